"""Method "batched": the logits of the whole batch at once, [B, T, U+1, V]. Simple and exact; memory grows with T * U *
V.

`logits_loss` is one autograd.Function from logits to the loss of each utterance. With p = softmax(logits), b and l the
occupancies of a cell's blank and label transition (losses/lattice.py), the gradient of -log P by the logits of that
cell is

    p * (b + l) - b * [token is blank] - l * [token is the next label]                       (Li et al. 2019, sec. 3.2)

so that besides the logits only [B, T, U+1] arrays are kept, and one more array of the logits' size, the gradient, is
made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses import backends, lattice
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.shapes import Lengths

ACTIVATIONS = ("tanh", "relu")


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, targets, lengths, blank, topology, options, normalize):
        logits = source.detach()
        kernels = backends.load("logits", options.backend, logits.device, logits.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            blank_lp, label_lp, normalizer = kernels.gather(logits, targets, lengths, blank, normalize)
            wanted = ctx.needs_input_grad[0]
            nll, blank_occ, label_occ = lattice.regularized(
                blank_lp, label_lp, lengths, topology, options, occupancies=wanted
            )
        if wanted:
            ctx.save_for_backward(source, targets, normalizer, blank_occ, label_occ)
            ctx.kernels, ctx.lengths, ctx.blank, ctx.clamp = kernels, lengths, blank, options.clamp
        return nll.to(blank_lp.dtype)

    @staticmethod
    def backward(ctx, upstream):
        logits, targets, normalizer, blank_occ, label_occ = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            gradient = ctx.kernels.gradient(
                logits.detach(), targets, normalizer, blank_occ, label_occ, upstream, ctx.lengths, ctx.blank, ctx.clamp
            )
        if torch.is_grad_enabled():
            gradient = lattice.RefuseDoubleBackward.apply(gradient, logits, upstream)
        return gradient, *[None] * 6


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    lengths: Lengths,
    *,
    blank: int,
    topology: str = "regular",
    options: TransducerLossOptions | None = None,
    normalize: bool = True,
) -> Tensor:
    """-log P of each utterance [B] from checked logits [B, T, U+1, V]; float64 for float64 logits, else float32.

    normalize=False takes logits for log-probs and returns the gradient by those.
    """
    return _LogitsLoss.apply(
        logits, targets.long(), lengths, blank, topology, options or TransducerLossOptions(), normalize
    )


def batched_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Lengths,
    *,
    activation: str,
    topology: str,
    blank: int,
    options: TransducerLossOptions,
    shared_upstream: bool = False,
) -> MethodLoss:
    """-log P of each utterance from checked inputs: the joiner over all cells, then `logits_loss`.

    shared_upstream makes no difference here.
    """
    # Zeros in the padding: else a NaN there would meet the gradient's 0 in the weight's matrix product, and 0 * NaN is
    # NaN.
    enc = enc.masked_fill(_padding(lengths.enc, enc), 0.0)
    pred = pred.masked_fill(_padding([u + 1 for u in lengths.target], pred), 0.0)
    hidden = enc[:, :, None] + pred[:, None]
    hidden = hidden.tanh_() if activation == "tanh" else hidden.relu_()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return MethodLoss(logits_loss(logits, targets, lengths, blank=blank, topology=topology, options=options))


def _padding(lens: list[int], like: Tensor) -> Tensor:
    """[B, N, 1]: positions of like [B, N, ...] beyond the lengths."""
    n = torch.arange(like.shape[1], device=like.device)
    return (n >= torch.tensor(lens, dtype=torch.int64, device=like.device)[:, None])[..., None]
