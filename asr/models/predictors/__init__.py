"""Predictors: tokens to context vectors. All share ``forward``, ``init_state``, ``output`` and ``step``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asr.models.predictors.lstm import LstmPredictor, LstmState
from asr.models.predictors.stateless import StatelessPredictor, StatelessState


@dataclass
class PredictorConfig:
    """Sizes of the predictor.

    Args:
        kind: "stateless" sees the last context_size tokens, "lstm" all of them.
        dim: embedding and output size P.
        context_size: tokens that the stateless predictor sees.
        num_layers: layers of the LSTM.
        dropout: probability, on the embeddings.
        context_dropout: probability that a training utterance is predicted without its token context ("stateless"
            only).
    """

    kind: Literal["stateless", "lstm"] = "stateless"
    dim: int = 128
    context_size: int = 2
    num_layers: int = 1
    dropout: float = 0.1
    context_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "context_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.predictor.{name}={getattr(self, name)} is outside [0, 1)")
        if self.context_dropout and self.kind != "stateless":
            raise ValueError(f"model.predictor.context_dropout needs kind=stateless, not {self.kind}; set it to 0")
        if self.context_size < 1:
            raise ValueError(f"model.predictor.context_size={self.context_size} must be at least 1")


def _stateless(config: PredictorConfig, vocab_size: int) -> StatelessPredictor:
    return StatelessPredictor(vocab_size, config.dim, config.context_size, config.dropout, config.context_dropout)


def _lstm(config: PredictorConfig, vocab_size: int) -> LstmPredictor:
    return LstmPredictor(vocab_size, config.dim, config.num_layers, config.dropout)


PREDICTORS = {"stateless": _stateless, "lstm": _lstm}

__all__ = ["PREDICTORS", "LstmPredictor", "LstmState", "PredictorConfig", "StatelessPredictor", "StatelessState"]
