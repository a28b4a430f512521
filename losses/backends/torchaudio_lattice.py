"""Forward-backward of the "regular" lattice by `torchaudio.functional.rnnt_loss`, on CPU or CUDA as it was built.

rnnt_loss is given a vocabulary of two tokens, blank 0 and label 1, whose log-probs are already normalised
(fused_log_softmax=False); the gradient by those is minus the occupancies (Graves 2012, eq. 20). It accumulates in
float32, so that the sums of long utterances carry an error of about 1e-7 of their largest partial sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.backends import LOG_FLOOR
from losses.shapes import Lengths

# Stands for log 0, of which torchaudio makes NaN: sums of fewer than 1e8 of it are finite in float32.
LOG_ZERO = -1e30


def forward_backward(
    blank: Tensor, label: Tensor, lengths: Lengths, modified: bool, occupancies: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See losses/backends/__init__.py.

    Raises:
        ValueError: for another topology than "regular" and for float64.
    """
    from torchaudio.functional import rnnt_loss

    if modified:
        raise ValueError(
            "backend='torchaudio' has topology 'regular' only, where a label keeps the frame; use 'numba' or 'torch'"
        )
    if blank.dtype != torch.float32:
        raise ValueError(
            f"backend='torchaudio' computes in float32, the log-probs are {blank.dtype}; cast them, or use 'torch'"
        )
    by_blank, by_label = (torch.zeros_like(x) if occupancies else None for x in (blank, label))
    device, batch = blank.device, blank.shape[0]
    if batch == 0:
        return torch.zeros(0, dtype=torch.float64, device=device), by_blank, by_label
    frames, tokens = max(lengths.enc), max(lengths.target)  # larger tensors are refused
    enc_lens, target_lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in lengths)
    t, u = torch.arange(frames, device=device)[:, None], torch.arange(tokens + 1, device=device)
    in_frames = t < enc_lens[:, None, None]
    valid = torch.stack(
        [in_frames & (u <= target_lens[:, None, None]), in_frames & (u < target_lens[:, None, None])], 3
    )
    both = blank.new_zeros(batch, frames, tokens + 1, 2)
    both[..., 0] = blank[:, :frames, : tokens + 1]
    both[:, :, :-1, 1] = label[:, :frames, :tokens]
    both = torch.where(valid, both.clamp(min=LOG_ZERO), 0.0)
    targets = torch.ones(batch, tokens, dtype=torch.int32, device=device)
    with torch.enable_grad():
        both.requires_grad_(occupancies)
        loss = rnnt_loss(
            both, targets, enc_lens, target_lens, blank=0, clamp=-1, reduction="none", fused_log_softmax=False
        )
    nll = loss.detach().double()
    nll[nll > -0.1 * LOG_ZERO] = torch.inf
    if by_blank is None or by_label is None:
        return nll, None, None
    (gradient,) = torch.autograd.grad(loss, both, torch.ones_like(loss))
    occupied = torch.threshold_(gradient.neg_(), math.exp(LOG_FLOOR[blank.dtype]), 0.0)
    occupied.masked_fill_(~nll.isfinite()[:, None, None, None], torch.nan)  # no path: no probabilities
    occupied.masked_fill_(~valid, 0.0)
    by_blank[:, :frames, : tokens + 1] = occupied[..., 0]
    by_label[:, :frames, :tokens] = occupied[:, :, :-1, 1]
    return nll, by_blank, by_label
