"""Method "fused": joiner, loss and gradient in tiles of packed lattice cells; nothing of the logits' size is made.

Utterances are taken in groups. The forward pass computes the logits of a group tile by tile, a tile small enough to
stay in the processor's cache, and keeps three numbers of each cell: the log-probs of blank and of the next label, and
the log-normaliser. Forward-backward over those (losses/lattice.py) gives the occupancies of the group's cells. Only
cells whose occupancy exceeds a threshold have a gradient that counts; of these the logits are computed again, become
the gradient by the logits

    p * (b + l) - b * [token is blank] - l * [token is the next label]                       (Li et al. 2019, sec. 3.2)

and go into the gradients of encoder output, predictor output, weight and bias at once, which are summed in float32 (or
float64).

Estimates. Where products in half precision are much faster (losses/backends: estimates), a float32 loss with a
threshold first takes their log-probs for all cells. They tell which cells may exceed the threshold, with a margin, and
only those are computed in float32, before forward-backward decides; the others enter it with their estimates. The same
cells and one in SAMPLED of the others, in float32, tell how far the estimates are off over a whole alignment; where
that is more than the margin allows, all cells of the group are computed in float32. This is a check and not a proof:
only a threshold of 0 computes every cell in any case.

Cells that no alignment reaches are not computed at all: padding, two corners of the lattice in "modified", and what
pruning leaves out.

When. Where all utterances will get the same upstream gradient (every reduction but "none"), the gradients are computed
in the forward pass for an upstream gradient of 1 and scaled in the backward pass, so that the logits of the cells
around the diagonal of the lattice, which are the likely ones, can be used while they are at hand (up to CACHE bytes of
them). Otherwise index, log-probs, normaliser and occupancies of the kept cells wait for the backward pass, packed, and
the upstream gradient is applied to each utterance's before sums over utterances.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from losses import lattice
from losses.cells import OCCUPANCY_THRESHOLD, Bounds, Group, spread
from losses.joint import Joint, Kept, LogProbs, Settings, Sums
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.shapes import Lengths, product_dtype
from losses.sizes import Sizes

# An estimate below this times the threshold is believed, if estimates are right to its square root.
MARGIN = 0.1
SAMPLED = 61  # a prime, so that the sample has cells of all columns

# A group, what takes its logits, and its log-probs.
Started = tuple[Group, Tensor | None, LogProbs]


def _threshold(joint: Joint) -> float:
    found = joint.settings.options.occupancy_threshold
    return OCCUPANCY_THRESHOLD[joint.dtype] if found is None else found


def _joint(sources: Any, dtype: torch.dtype, settings: Settings) -> Joint:
    enc, pred, weight, bias, targets = sources
    return Joint(enc, pred, weight, bias, targets, dtype, settings)


def _estimator(joint: Joint, sources: Any, wanted: bool) -> Joint | None:
    """The same joiner in the dtype of estimates, where they help."""
    settings = joint.settings
    if not wanted or settings.sizes is not None or settings.bounds is not None or not _threshold(joint) > 0:
        return None
    dtype = joint.kernels.estimates(joint.dtype)
    return None if dtype is None else _joint(sources, dtype, settings)


class _Lattice:
    """Padded log-probs of a group, and what forward-backward makes of them."""

    def __init__(self, joint: Joint, group: Group, found: LogProbs) -> None:
        self.joint, self.group = joint, group
        self.blank = spread(found.blank, group.at, group.shape)
        self.label = spread(found.label, group.at, group.shape)

    def replace(self, at: Tensor, found: LogProbs) -> None:
        """Log-probs of some cells by others."""
        self.blank.view(-1)[at] = found.blank
        self.label.view(-1)[at] = found.label

    def run(self, wanted: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """-log P of each utterance, and if wanted, occupancies of blank and label of the group's cells (else empty)."""
        settings = self.joint.settings
        nll, blank_occ, label_occ = lattice.regularized(
            self.blank,
            self.label[:, :, :-1],
            self.group.lengths,
            settings.topology,
            settings.options,
            occupancies=wanted,
        )
        if blank_occ is None or label_occ is None:
            return nll, (nll.new_empty(0), nll.new_empty(0))
        padded = blank_occ, torch.nn.functional.pad(label_occ, (0, 1))
        blanks, labels = (x.reshape(-1).index_select(0, self.group.at) for x in padded)
        return nll, (blanks, labels)


