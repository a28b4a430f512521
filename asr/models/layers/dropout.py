"""Dropout that costs little on CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _ByteDropout(torch.autograd.Function):
    """Dropout from random bytes: eight decisions for each 64-bit draw.

    They come from numpy, five times faster than torch's generator, which seeds them. Gradients of gradients are not
    available, see ``asr.models.layers.attention._TrainingAttention``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_of_256: int) -> Tensor:
        seed = int(torch.randint(2**63 - 1, ()))
        draws = torch.from_numpy(np.random.SFC64(seed).random_raw((x.numel() + 7) // 8))
        mask = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(draws.view(torch.uint8)[: x.numel()].view(x.shape), dropped_of_256, out=mask)
        mask.mul_(256.0 / (256 - dropped_of_256))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class Dropout(nn.Module):
    """Sets elements to zero with probability p while training, and scales the others by 1 / (1 - p).

    On CPU, torch draws one Bernoulli number for each element from a serial generator, a fifth of a small Conformer's
    step. Here the decisions come from random bytes, ten times faster; p is rounded to a multiple of 1/256, from 1/256
    to 255/256, and the scale is that of the rounded p.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, float; same shape and dtype."""
        if not self.training or self.p == 0.0 or x.numel() == 0:
            return x
        if x.device.type == "cpu":
            # a small p must not become none, nor a large one a scale of 1 / 0
            dropped = min(255, max(1, round(self.p * 256)))
            return _ByteDropout.apply(x, dropped)  # type: ignore[no-any-return]
        return F.dropout(x, self.p, True)
