"""Which cells of the lattice the fused and the pruned loss compute, packed one after another, and in what groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses.shapes import Lengths

# Occupancies up to this are left out of the gradient: far below what half precision resolves. All cells of an utterance
# together lose less than their number times this, of a sum of at least T.
OCCUPANCY_THRESHOLD = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 0.0, torch.float64: 0.0}


class Group(NamedTuple):
    """Some utterances of a batch and their reachable cells, int64 [N] each.

    utterances: their numbers.  lengths: theirs.  shape: (utterances, frames, columns) of their padded lattices.
    at: index of each cell into those lattices.  rows, columns: into [B * T] and [B * (U+1)] of the batch.
    likely: so many cells, the first ones, are those nearest the diagonal of their lattice.
    """

    utterances: list[int]
    lengths: Lengths
    shape: tuple[int, int, int]
    at: Tensor
    rows: Tensor
    columns: Tensor
    likely: int


class Bounds(NamedTuple):
    """Cells that pruning leaves (Kuang et al. 2022): frame t of utterance b has the columns first[b, t] to
    first[b, t] + size - 1. first int64 [B, T] on the host."""

    first: np.ndarray
    size: int


def reachable(
    lengths: Lengths, frames: int, columns: int, topology: str, first: np.ndarray | None = None, size: int = 0
) -> np.ndarray:
    """Index, in order, of the cells of padded lattices [B, frames, columns] that some complete alignment passes.

    first [B, frames], size: only those within bounds.
    """
    enc_lens = np.array(lengths.enc, dtype=np.int64)[:, None, None]
    target_lens = np.array(lengths.target, dtype=np.int64)[:, None, None]
    t, u = np.arange(frames)[:, None], np.arange(columns)
    cells = (t < enc_lens) & (u <= target_lens)
    if topology != "regular":
        passed = (u <= t) & (target_lens - u <= enc_lens - t)
        if topology == "constrained":  # the blank after a label is in the same frame
            passed |= (u >= 1) & (u <= t + 1) & (target_lens - u < enc_lens - t)
        cells &= passed
    if first is not None:
        cells &= (u >= first[:, :, None]) & (u < first[:, :, None] + size)
    return np.flatnonzero(cells)


def spread(values: Tensor, at: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Packed log-probs [N] at their cells, log 0 elsewhere."""
    out = values.new_full(shape, -torch.inf)
    out.view(-1)[at] = values
    return out


def _diagonal_first(at: np.ndarray, frames: int, tokens: int, columns: int, count: int) -> np.ndarray:
    """at, `count` cells nearest the diagonal of one lattice first; both parts stay in order.

    Alignments of an untrained model lie around the diagonal, and those of a trained one are not far from it.
    """
    distance = np.abs(at % columns * frames - at // columns * tokens)
    near = np.zeros(at.size, dtype=bool)
    near[np.argpartition(distance, count - 1)[:count]] = True
    return np.concatenate([at[near], at[~near]])


def groups(
    lengths: Lengths,
    frames: int,
    columns: int,
    topology: str,
    most: int,
    room: int,
    device: torch.device,
    bounds: Bounds | None = None,
) -> Iterator[Group]:
    """A batch [B, frames, columns] in groups of at most `most` cells, or of one utterance; one at a time, since the
    indices of all would be larger than the lattices.

    Utterances of equal length come together, so that the padded lattices of a group are small. room: cells that are
    marked as likely.
    """
    for numbers in grouping(lengths, most, bounds.size if bounds else columns):
        yield _group(numbers, lengths, frames, columns, topology, room, device, bounds)


def grouping(lengths: Lengths, most: int, size: int) -> list[list[int]]:
    """Numbers of the utterances, sorted by length, in groups of at most `most` cells or one utterance; size: columns of
    a frame that are computed."""
    chosen: list[list[int]] = []
    cells = 0
    for b in sorted(range(len(lengths.enc)), key=lambda b: (lengths.enc[b], lengths.target[b])):
        more = lengths.enc[b] * min(lengths.target[b] + 1, size)
        if chosen and cells + more <= most:
            chosen[-1].append(b)
            cells += more
        else:
            chosen.append([b])
            cells = more
    return chosen


def _group(
    numbers: list[int],
    lengths: Lengths,
    frames: int,
    columns: int,
    topology: str,
    room: int,
    device: torch.device,
    bounds: Bounds | None,
) -> Group:
    own = Lengths([lengths.enc[b] for b in numbers], [lengths.target[b] for b in numbers])
    shape = len(numbers), max(own.enc), max(own.target) + 1
    pruned = (bounds.first[numbers, : shape[1]], bounds.size) if bounds else ()
    at = reachable(own, *shape[1:], topology, *pruned)
    if at.size > room > 0 and len(numbers) == 1:
        at = _diagonal_first(at, own.enc[0], own.target[0], shape[2], room)
    # in place: these arrays are a large part of what a small lattice takes
    rows, under = at // shape[2], at % shape[2]
    utterance = np.array(numbers)[rows // shape[1]]
    rows %= shape[1]
    rows += utterance * frames
    utterance *= columns
    under += utterance
    cells, by_row, by_column = (torch.from_numpy(x).to(device) for x in (at, rows, under))
    return Group(numbers, own, shape, cells, by_row, by_column, min(at.size, room))


def next_labels(targets: Tensor, lengths: Lengths) -> Tensor:
    """[B, U+1]: the label that column u waits for, -1 where none is left."""
    labels = torch.nn.functional.pad(targets, (0, 1))
    column = torch.arange(labels.shape[1], device=targets.device)
    lens = torch.tensor(lengths.target, dtype=torch.int64, device=targets.device)
    return labels.masked_fill(column >= lens[:, None], -1)
