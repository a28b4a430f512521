"""Forward-backward of the transducer lattice on CPU: compiled loops over anti-diagonals, utterances over threads.

Layout. All transitions of a topology lead from layer d to layer d + 1: d = t + u for "regular", d = t for "modified".
With the log-probs copied to layers (row d holds the cells of layer d, indexed by u) both topologies have one recursion,

    beta[d, u] = logaddexp(blank[d, u] + beta[d+1, u], label[d, u] + beta[d+1, u+1])          (Graves 2012, eq. 18)

whose inner loop over u has no dependency and is vectorised by the compiler; so that it can be, exp and log1p are short
polynomials here and not library calls. Layer d holds the nodes lo(d) <= u <= hi(d) that lie on some complete path:
lo(d) = max(0, d - span), hi(d) = min(U, d), with span = T - 1 and T + U layers (regular) or span = T - U and T layers
(modified). Blank cannot be taken at the lower rim u = d - span, label cannot be taken at u = U, except that the last
blank of "regular" leaves the lattice. Everything is accumulated in float64.
"""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from losses.backends import LOG_FLOOR
from losses.backends.threads import jit, run_groups
from losses.shapes import Lengths

# Stands for log 0: finite, so that differences of two of them are not NaN. Sums of fewer than 1e20 of them stay finite.
LOG_ZERO = -1e30
SMALL_PROBLEM = 4096  # cells below which handing work to another thread costs more than it saves

LOG2E = 1.4426950408889634
LN2_HIGH = 6.93147180369123816490e-01  # 33 bits: n * LN2_HIGH is exact
LN2_LOW = 1.90821492927058770002e-10
LN2 = 0.6931471805599453
ROUND = 6755399441055744.0  # 1.5 * 2**52: adding it leaves the nearest integer in the low bits


@intrinsic
def _double_from_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


