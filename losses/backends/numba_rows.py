"""Compiled loops over rows of logits and of hidden states, of packed cells and of padded batches: all in this one file,
so that machine code kept on disk is never older than a loop that it calls (see threads.py).

float32 and float64 as they are, bfloat16 through its bits; sums of float32 are kept in blocks and added in float64. Exp
and tanh are short polynomials here and not library calls, so that the compiler vectorises the loops.
"""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from losses.backends.numba_bfloat16 import load_number, store_number
from losses.backends.threads import jit, jit_reordering

BLOCK = 256  # logits summed in their own precision before they are added in float64

F = np.float32
ROUND = F(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
LOWEST = F(-87.0)  # exp of less is denormal
HIGHEST = F(87.0)
LARGEST = 1e37  # of a sum of exp that was not cut off at HIGHEST
LOG2E, LN2 = F(1.44269504), F(0.69314718)
P0, P1, P2 = F(1.9875691500e-4), F(1.3981999507e-3), F(8.3334519073e-3)
P3, P4, P5 = F(4.1665795894e-2), F(1.6666665459e-1), F(5.0000001201e-1)
ONE = F(1.0)
TANH_END = F(8.0)
TANH_P1, TANH_P2, TANH_P3, TANH_P4 = F(0.13444497), F(3.5715969e-3), F(2.1894646e-5), F(1.5230395e-8)
TANH_Q1, TANH_Q2, TANH_Q3, TANH_Q4 = F(0.46777824), F(0.026164439), F(3.4112905e-4), F(8.522437e-7)


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
def exp32(x):
    """exp(x) for float32 x in [-87, 87], relative error 3e-7; NaN stays NaN (Cephes expf).

    ln 2 is not split: fused multiply-add, where the processor has it, rounds n * LN2 once only.
    """
    shifted = x * LOG2E + ROUND
    n = shifted - ROUND
    r = x - n * LN2
    p = P0 * r + P1
    p = p * r + P2
    p = p * r + P3
    p = p * r + P4
    p = p * r + P5
    p = p * (r * r) + r + ONE
    return p * _power_of_two(shifted)


@jit_reordering  # the sum may be reordered, and so vectorised; exp32 is compiled apart, without that freedom
def _sum_block(row, high):
    """Sum of exp(row - high) in float32, each term cut off at both ends."""
    total = F(0.0)
    for i in range(row.size):
        x = load_number(row[i]) - high
        x = LOWEST if x < LOWEST else x
        total += exp32(HIGHEST if x > HIGHEST else x)
    return total


@jit
def _sum_exp32(row, high):
    """Sum of exp(row - high) in float64; over LARGEST or NaN where a term may have been cut off."""
    total = 0.0
    for start in range(0, row.size, BLOCK):
        total += _sum_block(row[start : start + BLOCK], high)
    return total


@jit
def _log_sum_exp32(row):
    # any logit can be the reference unless one is much larger: no pass for the maximum in most rows
    high = load_number(row[0])
    total = _sum_exp32(row, high)
    if total < LARGEST:
        return F(high + math.log(total))
    return _log_sum_exp_by_maximum(row)


@jit
def _log_sum_exp_by_maximum(row):
    highest = _order(load_number(row[0]))
    for i in range(row.size):
        k = _order(load_number(row[i]))
        highest = k if k > highest else highest
    high = _value_of_order(highest)
    if high == -np.inf:
        return high
    return F(high + math.log(_sum_exp32(row, high)))


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
        y = exp32(LOWEST if x < LOWEST else x) * taken
        out[i] = F(0.0) if abs(y) <= floor else y


@jit
def _softmax_row64(row, normalizer, taken, floor, out):
    for i in range(row.size):
        y = math.exp(row[i] - normalizer) * taken
        out[i] = 0.0 if abs(y) <= floor else y


def log_sum_exp(row):
    """Of float64 or of other logits, chosen by type at compile time."""
    raise NotImplementedError("compiled only")


def softmax_row(row, normalizer, taken, floor, out):
    """Of float64 or of other logits, chosen by type at compile time."""
    raise NotImplementedError("compiled only")


@overload(log_sum_exp)
def _choose_log_sum_exp(row):
    kernel = _log_sum_exp64 if row.dtype == types.float64 else _log_sum_exp32
    return lambda row: kernel(row)


@overload(softmax_row)
def _choose_softmax_row(row, normalizer, taken, floor, out):
    kernel = _softmax_row64 if row.dtype == types.float64 else _softmax_row32
    return lambda row, normalizer, taken, floor, out: kernel(row, normalizer, taken, floor, out)


def _tanh(x):
    """Chosen by type at compile time; float32: relative error 4e-7."""
    raise NotImplementedError("compiled only")


@jit
def _tanh32(x):
    """x P(x^2) / Q(x^2), fitted to the least largest relative error in [-8, 8]; beyond, the value at 8: 1 - 2.4e-7."""
    x = -TANH_END if x < -TANH_END else x
    x = TANH_END if x > TANH_END else x
    s = x * x
    p = (((TANH_P4 * s + TANH_P3) * s + TANH_P2) * s + TANH_P1) * s + ONE
    q = (((TANH_Q4 * s + TANH_Q3) * s + TANH_Q2) * s + TANH_Q1) * s + ONE
    return x * p / q


@jit
def _tanh64(x):
    return math.tanh(x)


@overload(_tanh)
def _choose_tanh(x):
    kernel = _tanh64 if x == types.float64 else _tanh32
    return lambda x: kernel(x)


@jit
def _tanh_row(one, other, out):
    for i in range(out.size):
        out[i] = store_number(_tanh(load_number(one[i]) + load_number(other[i])), out[i])


@jit
def _relu_row(one, other, out, zero):
    for i in range(out.size):
        x = load_number(one[i]) + load_number(other[i])
        out[i] = store_number(zero if x < zero else x, out[i])  # NaN stays


@jit
def hidden_rows(enc, pred, rows, columns, tanh, zero, hidden):
    for n in range(rows.size):
        if tanh:
            _tanh_row(enc[rows[n]], pred[columns[n]], hidden[n])
        else:
            _relu_row(enc[rows[n]], pred[columns[n]], hidden[n], zero)


@jit_reordering
def _dot(row, other):
    """In the precision of row."""
    total = row[0] - row[0]
    for i in range(row.size):
        total += row[i] * load_number(other[i])
    return total


@jit
def round_row(row, out):
    for i in range(row.size):
        out[i] = store_number(row[i], out[i])


@jit
def score_rows(enc, pred, rows, columns, tanh, zero, weight, bias, labels, blank, hidden, blank_logit, label_logit):
    """hidden_rows, and the logits of blank and of the next label (0 where none is left) from the hidden states before
    they are rounded; bias [V] may be empty."""
    work = np.empty(hidden.shape[1], blank_logit.dtype)
    for n in range(rows.size):
        if tanh:
            _tanh_row(enc[rows[n]], pred[columns[n]], work)
        else:
            _relu_row(enc[rows[n]], pred[columns[n]], work, zero)
        blank_logit[n] = _dot(work, weight[blank])
        label = labels[n]
        label_logit[n] = _dot(work, weight[label]) if label >= 0 else zero
        if bias.size > 0:
            blank_logit[n] += load_number(bias[blank])
            if label >= 0:
                label_logit[n] += load_number(bias[label])
        round_row(work, hidden[n])


@jit
def normalize_rows(logits, vocab_size, labels, blank, blank_lp, label_lp, normalizer):
    """Log-probs from logits [N, V or more] whose columns of blank and next label are known better: blank_lp and
    label_lp bring those logits. The two columns of `logits` are -inf afterwards."""
    for n in range(labels.size):
        row = logits[n][:vocab_size]
        label = labels[n]
        blank_logit, label_logit = blank_lp[n], label_lp[n]
        row[blank] = store_number(F(-np.inf), row[blank])
        if label >= 0:
            row[label] = store_number(F(-np.inf), row[label])
        else:
            label_logit = F(-np.inf)
        high = blank_logit if blank_logit > label_logit else label_logit
        total = _sum_exp32(row, high)
        if not total < LARGEST:  # NaN, or others are far above both
            others = _log_sum_exp_by_maximum(row)
            high = high if high > others else others
            total = math.exp(others - high) if others > -np.inf else 0.0
        total += math.exp(blank_logit - high)
        if label >= 0:
            total += math.exp(label_logit - high)
        norm = F(high + math.log(total))
        normalizer[n] = norm
        blank_lp[n] = blank_logit - norm
        label_lp[n] = label_logit - norm if label >= 0 else norm - norm


@jit
def gather_rows(logits, at, labels, blank, normalize, blank_lp, label_lp, normalizer):
    for n in range(at.size):
        row = logits[at[n]]
        norm = normalizer[n]
        if normalize:
            norm = log_sum_exp(row)
            normalizer[n] = norm
        blank_lp[n] = load_number(row[blank]) - norm
        label_lp[n] = load_number(row[labels[n]]) - norm if labels[n] >= 0 else norm - norm


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
def add_rows(gradient, hidden, first, rows, columns, tanh, enc_gradient, pred_gradient):
    """gradient [N, W] of the columns first..first+W of hidden [N, J], added to those of each cell's row and column."""
    zero = enc_gradient.dtype.type(0)
    last = first + gradient.shape[1]
    for n in range(rows.size):
        one = enc_gradient[rows[n]][first:last]
        other = pred_gradient[columns[n]][first:last]
        if tanh:
            _add_tanh_row(gradient[n], hidden[n][first:last], one, other)
        else:
            _add_relu_row(gradient[n], hidden[n][first:last], one, other, zero)


@jit
def gradient_rows(
    logits, at, labels, blank, normalizer, blank_lp, label_lp, blank_occ, label_occ, scale, clamp, floor, out, total
):
    work = np.empty(total.size, dtype=normalizer.dtype)
    zero = normalizer.dtype.type(0)
    one = normalizer.dtype.type(1)
    for n in range(at.size):
        # without clamp the upstream gradient is applied to the occupancies, with clamp to the clamped gradient
        inner = scale[n] if clamp <= zero else one
        blanks = blank_occ[n] * inner
        labelled = label_occ[n] * inner
        taken = blanks + labelled
        out[n][total.size :] = 0
        if taken == zero:
            out[n][:] = 0
            continue
        softmax_row(logits[at[n]][: total.size], normalizer[n], taken, abs(inner) * floor, work)
        # these two may be known better than from the logits
        work[blank] = math.exp(blank_lp[n]) * taken - blanks
        if labels[n] >= 0:
            work[labels[n]] = math.exp(label_lp[n]) * taken - labelled
        if clamp > zero:
            for i in range(work.size):
                x = work[i]
                x = clamp if x > clamp else x
                work[i] = (-clamp if x < -clamp else x) * scale[n]
        round_row(work, out[n][: total.size])
        for i in range(work.size):
            total[i] += work[i]


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
                round_row(work, out)
