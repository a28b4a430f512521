"""Normaliser, gather and gradient of the logits on CPU: compiled loops of numba_rows.py, frames over threads."""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.backends.numba_bfloat16 import load_number, number_array, store_number
from losses.backends.numba_rows import (
    LOWEST,
    F,
    add_rows,
    exp32,
    gather_rows,
    hidden_rows,
    log_sum_exp,
    softmax_row,
)
from losses.backends.threads import jit, run_groups
from losses.shapes import Lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SMALL_PROBLEM = 2**15  # logits below which handing work to another thread costs more than it saves
TILE = 2**17  # logits of a piece of work


@jit
def _round_row(row, out):
    for i in range(row.size):
        out[i] = store_number(row[i], out[i])


@jit
def gather_tiles(tiles, logits, targets, target_lens, blank, normalize, blank_lp, label_lp, normalizer):
    """Rows [start, stop) of utterance b for each tile (b, start, stop)."""
    for k in range(tiles.shape[0]):
        b, start, stop = tiles[k]
        tokens = target_lens[b]
        for t in range(start, stop):
            for u in range(tokens + 1):
                row = logits[b, t, u]
                blank_lp[b, t, u] = load_number(row[blank])
                if u < tokens:
                    label_lp[b, t, u] = load_number(row[targets[b, u]])
                if normalize:
                    norm = log_sum_exp(row)
                    normalizer[b, t, u] = norm
                    blank_lp[b, t, u] -= norm
                    if u < tokens:
                        label_lp[b, t, u] -= norm


@jit
def gradient_tiles(
    tiles,
    logits,
    targets,
    enc_lens,
    target_lens,
    blank,
    normalize,
    normalizer,
    blank_occ,
    label_occ,
    upstream,
    floor,
    clamp,
    gradient,
):
    """Rows [start, stop) of utterance b for each tile (b, start, stop), padded cells included."""
    work = np.empty(logits.shape[3], dtype=blank_occ.dtype)
    zero = blank_occ.dtype.type(0)
    for k in range(tiles.shape[0]):
        b, start, stop = tiles[k]
        tokens = target_lens[b]
        scale = upstream[b]
        # without clamp the upstream gradient is applied to the occupancies, with clamp to the clamped gradient
        inner = scale if clamp <= zero else blank_occ.dtype.type(1)
        smallest = abs(inner) * floor
        for t in range(start, stop):
            for u in range(logits.shape[2]):
                out = gradient[b, t, u]
                blanks = zero
                labels = zero
                if t < enc_lens[b] and u <= tokens:
                    blanks = blank_occ[b, t, u] * inner
                    if u < tokens:
                        labels = label_occ[b, t, u] * inner
                taken = blanks + labels
                if t >= enc_lens[b] or u > tokens or taken == zero:
                    out[:] = 0
                    continue
                if normalize:
                    softmax_row(logits[b, t, u], normalizer[b, t, u], taken, smallest, work)
                else:
                    work[:] = zero
                work[blank] -= blanks
                if u < tokens:
                    work[targets[b, u]] -= labels
                if clamp > zero:
                    for i in range(work.size):
                        x = work[i]
                        x = clamp if x > clamp else x
                        work[i] = (-clamp if x < -clamp else x) * scale
                _round_row(work, out)


@jit
def _probability32(logit, normalizer, taken, floor):
    x = load_number(logit) - normalizer
    y = exp32(LOWEST if x < LOWEST else x) * taken
    return F(0.0) if abs(y) <= floor else y


@jit
def _probability64(logit, normalizer, taken, floor):
    y = math.exp(logit - normalizer) * taken
    return 0.0 if abs(y) <= floor else y


def _probability(logit, normalizer, taken, floor):
    """softmax * taken of one logit, 0 where that is below floor in size; chosen by type at compile time."""
    raise NotImplementedError("compiled only")


@overload(_probability)
def _choose_probability(logit, normalizer, taken, floor):
    kernel = _probability64 if logit == types.float64 else _probability32
    return lambda logit, normalizer, taken, floor: kernel(logit, normalizer, taken, floor)


@jit
def _probability_row(row, normalizer, taken, floor, out, total):
    """out = softmax * taken; added to total too."""
    for i in range(row.size):
        y = _probability(row[i], normalizer, taken, floor)
        total[i] += y
        out[i] = store_number(y, out[i])


