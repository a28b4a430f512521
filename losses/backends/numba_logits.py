"""Normaliser, gather and gradient of the logits on CPU: compiled loops, frames over threads.

float32 and float64 as they are, bfloat16 through its bits; sums of float32 are kept in blocks and added in float64. Exp
is a short polynomial here and not a library call, so that the compiler vectorises the loops.
"""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.backends.numba_bfloat16 import load_number, number_array, store_number
from losses.backends.threads import jit, jit_reordering, run_groups
from losses.shapes import Lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SMALL_PROBLEM = 2**15  # logits below which handing work to another thread costs more than it saves
TILE = 2**17  # logits of a piece of work
BLOCK = 256  # logits summed in their own precision before they are added in float64

F = np.float32
ROUND = F(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
LOWEST = F(-87.0)  # exp of less is denormal
LOG2E, LN2_HIGH, LN2_LOW = F(1.44269504), F(0.693359375), F(-2.12194440e-4)
P0, P1, P2 = F(1.9875691500e-4), F(1.3981999507e-3), F(8.3334519073e-3)
P3, P4, P5 = F(4.1665795894e-2), F(1.6666665459e-1), F(5.0000001201e-1)
ONE, TWO = F(1.0), F(2.0)


def _bits(context, builder, value):
    """The bits of a float32."""
    return builder.bitcast(value, context.get_value_type(types.int32))


def _float(context, builder, bits):
    return builder.bitcast(bits, context.get_value_type(types.float32))


def _integer(context, value):
    return context.get_constant(types.int32, value)


def _flip_negative(context, builder, bits):
    """Bits of a float32 to the integer of the same order, and back."""
    sign = builder.ashr(bits, _integer(context, 31))
    return builder.xor(bits, builder.and_(sign, _integer(context, 0x7FFFFFFF)))


@intrinsic
def _power_of_two(typing_context, shifted):
    """2**n as float32, for shifted = n + ROUND."""

    def generate(context, builder, signature, arguments):
        n = builder.add(_bits(context, builder, arguments[0]), _integer(context, 127))
        return _float(context, builder, builder.shl(n, _integer(context, 23)))

    return types.float32(types.float32), generate


@intrinsic
def _order(typing_context, value):
    """float32 to the int32 of the same order: integer maxima are vectorised, those of floats (NaN) are not."""

    def generate(context, builder, signature, arguments):
        return _flip_negative(context, builder, _bits(context, builder, arguments[0]))

    return types.int32(types.float32), generate


@intrinsic
def _value_of_order(typing_context, order):
    def generate(context, builder, signature, arguments):
        return _float(context, builder, _flip_negative(context, builder, arguments[0]))

    return types.float32(types.int32), generate


@jit
def _exp32(x):
    """exp(x) for float32 x in [-87, 87] to 2 ulp; NaN stays NaN (Cephes expf)."""
    shifted = x * LOG2E + ROUND
    n = shifted - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = P0 * r + P1
    p = p * r + P2
    p = p * r + P3
    p = p * r + P4
    p = p * r + P5
    p = p * (r * r) + r + ONE
    return p * _power_of_two(shifted)


@jit_reordering  # the sum may be reordered, and so vectorised; _exp32 is compiled apart, without that freedom
def _sum_block(row, high):
    """Sum of exp(row - high) in float32."""
    total = F(0.0)
    for i in range(row.size):
        x = load_number(row[i]) - high
        total += _exp32(LOWEST if x < LOWEST else x)
    return total


@jit
def _log_sum_exp32(row):
    highest = _order(load_number(row[0]))
    for i in range(row.size):
        k = _order(load_number(row[i]))
        highest = k if k > highest else highest
    high = _value_of_order(highest)
    if high == -np.inf:
        return high
    total = 0.0
    for start in range(0, row.size, BLOCK):
        total += _sum_block(row[start : start + BLOCK], high)
    return F(high + math.log(total))


@jit
def _log_sum_exp64(row):
    high = row[0]
    for x in row:
        high = x if x > high else high
    if high == -np.inf:
        return high
    total = 0.0
    for x in row:
        total += math.exp(x - high)
    return high + math.log(total)


@jit
def _softmax_row32(row, normalizer, taken, floor, out):
    """out = softmax * taken, 0 where that is below floor in size."""
    for i in range(row.size):
        x = load_number(row[i]) - normalizer
        y = _exp32(LOWEST if x < LOWEST else x) * taken
        out[i] = F(0.0) if abs(y) <= floor else y


@jit
def _softmax_row64(row, normalizer, taken, floor, out):
    for i in range(row.size):
        y = math.exp(row[i] - normalizer) * taken
        out[i] = 0.0 if abs(y) <= floor else y


def _log_sum_exp(row):
    """Of float64 or of other logits, chosen by type at compile time."""
    raise NotImplementedError("compiled only")


def _softmax_row(row, normalizer, taken, floor, out):
    """Of float64 or of other logits, chosen by type at compile time."""
    raise NotImplementedError("compiled only")


@overload(_log_sum_exp)
def _choose_log_sum_exp(row):
    kernel = _log_sum_exp64 if row.dtype == types.float64 else _log_sum_exp32
    return lambda row: kernel(row)


@overload(_softmax_row)
def _choose_softmax_row(row, normalizer, taken, floor, out):
    kernel = _softmax_row64 if row.dtype == types.float64 else _softmax_row32
    return lambda row, normalizer, taken, floor, out: kernel(row, normalizer, taken, floor, out)


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
                    norm = _log_sum_exp(row)
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
                    _softmax_row(logits[b, t, u], normalizer[b, t, u], taken, smallest, work)
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
def _tanh_row(one, other, out):
    """tanh(one + other), for bfloat16: 1e-7 off where it is near 0."""
    for i in range(out.size):
        x = load_number(one[i]) + load_number(other[i])
        x = x + x
        x = LOWEST if x < LOWEST else x
        x = -LOWEST if x > -LOWEST else x
        out[i] = store_number(ONE - TWO / (ONE + _exp32(x)), out[i])


@jit
def tanh_cells(ranges, enc, pred, rows, columns, hidden):
    """hidden[n] = tanh(enc[rows[n]] + pred[columns[n]]) for cells [start, stop) of each range."""
    for k in range(ranges.shape[0]):
        for n in range(ranges[k, 0], ranges[k, 1]):
            _tanh_row(enc[rows[n]], pred[columns[n]], hidden[n])


@jit
def gather_cells(ranges, logits, labels, blank, blank_lp, label_lp, normalizer):
    """Cells [start, stop) of packed logits [N, V] for each range."""
    for k in range(ranges.shape[0]):
        for n in range(ranges[k, 0], ranges[k, 1]):
            row = logits[n]
            norm = _log_sum_exp(row)
            normalizer[n] = norm
            blank_lp[n] = load_number(row[blank]) - norm
            if labels[n] >= 0:
                label_lp[n] = load_number(row[labels[n]]) - norm


@jit
def _probability32(logit, normalizer, taken, floor):
    x = load_number(logit) - normalizer
    y = _exp32(LOWEST if x < LOWEST else x) * taken
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


@jit
def _add_tanh_row(gradient, hidden, one, other):
    """Chain rule through hidden = tanh(x), added to both terms of x."""
    for i in range(gradient.size):
        h = load_number(hidden[i])
        g = load_number(gradient[i])
        g -= g * h * h
        one[i] += g
        other[i] += g


@jit
def _add_relu_row(gradient, hidden, one, other, zero):
    for i in range(gradient.size):
        g = load_number(gradient[i]) if load_number(hidden[i]) > zero else zero
        one[i] += g
        other[i] += g


@jit
def add_cells(group, starts, gradient, hidden, rows, columns, tanh, enc_gradient, pred_gradient):
    """Rows [starts[b], starts[b + 1]) of each utterance b of the group, added to their frame and their column."""
    zero = enc_gradient.dtype.type(0)
    for b in group:
        for i in range(starts[b], starts[b + 1]):
            one = enc_gradient[rows[i]]
            other = pred_gradient[columns[i]]
            if tanh:
                _add_tanh_row(gradient[i], hidden[i], one, other)
            else:
                _add_relu_row(gradient[i], hidden[i], one, other, zero)


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

        def run(group: np.ndarray) -> None:
            tanh_cells(ranges[group], *sources, rows.numpy(), columns.numpy(), target)

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
    source, names = number_array(logits), labels.numpy()
    ranges = _ranges(*logits.shape)

    def run(group: np.ndarray) -> None:
        gather_cells(ranges[group], source, names, blank, blank_lp, label_lp, normalizer)

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
        add_cells(group, bounds, source, values, at, under, activation == "tanh", enc_gradient, pred_gradient)

    run_groups(run, [int(n) * hidden.shape[1] for n in np.diff(bounds)], SMALL_PROBLEM)
    return torch.from_numpy(enc_gradient), torch.from_numpy(pred_gradient)
