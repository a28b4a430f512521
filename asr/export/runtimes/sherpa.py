"""sherpa-onnx, online and offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import sherpa_onnx

SAMPLE_RATE_HZ = 16000
FRAME_S = 0.04


def _arguments(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Of ``from_transducer``, for both recognizers."""
    files = {part: str(folder / name) for part, name in options["files"].items()}
    return {
        **files,
        "tokens": str(folder / "tokens.txt"),
        "num_threads": options.get("threads", 1),
        "feature_dim": options["num_mel_bins"],
        "decoding_method": "greedy_search",
    }


def _ids(folder: Path) -> dict[str, int]:
    """Id of each token as results show it: with a space for U+2581."""
    lines = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines)
    return {symbol.replace("\u2581", " "): int(number) for symbol, number in pairs}


class Online:
    """The streaming recognizer, greedy search, without endpoints."""

    def __init__(self, folder: Path, precision: str, options: dict[str, Any]):
        self.version = getattr(sherpa_onnx, "__version__", "unknown")
        self._ids = _ids(folder)
        self._recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
            **_arguments(folder, options), enable_endpoint_detection=False
        )

    def open(self) -> Any:
        return self._recognizer.create_stream()

    def accept(self, stream: Any, samples: np.ndarray) -> None:
        stream.accept_waveform(SAMPLE_RATE_HZ, samples)

    def finish(self, stream: Any) -> None:
        stream.input_finished()

    def advance(self, streams: list[Any]) -> list[Any]:
        ready = [stream for stream in streams if self._recognizer.is_ready(stream)]
        if ready:
            self._recognizer.decode_streams(ready)
        return ready

    def result(self, stream: Any) -> tuple[list[int], list[int]]:
        tokens, times = self._recognizer.tokens(stream), self._recognizer.timestamps(stream)
        start_s = self._recognizer.start_time(stream)
        return [self._ids[token] for token in tokens], [round((start_s + t) / FRAME_S) for t in times]

    def reset(self, stream: Any) -> None:
        self._recognizer.reset(stream)


class Offline:
    """The recognizer of whole utterances, greedy search; what was accepted is decoded when the stream is finished."""

    def __init__(self, folder: Path, precision: str, options: dict[str, Any]):
        self.version = getattr(sherpa_onnx, "__version__", "unknown")
        self._ids = _ids(folder)
        self._recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(**_arguments(folder, options))
        self._heard: dict[int, list[np.ndarray]] = {}
        self._finished: set[int] = set()

    def open(self) -> Any:
        stream = self._recognizer.create_stream()
        self._heard[id(stream)] = []
        return stream

    def accept(self, stream: Any, samples: np.ndarray) -> None:
        self._heard[id(stream)].append(samples)

    def finish(self, stream: Any) -> None:
        stream.accept_waveform(SAMPLE_RATE_HZ, np.concatenate(self._heard.pop(id(stream))))
        self._finished.add(id(stream))

    def advance(self, streams: list[Any]) -> list[Any]:
        ready = [stream for stream in streams if id(stream) in self._finished]
        if ready:
            self._recognizer.decode_streams(ready)
            self._finished.difference_update(id(stream) for stream in ready)
        return ready

    def result(self, stream: Any) -> tuple[list[int], list[int]]:
        found = stream.result
        return [self._ids[token] for token in found.tokens], [round(t / FRAME_S) for t in found.timestamps]

    def reset(self, stream: Any) -> None:
        raise NotImplementedError("whole utterances have no endpoint")
