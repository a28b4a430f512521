#!/usr/bin/env python3
"""Transcribes WAV files with the ONNX files beside this one. Needs numpy, kaldi-native-fbank and onnxruntime only.

    python run.py speech.wav                       # text and time of each word, as it is heard
    python run.py --precision int8 --json *.wav    # one JSON object a file

From Python, for a microphone or a server:

    recognizer = Recognizer("folder of this file")
    stream = recognizer.open()
    stream.accept(samples)              # float32 in [-1, 1], 16 kHz mono, in pieces of any size
    recognizer.advance([stream, ...])   # a chunk of each stream that has one, in one batch
    stream.text, stream.tokens, stream.frames
    stream.finish()                     # then advance until nothing goes on
"""

from __future__ import annotations

import argparse
import json
import sys
import wave
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np

SAMPLE_RATE_HZ = 16000
FRAME_SHIFT_SAMPLES = 160
SUBSAMPLING = 4
EXTRA_FRAMES = 3
FRAME_S = 0.04
BLANK = 0
TAIL_CHUNK_FRAMES = 8
"""Encoder frames of the silence that ends whole utterances."""


def _features(num_bins: int) -> Any:
    """The filter bank that the model was trained with."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE_HZ
    options.frame_opts.frame_shift_ms = 10
    options.frame_opts.frame_length_ms = 25
    options.frame_opts.dither = 0
    options.frame_opts.preemph_coeff = 0.97
    options.frame_opts.remove_dc_offset = True
    options.frame_opts.window_type = "povey"
    options.frame_opts.round_to_power_of_two = True
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = num_bins
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = -400
    options.use_energy = False
    return kaldi_native_fbank.OnlineFbank(options)


class Stream:
    """One source of sound; made by ``Recognizer.open``."""

    def __init__(self, recognizer: Recognizer):
        self.tokens: list[int] = []
        self.frames: list[int] = []  # of 40 ms, from the start of the stream
        self.confidences: list[float] = []
        self.finished = False
        self.caches: list[np.ndarray] | None = recognizer.first_caches()
        self.context = recognizer.first_context()
        self.decoder_out = recognizer.first_decoder_out
        self.num_frames = 0  # encoder frames so far
        self._recognizer = recognizer
        self._bank = _features(recognizer.num_bins)
        self._taken = 0
        self._num_samples = 0
        self.features = np.zeros((0, recognizer.num_bins), dtype=np.float32)

    def accept(self, samples: np.ndarray) -> None:
        """The next samples, float32 [N] in [-1, 1] at 16 kHz."""
        if self.finished:
            raise ValueError("this stream is finished; open another")
        self._num_samples += len(samples)
        self._accept(np.asarray(samples, dtype=np.float32))

    def finish(self, tail: bool = True) -> None:
        """No more sound comes. With ``tail``, silence follows up to the next whole chunk, and one chunk of it: a last
        word is not heard without."""
        if tail:
            chunk = SUBSAMPLING * FRAME_SHIFT_SAMPLES * (self._recognizer.chunk_frames or TAIL_CHUNK_FRAMES)
            overlap = EXTRA_FRAMES * FRAME_SHIFT_SAMPLES
            whole = (max(0, -(-(self._num_samples - overlap) // chunk)) + 1) * chunk + overlap
            self._accept(np.zeros(whole - self._num_samples, dtype=np.float32))
        self.finished = True
        self._bank.input_finished()
        self._take()

    @property
    def text(self) -> str:
        """What was heard so far."""
        symbols = self._recognizer.symbols
        return "".join(symbols[token] for token in self.tokens).replace("\u2581", " ").strip()

    def _accept(self, samples: np.ndarray) -> None:
        if len(samples):
            self._bank.accept_waveform(SAMPLE_RATE_HZ, samples)
            self._take()

    def _take(self) -> None:
        there = self._bank.num_frames_ready - self._taken
        if there:
            new = np.stack([self._bank.get_frame(self._taken + i) for i in range(there)])
            self._bank.pop(there)
            self._taken += there
            self.features = np.concatenate([self.features, new])

    @property
    def ready(self) -> bool:
        """Whether there is something to advance by."""
        chunk = self._recognizer.chunk_frames
        if chunk is None:
            return self.finished and self.caches is not None
        return len(self.features) >= SUBSAMPLING * chunk + EXTRA_FRAMES

    def next_features(self) -> np.ndarray:
        """The features of the next chunk, [4 C + 3, F], or of the whole utterance; the stream goes on behind them."""
        chunk = self._recognizer.chunk_frames
        if chunk is None:
            return self.features
        found = self.features[: SUBSAMPLING * chunk + EXTRA_FRAMES]
        self.features = self.features[SUBSAMPLING * chunk :]
        return found


class Recognizer:
    """Greedy search with the files of a folder, for one stream or many at once.

    Args:
        folder: of encoder.onnx, decoder.onnx, joiner.onnx and tokens.txt.
        precision: "fp32", or "int8" for the files with int8 in their names, where there are such.
        num_threads: of onnxruntime.
    """

    cache_axis = 2
    """Of the streams in the encoder's caches."""

    def __init__(self, folder: str | Path, precision: str = "fp32", num_threads: int = 1):
        folder = Path(folder)
        self.num_bins = self._context_size = 0
        self.chunk_frames: int | None = None
        self._load(folder, precision, num_threads)
        lines = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
        self.symbols = [line.rsplit(" ", 1)[0] for line in lines]
        self.first_decoder_out = self._predict(self.first_context()[None])[0]

    def _load(self, folder: Path, precision: str, num_threads: int) -> None:
        """Load the parts, and set ``num_bins``, ``chunk_frames`` (None for whole utterances) and the context's size."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        sessions = []
        for part in ("encoder", "decoder", "joiner"):
            path = folder / (f"{part}.onnx" if precision == "fp32" else f"{part}.{precision}.onnx")
            path = path if path.exists() else folder / f"{part}.onnx"
            sessions.append(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
        self._encoder, self._decoder, self._joiner = sessions
        about = self._encoder.get_modelmeta().custom_metadata_map
        self._inputs = self._encoder.get_inputs()
        self.num_bins = int(self._inputs[0].shape[2])
        self.chunk_frames = int(about["decode_chunk_len"]) // SUBSAMPLING if "decode_chunk_len" in about else None
        self._about = about
        self._context_size = int(self._decoder.get_modelmeta().custom_metadata_map["context_size"])

    def _step(
        self, features: np.ndarray, caches: list[np.ndarray], num_frames: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Features [N, 4 C + 3, F], caches and encoder frames so far [N] to projected frames [N, C, J] and caches."""
        names = [entry.name for entry in self._inputs]
        values = [features, *caches, SUBSAMPLING * num_frames]
        out, *after = self._encoder.run(None, dict(zip(names, values, strict=True)))
        return out, after

    def _whole(self, features: np.ndarray, lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, T, F] and their lengths to projected frames [N, T', J] and theirs."""
        out, out_lens = self._encoder.run(None, {"x": features, "x_lens": lens})
        return out, out_lens

    def _predict(self, contexts: np.ndarray) -> np.ndarray:
        """The last tokens [N, context size] to predictor output [N, J]."""
        return self._decoder.run(None, {"y": contexts})[0]  # type: ignore[no-any-return]

    def _join(self, encoder_out: np.ndarray, decoder_out: np.ndarray) -> np.ndarray:
        """[N, J] of both to logits [N, V]."""
        return self._joiner.run(None, {"encoder_out": encoder_out, "decoder_out": decoder_out})[0]  # type: ignore[no-any-return]

    def open(self) -> Stream:
        """A stream that has heard nothing yet."""
        return Stream(self)

    def first_context(self) -> np.ndarray:
        """The last tokens of a stream without any: none, then blank."""
        context = np.full(self._context_size, -1, dtype=np.int64)
        context[-1] = BLANK
        return context

    def first_caches(self) -> list[np.ndarray]:
        """The encoder's caches of a stream that has not begun, batch axis 2; none for whole utterances."""
        if self.chunk_frames is None:
            return []
        about = {name: int(value) for name, value in self._about.items() if value.lstrip("-").isdigit()}
        rows, dim = about["num_encoder_layers"], about["encoder_dim"]
        frames = about["left_context"], about["cnn_module_kernel"] - 1
        return [np.zeros((rows, count, 1, dim), dtype=np.float32) for count in frames]

    def advance(self, streams: list[Stream]) -> list[Stream]:
        """One chunk of each stream that has one (with full context: each finished utterance), in one batch.

        Returns:
            The streams that went on.
        """
        ready = [stream for stream in streams if stream.ready]
        if ready:
            for stream, frames in zip(ready, self.encode(ready), strict=True):
                self._search(stream, frames)
        return ready

    def encode(self, streams: list[Stream]) -> list[np.ndarray]:
        """Projected encoder frames [C, J] of the next chunk of each stream; the streams go on behind it."""
        features = [stream.next_features() for stream in streams]
        if self.chunk_frames is None:
            lens = np.array([len(x) for x in features], dtype=np.int64)
            padded = np.zeros((len(features), max(lens), self.num_bins), dtype=np.float32)
            for row, x in zip(padded, features, strict=True):
                row[: len(x)] = x
            out, out_lens = self._whole(padded, lens)
            for stream in streams:
                stream.caches = None
            return [row[:count] for row, count in zip(out, out_lens, strict=True)]
        axis = self.cache_axis
        caches = [np.concatenate(parts, axis=axis) for parts in zip(*(s.caches or [] for s in streams), strict=True)]
        counts = np.array([stream.num_frames for stream in streams], dtype=np.int64)
        out, after = self._step(np.stack(features), caches, counts)
        for index, stream in enumerate(streams):
            stream.caches = [cache.take([index], axis) for cache in after]
        return list(out)

    def _search(self, stream: Stream, frames: np.ndarray) -> None:
        """At most one token a frame. Frames up to the next token share the predictor's output: one call joins them."""
        at = 0
        while at < len(frames):
            rest = frames[at:]
            repeated = np.repeat(stream.decoder_out[None], len(rest), axis=0)
            logits = self._join(rest, repeated)
            best = logits.argmax(1)
            emits = np.flatnonzero(best != BLANK)
            if not len(emits):
                break
            first = int(emits[0])
            token = int(best[first])
            row = logits[first].astype(np.float64)
            stream.tokens.append(token)
            stream.frames.append(stream.num_frames + at + first)
            stream.confidences.append(float(1 / np.exp(row - row[token]).sum()))
            stream.context = np.append(stream.context[1:], token)
            stream.decoder_out = self._predict(stream.context[None])[0]
            at += first + 1
        stream.num_frames += len(frames)

    def reset(self, stream: Stream) -> None:
        """As at an endpoint: the text starts anew, the sound goes on.

        The last tokens stay the context of those that follow, unless there were none, as in sherpa-onnx.
        """
        if not stream.tokens:
            stream.context, stream.decoder_out = self.first_context(), self.first_decoder_out
        stream.tokens, stream.frames, stream.confidences = [], [], []


def words(stream: Stream) -> list[dict[str, Any]]:
    """Word, and seconds from the start at which it was heard to begin."""
    found: list[dict[str, Any]] = []
    for token, frame in zip(stream.tokens, stream.frames, strict=True):
        symbol = stream._recognizer.symbols[token]
        if symbol.startswith("\u2581") or not found or found[-1]["ended"]:
            found.append({"word": "", "time_s": round(FRAME_S * frame, 2), "ended": False})
        found[-1]["word"] += symbol.replace("\u2581", "")
        found[-1]["ended"] = symbol == "\u2581"
    return [{"word": entry["word"], "time_s": entry["time_s"]} for entry in found if entry["word"]]


def read_wav(path: str) -> np.ndarray:
    """Float32 samples of a WAV file of 16 bits, 16 kHz, one channel."""
    with wave.open(path) as file:
        form = (file.getsampwidth(), file.getframerate(), file.getnchannels())
        if form != (2, SAMPLE_RATE_HZ, 1):
            raise ValueError(
                f"{path}: {8 * form[0]} bits, {form[1]} Hz, {form[2]} channels; 16, 16000 and 1 are needed"
            )
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768


def main() -> int:
    """Exit status: 0, or 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description="Transcribe WAV files of 16 kHz.")
    parser.add_argument("files", nargs="+", metavar="FILE.wav")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a file, with words and times")
    args = parser.parse_args()
    recognizer = Recognizer(Path(__file__).resolve().parent, args.precision, args.threads)
    status = 0
    for path in args.files:
        try:
            samples = read_wav(path)
        except (OSError, EOFError, ValueError, wave.Error) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        stream = recognizer.open()
        stream.accept(samples)
        stream.finish()
        while recognizer.advance([stream]):
            pass
        if args.json:
            print(json.dumps({"file": path, "text": stream.text, "words": words(stream)}, ensure_ascii=False))
        else:
            print(f"{path}: {stream.text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
