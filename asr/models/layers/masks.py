"""Length and chunk masks."""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(lens: Tensor, max_len: int) -> Tensor:
    """True inside each sequence.

    Args:
        lens: [B] integer lengths.
        max_len: padded length T.

    Returns:
        [B, T] bool.
    """
    return torch.arange(max_len, device=lens.device)[None, :] < lens[:, None]


def attention_mask(lens: Tensor, max_len: int, chunk_frames: int = 0, left_frames: int = -1) -> Tensor | None:
    """Which key frames a query frame may see, as chunk-wise attention (Zhang et al. 2020, U2; Chen et al. 2021).

    A query in chunk i sees its own chunk and ``left_frames`` frames before that chunk's first frame.

    Args:
        lens: [B] encoder frames of each utterance.
        max_len: padded length T.
        chunk_frames: frames in a chunk; 0 gives full context.
        left_frames: left context in frames; -1 is unlimited. Only meaningful with ``chunk_frames > 0``.

    Returns:
        [B, 1, T, T] bool, True where attention is allowed. None where nothing is masked.
    """
    device = lens.device
    if chunk_frames <= 0:
        # a graph that is being recorded holds for all lengths
        recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if not recorded and bool((lens == max_len).all()):
            return None
        return length_mask(lens, max_len)[:, None, None, :].expand(-1, 1, max_len, -1)
    frame = torch.arange(max_len, device=device)
    chunk_start = frame // chunk_frames * chunk_frames
    allowed = frame[None, :] < (chunk_start + chunk_frames)[:, None]
    if left_frames >= 0:
        allowed &= frame[None, :] >= (chunk_start - left_frames)[:, None]
    # a padded query may have no key left in its window; it looks at itself, so that softmax stays finite
    own = torch.eye(max_len, dtype=torch.bool, device=device)
    return (allowed[None] & length_mask(lens, max_len)[:, None, :] | own[None])[:, None]
