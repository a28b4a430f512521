"""Rotary position embedding: relative positions inside the attention product."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    start: int, length: int, head_dim: int, device: torch.device, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles (Su et al. 2021, RoFormer, eq. 34).

    Only differences of positions enter an attention score, so a stream may number its window from any start.

    Args:
        start: position of the first frame.
        length: number of frames T.
        head_dim: even size of one head.

    Returns:
        cos, sin: float32 [T, head_dim / 2].
    """
    rate = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * rate
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + head_dim / 2) by the angles of their frame.

    Args:
        x: [B, T, N, H, head_dim], N projections (queries, keys) rotated alike.
        cos, sin: [T, head_dim / 2].

    Returns:
        Same shape and dtype as x.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None, None], sin.to(x.dtype)[:, None, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