def _keep(occupied: tuple[Tensor, Tensor], group: Group, found: LogProbs, threshold: float) -> Kept:
    """The cells of the group whose occupancy exceeds the threshold, or is NaN, of a loss that is not finite."""
    blank_occ, label_occ = occupied
    chosen = torch.nonzero(~(blank_occ + label_occ <= threshold)).squeeze(1)
    numbers = group.rows, group.columns, found.labels, found.normalizer, found.blank, found.label
    return Kept(chosen, *(x.index_select(0, chosen) for x in (*numbers, blank_occ, label_occ)))


def _forward(
    joint: Joint,
    estimator: Joint | None,
    sums: Sums | None,
    wanted: bool,
    threads: int,
    upstream: Tensor | None = None,
) -> tuple[Tensor, int, Kept | None]:
    """Loss [B] and number of cells that have a gradient; adds the gradients to sums, for an upstream gradient of 1
    without any, or without sums returns those cells, if they are to be kept.

    With two slots the log-probs of the next group are computed while the lattice of this one, which is little work for
    one thread, goes on; so are estimates, which need no cache.
    """
    loss = joint.enc.new_zeros(len(joint.settings.lengths.enc), dtype=joint.sum_dtype)
    waiting, count = [], 0
    groups, number = joint.groups(), 0
    started: deque[Started] = deque()
    try:
        while True:
            while len(started) < (2 if estimator else joint.slots) and (group := next(groups, None)) is not None:
                cache = None
                if estimator:
                    found = estimator.start_log_probs(group, None, 0, threads)
                else:
                    likely = 0 if sums is None else group.likely
                    cache = joint.cache(number) if likely else None
                    found = joint.start_log_probs(group, cache, likely, threads)
                started.append((group, cache, found))
                del found  # as soon as the lattice is done nothing should hold it
                number += 1
            group = None  # its indices go before the largest pieces are made
            if not started:
                break
            _, cache, _ = first = started.popleft()
            first[2].wait()
            numbers = first[0].utterances
            cells: Kept | None
            if estimator:
                cache = None if sums is None or not joint.room else joint.cache(0)
                nll, cells = _refined(joint, first, cache, threads)
            else:
                nll, cells = _decided(joint, first, wanted)
            del first
            loss[numbers] = nll.to(loss.dtype)
            if cells is None:
                continue
            count += cells.at.shape[0]
            if sums is not None:
                cached = 0 if cache is None else int((cells.at < joint.room).sum())  # cells are in order
                joint.add_gradients(cells.part(slice(0, cached)), cache, upstream, sums, threads)
                joint.add_gradients(cells.part(slice(cached, None)), None, upstream, sums, threads)
            elif joint.keep:
                waiting.append(cells._replace(at=cells.at[:0]))
            del cells
    finally:
        for _, _, found in started:  # after an error: no thread may write any more
            with suppress(Exception):  # the first error is the one that is raised
                found.wait()
    if sums is not None or not waiting:
        return loss, count, None
    return loss, count, Kept(*(torch.cat(x) for x in zip(*waiting, strict=True)))


def _decided(joint: Joint, started: Started, wanted: bool) -> tuple[Tensor, Kept | None]:
    """Loss of the group's utterances, and the cells with a gradient if those are wanted."""
    group, _, found = started
    nll, occupied = _Lattice(joint, group, found).run(wanted)
    return nll, _keep(occupied, group, found, _threshold(joint)) if wanted else None


def _refined(joint: Joint, started: Started, cache: Tensor | None, threads: int) -> tuple[Tensor, Kept]:
    """The same from estimated log-probs, those of all likely cells replaced; logits of the first `joint.room` of these
    are in the cache."""
    group, _, estimated = started
    threshold = _threshold(joint)
    padded = _Lattice(joint, group, estimated)
    blanks, labels = padded.run(True)[1]
    before = blanks + labels
    likely = ~(before <= MARGIN * threshold)
    computed = likely.clone()
    computed[::SAMPLED] = True
    while True:
        chosen = torch.nonzero(computed).squeeze(1)
        at, rows, columns = (x.index_select(0, chosen) for x in (group.at, group.rows, group.columns))
        part = group._replace(at=at, rows=rows, columns=columns)
        kept = 0 if cache is None else min(joint.room, chosen.shape[0])
        found = joint.start_log_probs(part, cache, kept, threads)
        found.wait()
        padded.replace(at, found)
        nll, (blanks, labels) = padded.run(True)
        occupied = blanks.index_select(0, chosen), labels.index_select(0, chosen)
        if chosen.shape[0] == likely.shape[0]:
            return nll, _keep(occupied, part, found, threshold)
        after = blanks + labels
        missed = ~(after <= threshold) & ~(before >= MARGIN**0.5 * after)
        errors = found.normalizer - estimated.normalizer.index_select(0, chosen)
        among_likely = likely.index_select(0, chosen)
        length = group.shape[1] + group.shape[2]
        if not bool(missed.any()) and all(_small(errors[x], length) for x in (among_likely, ~among_likely)):
            return nll, _keep(occupied, part, found, threshold)
        computed = torch.ones_like(likely)


