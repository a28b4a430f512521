"""The problems that are timed: encoder and predictor output as a model under training gives them, seeded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SEED = 1234
DIM = 512  # J

# name -> (B, T, U, V)
SHAPES = {
    "tiny": (2, 20, 5, 50),
    "S": (4, 100, 20, 500),
    "M": (8, 250, 50, 500),
    "L": (4, 375, 100, 500),
    "XL": (8, 400, 100, 1000),
    "headline": (1024, 1000, 100, 1024),
}
FRAMES_PER_BATCH = 10_000
# Inverse distribution functions like those of LibriSpeech's training set at 40 ms a frame and V=500: T of mean 318,
# 90th percentile 416, at most 680; U of mean 68, 90th percentile 93, at most 151. (probabilities, values)
LIBRISPEECH_FRAMES = ((0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1), (45, 135, 275, 360, 392, 416, 440, 680))
LIBRISPEECH_TOKENS = ((0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1), (3, 28, 54, 75, 87, 93, 110, 151))
CASES = (*SHAPES, "real")


@dataclass
class Case:
    """One batch, on CPU, float32: enc [B, T, J], pred [B, U+1, J], weight [V, J], targets [B, U], lengths."""

    name: str
    enc: Tensor
    pred: Tensor
    weight: Tensor
    targets: Tensor
    enc_lens: Tensor
    target_lens: Tensor

    @property
    def sources(self) -> list[Tensor]:
        """The tensors with gradients."""
        return [self.enc, self.pred, self.weight]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        enc, pred, weight = (x.to(dtype) for x in self.sources)
        return Case(self.name, enc, pred, weight, self.targets, self.enc_lens, self.target_lens)

    def utterance(self, b: int) -> Case:
        """A batch of one, without padding."""
        t, u = int(self.enc_lens[b]), int(self.target_lens[b])
        return Case(
            self.name, self.enc[b : b + 1, :t], self.pred[b : b + 1, : u + 1], self.weight,
            self.targets[b : b + 1, :u], self.enc_lens[b : b + 1], self.target_lens[b : b + 1],
        )  # fmt: skip


def librispeech_lens(generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """Lengths of one batch of FRAMES_PER_BATCH padded frames from the middle of a sample sorted by length."""
    count = 400
    correlated = generator.multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], count)
    rank = correlated.argsort(0).argsort(0)
    level = (rank + 0.5) / count
    frames = np.interp(level[:, 0], *LIBRISPEECH_FRAMES).round().astype(int)
    tokens = np.interp(level[:, 1], *LIBRISPEECH_TOKENS).round().astype(int)
    order = np.argsort(frames, kind="stable")
    last = count * 45 // 100  # about the mean
    size = FRAMES_PER_BATCH // int(frames[order[last]])
    chosen = order[last - size + 1 : last + 1]
    return frames[chosen].tolist(), tokens[chosen].tolist()


def make(name: str, seed: int = SEED, vocab_size: int | None = None) -> Case:
    """A case by name: lengths uniform in 50-100%, one utterance full ("headline": all full; "real": as in a corpus).

    enc and pred ~ 0.5 * N(0, 1), weight ~ N(0, 1) / sqrt(J), no bias.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "real":
        frames, tokens = librispeech_lens(np.random.default_rng(seed))
        size = 500
    else:
        batch, most_frames, most_tokens, size = SHAPES[name]
        frames, tokens = (_lens(batch, n, generator, name != "headline") for n in (most_frames, most_tokens))
    size = vocab_size or size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        name,
        normal(len(frames), max(frames), DIM).mul_(0.5),
        normal(len(frames), max(tokens) + 1, DIM).mul_(0.5),
        normal(size, DIM).div_(DIM**0.5),
        torch.randint(1, size, (len(frames), max(tokens)), generator=generator),
        torch.tensor(frames),
        torch.tensor(tokens),
    )


def _lens(batch: int, most: int, generator: torch.Generator, vary: bool) -> list[int]:
    lens = torch.randint(most // 2, most + 1, (batch,), generator=generator) if vary else torch.full((batch,), most)
    lens[0] = most
    return [int(n) for n in lens]
