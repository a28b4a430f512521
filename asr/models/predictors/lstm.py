"""LSTM predictor: the whole token history (Graves 2012)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.models.layers.dropout import Dropout


class LstmState(NamedTuple):
    """hidden, cell: float [B, num_layers, P]; batch first, so that streams are selected alike for every predictor."""

    hidden: Tensor
    cell: Tensor


class LstmPredictor(nn.Module):
    """Embedding and LSTM; the first input is blank (id 0)."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = Dropout(dropout)
        self.lstm = nn.LSTM(dim, dim, num_layers, batch_first=True)

    def forward(self, targets: Tensor) -> Tensor:
        """targets [B, U] int64 to [B, U + 1, P]; position u has seen the first u tokens."""
        first = targets.new_zeros(targets.shape[0], 1)
        out, _ = self.lstm(self.dropout(self.embedding(torch.cat([first, targets], dim=1))))
        return out

    def init_state(self, batch_size: int, device: torch.device | str = "cpu") -> LstmState:
        weight = self.embedding.weight
        zeros = weight.new_zeros(batch_size, self.lstm.num_layers, self.lstm.hidden_size, device=device)
        blank = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return self.step(blank, LstmState(zeros, zeros))

    def output(self, state: LstmState) -> Tensor:
        """[B, P]."""
        return state.hidden[:, -1]

    def step(self, tokens: Tensor, state: LstmState) -> LstmState:
        """State after each stream's next token; tokens [B] int64."""
        before = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        _, (hidden, cell) = self.lstm(self.embedding(tokens)[:, None], before)
        return LstmState(hidden.transpose(0, 1), cell.transpose(0, 1))
