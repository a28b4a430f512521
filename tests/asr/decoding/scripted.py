"""A transducer that emits what it is told, when it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tests.asr.decoding.fake import TableState


class ScriptedJoiner(nn.Module):
    """Blank unless the encoder says a token."""

    activation = "tanh"

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.out = nn.Linear(vocab_size, vocab_size)
        with torch.no_grad():
            self.out.weight.copy_(10 * torch.eye(vocab_size))
            self.out.bias.copy_(5 * (torch.arange(vocab_size) == 0))

    def project_encoder(self, enc: torch.Tensor) -> torch.Tensor:
        return enc

    def project_predictor(self, pred: torch.Tensor) -> torch.Tensor:
        return pred

    def logits(self, enc: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(enc + pred))


class ScriptedPredictor(nn.Module):
    """Has no opinion."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.zeros(targets.shape[0], targets.shape[1] + 1, self.vocab_size)

    def init_state(self, batch_size: int, device: object) -> TableState:
        return TableState(torch.zeros(batch_size))

    def output(self, state: TableState) -> torch.Tensor:
        return torch.zeros(state.count.shape[0], self.vocab_size)

    def step(self, tokens: torch.Tensor, state: TableState) -> TableState:
        return TableState(state.count + 1)


class ScriptedTransducer(nn.Module):
    """Emits the tokens of a script, each at its encoder frame.

    Args:
        script: by the number of feature frames of an utterance: (token, frame) pairs.
        later: by chunk in encoder frames (0: full context): frames by which all tokens come later.
        vocab_size: V.
    """

    def __init__(
        self,
        script: Mapping[int, Sequence[tuple[int, int]]],
        later: Mapping[int, int] | None = None,
        vocab_size: int = 5,
    ) -> None:
        super().__init__()
        self.script, self.later, self.vocab_size = script, later or {}, vocab_size
        self.predictor, self.joiner = ScriptedPredictor(vocab_size), ScriptedJoiner(vocab_size)

    def encode(
        self, features: torch.Tensor, feature_lens: torch.Tensor, chunk_frames: int = 0, left_context_frames: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lens = (feature_lens - 3) // 4
        enc = torch.zeros(len(lens), int(lens.max()), self.vocab_size)
        for row, count in zip(enc, feature_lens.tolist(), strict=True):
            for token, frame in self.script[count]:
                row[frame + self.later.get(chunk_frames, 0), token] = 20.0
        return enc, lens
