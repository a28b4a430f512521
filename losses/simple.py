"""Loss of the trivial joiner logits(t, u) = am[t] + lm[u], and the bounds that it gives (Kuang et al. 2022, "Pruned
RNN-T for fast, memory-efficient ASR training").

The normaliser of a cell is a matrix product of probabilities,

    logsumexp_v(am[t, v] + lm[u, v]) = log sum_v exp(am[t, v] - max am[t]) exp(lm[u, v] - max lm[u]) + max + max,

so that nothing of size T * (U+1) * V is made. Smoothing interpolates the log-probs with those of two models that see
one side only: log-softmax(lm[u]), and log-softmax(am[t] + log q) with q the mean over u of softmax(lm[u]). As in the
paper q is the utterance's own mean (k2 takes the mean of the batch, padding included), so that the loss of an utterance
does not depend on what else is in the batch.

All is done in float32 or better, under autocast too. With the product rounded to bfloat16 the gradient does not sum to
zero over the tokens; the small push that is left, in a direction that changes no probability and that nothing holds
back, is one that Adam follows at full speed: an encoder without a norm at its output then grows without bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losses import lattice
from losses.options import TransducerLossOptions
from losses.shapes import Lengths

# A sum of products of probabilities below this has lost digits to underflow, and is taken again in logarithms.
LEAST_SUM = {torch.float32: 1e-30, torch.float64: 1e-290}


class SimpleLoss(NamedTuple):
    """-log P of each utterance [B], and occupancies of blank [B, T, U+1] and label [B, T, U]."""

    loss: Tensor
    blank_occ: Tensor
    label_occ: Tensor


def _normalizer(am: Tensor, lm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp_v(am[t] + lm[u]) [T, U+1], and softmax numerator and denominator of lm: [U+1, V], [U+1, 1]."""
    # no gradient through the maxima: they cancel
    high_am, high_lm = (x.detach().amax(1, keepdim=True) for x in (am, lm))
    am_exp, lm_exp = (am - high_am).exp(), (lm - high_lm).exp()
    total = am_exp @ lm_exp.t()
    least = LEAST_SUM[am.dtype]
    low = total.detach() < least
    if bool(low.any()):
        t, u = low.nonzero(as_tuple=True)
        exact = torch.logsumexp(am[t] + lm[u], dim=1)
        safe = total.clamp(min=least).log() + high_am + high_lm.t()
        return safe.index_put((t, u), exact), lm_exp, high_lm
    return total.log() + high_am + high_lm.t(), lm_exp, high_lm


def _log_probs(am: Tensor, lm: Tensor, targets: Tensor, blank: int, options: TransducerLossOptions):
    """Smoothed log-probs of blank [T, U+1] and next label [T, U] of one utterance, am [T, V], lm [U+1, V]."""
    normalizer, lm_exp, high_lm = _normalizer(am, lm)
    by_lm = lm[:-1].gather(1, targets[:, None]).t()  # [1, U]
    by_am = am.index_select(1, targets)  # [T, U]
    am_blank, lm_blank = am[:, blank, None], lm[:, blank, None].t()
    blanks = am_blank + lm_blank - normalizer
    labels = by_am + by_lm - normalizer[:, :-1]
    lm_scale, am_scale = options.lm_only_scale, options.am_only_scale
    if not lm_scale and not am_scale:
        return blanks, labels
    shared = 1.0 - lm_scale - am_scale
    blanks, labels = blanks * shared, labels * shared
    lm_sum = lm_exp.sum(1, keepdim=True)
    if lm_scale:
        norm = (lm_sum.log() + high_lm).t()  # [1, U+1]
        blanks = blanks + lm_scale * (lm_blank - norm)
        labels = labels + lm_scale * (by_lm - norm[:, :-1])
    if am_scale:
        prior = (lm_exp / lm_sum).mean(0).clamp(min=torch.finfo(lm.dtype).tiny).log()  # [V]
        norm = torch.logsumexp(am + prior, dim=1, keepdim=True)  # [T, 1]
        blanks = blanks + am_scale * (am_blank + prior[blank] - norm)
        labels = labels + am_scale * (by_am + prior.index_select(0, targets) - norm)
    return blanks, labels


