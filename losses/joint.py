"""The joiner of one batch in tiles of packed lattice cells: add, activate, project, gather; and its gradient.

In half precision the logits of blank and of the next label, the two that the lattice sums over all frames, are dot
products of their own, of hidden states and weights that are not rounded: only the normaliser, in which the rounding of
many tokens averages out, comes from products in half precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import backends
from losses.cells import Bounds, Group, grouping, groups, next_labels
from losses.options import TransducerLossOptions
from losses.shapes import Lengths
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
    (U+1)], next label (-1: none), log-normaliser, log-probs of blank and label, occupancies of both."""

    at: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    normalizer: Tensor
    blank_lp: Tensor
    label_lp: Tensor
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
        readable = self.kernels.readable
        self.enc, self.pred = (readable(x.detach().reshape(-1, x.shape[2])).contiguous() for x in (enc, pred))
        self.vocab_size, self.dim = weight.shape
        self.width = self.kernels.width(self.vocab_size, dtype)
        self.weight = self._wide(weight.detach())
        self.bias = None if bias is None else self._wide(bias.detach())
        self.exact_scores = dtype.itemsize == 2
        if self.exact_scores:  # as they came: not rounded, unless they came rounded
            self.sources = [None if x is None else readable(x.detach()).contiguous() for x in (weight, bias)]
        self.labels = next_labels(targets, settings.lengths).view(-1)
        self.frames, self.columns = enc.shape[1], pred.shape[1]
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = settings.sizes or default_sizes(self.kernels, dtype)
        self.rows = rows_in(sizes, self.width, self.dim, dtype, settings.lengths.cells)
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

    def _wide(self, x: Tensor) -> Tensor:
        """weight or bias in the dtype of the products, with rows of zeros up to the width of the logits."""
        if self.width == self.vocab_size:
            return x.to(self.dtype).contiguous()
        wide = x.new_zeros(self.width, *x.shape[1:], dtype=self.dtype)
        wide[: self.vocab_size] = x
        return wide

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

    def scratch(self, name: str, rows: int, width: int) -> Tensor:
        """[rows, width], the calling thread's own: blocks that come and go in several threads cost page faults, and
        leave the allocator with holes."""
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
        arguments = settings.lengths, self.frames, self.columns, settings.topology, self._most_cells, self.room
        return groups(*arguments, device, settings.bounds)

    @property
    def _most_cells(self) -> int:
        """Of a group."""
        return min(self.rows.group, self.room or self.rows.group)

    @cached_property
    def _cache_rows(self) -> int:
        """Cells that the largest group needs, in whole tiles: elsewhere than on CPU, memory that nothing is written to
        is taken all the same."""
        lengths, bounds = self.settings.lengths, self.settings.bounds
        size = bounds.size if bounds else self.columns
        found = grouping(lengths, self._most_cells, size)
        cells = (sum(lengths.enc[b] * min(lengths.target[b] + 1, size) for b in numbers) for numbers in found)
        return min(self.room, filled(max(cells, default=0), self.tile))

    def cache(self, number: int) -> Tensor:
        """[C, width], for the logits of the first cells of a group; one for each of the groups that are under way."""
        return self.buffer(f"cache {number % self.slots}", self.width, self._cache_rows)

    def start_log_probs(self, group: Group, cache: Tensor | None, kept: int, threads: int) -> LogProbs:
        """Begin to compute the log-probs of the group's cells.

        cache [C, width] takes the logits of the first `kept` cells, filled up.
        """
        count = group.at.shape[0]
        labels = self.labels.index_select(0, group.columns)
        out = [self.enc.new_empty(count, dtype=self.sum_dtype) for _ in range(3)]

        def tile(start: int, stop: int) -> None:
            part, size = slice(start, stop), stop - start
            hidden = self.scratch("hidden", self.tile if self.few else filled(size), self.dim)
            numbers = tuple(x[part] for x in out)
            if self.exact_scores:
                self.kernels.scores(
                    self.enc, self.pred, group.rows[part], group.columns[part], self.settings.activation, *self.sources,
                    labels[part], self.settings.blank, hidden[:size], numbers[:2],
                )  # fmt: skip
            else:
                self._hidden(group.rows[part], group.columns[part], hidden[:size])
            hidden[size:] = 0
            if cache is None or stop > kept:
                place = self.scratch("logits", self.tile, self.width) if self.few else None
            else:
                place = cache[start : start + hidden.shape[0]]
            logits = self._linear(hidden, place)[:size]
            if self.exact_scores:
                self.kernels.normalize(logits, self.vocab_size, labels[part], self.settings.blank, numbers)
            else:
                self.kernels.gather(logits, labels[part], self.settings.blank, numbers)

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
        by_logits = self.buffer("by_logits", self.width, self.chunk)[:rows]
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
                logits, self.vocab_size, at, labels, self.settings.blank, *numbers, scale[part],
                self.settings.options.clamp, by_logits[part],
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
                out = self.scratch("weight", product.shape[0], self.dim) if self.few else None
                total += torch.mm(product, hidden, out=out)

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
