"""Normaliser, gather and gradient of the logits in torch operations, on any device.

Utterance by utterance over the true T_i x (U_i+1) cells, so that padding is not touched and temporaries are an
utterance's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.shapes import Lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _label_index(targets: Tensor, b: int, frames: int, tokens: int) -> Tensor:
    """[T_b, U_b, 1]: the next label of each cell, for gather and scatter along V."""
    return targets[b, None, :tokens, None].expand(frames, tokens, 1)


def gather(
    logits: Tensor, targets: Tensor, lengths: Lengths, blank: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See losses/backends/__init__.py."""
    dtype = _compute_dtype(logits)
    blank_lp = torch.zeros(logits.shape[:3], dtype=dtype, device=logits.device)
    label_lp = torch.zeros_like(blank_lp[:, :, 1:], memory_format=torch.contiguous_format)
    normalizer = torch.zeros_like(blank_lp) if normalize else None
    for b, (t, u) in enumerate(zip(lengths.enc, lengths.target, strict=True)):
        cells = logits[b, :t, : u + 1].to(dtype)
        blanks, labels = blank_lp[b, :t, : u + 1], label_lp[b, :t, :u]
        blanks.copy_(cells[..., blank])
        labels.copy_(cells[:, :u].gather(2, _label_index(targets, b, t, u)).squeeze(2))
        if normalizer is not None:
            norm = normalizer[b, :t, : u + 1]
            norm.copy_(torch.logsumexp(cells, dim=2))
            blanks -= norm
            labels -= norm[:, :u]
    return blank_lp, label_lp, normalizer


def gradient(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor | None,
    blank_occ: Tensor,
    label_occ: Tensor,
    upstream: Tensor,
    lengths: Lengths,
    blank: int,
    clamp: float,
) -> Tensor:
    """See losses/backends/__init__.py."""
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    dtype = _compute_dtype(logits)
    for b, (t, u) in enumerate(zip(lengths.enc, lengths.target, strict=True)):
        cells, out = logits[b, :t, : u + 1], result[b, :t, : u + 1]
        blanks, labels = blank_occ[b, :t, : u + 1], label_occ[b, :t, :u]
        work = out if dtype == logits.dtype else torch.zeros_like(cells, dtype=dtype)
        if normalizer is not None:
            taken = blanks.clone()
            taken[:, :u] += labels
            torch.sub(cells, normalizer[b, :t, : u + 1, None], out=work)
            work.exp_().mul_(taken[..., None])
        work[..., blank] -= blanks
        work[:, :u].scatter_add_(2, _label_index(targets, b, t, u), -labels[..., None])
        torch.hardshrink(work, GRADIENT_FLOOR[dtype], out=work)
        if clamp > 0:
            work.clamp_(-clamp, clamp)
        work *= upstream[b]
        if work is not out:
            out.copy_(work)
    return result