@intrinsic
def _bits_of_double(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@jit
def _exp(x):
    """exp(x) for x in [-708, 708] to 2 ulp; NaN stays NaN."""
    shifted = x * LOG2E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    # the product, not a sum of exponents, so that a NaN in p survives
    return p * _double_from_bits((_bits_of_double(shifted) + 1023) << 52)


@jit
def _logaddexp(a, b):
    """log(exp(a) + exp(b)); NaN in either gives NaN; -inf must have been replaced by LOG_ZERO."""
    high = a if a > b else b
    low = b if a > b else a
    d = low - high
    d = -60.0 if d < -60.0 else d  # exp(-60) is below half an ulp of any sum that matters
    z = _exp(d)
    # log1p(z) = c + 2 atanh(s) with |s| <= 0.172
    large = z > 0.41421356237309503
    s = (z - 1.0 if large else z) / (z + 3.0 if large else z + 2.0)
    q = s * s
    p = 1.0 / 21.0
    p = p * q + 1.0 / 19.0
    p = p * q + 1.0 / 17.0
    p = p * q + 1.0 / 15.0
    p = p * q + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return high + ((LN2 if large else 0.0) + 2.0 * s * p)


@jit
def _logaddexp_rows(out, a, b, c, d):
    """out = logaddexp(a + b, c + d), elementwise."""
    for i in range(out.size):
        out[i] = _logaddexp(a[i] + b[i], c[i] + d[i])


@jit
def _exp_rows(out, a, b, c, log_sum, floor):
    """out = exp(a + b + c - log_sum), elementwise; 0 where the exponent is below floor >= -700."""
    for i in range(out.size):
        x = a[i] + b[i] + c[i] - log_sum
        y = _exp(floor if x < floor else x)
        out[i] = 0.0 if x < floor else y


@jit
def _to_layers(source, width, frames, shift, out):
    """Copy cells [t, u], u < width, to out[t + shift * u, u] as float64, -inf as LOG_ZERO."""
    for t in range(frames):
        for u in range(width):
            x = np.float64(source[t, u])
            out[t + shift * u, u] = LOG_ZERO if x < LOG_ZERO else x


@jit
def _beta(blank, label, tokens, layers, span, beta):
    """Fill beta[0..layers]; beta[0, 0] is log P(targets)."""
    beta[layers, tokens] = 0.0
    for d in range(layers - 1, -1, -1):
        first = max(0, d - span)
        last = min(tokens, d)
        after = beta[d + 1]
        here = beta[d]
        if last == tokens:
            here[tokens] = blank[d, tokens] + after[tokens]
            last -= 1
        if first == d - span and first < tokens:
            here[first] = label[d, first] + after[first + 1]
            first += 1
        if first <= last:
            end = last + 1
            _logaddexp_rows(
                here[first:end], blank[d, first:end], after[first:end], label[d, first:end], after[first + 1 : end + 1]
            )


@jit
def _alpha_step(blank, label, tokens, span, d, before, here):
    """Forward variables of layer d >= 1 from those of layer d - 1."""
    first = max(0, d - span)
    last = min(tokens, d)
    if first == 0:
        here[0] = before[0] + blank[d - 1, 0]
        first = 1
    if last == d:
        here[d] = before[d - 1] + label[d - 1, d - 1]
        last -= 1
    if first <= last:
        end = last + 1
        _logaddexp_rows(
            here[first:end],
            before[first:end],
            blank[d - 1, first:end],
            before[first - 1 : end - 1],
            label[d - 1, first - 1 : end - 1],
        )


@jit
def _occupancies(blank, label, beta, tokens, layers, span, shift, floor, blank_occ, label_occ):
    """Probability of each transition, exp(alpha + log-prob + beta - log P), into arrays of zeros."""
    log_sum = np.nan if beta[0, 0] < 0.1 * LOG_ZERO else beta[0, 0]  # no path: no probabilities
    before = np.empty(tokens + 1)
    here = np.empty(tokens + 1)
    row = np.empty(tokens + 1)
    here[0] = 0.0
    for d in range(layers):
        if d > 0:
            before, here = here, before
            _alpha_step(blank, label, tokens, span, d, before, here)
        first = max(0, d - span)
        last = min(tokens, d)
        after = beta[d + 1]
        start = first + 1 if (first == d - span and first < tokens) else first
        end = last + 1
        if start < end:
            _exp_rows(row[start:end], here[start:end], blank[d, start:end], after[start:end], log_sum, floor)
            for u in range(start, end):
                blank_occ[d - shift * u, u] = row[u]
        end = min(end, tokens)
        if first < end:
            _exp_rows(row[first:end], here[first:end], label[d, first:end], after[first + 1 : end + 1], log_sum, floor)
            for u in range(first, end):
                label_occ[d - shift * u, u] = row[u]


@jit
def lattice_group(blank, label, enc_lens, target_lens, group, modified, floor, nll, occupancies, blank_occ, label_occ):
    """Utterances `group` of a batch; writes their rows of nll, blank_occ, label_occ."""
    size = 0
    for b in group:
        layers = enc_lens[b] + (0 if modified else target_lens[b])
        size = max(size, (layers + 1) * (target_lens[b] + 1))
    scratch = np.empty((3, size))
    for b in group:
        frames = enc_lens[b]
        tokens = target_lens[b]
        layers = frames if modified else frames + tokens
        span = frames - tokens if modified else frames - 1
        shift = 0 if modified else 1
        width = tokens + 1
        blank_rows = scratch[0, : layers * width].reshape((layers, width))
        label_rows = scratch[1, : layers * width].reshape((layers, width))
        beta = scratch[2, : (layers + 1) * width].reshape((layers + 1, width))
        _to_layers(blank[b], width, frames, shift, blank_rows)
        _to_layers(label[b], tokens, frames, shift, label_rows)
        _beta(blank_rows, label_rows, tokens, layers, span, beta)
        log_sum = beta[0, 0]
        nll[b] = np.inf if log_sum < 0.1 * LOG_ZERO else -log_sum
        if occupancies:
            _occupancies(blank_rows, label_rows, beta, tokens, layers, span, shift, floor, blank_occ[b], label_occ[b])


@jit
def viterbi_group(blank, label, enc_lens, target_lens, modified, frames_out, score):
    """Best path of every utterance: frames_out[b, u] is the frame of label u, score[b] the log-prob of the path.

    Of equally good paths the one that emits earlier is taken.
    """
    for b in range(enc_lens.size):
        frames = enc_lens[b]
        tokens = target_lens[b]
        step = 1 if modified else 0
        best = np.full((frames + 1, tokens + 1), LOG_ZERO)
        best[frames, tokens] = 0.0
        emit = np.zeros((frames + 1, tokens + 1), dtype=np.bool_)
        for t in range(frames - 1, -1, -1):
            for u in range(tokens, -1, -1):
                stay = best[t + 1, u] + max(LOG_ZERO, np.float64(blank[b, t, u]))
                best[t, u] = stay
                if u < tokens:
                    move = best[t + step, u + 1] + max(LOG_ZERO, np.float64(label[b, t, u]))
                    if move >= stay:
                        best[t, u] = move
                        emit[t, u] = True
        score[b] = best[0, 0]
        t = 0
        u = 0
        while u < tokens and t < frames:
            if emit[t, u]:
                frames_out[b, u] = t
                u += 1
                t += step
            else:
                t += 1


def forward_backward(
    blank: Tensor, label: Tensor, lengths: Lengths, modified: bool, occupancies: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See losses/backends/__init__.py. Uses as many threads as torch does; small problems run in the caller's."""
    batch = blank.shape[0]
    blank_lp, label_lp = blank.numpy(), label.numpy()
    nll = np.zeros(batch)
    # numpy's zeros and not torch's: untouched pages cost nothing, and torch's threads stay asleep
    blank_occ = np.zeros_like(blank_lp if occupancies else blank_lp[:0])
    label_occ = np.zeros_like(label_lp if occupancies else label_lp[:0])
    enc_lens = np.array(lengths.enc, dtype=np.int64)
    target_lens = np.array(lengths.target, dtype=np.int64)

    floor = LOG_FLOOR[blank.dtype]

    def run(group: np.ndarray) -> None:
        lattice_group(
            blank_lp, label_lp, enc_lens, target_lens, group, modified, floor, nll, occupancies, blank_occ, label_occ
        )

    run_groups(run, [t * (u + 1) for t, u in zip(lengths.enc, lengths.target, strict=True)], SMALL_PROBLEM)
    if not occupancies:
        return torch.from_numpy(nll), None, None
    return torch.from_numpy(nll), torch.from_numpy(blank_occ), torch.from_numpy(label_occ)


def viterbi(blank: Tensor, label: Tensor, lengths: Lengths, modified: bool) -> tuple[Tensor, Tensor]:
    """Frame of each label, int64 [B, U] with -1 in the padding, and the log-prob of the path, float64 [B]."""
    frames = torch.full(label.shape[::2], -1, dtype=torch.int64)
    score = torch.zeros(blank.shape[0], dtype=torch.float64)
    enc_lens = np.array(lengths.enc, dtype=np.int64)
    target_lens = np.array(lengths.target, dtype=np.int64)
    viterbi_group(blank.numpy(), label.numpy(), enc_lens, target_lens, modified, frames.numpy(), score.numpy())
    score[score < 0.1 * LOG_ZERO] = -math.inf
    return frames, score
