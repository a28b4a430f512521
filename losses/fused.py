"""Method "fused": joiner, loss and gradient in tiles of packed lattice cells; nothing of the logits' size is made.

Utterances are taken in groups. The forward pass computes the logits of a group tile by tile, a tile small enough to
stay in the processor's cache, and keeps three numbers of each cell: the log-probs of blank and of the next label, and
the log-normaliser. Forward-backward over those (losses/lattice.py) gives the occupancies of the group's cells. Only
cells whose occupancy exceeds a threshold have a gradient that counts; of these the logits are computed again, become
the gradient by the logits

    p * (b + l) - b * [token is blank] - l * [token is the next label]                       (Li et al. 2019, sec. 3.2)

and go into the gradients of encoder output, predictor output, weight and bias at once, which are summed in float32 (or
float64).

Cells that no alignment reaches are not computed at all: padding, two corners of the lattice in "modified", and what
pruning leaves out.

When. Where all utterances will get the same upstream gradient (every reduction but "none"), the gradients are computed
in the forward pass for an upstream gradient of 1 and scaled in the backward pass, so that the logits of the cells
around the diagonal of the lattice, which are the likely ones, can be used while they are at hand (up to CACHE bytes of
them). Otherwise index, occupancies and normaliser of the kept cells wait for the backward pass, packed, and the
upstream gradient is applied to each utterance's before sums over utterances.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import backends, lattice
from losses.cells import OCCUPANCY_THRESHOLD, Bounds, Group, groups, next_labels, spread
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.shapes import Lengths, product_dtype
from losses.sizes import Sizes, default_sizes, filled, rows_in

LEAST_SHARE = 8  # a cache that holds less than one in so many cells of an utterance is not worth its memory
MOST_COLUMNS = 512  # columns of the weight's gradient, or of the hidden states', in one product


class Settings(NamedTuple):
    """Arguments without a gradient."""

    lengths: Lengths
    activation: str
    topology: str
    blank: int
    options: TransducerLossOptions
    shared_upstream: bool
    bounds: Bounds | None = None
    sizes: Sizes | None = None  # None: those of the kernels


class Kept(NamedTuple):
    """Cells with a gradient, [K] each: index into the cached logits (empty without a cache), into [B * T] and into [B *
    (U+1)], next label (-1: none), log-normaliser, occupancies of blank and label."""

    at: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    normalizer: Tensor
    blank_occ: Tensor
    label_occ: Tensor

    def part(self, index: Tensor | slice) -> Kept:
        """Some of the cells."""
        if isinstance(index, slice):
            return Kept(*(x[index] for x in self))
        return Kept(*(x.index_select(0, index) if x.numel() else x for x in self))


class LogProbs(NamedTuple):
    """Of a group's cells, [N] each: next label, log-probs of blank and of that label, log-normaliser; all but the label
    are there after wait()."""

    labels: Tensor
    blank: Tensor
    label: Tensor
    normalizer: Tensor
    wait: Callable[[], None]


# A group, what takes its logits, and its log-probs.
Started = tuple[Group, Tensor | None, LogProbs]


class Sums:
    """Gradients by enc [B * T, J], pred [B * (U+1), J], weight [V, J] and bias [V] while they are summed; None where
    none is wanted."""

    def __init__(self, sizes: tuple[int, int, int, int], wanted: tuple[bool, bool, bool, bool], like: Tensor) -> None:
        rows, columns, vocab_size, dim = sizes
        states = wanted[0] or wanted[1]
        self.enc = like.new_zeros(rows, dim) if states else None
        self.pred = like.new_zeros(columns, dim) if states else None
        self.weight = like.new_zeros(vocab_size, dim) if wanted[2] else None
        self.bias = like.new_zeros(vocab_size) if wanted[3] else None


class Joint:
    """One batch: its joiner, cell by cell."""

    def __init__(self, enc, pred, weight, bias, targets, dtype: torch.dtype, settings: Settings) -> None:
        self.kernels: Any = backends.load("packed", settings.options.backend, enc.device, dtype)
        self.settings, self.dtype = settings, dtype
        self.enc, self.pred = (x.detach().reshape(-1, x.shape[2]).contiguous() for x in (enc, pred))
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.labels = next_labels(targets, settings.lengths).view(-1)
        self.frames, self.columns = enc.shape[1], pred.shape[1]
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.vocab_size, self.dim = weight.shape
        sizes = settings.sizes or default_sizes(self.kernels, dtype)
        self.rows = rows_in(sizes, self.vocab_size, self.dim, dtype, settings.lengths.cells)
        self.tile, self.room, self.chunk = self.rows.tile, self.rows.cache, self.rows.chunk
        largest = max((t * (u + 1) for t, u in zip(*settings.lengths, strict=True)), default=0)
        if self.room * LEAST_SHARE < largest and settings.bounds is None:
            self.room = 0
        self.keep, self.few, self.most_threads = sizes.keep, sizes.few, sizes.threads
        self.slots = 2 if sizes.overlap else 1
        self.packed = self.weight if self.few else self.kernels.pack(self.weight, self.tile)
        self._buffers: dict[str, Tensor] = {}
        self._transposed: dict[int, Tensor] = {}
        self._own = threading.local()

    @contextmanager
    def parallel(self) -> Iterator[int]:
        """Within, torch leaves the sharing out to the kernels' `start`; gives the number of threads."""
        with self.kernels.parallel() as threads:
            yield min(threads, self.most_threads or threads)

    def buffer(self, name: str, width: int, rows: int) -> Tensor:
        """[rows, width] in the dtype of the products; used again and again, since fresh memory costs a page fault every
        4 KiB."""
        if name not in self._buffers:
            self._buffers[name] = self.enc.new_empty(rows, width, dtype=self.dtype)
        return self._buffers[name]

    def scratch(self, name: str, rows: int, width: int) -> Tensor | None:
        """[rows, width], the calling thread's own, where memory is limited: blocks that come and go in several threads
        leave the allocator with holes. Else None."""
        if not self.few:
            return None
        held = self._own.__dict__
        if name not in held or held[name].numel() < rows * width:
            held[name] = self.enc.new_empty(rows * width, dtype=self.dtype)
        return held[name][: rows * width].view(rows, width)

    def sums(self, wanted: tuple[bool, bool, bool, bool]) -> Sums:
        sizes = self.enc.shape[0], self.pred.shape[0], self.vocab_size, self.dim
        return Sums(sizes, wanted, self.enc.new_empty(0, dtype=self.sum_dtype))

    def groups(self) -> Iterator[Group]:
        """The batch in groups whose logits, all or those nearest the diagonal, fit the cache."""
        settings, device = self.settings, self.enc.device
        most = min(self.rows.group, self.room or self.rows.group)
        arguments = settings.lengths, self.frames, self.columns, settings.topology, most, self.room
        return groups(*arguments, device, settings.bounds)

    def cache(self, number: int) -> Tensor:
        """[C, V], for the logits of the first cells of a group; one for each of the groups that are under way."""
        return self.buffer(f"cache {number % self.slots}", self.vocab_size, self.room)

    def start_log_probs(self, group: Group, cache: Tensor | None, kept: int, threads: int) -> LogProbs:
        """Begin to compute the log-probs of the group's cells.

        cache [C, V] takes the logits of the first `kept` cells, filled up.
        """
        count = group.at.shape[0]
        labels = self.labels.index_select(0, group.columns)
        out = [self.enc.new_empty(count, dtype=self.sum_dtype) for _ in range(3)]

        def tile(start: int, stop: int) -> None:
            part, size = slice(start, stop), stop - start
            hidden = self.scratch("hidden", self.tile, self.dim)
            if hidden is None:
                hidden = self.enc.new_empty(filled(size), self.dim, dtype=self.dtype)
            self._hidden(group.rows[part], group.columns[part], hidden[:size])
            hidden[size:] = 0
            if cache is None or stop > kept:
                place = self.scratch("logits", self.tile, self.vocab_size)
            else:
                place = cache[start : start + hidden.shape[0]]
            logits = self._linear(hidden, place)
            self.kernels.gather(logits[:size], labels[part], self.settings.blank, tuple(x[part] for x in out))

        tasks = [
            partial(tile, start, min(start + self.tile, last))
            for first, last in ((0, kept), (kept, count))
            for start in range(first, last, self.tile)
        ]
        return LogProbs(labels, out[0], out[1], out[2], self.kernels.start(tasks, threads))

    def _by_hidden(self, by_logits: Tensor, columns: slice) -> Tensor:
        """Gradient by some columns of the hidden states, [N, W]."""
        if self.few:
            out = self.scratch("states", by_logits.shape[0], columns.stop - columns.start)
            return torch.mm(by_logits, self.weight[:, columns], out=out)
        if columns.start not in self._transposed:
            self._transposed[columns.start] = self.kernels.pack(self.weight[:, columns].t(), self.tile)
        return self.kernels.linear(by_logits, self._transposed[columns.start], None, None)

    def _linear(self, hidden: Tensor, out: Tensor | None) -> Tensor:
        if not self.few or out is None:
            return self.kernels.linear(hidden, self.packed, self.bias, out)
        if self.bias is None:  # the kernels' own product may be made elsewhere and copied
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def _hidden(self, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        self.kernels.hidden(self.enc, self.pred, rows, columns, self.settings.activation, out)

    def add_gradients(
        self, kept: Kept, cache: Tensor | None, upstream: Tensor | None, sums: Sums, threads: int
    ) -> None:
        """Add the gradients of the kept cells, whose logits are in the cache or else are computed again.

        upstream [B]; None stands for 1.
        """
        count = kept.rows.shape[0]
        for start in range(0, count, self.chunk):
            part = slice(start, min(start + self.chunk, count))
            self._add_chunk(kept.part(part), cache, upstream, sums, threads)

    def _add_chunk(self, kept: Kept, cache: Tensor | None, upstream: Tensor | None, sums: Sums, threads: int) -> None:
        count = kept.rows.shape[0]
        rows = filled(count)
        if self.few:
            rows = self.rows.small if count <= self.rows.small else self.chunk
        hidden = self.buffer("hidden", self.dim, self.chunk)[:rows]
        by_logits = self.buffer("by_logits", self.vocab_size, self.chunk)[:rows]
        if upstream is None:
            scale = torch.ones_like(kept.normalizer)
        else:
            scale = upstream.to(self.sum_dtype).index_select(0, kept.rows.div(self.frames, rounding_mode="floor"))
        hidden[count:] = 0
        starts = range(0, count, self.tile)
        by_bias: list[Any] = [None] * len(starts)

        def by_cells(i: int) -> None:
            part = slice(starts[i], min(starts[i] + self.tile, count))
            filled = slice(starts[i], starts[i] + self.tile)  # up to ROWS - 1 more at the end
            at, rows, columns, *rest = kept.part(part)
            self._hidden(rows, columns, hidden[part])
            logits = cache
            if logits is None:
                logits = self._linear(hidden[filled], by_logits[filled])
                at = torch.arange(rows.shape[0], device=rows.device)
            labels, *numbers = rest
            by_bias[i] = self.kernels.gradient(
                logits, at, labels, self.settings.blank, *numbers, scale[part], self.settings.options.clamp,
                by_logits[part],
            )  # fmt: skip

        def by_states(columns: slice) -> None:
            for start in starts:
                part, filled = slice(start, min(start + self.tile, count)), slice(start, start + self.tile)
                by_hidden = self._by_hidden(by_logits[filled], columns)
                self.kernels.add(
                    by_hidden[: part.stop - start], hidden[part], columns.start, kept.rows[part], kept.columns[part],
                    self.settings.activation, sums.enc, sums.pred,
                )  # fmt: skip

        def by_weight(tokens: slice) -> None:
            assert sums.weight is not None
            total, product = sums.weight[tokens], by_logits[:, tokens].t()
            if total.dtype == self.dtype:
                total.addmm_(product, hidden)
            else:
                total += torch.mm(product, hidden, out=self.scratch("weight", product.shape[0], self.dim))

        self.kernels.start([partial(by_cells, i) for i in range(len(starts))], threads)()
        by_logits[count:] = 0
        tasks = []
        if sums.enc is not None:
            tasks += [partial(by_states, x) for x in self.kernels.shares(self.dim, threads, MOST_COLUMNS)]
        if sums.weight is not None:
            tasks += [partial(by_weight, x) for x in self.kernels.shares(self.vocab_size, threads, MOST_COLUMNS)]
        self.kernels.start(tasks, threads)()
        if sums.bias is not None:
            for x in by_bias:
                sums.bias += x


def _keep(occupied: list[Tensor], group: Group, labels: Tensor, normalizer: Tensor, threshold: float) -> Kept:
    """The cells whose occupancy exceeds the threshold, or is NaN, of a loss that is not finite."""
    blank_occ = occupied[0].reshape(-1).index_select(0, group.at)
    label_occ = torch.nn.functional.pad(occupied[1], (0, 1)).reshape(-1).index_select(0, group.at)
    chosen = torch.nonzero(~(blank_occ + label_occ <= threshold)).squeeze(1)
    found = group.rows, group.columns, labels, normalizer, blank_occ, label_occ
    return Kept(chosen, *(x.index_select(0, chosen) for x in found))


def _forward(
    joint: Joint, sums: Sums | None, wanted: bool, threads: int, upstream: Tensor | None = None
) -> tuple[Tensor, int, Kept | None]:
    """Loss [B] and number of cells that have a gradient; adds the gradients to sums, for an upstream gradient of 1
    without any, or without sums returns those cells, if they are to be kept.

    With two slots the log-probs of the next group are computed while the lattice of this one, which is little work for
    one thread, goes on.
    """
    loss = joint.enc.new_zeros(len(joint.settings.lengths.enc), dtype=joint.sum_dtype)
    waiting, count = [], 0
    groups, number = joint.groups(), 0
    started: deque[Started] = deque()
    try:
        while True:
            while len(started) < joint.slots and (group := next(groups, None)) is not None:
                likely = 0 if sums is None else group.likely
                cache = joint.cache(number) if likely else None
                started.append((group, cache, joint.start_log_probs(group, cache, likely, threads)))
                number += 1
            group = None  # its indices go before the largest pieces are made
            if not started:
                break
            numbers = started[0][0].utterances
            nll, cells = _lattice(joint, started[0], wanted)
            loss[numbers] = nll.to(loss.dtype)
            _, cache, _ = started.popleft()
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
            found.wait()
    if sums is not None or not waiting:
        return loss, count, None
    return loss, count, Kept(*(torch.cat(x) for x in zip(*waiting, strict=True)))


def _lattice(joint: Joint, started: Started, wanted: bool) -> tuple[Tensor, Kept | None]:
    """Loss of the group's utterances, and the cells with a gradient if those are wanted."""
    group, _, found = started
    settings = joint.settings
    found.wait()
    nll, *occupied = lattice.regularized(
        spread(found.blank, group.at, group.shape),
        spread(found.label, group.at, group.shape)[:, :, :-1],
        group.lengths,
        settings.topology,
        settings.options,
        occupancies=wanted,
    )
    if not wanted:
        return nll, None
    threshold = settings.options.occupancy_threshold
    if threshold is None:
        threshold = OCCUPANCY_THRESHOLD[joint.dtype]
    return nll, _keep([x for x in occupied if x is not None], group, found.labels, found.normalizer, threshold)


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
        enc, pred, weight, bias, targets = sources
        joint = Joint(enc, pred, weight, bias, targets, dtype, settings)
        sums = joint.sums(wanted) if at_once else None
        with joint.parallel() as threads:
            loss, count, kept = _forward(joint, sums, any(wanted), threads)
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
        enc, pred, weight, bias, targets = sources
        joint = Joint(enc, pred, weight, bias, targets, ctx.dtype, ctx.settings)
        sums = joint.sums(ctx.wanted)
        with joint.parallel() as threads:
            if kept:
                joint.add_gradients(Kept(*kept), None, upstream, sums, threads)
            elif not joint.keep:
                _forward(joint, sums, True, threads, upstream)
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
