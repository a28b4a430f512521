"""Causal depthwise convolution over frames; for training on CPU with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Frame t of the result sees frames t - K + 1 .. t of x; zeros stand before the first.

    Args:
        x: [B, T, D].
        weight: [D, 1, 1, K].
        bias: [D] or None.

    Returns:
        [B, T, D].
    """
    return depthwise_conv_after(F.pad(x, (0, 0, weight.shape[-1] - 1, 0)), weight, bias)


def depthwise_conv_after(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of [B, K - 1 + T, D], whose first K - 1 frames are those before; to [B, T, D]."""
    if x.device.type == "cpu" and x.requires_grad:
        return _DepthwiseConv.apply(x, weight, bias)  # type: ignore[no-any-return]
    return _convolve(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, T + K - 1, D] to [B, T, D], without padding."""
    # read as a channels-last image of height 1: several times faster on CPU than conv1d over [B, D, T]
    image = x.unsqueeze(1).permute(0, 3, 1, 2)
    return F.conv2d(image, weight, bias, groups=weight.shape[0]).permute(0, 2, 3, 1).squeeze(1)


class _DepthwiseConv(torch.autograd.Function):
    """oneDNN computes the gradients of weight and bias slowly: products of shifted frames take half the time.

    Gradients of gradients are not available, see ``asr.models.layers.attention._TrainingAttention``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            ctx.save_for_backward(x, weight)
            return _convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernel, frames = weight.shape[-1], grad.shape[1]
        by_x = _convolve(F.pad(grad, (0, 0, kernel - 1, kernel - 1)), weight.to(grad.dtype).flip(-1), None)
        by_taps = [(x[:, k : k + frames] * grad).sum((0, 1), dtype=weight.dtype) for k in range(kernel)]
        by_bias = grad.sum((0, 1), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        return by_x, torch.stack(by_taps, dim=-1).view_as(weight), by_bias
