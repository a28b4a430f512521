"""Tiny transducers with random weights: all that a search asks of a model, small enough for brute force."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class RecurrentState(NamedTuple):
    hidden: torch.Tensor  # [B, P]
    count: torch.Tensor  # [B, 1, 1] tokens seen: a second tensor, of another rank and dtype


class RecurrentPredictor(nn.Module):
    """Remembers the whole history, so that a state that is not carried along shows."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.cell = nn.GRUCell(dim, dim)

    def init_state(self, batch_size: int, device: object) -> RecurrentState:
        start = self.cell(self.embedding.weight[:1])
        # Expanded on purpose: a search must not write into a state.
        count = torch.zeros(1, 1, 1, dtype=torch.int64)
        return RecurrentState(start.expand(batch_size, -1), count.expand(batch_size, 1, 1))

    def output(self, state: RecurrentState) -> torch.Tensor:
        return state.hidden + 0.1 * state.count[:, 0]

    def step(self, tokens: torch.Tensor, state: RecurrentState) -> RecurrentState:
        return RecurrentState(self.cell(self.embedding(tokens), state.hidden), state.count + 1)


class Joiner(nn.Module):
    def __init__(self, dim: int, vocab_size: int, blank_bias: float) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(dim, dim)
        self.predictor_proj = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, vocab_size)
        with torch.no_grad():
            self.out.weight *= 4
            self.out.bias[0] += blank_bias

    def project_encoder(self, enc: torch.Tensor) -> torch.Tensor:
        return self.encoder_proj(enc)

    def project_predictor(self, pred: torch.Tensor) -> torch.Tensor:
        return self.predictor_proj(pred)

    def logits(self, enc: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(enc + pred))


class TinyTransducer(nn.Module):
    """``encode`` keeps every fourth feature frame: the geometry of a real encoder, with bins as dimensions."""

    def __init__(self, vocab_size: int = 5, dim: int = 6, blank_bias: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.predictor = RecurrentPredictor(vocab_size, dim)
            self.joiner = Joiner(dim, vocab_size, blank_bias)
        self.vocab_size = vocab_size
        self.dim = dim
        self.double().eval()

    def encode(
        self, features: torch.Tensor, feature_lens: torch.Tensor, *context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lens = ((feature_lens - 3) // 4).clamp(min=0)
        log_mel = features[:, : 4 * int(lens.max()) : 4, : self.dim].double()
        return (log_mel + 8) / 3, lens


class TableState(NamedTuple):
    count: torch.Tensor  # [B]


class TableTransducer:
    """Probabilities written down: ``table [T, U + 1, V]`` for frame t after u tokens; ``enc [B, T, 1]`` holds t."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table.log()
        self.predictor = self
        self.joiner = self

    def init_state(self, batch_size: int, device: object) -> TableState:
        return TableState(torch.zeros(batch_size))

    def output(self, state: TableState) -> torch.Tensor:
        return state.count[:, None]

    def step(self, tokens: torch.Tensor, state: TableState) -> TableState:
        return TableState(state.count + 1)

    def project_encoder(self, enc: torch.Tensor) -> torch.Tensor:
        return enc

    def project_predictor(self, pred: torch.Tensor) -> torch.Tensor:
        return pred

    def logits(self, enc: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        enc, pred = torch.broadcast_tensors(enc, pred)
        return self.table[enc[..., 0].long(), pred[..., 0].long().clamp(max=self.table.shape[1] - 1)]


def random_batch(lens: list[int], dim: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder output ``[B, T, dim]`` of ragged lengths, NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    enc = torch.randn(len(lens), max(lens), dim, generator=generator, dtype=torch.float64)
    enc_lens = torch.tensor(lens)
    enc[torch.arange(max(lens))[None, :] >= enc_lens[:, None]] = torch.nan
    return enc, enc_lens
