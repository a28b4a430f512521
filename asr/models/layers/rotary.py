"""Rotary position embedding: relative positions inside the attention product."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_rates(head_dim: int, device: torch.device, base: float = 10000.0) -> Tensor:
    """Radians a frame, float32 [head_dim / 2] (Su et al. 2021, RoFormer, eq. 15)."""
    exponent: Tensor = -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return base**exponent


def rotary_tables(start: int, length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles (Su et al. 2021, RoFormer, eq. 34).

    Only differences of positions enter an attention score, so frames may be numbered from any start.

    Args:
        start: position of the first frame.
        length: number of frames T.
        head_dim: even size of one head.

    Returns:
        cos, sin: float32 [T, head_dim / 2].
    """
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = position[:, None] * rotary_rates(head_dim, device)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + head_dim / 2) by the angles of their frame.

    Args:
        x: [B, T, N, H, head_dim], N projections (queries, keys) rotated alike.
        cos, sin: [T, head_dim / 2], or [B, T, head_dim / 2] where the streams of a batch have clocks of their own.

    Returns:
        Same shape and dtype as x.
    """
    return rotate(x, cos[..., None, None, :], sin[..., None, None, :])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with tables that broadcast to x [..., head_dim / 2]."""
    half = int(x.shape[-1]) // 2  # a number, also in a graph that is recorded
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
