"""What the model itself hears in the waveforms that a runtime gets: the yardstick of verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from asr.checkpoint import Loaded
from asr.data.fbank import EXTRA_FRAMES, FRAME_SHIFT_SAMPLES, SUBSAMPLING, Fbank, FeatureConfig, pad_tail
from asr.data.features import single_threaded_torch
from asr.decoding.greedy import GreedyState, advance_greedy, greedy, init_greedy
from asr.decoding.search import replace_rows
from asr.models.context import Context, Milliseconds, context


@dataclass
class Heard:
    """Tokens and the encoder frames that emitted them; and what the encoder gave, projected for the joiner, [T', J]."""

    tokens: list[int]
    frames: list[int]
    encoder_out: np.ndarray


def pad_for_devices(samples: np.ndarray, chunk_ms: Milliseconds) -> np.ndarray:
    """A waveform with the silence that a device must be given behind it, so that it hears the last word.

    That is up to the next whole chunk and one chunk more, as ``pad_tail`` has it, and two feature frames: runtimes
    decode a chunk when there are more frames than it reads, and know the last frame of a stream that goes on only
    later.

    Args:
        samples: float32 [N] at 16 kHz.
        chunk_ms: with "full", silence as after whole utterances.

    Returns:
        float32 [N'], N' a multiple of 160.
    """
    tail = FeatureConfig() if chunk_ms == "full" else FeatureConfig(tail_chunk_ms=chunk_ms)
    extra = 0 if chunk_ms == "full" else 2 * FRAME_SHIFT_SAMPLES
    return np.pad(pad_tail(samples, tail), (0, extra))


@dataclass
class _Listener:
    """A stream on its way."""

    parts: Sequence[np.ndarray]
    features: torch.Tensor
    heard: list[Heard] = field(default_factory=list)
    outs: list[list[np.ndarray]] = field(default_factory=list)
    at: int = 0  # feature frame at which the next chunk begins
    given: int = 0  # samples

    def hear_next_part(self) -> None:
        self.given += len(self.parts[len(self.heard)])
        self.heard.append(Heard([], [], np.zeros(0)))
        self.outs.append([])

    def can_step(self, frames: int) -> bool:
        """Whether there are more frames than a step reads, as runtimes ask."""
        # a frame is known 17.5 ms after its time, or when nothing more comes
        known = self.given // FRAME_SHIFT_SAMPLES - (len(self.heard) < len(self.parts))
        return self.at + frames < known


@torch.inference_mode()
def hear_streams(
    loaded: Loaded,
    streams: Sequence[Sequence[np.ndarray]],
    chunk_ms: Milliseconds,
    left_context_ms: Milliseconds,
    batch_size: int = 16,
) -> list[list[Heard]]:
    """Greedy search over streams, chunk by chunk, each of padded waveforms that follow one another.

    What comes between parts is an endpoint, as ``StreamingRecognizer`` has it: nothing is forgotten, but the context of
    the search where nothing was said.

    Args:
        loaded: model and configuration.
        streams: of each, float32 [N] at 16 kHz, N a multiple of 160, from ``pad_for_devices``.
        chunk_ms, left_context_ms: of the streams.
        batch_size: streams computed at once.

    Returns:
        For each stream one result a part; frames count from the start of the stream.
    """
    fbank = Fbank(loaded.config.data.features)
    listeners = [_Listener(parts, torch.from_numpy(fbank.extract(np.concatenate(parts)))) for parts in streams]
    with single_threaded_torch():
        for start in range(0, len(listeners), batch_size):
            _hear_batch(loaded, listeners[start : start + batch_size], context(chunk_ms, left_context_ms))
    for one in listeners:
        for heard, outs in zip(one.heard, one.outs, strict=True):
            empty = np.zeros((0, loaded.model.config.joiner.dim), dtype=np.float32)
            heard.encoder_out = np.concatenate([empty, *outs])
    return [one.heard for one in listeners]


def _hear_batch(loaded: Loaded, listeners: Sequence[_Listener], chunk: Context) -> None:
    model, decoding = loaded.model, loaded.config.decoding
    size = SUBSAMPLING * chunk.chunk_frames
    reads = size + EXTRA_FRAMES
    encoder, search = (
        model.encoder.init_state(len(listeners), chunk.left_frames),
        init_greedy(model, len(listeners), "cpu"),
    )
    fresh = init_greedy(model, 1, "cpu")
    for one in listeners:
        one.hear_next_part()
    while True:
        for row, one in enumerate(listeners):
            if not one.can_step(reads) and len(one.heard) < len(one.parts):
                said = bool(one.heard[-1].tokens)
                one.hear_next_part()
                if said:
                    continue
                rows = torch.tensor([row])
                predictor = replace_rows(search.predictor, rows, fresh.predictor)
                search = GreedyState(predictor, search.pred_p.index_copy(0, rows, fresh.pred_p))
        there = [one.can_step(reads) for one in listeners]
        if not any(there):
            break
        lens = torch.tensor([chunk.chunk_frames if can else 0 for can in there])
        features = torch.zeros(len(listeners), reads, listeners[0].features.shape[1])
        for row, one in enumerate(listeners):
            if there[row]:
                features[row] = one.features[one.at : one.at + reads]
        enc, encoder = model.encoder.step(features, encoder, None if all(there) else lens)
        search, emissions, _ = advance_greedy(model, search, enc, lens, decoding)
        outs = model.joiner.project_encoder(enc).numpy()
        for row, token, frame in zip(*(column.tolist() for column in emissions[:3]), strict=True):
            listeners[row].heard[-1].tokens.append(token)
            listeners[row].heard[-1].frames.append(listeners[row].at // SUBSAMPLING + frame)
        for row, one in enumerate(listeners):
            if there[row]:
                one.outs[-1].append(outs[row])
                one.at += size


@torch.inference_mode()
def hear_whole(loaded: Loaded, samples: np.ndarray) -> Heard:
    """Greedy search over one padded waveform, float32 [N], in full context."""
    model = loaded.model
    features = torch.from_numpy(Fbank(loaded.config.data.features).extract(samples))[None]
    enc, lens = model.encode(features, torch.tensor([features.shape[1]]))
    best = greedy(model, enc, lens, loaded.config.decoding)[0]
    out = model.joiner.project_encoder(enc)[0, : int(lens)].numpy()
    return Heard(best.tokens, best.frames, out)
