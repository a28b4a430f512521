"""The yardstick: the transducer loss as one writes it in plain torch, with autograd, on the padded batch.

tanh(enc + pred) @ weight.T, log_softmax, gather, and the recursion over anti-diagonals (Graves 2012, eq. 16),
vectorised over batch and diagonal; the recursion is in float64, without which float32 gradients are off by 4e-5 of
their size.

Occupancies too small to matter are set to 0 on their way back: left in, they make the gradients by the logits denormal,
and on some processors a matrix product over denormal numbers takes many times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-25  # occupancies below are taken as 0, in float32


def _without_denormal(occupancy: Tensor) -> Tensor:
    """A gradient by log-probs."""
    return occupancy.masked_fill(occupancy.abs() < SMALLEST, 0.0) if occupancy.dtype == torch.float32 else occupancy


def _skewed(x: Tensor, layers: int) -> Tensor:
    """[B, T, W] to [B, layers, W] with row t + u holding cell (t, u), by padding and viewing."""
    batch, frames, width = x.shape
    wide = torch.nn.functional.pad(x.transpose(1, 2), (0, layers - frames + 1))
    flat = wide.reshape(batch, width * (layers + 1))[:, : width * layers]
    return flat.view(batch, width, layers).transpose(1, 2)


def yardstick_loss(
    enc: Tensor, pred: Tensor, weight: Tensor, targets: Tensor, enc_lens: Tensor, target_lens: Tensor
) -> Tensor:
    """-log P of each utterance [B] from enc [B, T, J], pred [B, U+1, J], weight [V, J]; blank is 0."""
    logits = torch.tanh(enc[:, :, None] + pred[:, None]) @ weight.T
    log_probs = logits.log_softmax(-1)
    blank = log_probs[..., 0]  # first: in the other order autograd holds one more array of the size of the logits
    index = targets[:, None, :, None].expand(-1, log_probs.shape[1], -1, 1)
    label = log_probs[:, :, :-1].gather(3, index).squeeze(3)
    for x in (blank, label):
        if x.requires_grad:
            x.register_hook(_without_denormal)
    return recursion(blank, label, enc_lens, target_lens)


def recursion(blank: Tensor, label: Tensor, enc_lens: Tensor, target_lens: Tensor) -> Tensor:
    """-log P of each utterance [B], float64, from log-probs of blank [B, T, U+1] and of the next label [B, T, U]."""
    batch, frames, columns = blank.shape
    layers = frames + columns - 1
    blank, label = (_skewed(x.double(), layers) for x in (blank, label))
    alpha = torch.nn.functional.pad(blank.new_zeros(batch, 1), (0, columns - 1), value=-1e30)
    # by unbind, whose gradient is one stack: that of blank[:, d] would be an array of all diagonals for each
    blanks, labels = blank.unbind(1), label.unbind(1)
    rows = [alpha]
    for d in range(1, layers):
        stay = alpha + blanks[d - 1]
        move = torch.nn.functional.pad(alpha[:, :-1] + labels[d - 1], (1, 0), value=-1e30)
        alpha = torch.logaddexp(stay, move)
        rows.append(alpha)
    last = enc_lens - 1 + target_lens
    utterance = torch.arange(batch)
    return -(torch.stack(rows)[last, utterance, target_lens] + blank[utterance, last, target_lens])
