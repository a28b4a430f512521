"""Method "samplewise": utterance by utterance over the true T_i x (U_i+1) cells (Braun, McDermott and Hsiao 2022,
"Neural Transducer Training: Reduced Memory Consumption with Sample-wise Computation").

The logits of an utterance are freed before those of the next are made, so that memory does not grow with the batch, and
no padding is computed. Short utterances of similar length go together, up to GROUP logits, so that the device has
enough to do. As in the paper, gradients are computed along with the loss, for an upstream gradient of 1, where all
utterances will get the same one; for reduction "none" the backward pass computes each group anew with its upstream
gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import batched, lattice
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.shapes import Lengths

GROUP = 2**22  # logits of utterances that are computed together


class _Settings(NamedTuple):
    lengths: Lengths
    chosen: dict
    shared_upstream: bool
    group: int


def groups_within(lengths: Lengths, vocab_size: int, most: int) -> list[list[int]]:
    """Numbers of the utterances, sorted by length, in groups of at most `most` padded logits or one utterance."""
    groups: list[list[int]] = []
    frames = columns = 0
    for b in sorted(range(len(lengths.enc)), key=lambda b: (lengths.enc[b], lengths.target[b])):
        frames, columns = max(frames, lengths.enc[b]), max(columns, lengths.target[b] + 1)
        if groups and (len(groups[-1]) + 1) * frames * columns * vocab_size <= most:
            groups[-1].append(b)
        else:
            groups.append([b])
            frames, columns = lengths.enc[b], lengths.target[b] + 1
    return groups


def _cut(enc: Tensor, pred: Tensor, targets: Tensor, numbers: list[int], lengths: Lengths):
    """enc, pred, targets and lengths of the utterances `numbers`, cut to the longest of them."""
    own = Lengths([lengths.enc[b] for b in numbers], [lengths.target[b] for b in numbers])
    frames, tokens = max(own.enc), max(own.target)
    return enc[numbers, :frames], pred[numbers, : tokens + 1], targets[numbers, :tokens], own


class _SamplewiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, enc, pred, weight, bias, targets, settings):
        ctx.settings, ctx.wanted = settings, ctx.needs_input_grad[:4]
        device = enc.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        sources = [enc, pred, weight, bias]
        at_once = settings.shared_upstream and any(ctx.wanted)
        sums = _zeros(sources, ctx.wanted) if at_once else []
        loss = enc.new_zeros(enc.shape[0], dtype=torch.promote_types(enc.dtype, torch.float32))
        for numbers in groups_within(settings.lengths, weight.shape[0], settings.group):
            if at_once:
                loss[numbers] = _add_gradients(sums, sources, targets, numbers, settings, None)
            else:
                own_enc, own_pred, own_targets, own = _cut(enc, pred, targets, numbers, settings.lengths)
                arguments = own_enc, own_pred, weight, bias, own_targets, own
                loss[numbers] = batched.batched_loss(*arguments, **settings.chosen).loss
        ctx.save_for_backward(*sources, targets)
        ctx.sums = sums
        return loss

    @staticmethod
    def backward(ctx, upstream):
        enc, pred, weight, bias, targets = ctx.saved_tensors
        sources = [enc, pred, weight, bias]
        # scaled in place, a copy of enc's gradient may be gigabytes: a second backward pass has to compute them anew
        sums, ctx.sums = ctx.sums, []
        enabled, dtype = ctx.autocast
        with torch.no_grad(), torch.autocast(enc.device.type, dtype, enabled):
            if sums:
                gradients = lattice.scale_(sums, upstream)
            else:
                gradients = _zeros(sources, ctx.wanted)
                for numbers in groups_within(ctx.settings.lengths, weight.shape[0], ctx.settings.group):
                    _add_gradients(gradients, sources, targets, numbers, ctx.settings, upstream)
            gradients = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, sources, strict=True)]
        if torch.is_grad_enabled():
            tied = [x for x in (*sources, upstream) if x is not None]
            gradients = [None if g is None else lattice.RefuseDoubleBackward.apply(g, *tied) for g in gradients]
        return *gradients, None, None


def _zeros(sources: list[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Sums of gradients, float32 or float64."""
    return [
        torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if x is not None and needed else None
        for x, needed in zip(sources, wanted, strict=True)
    ]


def _add_gradients(
    sums: list[Tensor | None],
    sources: list[Tensor | None],
    targets: Tensor,
    numbers: list[int],
    settings: _Settings,
    upstream: Tensor | None,
) -> Tensor:
    """Add the gradients of some utterances, for an upstream gradient of 1 without any; returns their loss [n]."""
    enc, pred, weight, bias = sources
    assert enc is not None and pred is not None
    enc, pred, targets, own = _cut(enc, pred, targets, numbers, settings.lengths)
    with torch.enable_grad():
        inputs: list[Any] = [
            None if x is None else x.detach().requires_grad_(total is not None)
            for x, total in zip((enc, pred, weight, bias), sums, strict=True)
        ]
        own_enc, own_pred, own_weight, own_bias = inputs
        loss = batched.batched_loss(own_enc, own_pred, own_weight, own_bias, targets, own, **settings.chosen).loss
        scale = torch.ones_like(loss) if upstream is None else upstream[numbers]
        found = iter(torch.autograd.grad(loss, [x for x in inputs if x is not None and x.requires_grad], scale))
    for i, total in enumerate(sums):
        if total is not None:
            gradient = next(found)
            if i < 2:  # enc, pred: every utterance has its own rows
                total[numbers, : gradient.shape[1]] = gradient.to(total.dtype)
            else:
                total += gradient
    return loss.detach()


def samplewise_loss(
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
    group: int | None = None,
) -> MethodLoss:
    """-log P of each utterance from checked inputs.

    shared_upstream: all utterances will get the same upstream gradient; it is not checked. group: logits of utterances
    that are computed together, None for GROUP.
    """
    chosen = {"activation": activation, "topology": topology, "blank": blank, "options": options}
    settings = _Settings(lengths, chosen, shared_upstream, GROUP if group is None else group)
    return MethodLoss(_SamplewiseLoss.apply(enc, pred, weight, bias, targets, settings))
