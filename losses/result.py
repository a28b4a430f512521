"""What a method returns to losses/api.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class MethodLoss(NamedTuple):
    """loss: -log P of each utterance [B].  simple_loss: that of the trivial joiner [B], if the method has one.

    found: what the method found out, for TransducerLossOutput.info.
    """

    loss: Tensor
    simple_loss: Tensor | None = None
    found: dict[str, Any] = {}
