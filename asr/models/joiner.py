"""Joiner: encoder frame and predictor context to token logits; the transducer loss is called inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from losses import TransducerLossOptions, TransducerLossOutput, transducer_loss
from losses.api import USE_SIMPLE

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass
class JoinerConfig:
    """Sizes of the joiner.

    Args:
        dim: joiner dimension J.
        activation: "tanh" or "relu", between the sum of both projections and the output layer.
    """

    dim: int = 128
    activation: Literal["tanh", "relu"] = "tanh"


def init_blank_bias(layer: nn.Linear, probability: float = 0.9) -> None:
    """Lets an untrained output layer say blank with this probability, about its share of the frames.

    Without it the first hundreds of steps are spent on nothing else.
    """
    with torch.no_grad():
        layer.bias.zero_()
        layer.bias[0] = math.log(probability / (1 - probability) * max(layer.out_features - 1, 1))


class SimpleJoiner(nn.Module):
    """Trivial joiner logits(t, u) = am[t] + lm[u] (Kuang et al. 2022), which finds what "pruned" computes.

    Weights start at a quarter of torch's usual size, as in icefall's recipes.
    """

    INITIAL_SCALE = 0.25

    def __init__(self, encoder_dim: int, predictor_dim: int, vocab_size: int):
        super().__init__()
        self.am = nn.Linear(encoder_dim, vocab_size)
        self.lm = nn.Linear(predictor_dim, vocab_size)
        with torch.no_grad():
            for layer in (self.am, self.lm):
                layer.weight.mul_(self.INITIAL_SCALE)
                layer.bias.zero_()
        # lm carries it, since the shares of the smoothed loss that see one side only are lm, and am with the mean of lm
        init_blank_bias(self.lm)

    def forward(self, enc: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] and [B, U + 1, P] to am [B, T, V] and lm [B, U + 1, V]."""
        return self.am(enc), self.lm(pred)


class Joiner(nn.Module):
    """logits = W act(P_e enc + P_p pred) + b (Graves 2012, as in He et al. 2019).

    simple_joiner adds the trivial joiner that losses of ``USE_SIMPLE`` need; logits and searches do not use it.
    """

    def __init__(
        self,
        config: JoinerConfig,
        encoder_dim: int,
        predictor_dim: int,
        vocab_size: int,
        simple_joiner: bool = False,
    ):
        super().__init__()
        self.activation = config.activation
        self.encoder_proj = nn.Linear(encoder_dim, config.dim)
        self.predictor_proj = nn.Linear(predictor_dim, config.dim)
        self.out = nn.Linear(config.dim, vocab_size)
        init_blank_bias(self.out)
        self.simple = SimpleJoiner(encoder_dim, predictor_dim, vocab_size) if simple_joiner else None

    def project_encoder(self, enc: Tensor) -> Tensor:
        """[..., D] to [..., J]."""
        return self.encoder_proj(enc)

    def project_predictor(self, pred: Tensor) -> Tensor:
        """[..., P] to [..., J]."""
        return self.predictor_proj(pred)

    def logits(self, enc: Tensor, pred: Tensor) -> Tensor:
        """Projected enc and pred, broadcast against each other, [..., J] to [..., V]."""
        return self.out(ACTIVATIONS[self.activation](enc + pred))

    def forward(
        self,
        enc: Tensor,
        pred: Tensor,
        targets: Tensor,
        enc_lens: Tensor,
        target_lens: Tensor,
        *,
        method: str,
        topology: str,
        reduction: str,
        options: TransducerLossOptions,
        memory_limit: str | None = None,
    ) -> TransducerLossOutput:
        """The transducer loss of encoder frames [B, T, D] and predictor outputs [B, U + 1, P].

        It is called here, and not by the trainer, because a sharded module's weights are whole only while its own
        forward runs.

        Raises:
            ValueError: the method needs the trivial joiner and there is none.
        """
        simple = None
        if method in USE_SIMPLE:
            if self.simple is None:
                raise ValueError(f"loss.method={method} needs a model that was built with simple_joiner=True")
            simple = self.simple(enc, pred)
        return transducer_loss(
            self.project_encoder(enc),
            self.project_predictor(pred),
            self.out.weight,
            self.out.bias,
            targets,
            enc_lens,
            target_lens,
            method=method,
            activation=self.activation,
            topology=topology,
            simple=simple,
            reduction=reduction,
            memory_limit=memory_limit,
            options=options,
            check_values=False,  # the trainer leaves out batches whose loss is not finite
        )
