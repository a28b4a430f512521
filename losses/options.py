"""Choices that change what a transducer loss teaches, each with its paper."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TransducerLossOptions:
    """Choices that change what is learned.

    Args:
        fastemit_lambda: FastEmit weight, 0 is off; the label part of the gradient is multiplied by 1 + lambda
            (Yu et al. 2021, eq. 14). Published values are 0.001 to 0.01.
        delay_penalty: lambda of the delay-penalized transducer, 0 is off; lambda * ((T - 1) / 2 - t) is added to the
            label log-probs of frame t (Kang et al. 2023, eq. 4). Published values are 0.0015 to 0.006.
        alignment_power: gamma; the loss is -(1 / gamma) log sum over alignments of P(alignment)^gamma. 1 is the
            transducer's sum (Graves 2012, eq. 12); larger values go towards the best alignment alone (Viterbi
            training), so that the model puts a token at one frame instead of spreading it over several.
        clamp: limit of each entry of the gradient by the logits of a cell, before the upstream gradient is applied, as
            in torchaudio's rnnt_loss; 0 is off.
        occupancy_threshold: methods "fused" and "pruned" leave cells up to this occupancy out of the gradient; the
            value of the loss does not change, but in float32 for estimates (losses/fused.py). None is 1e-6 where the
            joiner's product is in half precision, else 0; with 1e-6 in float32 "fused" is up to twice as fast.
        prune_range: S, method "pruned" only: so many columns of each frame are computed (Kuang et al. 2022); 2 or more.
        lm_only_scale, am_only_scale: method "pruned" only: shares of the predictor-only and the encoder-only
            log-probs in the simple loss (Kuang et al. 2022), together at most 1.
        backend: a name of losses.backends.BACKENDS; None takes the fastest that is always there.
    """

    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    alignment_power: float = 1.0
    clamp: float = 0.0
    occupancy_threshold: float | None = None
    prune_range: int = 5
    lm_only_scale: float = 0.25
    am_only_scale: float = 0.0
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("fastemit_lambda", "delay_penalty", "clamp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a number from 0 up; pass 0 to turn it off")
        if not (math.isfinite(self.alignment_power) and self.alignment_power > 0):
            raise ValueError(f"alignment_power={self.alignment_power} is not a number above 0; pass 1 to turn it off")
        threshold = self.occupancy_threshold
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"occupancy_threshold={threshold} is not from 0 to 1; pass None for the default")
        if self.prune_range < 2:
            raise ValueError(f"prune_range={self.prune_range} is below 2; published values are 5 to 10")
        for name in ("lm_only_scale", "am_only_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not from 0 to 1; pass 0 to turn it off")
        if self.lm_only_scale + self.am_only_scale > 1:
            raise ValueError(
                f"lm_only_scale={self.lm_only_scale} and am_only_scale={self.am_only_scale} sum to more than 1"
            )
