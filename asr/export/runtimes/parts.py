"""Runtimes that load one part a file and take the encoder's state as plain tensors, with the features and the search of
``asr.export.onnx_runner``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RUNNER = Path(__file__).resolve().parent.parent / "onnx_runner.py"


def load_runner(path: Path = RUNNER) -> Any:
    """The program of this path as a module."""
    spec = importlib.util.spec_from_file_location("exported_runner", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no program")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Recognizing:
    """An adapter around a recognizer of ``asr.export.onnx_runner``."""

    def __init__(self, recognizer: Any):
        self._recognizer = recognizer

    def tensors(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Features, and encoder output projected for the joiner, of a waveform."""
        stream = self._recognizer.open()
        stream.accept(samples)
        stream.finish(tail=False)
        features = stream.features
        outs = []
        while stream.ready:
            outs.append(self._recognizer.encode([stream])[0])
        return {"features": features, "encoder_out": np.concatenate(outs)}

    def open(self) -> Any:
        return self._recognizer.open()

    def accept(self, stream: Any, samples: np.ndarray) -> None:
        stream.accept(samples)

    def finish(self, stream: Any) -> None:
        stream.finish(tail=False)

    def advance(self, streams: list[Any]) -> list[Any]:
        return self._recognizer.advance(streams)  # type: ignore[no-any-return]

    def result(self, stream: Any) -> tuple[list[int], list[int]]:
        return stream.tokens, stream.frames

    def reset(self, stream: Any) -> None:
        self._recognizer.reset(stream)


class Parts(Recognizing):
    """``load_part`` and ``call`` say what the runtime is.

    The encoder of streams takes features, keys, values, conv, frames and clock, and returns projected frames and the
    state after them; that of whole utterances takes features and lengths.
    """

    at_once: int | None = None
    """Most streams in a call; None for any number."""
    counter: type = np.int64
    """Of the state's count of frames."""

    def __init__(self, folder: Path, precision: str, options: dict[str, Any]):
        adapter = self
        sizes = json.loads((folder / "geometry.json").read_text(encoding="utf-8"))
        self.set_threads(options.get("threads", 1))

        class Recognizer(load_runner().Recognizer):  # type: ignore[misc]
            cache_axis = 0

            def _load(self, folder: Path, precision: str, num_threads: int) -> None:
                self.num_bins, self._context_size = sizes["num_mel_bins"], sizes["context_size"]
                self.chunk_frames = sizes["chunk_frames"] or None
                self._parts = {part: adapter.load_part(folder / name) for part, name in options["files"].items()}

            def first_caches(self) -> list[np.ndarray]:
                if not self.chunk_frames:
                    return []
                blocks, heads, dim = sizes["num_layers"], sizes["num_heads"], sizes["dim"]
                attention = heads, sizes["left_frames"], dim // heads
                shapes = attention, attention, (sizes["conv_kernel"] - 1, dim)
                caches = [np.zeros((1, blocks, *shape), dtype=np.float32) for shape in shapes]
                clock = np.zeros((1, dim // heads // 2), dtype=np.float32)
                return [*caches, np.zeros(1, dtype=adapter.counter), clock]

            def _step(
                self, features: np.ndarray, caches: list[np.ndarray], num_frames: np.ndarray
            ) -> tuple[np.ndarray, list[np.ndarray]]:
                out, *after = adapter.batched(self._parts["encoder"], features, *caches)
                return out, after

            def _whole(self, features: np.ndarray, lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                out, out_lens = adapter.batched(self._parts["encoder"], features, lens)
                return out, out_lens

            def _predict(self, contexts: np.ndarray) -> np.ndarray:
                return adapter.batched(self._parts["decoder"], contexts)[0]

            def _join(self, encoder_out: np.ndarray, decoder_out: np.ndarray) -> np.ndarray:
                return adapter.batched(self._parts["joiner"], encoder_out, decoder_out)[0]

        super().__init__(Recognizer(folder, precision, options.get("threads", 1)))

    def batched(self, part: Any, *arguments: np.ndarray) -> list[np.ndarray]:
        """Results of a part, called as often as ``at_once`` asks."""
        most = self.at_once or len(arguments[0])
        found = [
            self.call(part, *(np.ascontiguousarray(x[start : start + most]) for x in arguments))
            for start in range(0, len(arguments[0]), most)
        ]
        return [np.concatenate(rows) for rows in zip(*found, strict=True)]

    def load_part(self, path: Path) -> Any:
        """The runtime's own form of a file."""
        raise NotImplementedError

    def set_threads(self, number: int) -> None:
        """Of the runtime."""

    def call(self, part: Any, *arguments: np.ndarray) -> list[np.ndarray]:
        """Results of a part, whose arguments are contiguous."""
        raise NotImplementedError
