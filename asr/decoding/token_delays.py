"""How long after its sound each token of an utterance is emitted, and how long after it somebody can read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asr.data.fbank import EXTRA_FRAMES, FRAME_SHIFT_MS
from asr.data.tokenizer import Tokenizer
from asr.decoding.score import NO_WORD, align
from asr.decoding.search import Hypothesis
from asr.models.context import ENCODER_FRAME_MS, Milliseconds
from losses import align as align_with_audio

LOOKAHEAD_MS = EXTRA_FRAMES * FRAME_SHIFT_MS + 7.5
"""Audio behind a chunk that its features need: three feature frames more, and 7.5 ms of the last one's window, which
reaches 12.5 ms beyond its middle."""


@dataclass(frozen=True)
class Reference:
    """Tokens of a reference, and the encoder frame of each on the best alignment; both have U entries, U above 0."""

    tokens: list[int]
    frames: list[int]


@dataclass(frozen=True)
class Spread:
    """Mean, median and 90th percentile of ``count`` values, in ms; NaN without any."""

    count: int
    mean: float
    median: float
    p90: float

    @staticmethod
    def of(values_ms: Sequence[float]) -> Spread:
        if not len(values_ms):
            return Spread(0, math.nan, math.nan, math.nan)
        array = np.asarray(values_ms, dtype=np.float64)
        return Spread(len(array), float(array.mean()), float(np.median(array)), float(np.quantile(array, 0.9)))

    def later(self, by_ms: float) -> Spread:
        """All values that much larger."""
        return Spread(self.count, self.mean + by_ms, self.median + by_ms, self.p90 + by_ms)


@dataclass(frozen=True)
class Delays:
    """Of one utterance at one chunk, in ms.

    emission: of each token that was recognised right, its time in the stream minus its time on the alignment.
    perceived: of the same tokens, the time at which the audio is there that they wait for, minus the same.
    first_partial: when the audio is there for the first partial result with text, minus the time of the first
        reference token on the alignment; None if there never was a text.
    """

    emission: list[float]
    perceived: list[float]
    first_partial: float | None


def available_ms(frame: int, chunk_ms: Milliseconds, duration_s: float) -> float:
    """When all audio is heard that a stream needs to emit a token at an encoder frame, in ms from its start.

    That is the end of the frame's chunk and the 37.5 ms that features need behind it. But no later than the end of the
    recording: its silent tail takes no time, as whoever ends a stream knows that nothing follows. Without chunks all
    audio is needed.
    """
    end_ms = 1000 * duration_s
    if chunk_ms == "full":
        return end_ms
    chunk = frame * ENCODER_FRAME_MS // chunk_ms
    return min((chunk + 1) * chunk_ms + LOOKAHEAD_MS, end_ms)


def token_delays(
    reference: Reference, found: Hypothesis, tokenizer: Tokenizer, chunk_ms: Milliseconds, duration_s: float
) -> Delays:
    """Delays of one utterance; ``duration_s`` is that of its audio, without the silent tail."""
    emission, perceived = [], []
    for u, i in right_tokens(reference.tokens, found.tokens):
        spoken_ms = reference.frames[u] * ENCODER_FRAME_MS
        emission.append(float(found.frames[i] * ENCODER_FRAME_MS - spoken_ms))
        perceived.append(available_ms(found.frames[i], chunk_ms, duration_s) - spoken_ms)
    first_partial = None
    for i, frame in enumerate(found.frames):
        if tokenizer.decode(found.tokens[: i + 1]).strip():  # a token may be a space, which shows nothing
            spoken_ms = reference.frames[0] * ENCODER_FRAME_MS
            first_partial = available_ms(frame, chunk_ms, duration_s) - spoken_ms
            break
    return Delays(emission, perceived, first_partial)


def right_tokens(reference: Sequence[int], found: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (in the reference, in the hypothesis) of the tokens that an alignment of least edits has as equal."""
    pairs = align([str(token) for token in reference], [str(token) for token in found])
    right = []
    u = i = 0
    for expected, heard in pairs:
        if expected == heard:
            right.append((u, i))
        u += expected != NO_WORD
        i += heard != NO_WORD
    return right


@torch.inference_mode()
def align_references(
    model: Any, enc: torch.Tensor, enc_lens: torch.Tensor, targets: Sequence[Sequence[int]], topology: str
) -> list[Reference | None]:
    """The best path (Viterbi) of each reference through the lattice of the transducer.

    Args:
        model: a transducer in evaluation mode.
        enc: [B, T, D] encoder output, on the model's device.
        enc_lens: [B] int64.
        targets: token ids of B references.
        topology: of the lattice that the model was trained on.

    Returns:
        B alignments; None where there is nothing to align, or more tokens than the topology allows (one a frame unless
        it is "regular").
    """
    aligned: list[Reference | None] = [None] * len(targets)
    lens = enc_lens.tolist()
    most = [n * 10**9 if topology == "regular" else n for n in lens]
    rows = [i for i, tokens in enumerate(targets) if 0 < len(tokens) <= most[i]]
    if not rows:
        return aligned
    counts = torch.tensor([len(targets[i]) for i in rows], device=enc.device)
    padded = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64, device=enc.device)
    for row, i in zip(padded, rows, strict=True):
        row[: len(targets[i])] = torch.tensor(targets[i])
    joiner = model.joiner
    best = align_with_audio(
        joiner.project_encoder(enc[rows]),
        joiner.project_predictor(model.predictor(padded)),
        joiner.out.weight,
        joiner.out.bias,
        padded,
        enc_lens[rows],
        counts,
        activation=joiner.activation,
        topology=topology,
    )
    for frames, i in zip(best.frames.tolist(), rows, strict=True):
        aligned[i] = Reference(list(targets[i]), frames[: len(targets[i])])
    return aligned
