"""How large the pieces are in which the fused loss works."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

# Rows of matrix products are filled up to a multiple: oneDNN compiles code for each shape that it meets, and keeps it.
ROWS = 64


class Sizes(NamedTuple):
    """Bytes of the pieces, see losses/backends/__init__.py, and what is kept.

    tile: hidden states and logits at a time, on each thread.  group: logits of utterances taken together.  cache:
    logits of a group kept for the gradient, 0: none.  chunk: gradients by the logits.  least: cells of each of them
    at least, but of the cache.  keep: for reduction "none", cells with their occupancies wait for the backward
    pass; else that computes them again.  few: products of few shapes, whose rows are filled up to a whole tile and
    a whole or a quarter chunk, since the code for each shape takes up to a megabyte; and temporaries of each
    thread's own.  threads: so many at most, 0: all.  overlap: two groups at a time, each with its cache.
    """

    tile: int
    group: int
    cache: int
    chunk: int
    least: int
    keep: bool = True
    few: bool = False
    threads: int = 0
    overlap: bool = False


class Rows(NamedTuple):
    """The same in lattice cells, multiples of ROWS; small: rows to which a short chunk is filled, 0: to ROWS."""

    tile: int
    group: int
    cache: int
    chunk: int
    small: int


def default_sizes(kernels: ModuleType, dtype: torch.dtype, overlap: bool = True) -> Sizes:
    """Those that are fastest where there is memory enough, with products in dtype."""
    overlap = overlap and dtype.itemsize == 2  # logits of four bytes: one large cache serves better than two
    cache = kernels.CACHE if overlap else kernels.CACHE_OF_ONE
    return Sizes(kernels.TILE, kernels.GROUP, cache, kernels.CHUNK, kernels.LEAST_TILE[dtype.itemsize], overlap=overlap)


def filled(count: int, multiple: int = ROWS) -> int:
    """The next multiple of ROWS or of another number."""
    return -(-count // multiple) * multiple


def rows_in(sizes: Sizes, vocab_size: int, dim: int, dtype: torch.dtype, most: int) -> Rows:
    """Cells of each piece, with products in dtype and `most` cells in all."""

    def cells(size: int, numbers: int) -> int:
        return filled(max(sizes.least, size // (numbers * dtype.itemsize)))

    tile = min(cells(sizes.tile, vocab_size + dim), max(ROWS, filled(most)))
    group, chunk = cells(sizes.group, vocab_size), cells(sizes.chunk, vocab_size)
    cache = cells(sizes.cache, vocab_size) if sizes.cache else 0
    if not sizes.few:
        return Rows(tile, group, min(cache, filled(most)), min(chunk, filled(most)), 0)
    chunk = min(max(1, chunk // tile) * tile, max(tile, filled(most, tile)))
    small = chunk // 4 // tile * tile or chunk
    return Rows(tile, group, min(cache // tile * tile, filled(most, tile)), chunk, small)
