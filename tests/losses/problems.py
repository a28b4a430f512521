"""Small transducer problems with known shapes, and what losses/reference.py says about them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losses import reference
from losses.backends import BACKENDS, INSTALL

OWN_BACKENDS = [name for name in BACKENDS if name not in INSTALL]  # those that need no optional package

# name -> (frames of each utterance, tokens of each utterance)
REGULAR = {
    "ragged": ([7, 4, 1, 5], [3, 4, 2, 0]),
    "no tokens": ([3, 6], [0, 0]),
    "one frame": ([1, 1], [0, 3]),
    "more tokens than frames": ([2, 3], [9, 5]),
    "one utterance": ([5], [4]),
    "odd sizes": ([63, 40], [11, 7]),
}
MODIFIED = {
    "ragged": ([7, 4, 1, 5], [3, 4, 1, 0]),
    "no tokens": ([3, 6], [0, 0]),
    "one frame": ([1, 1], [0, 1]),
    "as many tokens as frames": ([5, 3], [5, 3]),
    "odd sizes": ([63, 40], [11, 7]),
}
NAMES = {"regular": REGULAR, "modified": MODIFIED, "constrained": MODIFIED}
CASES = [(topology, name) for topology, names in NAMES.items() for name in names]


@dataclass
class Problem:
    """Tensors of one batch; the padding of floating ones holds NaN and that of targets nonsense."""

    enc: Tensor
    pred: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    enc_lens: Tensor
    target_lens: Tensor
    upstream: Tensor  # [B], for weighted sums of the losses
    blank: int
    topology: str

    @property
    def parameters(self) -> list[Tensor]:
        return [self.enc, self.pred, self.weight, self.bias]

    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.parameters, self.targets, self.enc_lens, self.target_lens)

    def logits(self) -> Tensor:
        """[B, T, U+1, V] of the tanh joiner, NaN in the padding."""
        with torch.no_grad():
            return torch.tanh(self.enc[:, :, None] + self.pred[:, None]) @ self.weight.T + self.bias

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Of blank [B, T, U+1] and next label [B, T, U], NaN in the padding."""
        log_probs = self.logits().log_softmax(-1)
        index = self.targets.clamp(0, self.weight.shape[0] - 1).long()[:, None, :, None]
        labels = log_probs[:, :, :-1].gather(3, index.expand(-1, log_probs.shape[1], -1, 1)).squeeze(3)
        return log_probs[..., self.blank].clone(), labels

    def expected(self, **options) -> reference.JointGradients:
        return reference.joint_loss(
            *(x.detach().double().numpy() for x in self.parameters),
            self.targets.numpy(),
            self.enc_lens.tolist(),
            self.target_lens.tolist(),
            upstream=self.upstream.double().numpy(),
            topology=self.topology,
            blank=self.blank % self.weight.shape[0],
            **options,
        )


def make(
    topology: str,
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
    lens: torch.dtype = torch.int64,
    blank: int = 0,
    vocab: int = 9,
    dim: int = 5,
    padding: int = 2,
    seed: int = 0,
) -> Problem:
    """A random problem; `padding` more frames and tokens than the longest utterance."""
    frames, tokens = NAMES[topology][name]
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(frames), max(tokens) + padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    enc, pred = normal(batch, max(frames) + padding, dim), normal(batch, width + 1, dim)
    targets = torch.randint(0, vocab - 1, (batch, width), generator=generator)
    targets += targets >= blank % vocab  # any token but blank
    for b in range(batch):
        enc[b, frames[b] :] = torch.nan
        pred[b, tokens[b] + 1 :] = torch.nan
        targets[b, tokens[b] :] = 10**6
    return Problem(
        enc.requires_grad_(),
        pred.requires_grad_(),
        normal(vocab, dim).requires_grad_(),
        normal(vocab).requires_grad_(),
        targets.to(lens),
        torch.tensor(frames, dtype=lens),
        torch.tensor(tokens, dtype=lens),
        torch.randn(batch, generator=generator, dtype=torch.float64),
        blank,
        topology,
    )


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    """Largest difference at most tolerance times the largest expected entry (at least 1)."""
    assert tuple(actual.shape) == expected.shape
    if not expected.size:
        return
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= tolerance * max(1.0, float(np.abs(expected).max())), f"off by {error}"


def cells_by_enumeration(frames: int, tokens: int, topology: str) -> set[tuple[int, int]]:
    """Cells (t, u) of all alignments."""
    found = set()
    choose = itertools.combinations_with_replacement if topology == "regular" else itertools.combinations
    for at in choose(range(frames), tokens):
        u = 0
        for t in range(frames):
            found.add((t, u))
            for _ in range(at.count(t)):
                u += 1
                if topology != "modified":  # a label or, in "constrained", a blank follows in the same frame
                    found.add((t, u))
    return found
