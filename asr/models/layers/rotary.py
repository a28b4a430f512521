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
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[..., None, None, :].to(x.dtype), sin[..., None, None, :].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def whole_head_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for a head x: x * cos, plus x with its halves swapped * sin; for queries they scale the scores too, by
    head_dim ** -0.5.

    Args:
        cos, sin: [..., head_dim / 2].

    Returns:
        cos, sin: [2, ..., head_dim], for queries and keys.
    """
    scale = (2 * int(cos.shape[-1])) ** -0.5  # a number, also in a graph that is recorded
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return torch.stack([cos * scale, cos]), torch.stack([sin * scale, sin])


def rotate_step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` to queries and keys of a chunk [2, B, H, C, d], by ``whole_head_tables`` as [2, B, 1, C, d]."""
    half = int(x.shape[-1]) // 2  # a number, also in a graph that is recorded
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + swapped * sin.to(x.dtype)
