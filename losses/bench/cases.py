"""The problems that are timed: encoder and predictor output as a model under training gives them, seeded.

A case is named in SHAPES, or is "real", or is written out as BxTxUxV, such as 8x250x50x500. Endings, in this order:
"-full" (all lengths full), "-trained" (the lattices of a trained model: losses/bench/trained.py) and "-first" (the
first CHECKED utterances of the case alone, which stand for a case whose float64 run would take hours).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

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
CASES = (*SHAPES, "real", "M-trained", "L-trained")
CHECKED = 4  # utterances of a "-first" case
NAME = re.compile(r"(?P<base>[A-Za-z]+|\d+x\d+x\d+x\d+)(?P<full>-full)?(?P<trained>-trained)?(?P<first>-first)?")


@dataclass
class Case:
    """One batch, on CPU, float32: enc [B, T, J], pred [B, U+1, J], weight [V, J], targets [B, U], lengths.

    am [B, T, V] and lm [B, U+1, V], logits of a trivial joiner, are there for the losses that use one.
    """

    name: str
    enc: Tensor
    pred: Tensor
    weight: Tensor
    targets: Tensor
    enc_lens: Tensor
    target_lens: Tensor
    am: Tensor | None = None
    lm: Tensor | None = None

    @property
    def sources(self) -> list[Tensor]:
        """The tensors with gradients: enc, pred, weight, and am and lm where they are there."""
        return [x for x in (self.enc, self.pred, self.weight, self.am, self.lm) if x is not None]

    @property
    def cells(self) -> int:
        """Lattice cells: sum of T_i * (U_i+1)."""
        return int((self.enc_lens * (self.target_lens + 1)).sum())

    @property
    def padded_cells(self) -> int:
        """B * T * (U+1)."""
        return self.enc.shape[0] * self.enc.shape[1] * self.pred.shape[1]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        enc, pred, weight, *simple = (x.to(dtype) for x in self.sources)
        am, lm = simple or (None, None)
        return replace(self, enc=enc, pred=pred, weight=weight, am=am, lm=lm)

    def utterance(self, b: int) -> Case:
        """A batch of one, without padding."""
        return self._part(slice(b, b + 1), int(self.enc_lens[b]), int(self.target_lens[b]))

    def first(self, count: int) -> Case:
        """A batch of the first utterances, copied, so that the rest can be given back."""
        return self._part(slice(0, count), self.enc.shape[1], self.targets.shape[1], copy=True)

    def _part(self, rows: slice, t: int, u: int, copy: bool = False) -> Case:
        def cut(x: Tensor | None, *sizes: int) -> Tensor | None:
            x = None if x is None else x[(rows, *(slice(0, n) for n in sizes))]
            return x.clone() if copy and x is not None else x

        names = {"enc": (t,), "am": (t,), "pred": (u + 1,), "lm": (u + 1,), "targets": (u,)}
        parts = {name: cut(getattr(self, name), *sizes) for name, sizes in names.items()}
        return replace(self, **parts, enc_lens=self.enc_lens[rows], target_lens=self.target_lens[rows])  # type: ignore[arg-type]


class Name:
    """A case's name, taken apart; ValueError when there is no such case."""

    def __init__(self, name: str) -> None:
        found = NAME.fullmatch(name)
        base = found["base"] if found else ""
        if found is None or not (base in SHAPES or base == "real" or base[0].isdigit()):
            raise ValueError(f"case {name} does not exist; choose from: {', '.join(CASES)}, BxTxUxV[-full]")
        self.base = base
        self.full = bool(found["full"]) or base == "headline"
        self.trained, self.first = bool(found["trained"]), bool(found["first"])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, T, U, V) before "-first"; not for "real"."""
        if self.base in SHAPES:
            return SHAPES[self.base]
        batch, frames, tokens, size = map(int, self.base.split("x"))
        return batch, frames, tokens, size


def tensors_path(folder: Path, name: str) -> Path:
    """Where a run keeps the tensors of a trained case."""
    return folder / f"{name.removesuffix('-first')}.case.pt"


def load(name: str, folder: Path | None, vocab_size: int | None = None, simple: bool = False) -> Case:
    """A case by name; a trained one from the folder, into which `trained.write` put it."""
    parts = Name(name)
    if not parts.trained:
        return make(name, vocab_size=vocab_size, simple=simple)
    if folder is None:
        raise ValueError(f"case {name} is trained first: losses.bench.trained.write")
    case = Case(**torch.load(tensors_path(folder, name)))
    case = case if simple else replace(case, am=None, lm=None)
    return case.first(CHECKED) if parts.first else case


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


def make(name: str, seed: int = SEED, vocab_size: int | None = None, simple: bool = False) -> Case:
    """A case by name: lengths uniform in 50-100%, one utterance full ("real": as in a corpus); untrained.

    enc and pred ~ 0.5 * N(0, 1), weight ~ N(0, 1) / sqrt(J), no bias; with `simple`, am and lm ~ 0.5 * N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    parts = Name(name)
    if parts.base == "real":
        frames, tokens = librispeech_lens(np.random.default_rng(seed))
        size = 500
    else:
        batch, most_frames, most_tokens, size = parts.sizes
        frames, tokens = (_lens(batch, n, generator, not parts.full) for n in (most_frames, most_tokens))
    size = vocab_size or size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    case = Case(
        name,
        normal(len(frames), max(frames), DIM).mul_(0.5),
        normal(len(frames), max(tokens) + 1, DIM).mul_(0.5),
        normal(size, DIM).div_(DIM**0.5),
        torch.randint(1, size, (len(frames), max(tokens)), generator=generator),
        torch.tensor(frames),
        torch.tensor(tokens),
    )
    if simple:  # last, so that the other tensors are the same without
        case.am = normal(len(frames), max(frames), size).mul_(0.5)
        case.lm = normal(len(frames), max(tokens) + 1, size).mul_(0.5)
    return case.first(CHECKED) if parts.first else case


def _lens(batch: int, most: int, generator: torch.Generator, vary: bool) -> list[int]:
    lens = torch.randint(most // 2, most + 1, (batch,), generator=generator) if vary else torch.full((batch,), most)
    lens[0] = most
    return [int(n) for n in lens]
