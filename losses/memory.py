"""`memory_limit`: how much each method takes, and which sizes or which method keep to a limit.

What counts is the memory that a forward and a backward pass take above their inputs and the gradients that they leave:
resident memory of the process on CPU, allocated memory of the device elsewhere. The estimates follow the code term by
term, in bytes; what the allocator and the libraries add is in MARGIN and SLACK, which measurements justify
(`python -m losses.bench.memory_limit`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from losses import backends
from losses.cells import grouping
from losses.joint import MOST_COLUMNS
from losses.options import TransducerLossOptions
from losses.samplewise import GROUP, groups_within
from losses.shapes import Lengths
from losses.sizes import ROWS, Rows, Sizes, default_sizes, filled, rows_in

UNITS = {"": 1, "B": 1} | {p + s: b**n for s, b in (("B", 1000), ("iB", 1024)) for n, p in enumerate("KMGT", 1)}
MARGIN = 1.25  # on the sum of the terms: rounding to pages, fragments, rows that come and go
SLACK = 320 * 2**10  # bytes, whatever the problem
THREAD = 350 * 2**10  # bytes of each thread of several: stack, arena of the allocator, buffers of the matrix products
HOLES = 2.2  # what blocks of many sizes leave free in the allocator: up to 1.85 of what they take was measured
PACKING = 600 * 2**10  # bytes at most of the copies that MKL makes of parts of the factors, on each thread
CODE = 850 * 2**10  # bytes of what oneDNN keeps for each shape of a half precision product

# Shares of the default tile, group and chunk, and about how much longer the loss takes; 0: the least there is.
SHARES = ((1.0, 0.0), (0.5, 0.02), (0.25, 0.05), (0.1, 0.12), (0.0, 0.4))
CACHES = (1.0, 0.5, 0.25, 0.1, 0.0)  # shares of the default cache
ONE_THREAD = 1.0  # how much longer the loss takes on one thread of two
NO_CACHE = 0.25  # how much longer the loss takes when all logits of the gradient are computed again

_log = logging.getLogger("losses")
_said: set[object] = set()


class MemoryLimitError(ValueError):
    """No method fits; smallest: the limit, in bytes, that would."""

    def __init__(self, text: str, smallest: int) -> None:
        super().__init__(text)
        self.smallest = smallest


class Work(NamedTuple):
    """What the memory depends on.

    frames, columns: T and U+1 of the padded batch.  source: dtype of enc and pred.  weight, product: of the weight and
    of the logits.  wanted: gradients of enc, pred, weight and bias.  shared_upstream: see losses/fused.py.  copies:
    bytes of inputs that are not contiguous.  simple: itemsize of the trivial joiner's logits, 0 without.
    """

    lengths: Lengths
    frames: int
    columns: int
    vocab_size: int
    dim: int
    source: torch.dtype
    weight: torch.dtype
    product: torch.dtype
    wanted: tuple[bool, bool, bool, bool]
    shared_upstream: bool
    topology: str
    options: TransducerLossOptions
    device: torch.device
    threads: int
    copies: int
    simple: int


class Plan(NamedTuple):
    """method: what is called, with these more arguments.  exact: it stands for a method without a threshold."""

    method: str
    arguments: dict[str, Any]
    exact: bool
    text: str


def parse_limit(limit: object) -> int:
    """Bytes of "2GiB", "500MB", "1.5 GiB" or an int; ValueError in one line."""
    wrong = f"memory_limit={limit!r} is not a size"
    if isinstance(limit, int) and not isinstance(limit, bool):
        number, unit = float(limit), 1
    elif isinstance(limit, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", limit)
        units = {name.lower(): size for name, size in UNITS.items()}
        if not found or found[2].lower() not in units:
            raise ValueError(f'{wrong}; pass a number with one of {", ".join(u for u in UNITS if u)}, as in "2GiB"')
        number, unit = float(found[1]), units[found[2].lower()]
    else:
        raise ValueError(f'{wrong}; pass bytes as an int, or text as in "2GiB"')
    if not number * unit >= 1:
        raise ValueError(f"{wrong} above 0; pass None for no limit")
    return int(number * unit)


def text_of(size: float) -> str:
    """Bytes with a binary unit, rounded up, so that `parse_limit` gives no less."""
    unit = next((u for u in ("GiB", "MiB") if size >= UNITS[u]), "KiB")
    return f"{math.ceil(size * 10 / UNITS[unit]) / 10:g}{unit}"


def estimate_fused(work: Work, sizes: Sizes, bounds: int = 0) -> int:
    """Bytes that method "fused" takes above inputs and gradients; bounds: columns of each frame, 0: all."""
    kernels = backends.load("packed", work.options.backend, work.device, work.product)
    copied = work.weight != work.product or kernels.width(work.vocab_size, work.product) != work.vocab_size
    work = work._replace(vocab_size=kernels.width(work.vocab_size, work.product))
    rows = rows_in(sizes, work.vocab_size, work.dim, work.product, work.lengths.cells)
    lengths, number = work.lengths, work.product.itemsize
    total = 8 if work.product == torch.float64 else 4
    tiles = 1 if _torch_kernels(work, "packed") else min(work.threads, sizes.threads or work.threads)
    batch, wanted = len(lengths.enc), any(work.wanted)
    size = bounds or work.columns
    steady = work.copies + 8 * batch * (2 * work.columns - 1)  # targets, labels
    steady += tiles * _packing(work)
    if not _torch_kernels(work, "packed"):  # float16 is read by no compiled loop
        steady += 4 * work.dim * batch * (work.frames + work.columns) * (work.source == torch.float16)
        steady += 4 * work.vocab_size * (work.dim + 1) * (work.weight == torch.float16 and number == 2)
    if copied:
        steady += number * work.vocab_size * (work.dim + 1)
    if wanted:
        steady += _sums(work, total)
    at_once = wanted and (work.shared_upstream or not sizes.keep)
    most = min(rows.group, rows.cache or rows.group) if at_once else rows.group
    cells = [t * min(u + 1, size) for t, u in zip(*lengths, strict=True)]
    everything = sum(cells)
    cache = most_lattice = most_kept = 0
    for numbers in grouping(lengths, most, size):
        count = sum(cells[b] for b in numbers)
        if at_once:
            cache = max(cache, min(filled(count, rows.tile), rows.cache))
        most_lattice = max(most_lattice, _lattice(work, numbers, count, total, wanted))
        most_kept = max(most_kept, (32 + 5 * total) * count)
    cache *= work.vocab_size * number
    tile = tiles * _forward_tile(work, rows.tile) + _code(work, 1)
    peak = steady + tile + most_lattice
    if at_once:
        peak += cache + max(0, most_kept - most_lattice) + _gradient(work, rows, tiles, total)
    elif wanted:
        waiting = (24 + 5 * total) * everything
        peak = steady + tile + waiting + max(waiting, most_lattice, _gradient(work, rows, tiles, total))
    return _rounded(peak) + (THREAD * tiles if tiles > 1 else 0)


def estimate_batched(work: Work, numbers: list[int] | None = None) -> int:
    """Bytes that method "batched" takes, of all utterances or of some, cut to the longest of them."""
    lengths = work.lengths
    some = range(len(lengths.enc)) if numbers is None else numbers
    frames = work.frames if numbers is None else max(lengths.enc[b] for b in some)
    columns = work.columns if numbers is None else max(lengths.target[b] for b in some) + 1
    cells = len(some) * frames * columns
    source, number = work.source.itemsize, work.product.itemsize
    total = 8 if work.product == torch.float64 else 4
    cast = 2 * number if work.source != work.product else 0
    hidden = work.dim * (3 * source + cast)
    logits = work.vocab_size * (2 * number + (0 if number >= total or not _torch_kernels(work, "logits") else total))
    padded = 2 * source * work.dim * len(some) * (frames + columns)
    weights = work.vocab_size * work.dim * 2 * (number + total)
    lattice = _lattice(work, list(some), 0, total, True) + 6 * total * cells
    return _rounded(work.copies + cells * (hidden + logits) + padded + weights + lattice + _code(work, 3))


def estimate_samplewise(work: Work, group: int) -> float:
    """Bytes that method "samplewise" takes with groups of so many logits."""
    total = torch.promote_types(work.source, torch.float32).itemsize
    groups = groups_within(work.lengths, work.vocab_size, group)
    return HOLES * max(estimate_batched(work, numbers) for numbers in groups) + _sums(work, total)


def _estimate_simple(work: Work) -> int:
    """Bytes of the trivial joiner's loss: autograd keeps about so many arrays of the size of its logits."""
    lengths, total = work.lengths, max(4, work.simple)
    rows = sum(lengths.enc) + sum(lengths.target) + len(lengths.enc)
    padded = len(lengths.enc) * (work.frames + work.columns)
    cells = len(lengths.enc) * work.frames * work.columns
    copies = 2 + (work.simple < 4) + bool(work.options.am_only_scale)
    longest = max(lengths.enc) + max(lengths.target) + 1
    kept = copies * total * rows * work.vocab_size + 12 * total * cells
    backward = (work.simple * padded + 5 * total * longest) * work.vocab_size
    return kept + backward


