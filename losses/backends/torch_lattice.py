"""Forward-backward of the transducer lattice in torch operations, on any device.

All transitions lead from layer d to layer d + 1 (d = t + u for "regular", d = t for "modified"), so each step of the
recursion is one operation over [B, U+1]; T + U (or T) steps. Cells outside of an utterance hold log-prob -inf and so
carry nothing, whatever the padding held. Everything is accumulated in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.backends import LOG_FLOOR
from losses.shapes import Lengths


def _layers(log_probs: Tensor, valid: Tensor, shift: int, layers: int) -> Tensor:
    """[B, T, W] to [layers, B, W] float64: layer d holds the cells t = d - shift * u, -inf where there is none."""
    batch, frames, width = log_probs.shape
    device = log_probs.device
    t = torch.arange(layers, device=device)[:, None] - shift * torch.arange(width, device=device)
    inside = (t >= 0) & (t < frames)
    index = t.clamp(0, max(frames - 1, 0)).expand(batch, layers, width)
    keep = inside & valid.gather(1, index)
    rows = log_probs.gather(1, index).double().masked_fill(~keep, -torch.inf)
    return rows.transpose(0, 1).contiguous()


def _cells(rows: Tensor, frames: int, shift: int) -> Tensor:
    """Inverse of `_layers`: [layers, B, W] to [B, T, W]."""
    _, batch, width = rows.shape
    device = rows.device
    d = torch.arange(frames, device=device)[:, None] + shift * torch.arange(width, device=device)
    return rows.gather(0, d[:, None].expand(frames, batch, width)).transpose(0, 1)


def forward_backward(
    blank: Tensor, label: Tensor, lengths: Lengths, modified: bool, occupancies: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See losses/backends/__init__.py."""
    batch, frames, width = blank.shape
    device = blank.device
    if batch == 0:
        nll = torch.zeros(0, dtype=torch.float64, device=device)
        return nll, torch.zeros_like(blank) if occupancies else None, torch.zeros_like(label) if occupancies else None
    enc_lens = torch.tensor(lengths.enc, device=device)
    target_lens = torch.tensor(lengths.target, device=device)
    shift = 0 if modified else 1
    layers = frames + shift * (width - 1)
    t = torch.arange(frames, device=device)[:, None]
    u = torch.arange(width, device=device)
    in_frames = t < enc_lens[:, None, None]
    blank_rows = _layers(blank, in_frames & (u <= target_lens[:, None, None]), shift, layers)
    label_rows = _layers(label, in_frames & (u[:-1] < target_lens[:, None, None]), shift, layers)

    # The lattice of utterance b ends in node U_b of layer `last[b]`, one layer behind its last cell.
    last = enc_lens + shift * target_lens
    utterance = torch.arange(batch, device=device)
    beta = torch.full((layers + 1, batch, width), -torch.inf, dtype=torch.float64, device=device)
    beta[last, utterance, target_lens] = 0.0
    for d in range(layers - 1, -1, -1):
        step = blank_rows[d] + beta[d + 1]
        if width > 1:
            step[:, :-1] = torch.logaddexp(step[:, :-1], label_rows[d] + beta[d + 1, :, 1:])
        beta[d] = torch.maximum(beta[d], step)  # step is -inf at the node that ends an utterance
    log_sum = beta[0, :, 0].clone()
    if not occupancies:
        return -log_sum, None, None

    alpha = torch.full((layers, batch, width), -torch.inf, dtype=torch.float64, device=device)
    alpha[0, :, 0] = 0.0
    for d in range(1, layers):
        alpha[d] = alpha[d - 1] + blank_rows[d - 1]
        if width > 1:
            alpha[d, :, 1:] = torch.logaddexp(alpha[d, :, 1:], alpha[d - 1, :, :-1] + label_rows[d - 1])
    alpha -= log_sum.masked_fill(log_sum == -torch.inf, torch.nan)[:, None]  # no path: no probabilities
    floor = math.exp(LOG_FLOOR[blank.dtype])
    blank_occ = torch.threshold_((alpha + blank_rows + beta[1:]).exp_(), floor, 0.0)
    label_occ = torch.threshold_((alpha[:, :, :-1] + label_rows + beta[1:, :, 1:]).exp_(), floor, 0.0)
    blank_cells = _cells(blank_occ, frames, shift).to(blank.dtype, memory_format=torch.contiguous_format)
    label_cells = _cells(label_occ, frames, shift).to(label.dtype, memory_format=torch.contiguous_format)
    return -log_sum, blank_cells, label_cells