def _small(errors: Tensor, length: int) -> bool:
    """Whether errors like these, of `length` cells of an alignment, change its probability by less than the margin
    allows: their mean, and three times the standard deviation of their sum."""
    if not errors.numel():
        return True
    off = errors.mean().abs() * length + 3 * (errors.square().mean() * length).sqrt()
    return bool(off < -0.5 * math.log(MARGIN))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, enc, pred, weight, bias, targets, settings):
        ctx.settings, ctx.dtype = settings, product_dtype(enc, pred)
        ctx.wanted = tuple(ctx.needs_input_grad[:4])
        at_once = settings.shared_upstream and any(ctx.wanted)
        sources = (enc, pred, weight, bias, targets)
        loss, count, ctx.sums, kept = _loss(sources, ctx.dtype, settings, ctx.wanted, at_once)
        if any(ctx.wanted):
            ctx.save_for_backward(*sources, *(kept or ()))
        kept_cells = torch.tensor(count)
        ctx.mark_non_differentiable(kept_cells)
        return loss, kept_cells

    @staticmethod
    def backward(ctx, upstream, _):
        sources = ctx.saved_tensors[:4]
        with torch.no_grad():
            gradients = [
                g.view_as(x).to(x.dtype) if wanted and g is not None else None
                for g, x, wanted in zip(_gradients(ctx, upstream), sources, ctx.wanted, strict=True)
            ]
        if torch.is_grad_enabled():
            tied = [x for x in (*sources, upstream) if x is not None]
            gradients = [None if g is None else lattice.RefuseDoubleBackward.apply(g, *tied) for g in gradients]
        return *gradients, None, None


def _loss(
    sources: Any, dtype: torch.dtype, settings: Settings, wanted: tuple[bool, bool, bool, bool], at_once: bool
) -> tuple[Tensor, int, Sums | None, Kept | None]:
    """Loss [B], number of cells with a gradient, and the gradients for an upstream gradient of 1 or those cells."""
    with torch.autocast(sources[0].device.type, enabled=False):
        joint = _joint(sources, dtype, settings)
        sums = joint.sums(wanted) if at_once else None
        estimator = _estimator(joint, sources, any(wanted))
        with joint.parallel() as threads:
            loss, count, kept = _forward(joint, estimator, sums, any(wanted), threads)
    return loss, count, sums, kept


def _gradients(ctx, upstream: Tensor) -> list[Tensor | None]:
    """By enc, pred, weight and bias."""
    sources: Any = ctx.saved_tensors[:5]
    if ctx.settings.shared_upstream:
        # scaled in place, a copy of enc's gradient may be gigabytes: a second backward pass has to compute them anew
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            sums = _loss(sources, ctx.dtype, ctx.settings, ctx.wanted, True)[2]
        assert sums is not None
        return lattice.scale_([sums.enc, sums.pred, sums.weight, sums.bias], upstream)
    kept = ctx.saved_tensors[5:]
    with torch.autocast(upstream.device.type, enabled=False):
        joint = _joint(sources, ctx.dtype, ctx.settings)
        sums = joint.sums(ctx.wanted)
        with joint.parallel() as threads:
            if kept:
                joint.add_gradients(Kept(*kept), None, upstream, sums, threads)
            elif not joint.keep:
                _forward(joint, None, sums, True, threads, upstream)
    return [sums.enc, sums.pred, sums.weight, sums.bias]


def fused_loss(
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
    bounds: Bounds | None = None,
    sizes: Sizes | None = None,
) -> MethodLoss:
    """-log P of each utterance from checked inputs, and "kept_cells", the number of cells that have a gradient.

    shared_upstream: all utterances will get the same upstream gradient; it is not checked. bounds: only these cells
    are part of the lattice. sizes: of the pieces, None for the fastest.
    """
    settings = Settings(lengths, activation, topology, blank, options, shared_upstream, bounds, sizes)
    loss, kept_cells = _FusedLoss.apply(enc, pred, weight, bias, targets.long(), settings)
    return MethodLoss(loss, None, {"kept_cells": int(kept_cells)})