def _sums(work: Work, total: int) -> int:
    """Sums of gradients that are not themselves the gradients which are left."""
    states = work.dim * len(work.lengths.enc)
    sizes = states * work.frames, states * work.columns, work.vocab_size * work.dim, work.vocab_size
    made = (work.wanted[0] or work.wanted[1],) * 2 + work.wanted[2:]
    dtypes = (work.source, work.source, work.weight, work.weight)
    return sum(
        total * size
        for size, dtype, is_made, wanted in zip(sizes, dtypes, made, work.wanted, strict=True)
        if is_made and (not wanted or dtype.itemsize != total)
    )


def _lattice(work: Work, numbers: list[int], count: int, total: int, wanted: bool) -> int:
    """Forward-backward over the padded lattices of some utterances, `count` of whose cells are packed."""
    enc, target = ([lens[b] for b in numbers] for lens in work.lengths)
    frames, columns = max(enc), max(target) + 1
    padded = len(numbers) * frames * columns
    options = work.options
    shift = 0 if work.topology != "regular" else 1
    copies = 3 + (work.topology == "constrained") + bool(options.delay_penalty) + 2 * (options.alignment_power != 1)
    occupied = 2 if wanted else 0
    if _torch_kernels(work, "lattice"):
        layers = len(numbers) * (frames + shift * (columns - 1) + 1) * columns
        scratch = 8 * layers * (14 if wanted else 8)
    else:
        scratch = 24 * max((t + shift * u + 1) * (u + 1) for t, u in zip(enc, target, strict=True))
    packed = 32 * count + 3 * total * count  # index arrays and labels, log-probs
    index = 40 * count + 3 * padded
    keeping = (total * (4 + occupied) + 1) * padded + (32 + 7 * total) * count
    return max(index, packed + max(total * padded * (copies + occupied) + scratch, keeping if wanted else 0))


