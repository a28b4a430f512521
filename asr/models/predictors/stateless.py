"""Stateless predictor: the last few tokens only (Ghodsi et al. 2020)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.models.layers.dropout import Dropout


class StatelessState(NamedTuple):
    """context: int64 [B, context_size], oldest token first; -1 stands for no token."""

    context: Tensor


class StatelessPredictor(nn.Module):
    """Embeddings of the last ``context_size`` tokens, a linear layer and ReLU.

    The start context is [-1, ..., -1, 0]: no tokens, then blank, as device runtimes begin; -1 embeds to zeros (clamped
    and masked, because an exported Embedding would read its last row).

    ``context_dropout`` hides the whole context of an utterance with this probability while training. The context of a
    run of equal tokens is the same before and after each of them, so it cannot say whether a token is still due; an
    encoder that must often do without it learns to mark each token at one frame.
    """

    def __init__(self, vocab_size: int, dim: int, context_size: int, dropout: float, context_dropout: float):
        super().__init__()
        self.context_size = context_size
        self.context_dropout = context_dropout
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mix = nn.Linear(context_size * dim, dim)
        self.dropout = Dropout(dropout)

    def _embed(self, context: Tensor) -> Tensor:
        """[..., context_size] int64 to [..., P]."""
        x = self.embedding(context.clamp(min=0)) * (context >= 0).unsqueeze(-1)
        return F.relu(self.mix(self.dropout(x.flatten(-2))))

    def forward(self, targets: Tensor) -> Tensor:
        """targets [B, U] int64 to [B, U + 1, P]; position u has seen the first u tokens."""
        start = targets.new_full((targets.shape[0], self.context_size), -1)
        start[:, -1] = 0
        padded = torch.cat([start, targets], dim=1)
        if self.training and self.context_dropout > 0:
            hidden = torch.rand(targets.shape[0], 1, device=targets.device) < self.context_dropout
            padded = padded.masked_fill(hidden, -1)
        return self._embed(padded.unfold(1, self.context_size, 1))

    def init_state(self, batch_size: int, device: torch.device | str = "cpu") -> StatelessState:
        context = torch.full((batch_size, self.context_size), -1, dtype=torch.int64, device=device)
        context[:, -1] = 0
        return StatelessState(context)

    def output(self, state: StatelessState) -> Tensor:
        """[B, P]."""
        return self._embed(state.context)

    def step(self, tokens: Tensor, state: StatelessState) -> StatelessState:
        """State after each stream's next token; tokens [B] int64."""
        return StatelessState(torch.cat([state.context[:, 1:], tokens[:, None]], dim=1))
