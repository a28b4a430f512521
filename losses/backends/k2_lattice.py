"""Forward-backward of the lattice by `k2.mutual_information_recursion`, on CPU or CUDA as k2 is built; in float64.

The recursion, p the forward variables over nodes of s labels and t frames, px the log-probs of labels and py of blank:

    regular    p[s, t] = log_add(p[s-1, t]   + px[s-1, t],   p[s, t-1] + py[s, t-1])     px [B, S, T+1]
    modified   p[s, t] = log_add(p[s-1, t-1] + px[s-1, t-1], p[s, t-1] + py[s, t-1])     px [B, S, T]

from p[0, 0] = 0 to p[U_b, T_b]; py [B, S+1, T]. k2 tells the topology by the size of px. In "regular" no label can be
emitted after the last frame, so that px[:, t] is -inf from t = T_b on. The gradient of p[U_b, T_b] by px and py is the
occupancies. fast_rnnt has the same function (Kuang et al. 2022, "Pruned RNN-T for fast, memory-efficient
ASR training").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.backends import LOG_FLOOR
from losses.shapes import Lengths


def forward_backward(
    blank: Tensor, label: Tensor, lengths: Lengths, modified: bool, occupancies: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See losses/backends/__init__.py."""
    from k2 import mutual_information_recursion

    batch, frames, columns = blank.shape
    device = blank.device
    if batch == 0:
        nll = torch.zeros(0, dtype=torch.float64, device=device)
        return nll, torch.zeros_like(blank) if occupancies else None, torch.zeros_like(label) if occupancies else None
    enc_lens, target_lens = (torch.tensor(x, dtype=torch.int64, device=device) for x in lengths)
    rows = max(columns - 1, 1)  # a batch without labels has a row of px that is never reached
    in_frames = torch.arange(frames, device=device) < enc_lens[:, None]
    s = torch.arange(rows + 1, device=device)
    label_valid = (s[:-1] < target_lens[:, None])[:, :, None] & in_frames[:, None]
    blank_valid = (s <= target_lens[:, None])[:, :, None] & in_frames[:, None]
    px = torch.full((batch, rows, frames + (not modified)), -torch.inf, dtype=torch.float64, device=device)
    py = torch.full((batch, rows + 1, frames), -torch.inf, dtype=torch.float64, device=device)
    px[:, : columns - 1, :frames] = label.transpose(1, 2)
    py[:, :columns] = blank.transpose(1, 2)
    px[:, :, :frames].masked_fill_(~label_valid, -torch.inf)
    py.masked_fill_(~blank_valid, -torch.inf)
    boundary = torch.stack([torch.zeros_like(enc_lens), torch.zeros_like(enc_lens), target_lens, enc_lens], 1)
    # The fourth argument is return_grad, in some versions calc_gradients.
    found = mutual_information_recursion(px, py, boundary, occupancies)
    log_sum, gradients = found if occupancies else (found, None)
    # k2's log_add drops NaN where the other term is a number
    log_sum = log_sum.masked_fill(px.isnan().flatten(1).any(1) | py.isnan().flatten(1).any(1), torch.nan)
    if gradients is None:
        return -log_sum, None, None
    px_grad, py_grad = gradients
    impossible = ~log_sum.isfinite()[:, None, None]
    floor = math.exp(LOG_FLOOR[blank.dtype])

    def cells(gradient: Tensor, valid: Tensor, width: int) -> Tensor:
        """[B, S, T] to [B, T, width], NaN without a path, 0 in the padding."""
        occupied = torch.threshold(gradient[:, :, :frames], floor, 0.0)
        occupied = occupied.masked_fill(impossible, torch.nan).masked_fill(~valid, 0.0)
        return occupied[:, :width].transpose(1, 2).to(blank.dtype, memory_format=torch.contiguous_format)

    return -log_sum, cells(py_grad, blank_valid, columns), cells(px_grad, label_valid, columns - 1)