def simple_loss(
    am: Tensor,
    lm: Tensor,
    targets: Tensor,
    lengths: Lengths,
    *,
    topology: str,
    blank: int,
    options: TransducerLossOptions,
) -> SimpleLoss:
    """Smoothed loss of the trivial joiner from am [B, T, V] and lm [B, U+1, V], utterance by utterance.

    Half precision is computed in float32. Padding is not read.
    """
    dtype = torch.float64 if am.dtype == torch.float64 else torch.float32
    batch, frames, _ = am.shape
    columns = lm.shape[1]
    if batch == 0:
        none = am.new_zeros(0, frames, columns), am.new_zeros(0, frames, columns - 1)
        return SimpleLoss((am.sum() + lm.sum()) * am.new_zeros(0), *none)
    blanks: list[Tensor] = []
    labels: list[Tensor] = []
    # not am[b]: its backward pass would make a gradient of the size of am for each utterance
    rows = zip(am.unbind(), lm.unbind(), targets, lengths.enc, lengths.target, strict=True)
    with torch.autocast(am.device.type, enabled=False):
        for own_am, own_lm, own_targets, t, u in rows:
            found = _log_probs(own_am[:t].to(dtype), own_lm[: u + 1].to(dtype), own_targets[:u], blank, options)
            size = (0, columns - u - 1, 0, frames - t)
            blanks.append(torch.nn.functional.pad(found[0], size))
            labels.append(torch.nn.functional.pad(found[1], size))
        blank_lp, label_lp = torch.stack(blanks), torch.stack(labels)
        if options.delay_penalty:
            label_lp = lattice.penalize_delay(label_lp, lengths, options.delay_penalty)
        found = lattice.LatticeLoss.apply(blank_lp, label_lp, lengths, topology, 0.0, options.backend, True)
    return SimpleLoss(*found)


def largest_jump(prune_range: int, topology: str) -> int:
    """Columns by which the bounds may rise from one frame to the next, so that an alignment can follow them."""
    return prune_range - 1 if topology == "regular" else 1


def prune_bounds(blank_occ: Tensor, label_occ: Tensor, lengths: Lengths, prune_range: int, topology: str) -> Tensor:
    """First of the prune_range columns that each frame keeps, int64 [B, T].

    Of all ranges the one with the most occupancy is taken, and then raised where that is needed for: start at column 0;
    never fall; never rise by more than an alignment can follow; end with the column of the last token. In the padding:
    as in the last frame.
    """
    batch, frames, columns = blank_occ.shape
    device = blank_occ.device
    size = min(prune_range, columns)
    occupancy = blank_occ + torch.nn.functional.pad(label_occ, (0, 1))
    total = torch.nn.functional.pad(occupancy.cumsum(2), (1, 0))
    best = (total[:, :, size:] - total[:, :, :-size]).argmax(2)
    t = torch.arange(frames, device=device)
    enc_lens, target_lens = (torch.tensor(x, dtype=torch.int64, device=device)[:, None] for x in lengths)
    last = (target_lens + 1 - prune_range).clamp(min=0)
    first = torch.where(t < enc_lens - 1, torch.minimum(best, last), last)
    first = _least_to_come(first)
    # room that the steepest rise from column 0 leaves; where it may not grow any more, the bounds have to rise before
    steepest = largest_jump(prune_range, topology) * t
    return steepest - _least_to_come(steepest - first).clamp(min=0)


def _least_to_come(x: Tensor) -> Tensor:
    """min over t' >= t of x[b, t'] for x [B, T]."""
    return x.flip(1).cummin(1).values.flip(1) if x.numel() else x


def check_prune_range(lengths: Lengths, prune_range: int, topology: str) -> None:
    """An alignment within so few columns a frame exists for each utterance; ValueError otherwise."""
    jump = largest_jump(prune_range, topology)
    for i, (t, u) in enumerate(zip(lengths.enc, lengths.target, strict=True)):
        if u + 1 - prune_range > jump * (t - 1):
            least = -(-u // t) + 1  # (S - 1) * t >= u
            raise ValueError(
                f"prune_range={prune_range} cannot reach the last of target_lens[{i}]={u} tokens in enc_lens[{i}]={t} "
                f"frames; pass prune_range={least} or more, or leave the utterance out"
            )