def _forward_tile(work: Work, rows: int) -> int:
    """Temporaries of a tile of the forward pass."""
    number, dim, vocab_size = work.product.itemsize, work.dim, work.vocab_size
    if _torch_kernels(work, "packed"):
        states = 3 * work.source.itemsize if number > 2 else 4 * max(4, work.source.itemsize)
        return rows * (dim * (number + states) + vocab_size * (2 * number + 12))
    return rows * (number * (dim + vocab_size) + 8)


def _gradient(work: Work, rows: Rows, tiles: int, total: int) -> int:
    """Buffers of a chunk and temporaries of its tiles."""
    number, dim, vocab_size = work.product.itemsize, work.dim, work.vocab_size
    chunk, tile = rows.chunk, rows.tile
    buffers = chunk * (number * (dim + vocab_size) + 2 * total + 8) + total * vocab_size * (tiles + -(-chunk // tile))
    columns = min(dim, MOST_COLUMNS)
    if _torch_kernels(work, "packed"):
        by_cells = tile * vocab_size * (2 * number + 3 * total + 1)
        by_states = tile * columns * (number + 5 * total)
    else:
        by_cells, by_states = tile * 8, tile * columns * number
    # of half precision the product is made first and then added
    by_weight = 0 if number == total else min(vocab_size, MOST_COLUMNS) * dim * number
    kernels = backends.load("packed", work.options.backend, work.device, work.product)
    widths = [len({x.stop - x.start for x in kernels.shares(n, tiles, MOST_COLUMNS)}) for n in (dim, vocab_size)]
    shapes = widths[0] + widths[1] * (1 + (0 < rows.small < chunk))
    return buffers + tiles * (by_cells + by_states + by_weight) + _code(work, shapes)


def _code(work: Work, shapes: int) -> int:
    """oneDNN's code for products of so many shapes, which it keeps."""
    return CODE * shapes if work.device.type == "cpu" and work.product.itemsize == 2 else 0


def _packing(work: Work) -> int:
    """What MKL keeps on each thread to copy parts of the factors to."""
    if work.device.type != "cpu" or work.product.itemsize == 2:
        return 0
    return min(PACKING, work.product.itemsize * work.vocab_size * work.dim)


def _torch_kernels(work: Work, kind: Any) -> bool:
    kernels = backends.load(kind, work.options.backend, work.device, work.product)
    return kernels.__name__ == backends.BACKENDS["torch"][kind]


def _rounded(size: float) -> int:
    return math.ceil(size * MARGIN) + SLACK


def _candidates(default: Sizes, waits: bool) -> Iterator[Sizes]:
    """Sizes from the fastest down; waits: the gradient waits for the backward pass."""
    found = []
    for share, longer in SHARES:
        tile, group, chunk = (int(x * share) for x in (default.tile, default.group, default.chunk))
        least = default.least if share else min(ROWS, default.least)
        for threads in (0, 1):
            longer += threads * ONE_THREAD
            if waits:
                found.append((longer, Sizes(tile, group, 0, chunk, least, few=True, threads=threads)))
            for cache in CACHES:
                sizes = Sizes(tile, group, int(default.cache * cache), chunk, least, not waits, True, threads)
                found.append((longer + NO_CACHE * (waits + 1 - cache), sizes))
    yield from (sizes for _, sizes in sorted(found, key=lambda x: x[0]))


def plan(method: str, work: Work, limit: object) -> Plan:
    """What keeps to the limit, the fastest that is known to; says so once. MemoryLimitError if nothing does."""
    most = parse_limit(limit)
    if not work.lengths.enc:
        return Plan(method, {}, False, f"memory_limit={limit!r}: method {method!r}; there is nothing to compute")
    bounds, more = 0, 0
    if method == "pruned":
        bounds, more = work.options.prune_range, math.ceil(_estimate_simple(work) * MARGIN)
    first, smallest = "", math.inf
    if method in ("batched", "samplewise"):
        groups = [1.0] if method == "batched" else [1.0, 0.25, 0.06, 0.0]
        for share in groups:
            group = int(GROUP * share)
            size = estimate_batched(work) if method == "batched" else estimate_samplewise(work, group)
            if size <= most:
                more_arguments = {} if method == "batched" else {"group": group}
                how = "" if method == "batched" else f" in groups of {group} logits"
                return _say(method, work, limit, Plan(method, more_arguments, False, how), size)
            smallest = min(smallest, size)
            first = first or f" instead of {method}, which would take {text_of(size)}"
    kernels = backends.load("packed", work.options.backend, work.device, work.product)
    fastest = default_sizes(kernels, work.product, overlap=False)
    default = fastest._replace(few=True)
    if not work.shared_upstream:
        default = default._replace(cache=0)
    for sizes in _candidates(fastest, not work.shared_upstream):
        size = more + estimate_fused(work, sizes, bounds)
        smallest = min(smallest, size)
        if size <= most:
            how = " in its default sizes" if sizes == default else f" in {_named(sizes)}"
            if not first and sizes != default:
                first = f"; the default sizes would take {text_of(more + estimate_fused(work, default, bounds))}"
            name = method if method == "pruned" else "fused"
            return _say(method, work, limit, Plan(name, {"sizes": sizes}, name != method, how + first), size)
    needed = text_of(smallest)
    raise MemoryLimitError(
        f"memory_limit={limit!r}: the smallest limit that fits is {needed}, mostly for {_largest(work, more)}; pass "
        "that, or smaller or shorter batches",
        parse_limit(needed),
    )


def _named(sizes: Sizes) -> str:
    none = {"tile": "least tile", "group": "one utterance at a time", "cache": "no cache", "chunk": "least chunk"}
    values = [(name, text, getattr(sizes, name)) for name, text in none.items()]
    names = [f"{name} {text_of(value)}" if value else text for name, text, value in values]
    return (
        "smaller sizes: "
        + ", ".join(names)
        + ("" if sizes.keep else ", cells computed again in the backward pass")
        + (", one thread" if sizes.threads else "")
    )


def _largest(work: Work, simple: int) -> str:
    """What takes the most of what cannot be made smaller."""
    frames, tokens = max(zip(*work.lengths, strict=True), key=lambda x: x[0] * (x[1] + 1), default=(0, 0))
    total = 8 if work.product == torch.float64 else 4
    parts = {
        f"the lattice of an utterance of {frames} frames and {tokens} tokens": _lattice_of_largest(work, total),
        "sums of gradients": _sums(work, total) if any(work.wanted) else 0,
        "the loss of the trivial joiner": simple,
        "tiles of the joiner": 2 * ROWS * (work.vocab_size + work.dim) * work.product.itemsize,
        "oneDNN's code for products in half precision": _code(work, 5),
        "copies of weight and input": work.copies
        + (work.weight != work.product) * work.vocab_size * work.dim * work.product.itemsize,
    }
    return max(parts, key=lambda name: parts[name])


def _lattice_of_largest(work: Work, total: int) -> int:
    return max((_lattice(work, [b], 0, total, True) for b in range(len(work.lengths.enc))), default=0)


def _say(asked: str, work: Work, limit: object, found: Plan, size: float) -> Plan:
    text = f"memory_limit={limit!r}: method {found.method!r}{found.text}; takes at most {text_of(size)}"
    key = asked, str(limit), found.method, str(found.arguments)
    if key not in _said:
        _said.add(key)
        _log.info(
            "%s (B=%d, T=%d, U=%d, V=%d, J=%d, %s products on %s)",
            text, len(work.lengths.enc), work.frames, work.columns - 1, work.vocab_size, work.dim,
            str(work.product).removeprefix("torch."), work.device,
        )  # fmt: skip
    return found._replace(text=text)
