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
        occupancy_threshold: method "fused" leaves cells up to this occupancy out of the gradient; the value of the loss
            does not change. None is 1e-6 where the joiner's product is in half precision, else 0. "samplewise" and
            "batched" always keep to that None.
    """

    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    alignment_power: float = 1.0
    occupancy_threshold: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fastemit_lambda) and self.fastemit_lambda >= 0):
            raise ValueError(f"fastemit_lambda={self.fastemit_lambda} is not a number from 0 up; pass 0 to turn it off")
        if not (math.isfinite(self.delay_penalty) and self.delay_penalty >= 0):
            raise ValueError(f"delay_penalty={self.delay_penalty} is not a number from 0 up; pass 0 to turn it off")
        if not (math.isfinite(self.alignment_power) and self.alignment_power > 0):
            raise ValueError(f"alignment_power={self.alignment_power} is not a number above 0; pass 1 to turn it off")
        threshold = self.occupancy_threshold
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"occupancy_threshold={threshold} is not from 0 to 1; pass None for the default")