@jit
def gradient_cells(
    group, ranges, chosen, logits, labels, blank, normalizer, blank_occ, label_occ, scale, floor, gradient, sums
):
    """Rows [start, stop) of gradient for each range of the group, and their sum in sums[k]."""
    for k in group:
        total = sums[k]
        for i in range(ranges[k, 0], ranges[k, 1]):
            n = chosen[i]
            row = logits[n]
            norm = normalizer[n]
            out = gradient[i]
            blanks = blank_occ[i] * scale[i]
            labelled = label_occ[i] * scale[i]
            taken = blanks + labelled
            smallest = abs(scale[i]) * floor
            _probability_row(row, norm, taken, smallest, out, total)
            total[blank] -= blanks
            out[blank] = store_number(_probability(row[blank], norm, taken, smallest) - blanks, out[blank])
            label = labels[n]
            if label >= 0:
                total[label] -= labelled
                out[label] = store_number(_probability(row[label], norm, taken, smallest) - labelled, out[label])


def _tiles(lens: list[int], row: int) -> np.ndarray:
    """(utterance, first frame, last frame + 1) that cover lens, at most about TILE logits each; row logits a frame."""
    step = max(1, TILE // max(1, row))
    tiles = [(b, t, min(t + step, n)) for b, n in enumerate(lens) for t in range(0, n, step)]
    return np.array(tiles, dtype=np.int64).reshape(-1, 3)


def gather(
    logits: Tensor, targets: Tensor, lengths: Lengths, blank: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See losses/backends/__init__.py."""
    batch, frames, columns, vocab_size = logits.shape
    dtype = np.float64 if logits.dtype == torch.float64 else np.float32
    blank_lp = np.zeros((batch, frames, columns), dtype)
    label_lp = np.zeros((batch, frames, columns - 1), dtype)
    normalizer = np.zeros((batch, frames, columns) if normalize else (0, 0, 0), dtype)
    source, labels = number_array(logits.contiguous()), targets.contiguous().numpy()
    target_lens = np.array(lengths.target, dtype=np.int64)
    tiles = _tiles(lengths.enc, columns * vocab_size)

    def run(group: np.ndarray) -> None:
        gather_tiles(tiles[group], source, labels, target_lens, blank, normalize, blank_lp, label_lp, normalizer)

    _run(run, tiles, [u + 1 for u in lengths.target], vocab_size)
    norm = torch.from_numpy(normalizer) if normalize else None
    return torch.from_numpy(blank_lp), torch.from_numpy(label_lp), norm


def gradient(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor | None,
    blank_occ: Tensor,
    label_occ: Tensor,
    upstream: Tensor,
    lengths: Lengths,
    blank: int,
    clamp: float,
) -> Tensor:
    """See losses/backends/__init__.py."""
    batch, frames, columns, vocab_size = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    source, target, labels = number_array(logits.contiguous()), number_array(result), targets.contiguous().numpy()
    occupied = blank_occ.numpy(), label_occ.numpy()
    number = occupied[0].dtype.type
    norm = np.zeros((0, 0, 0), number) if normalizer is None else normalizer.numpy()
    scale = upstream.to(blank_occ.dtype).contiguous().numpy()
    enc_lens, target_lens = (np.array(n, dtype=np.int64) for n in lengths)
    floor = number(GRADIENT_FLOOR[blank_occ.dtype])
    limit = number(max(clamp, 0.0))
    tiles = _tiles([frames] * batch, columns * vocab_size)

    def run(group: np.ndarray) -> None:
        gradient_tiles(
            tiles[group], source, labels, enc_lens, target_lens, blank, normalizer is not None, norm, *occupied,
            scale, floor, limit, target,
        )  # fmt: skip

    _run(run, tiles, [columns] * batch, vocab_size)
    return result


def _run(function, tiles: np.ndarray, columns: list[int], vocab_size: int) -> None:
    run_groups(function, [int((e - s) * columns[b] * vocab_size) for b, s, e in tiles], SMALL_PROBLEM)


def _ranges(count: int, vocab_size: int) -> np.ndarray:
    step = max(1, TILE // max(1, vocab_size))
    return np.array([(n, min(n + step, count)) for n in range(0, count, step)], dtype=np.int64).reshape(-1, 2)


def hidden_packed(enc: Tensor, pred: Tensor, rows: Tensor, columns: Tensor, activation: str) -> Tensor:
    """activation(enc[rows] + pred[columns]), [N, J], of enc and pred [.., J] and int64 indices [N]."""
    if activation == "tanh" and enc.dtype == pred.dtype == torch.bfloat16:
        hidden = enc.new_empty(rows.shape[0], enc.shape[1])
        sources = [number_array(x.contiguous()) for x in (enc, pred)]
        ranges, target = _ranges(*hidden.shape), number_array(hidden)
        at, under = rows.numpy(), columns.numpy()

        def run(group: np.ndarray) -> None:
            for start, stop in ranges[group]:
                hidden_rows(*sources, at[start:stop], under[start:stop], True, F(0), target[start:stop])

        run_groups(run, [int(e - s) * hidden.shape[1] for s, e in ranges], SMALL_PROBLEM)
        return hidden
    hidden = enc.index_select(0, rows) + pred.index_select(0, columns)
    return hidden.tanh_() if activation == "tanh" else hidden.relu_()


def gather_packed(logits: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of blank and next label, and the log-normaliser, all [N], of packed cells.

    logits [N, V], labels int64 [N], -1 where no label is left (its log-prob is then 0).
    """
    number = np.float64 if logits.dtype == torch.float64 else np.float32
    blank_lp, label_lp, normalizer = (np.zeros(logits.shape[0], number) for _ in range(3))
    source, names, at = number_array(logits), labels.numpy(), np.arange(logits.shape[0])
    ranges = _ranges(*logits.shape)

    def run(group: np.ndarray) -> None:
        for start, stop in ranges[group]:
            out = (x[start:stop] for x in (blank_lp, label_lp, normalizer))
            gather_rows(source, at[start:stop], names[start:stop], blank, True, *out)

    run_groups(run, [int(e - s) * logits.shape[1] for s, e in ranges], SMALL_PROBLEM)
    return torch.from_numpy(blank_lp), torch.from_numpy(label_lp), torch.from_numpy(normalizer)


def gradient_packed(
    chosen: Tensor,
    logits: Tensor,
    labels: Tensor,
    normalizer: Tensor,
    blank_occ: Tensor,
    label_occ: Tensor,
    scale: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor]:
    """Gradient by the logits of the chosen cells, [K, V] in the dtype of logits, and its sum over them, [V].

    chosen int64 [K]; logits, labels and normalizer as in `gather_packed`, of all N cells; blank_occ, label_occ and
    scale (the upstream gradient) [K], of the chosen ones.
    """
    result = torch.empty(chosen.shape[0], logits.shape[1], dtype=logits.dtype)
    ranges = _ranges(*result.shape)
    sums = np.zeros((len(ranges), logits.shape[1]), normalizer.numpy().dtype)
    floor = sums.dtype.type(GRADIENT_FLOOR[normalizer.dtype])
    arrays = [x.numpy() for x in (normalizer, blank_occ, label_occ, scale)]
    norm, blanks, labelled, factors = arrays
    source, target, names, order = number_array(logits), number_array(result), labels.numpy(), chosen.numpy()

    def run(group: np.ndarray) -> None:
        gradient_cells(
            group, ranges, order, source, names, blank, norm, blanks, labelled, factors, floor, target, sums
        )  # fmt: skip

    run_groups(run, [int(e - s) * logits.shape[1] for s, e in ranges], SMALL_PROBLEM)
    return result, torch.from_numpy(sums.sum(0, dtype=np.float64).astype(sums.dtype))


def add_packed(
    gradient: Tensor,
    hidden: Tensor,
    starts: list[int],
    rows: Tensor,
    columns: Tensor,
    activation: str,
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Gradient by the two terms of hidden = activation(enc[rows] + pred[columns]), summed in float32 or float64.

    gradient, hidden [K, J]; rows, columns int64 [K]; starts: first cell of each utterance, and K. Returns [size, J] of
    each of the two sizes.
    """
    number = np.float64 if gradient.dtype == torch.float64 else np.float32
    enc_gradient, pred_gradient = (np.zeros((size, hidden.shape[1]), number) for size in sizes)
    source, values, bounds = number_array(gradient), number_array(hidden), np.array(starts, dtype=np.int64)
    at, under = rows.numpy(), columns.numpy()

    def run(group: np.ndarray) -> None:
        for b in group:
            part = slice(bounds[b], bounds[b + 1])
            cells = source[part], values[part], 0, at[part], under[part]
            add_rows(*cells, activation == "tanh", enc_gradient, pred_gradient)

    run_groups(run, [int(n) * hidden.shape[1] for n in np.diff(bounds)], SMALL_PROBLEM)
    return torch.from_numpy(enc_gradient), torch.from_numpy(pred_gradient)
