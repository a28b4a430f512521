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
P3, P4, P5, ONE = F(4.1665795894e-2), F(1.6666665459e-1), F(5.0000001201e-1), F(1.0)


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


@intrinsic
def _load(typing_context, value):
    """A logit as a number: bfloat16 (its bits as int16) becomes float32, others stay."""
    if not isinstance(value, types.Integer):
        return value(value), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        wide = builder.zext(arguments[0], context.get_value_type(types.int32))
        return _float(context, builder, builder.shl(wide, _integer(context, 16)))

    return types.float32(types.int16), generate


@intrinsic
def _store(typing_context, value, like):
    """Inverse of `_load` for an array of the type of `like`; rounds to nearest even, NaN stays NaN."""
    if not isinstance(like, types.Integer):
        return like(like, like), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        bits = _bits(context, builder, arguments[0])
        odd = builder.and_(builder.lshr(bits, _integer(context, 16)), _integer(context, 1))
        half = builder.add(odd, _integer(context, 0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), _integer(context, 16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(is_nan, _integer(context, 0x7FC0), rounded)
        return builder.trunc(chosen, context.get_value_type(types.int16))

    return types.int16(types.float32, types.int16), generate


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
        x = _load(row[i]) - high
        total += _exp32(LOWEST if x < LOWEST else x)
    return total


@jit
def _log_sum_exp32(row):
    highest = _order(_load(row[0]))
    for i in range(row.size):
        k = _order(_load(row[i]))
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
        x = _load(row[i]) - normalizer
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
        out[i] = _store(row[i], out[i])


@jit
def gather_tiles(tiles, logits, targets, target_lens, blank, normalize, blank_lp, label_lp, normalizer):
    """Rows [start, stop) of utterance b for each tile (b, start, stop)."""
    for k in range(tiles.shape[0]):
        b, start, stop = tiles[k]
        tokens = target_lens[b]
        for t in range(start, stop):
            for u in range(tokens + 1):
                row = logits[b, t, u]
                blank_lp[b, t, u] = _load(row[blank])
                if u < tokens:
                    label_lp[b, t, u] = _load(row[targets[b, u]])
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


def _array(logits: Tensor) -> np.ndarray:
    """The memory of logits; bfloat16, which numpy does not have, as int16."""
    return (logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits).numpy()


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
    source, labels = _array(logits.contiguous()), targets.contiguous().numpy()
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
    source, target, labels = _array(logits.contiguous()), _array(result), targets.contiguous().numpy()
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
