"""Attention on CUDA gives the gradients of the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from asr.models.layers.attention import Positions, attend

SCORE = -120.0


@pytest.mark.parametrize("frames", [64, 100, 128, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_far_below_zero_have_finite_gradients(frames: int, dtype: torch.dtype) -> None:
    """A kernel that pads keys with scores of 0 overflows where all scores of a query are about -120."""
    generator = torch.Generator().manual_seed(frames)
    qkv = torch.randn(2, frames, 3, 4, 64, generator=generator) * 0.1
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 1.0, SCORE * math.sqrt(64)
    upstream = torch.randn(2, frames, 256, generator=generator)
    mask = torch.ones(2, 1, frames, frames, dtype=torch.bool).tril()
    angles = torch.zeros(frames, 32)
    gradients = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        own = qkv.detach().to(device, kind).requires_grad_()
        positions = Positions(mask.to(device), angles.cos().to(device), angles.sin().to(device))
        (attend(own, positions) * upstream.to(device, kind)).sum().backward()
        gradients.append(own.grad.double().cpu())
    here, there = gradients
    assert there.isfinite().all()
    if dtype == torch.float32:
        # The gradient of a query's first feature is SCORE times the sum of its scores' gradients, which is 0. A kernel
        # that computes a probability anew from score and logsumexp knows it to SCORE's rounding: the sum keeps that.
        first = (there - here)[:, :, 0, :, 0].abs()
        q, k, v, up = (x.transpose(1, 2).double() for x in (*qkv.unbind(2), upstream.unflatten(2, (4, 64))))
        probabilities = (q @ k.mT / math.sqrt(64)).masked_fill(~mask, -torch.inf).softmax(3)
        sizes = (probabilities * (up @ v.mT).abs()).sum(3).transpose(1, 2)
        assert (first <= torch.finfo(dtype).eps * SCORE**2 * sizes).all()
        here[:, :, 0, :, 0] = there[:, :, 0, :, 0] = 0
        torch.testing.assert_close(there, here, rtol=1e-3, atol=2e-5 * float(here.abs().max()))
