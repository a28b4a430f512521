"""A step of a Conformer's blocks on CPU, compiled: what ``ConformerBlock.step`` computes, for streams side by side.

A chunk of a stream is eight frames: products of eight rows, for which torch's matrix product reaches a fraction of
the processor, and some fifty small operations a block, each of which costs more to start than to do. Here a block is
eight calls that hold no lock, so that threads share out the streams; frames that are not there, and cached frames from
before a stream began, are not computed at all. Only the order of sums differs from torch's.

Symbols: N streams of a thread; R rows of x, their frames one after the other, filled up to a multiple of 4; the others
are those of ``conformer.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losses.backends.numba_bfloat16 import number_array
from losses.backends.threads import jit_reordering, run_each

ROWS = 4
"""Rows of a product that are computed together."""


class Affine(NamedTuple):
    """Weight and bias of a layer, float32: [N, K] and [N] of a product, [D] and [D] of a norm, with its epsilon."""

    weight: np.ndarray
    bias: np.ndarray
    eps: np.float32


class FeedForwardWeights(NamedTuple):
    norm: Affine
    up: Affine
    down: Affine


class BlockWeights(NamedTuple):
    """Of a block; ``taps`` is the depthwise convolution, [D, 1, 1, K] and [D]."""

    ff1: FeedForwardWeights
    attention_norm: Affine
    qkv: Affine
    attention_out: Affine
    conv_in_norm: Affine
    gated: Affine
    taps: Affine
    conv_norm: Affine
    conv_out: Affine
    ff2: FeedForwardWeights


class Caches(NamedTuple):
    """As ``conformer.BlockState``: keys and values [B, H, L, d], conv [B, K - 1, D]."""

    keys: np.ndarray
    values: np.ndarray
    conv: np.ndarray


class Chunk(NamedTuple):
    """The frames of N streams, which are some of the B that the state holds.

    first: row of the state of the first of them.
    counts: int64 [N], frames that are there.
    begins: int64 [N], the row of x of the first.
    known: int64 [B], cached frames since each stream began, at most L.
    cos, sin: float32 [B, C, d / 2], the angles of the chunk's frames.
    """

    first: int
    counts: np.ndarray
    begins: np.ndarray
    known: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


@jit_reordering
def _exp(x):
    # Cody and Waite's reduction, and a polynomial of degree 6 (Cephes): to 2 units in the last place, and in vectors
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@jit_reordering
def _sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + _exp(-x))


@jit_reordering
def _products(x, rows, weight, y, first):
    """y[:rows, first + n] is the product of x [rows, K] and row n of weight [N, K]; rows is a multiple of 4."""
    count, width = weight.shape
    whole = count - count % 3
    for n in range(0, whole, 3):
        u, v, w = weight[n], weight[n + 1], weight[n + 2]
        at = first + n
        for r in range(0, rows, ROWS):
            # 12 sums, 3 weights and a number of x are the 16 registers of AVX2
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = np.float32(0.0)
            for k in range(width):
                a0 += x0[k] * u[k]
                b0 += x0[k] * v[k]
                c0 += x0[k] * w[k]
                a1 += x1[k] * u[k]
                b1 += x1[k] * v[k]
                c1 += x1[k] * w[k]
                a2 += x2[k] * u[k]
                b2 += x2[k] * v[k]
                c2 += x2[k] * w[k]
                a3 += x3[k] * u[k]
                b3 += x3[k] * v[k]
                c3 += x3[k] * w[k]
            y[r, at], y[r, at + 1], y[r, at + 2] = a0, b0, c0
            y[r + 1, at], y[r + 1, at + 1], y[r + 1, at + 2] = a1, b1, c1
            y[r + 2, at], y[r + 2, at + 1], y[r + 2, at + 2] = a2, b2, c2
            y[r + 3, at], y[r + 3, at + 1], y[r + 3, at + 2] = a3, b3, c3
    for n in range(whole, count):
        u = weight[n]
        for r in range(0, rows, ROWS):
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            a0 = a1 = a2 = a3 = np.float32(0.0)
            for k in range(width):
                a0 += x0[k] * u[k]
                a1 += x1[k] * u[k]
                a2 += x2[k] * u[k]
                a3 += x3[k] * u[k]
            at = first + n
            y[r, at], y[r + 1, at], y[r + 2, at], y[r + 3, at] = a0, a1, a2, a3


@jit_reordering
def _linear(x, rows, layer, y):
    """y [rows, N] of x [rows, K]."""
    _products(x, rows, layer.weight, y, np.int64(0))
    for r in range(rows):
        for n in range(layer.bias.size):
            y[r, n] += layer.bias[n]


@jit_reordering
def _add_linear(x, layer, scale, y, room):
    """Adds scale times the layer of x to y; room [rows, N]."""
    rows = x.shape[0]
    _products(x, rows, layer.weight, room, np.int64(0))
    for r in range(rows):
        for n in range(layer.bias.size):
            y[r, n] += scale * (room[r, n] + layer.bias[n])


@jit_reordering
def _norm(x, rows, layer, y):
    dim = layer.weight.size
    for r in range(rows):
        total = np.float32(0.0)
        for i in range(dim):
            total += x[r, i]
        mean = total / np.float32(dim)
        total = np.float32(0.0)
        for i in range(dim):
            total += (x[r, i] - mean) * (x[r, i] - mean)
        scale = np.float32(1.0) / np.sqrt(total / np.float32(dim) + layer.eps)
        for i in range(dim):
            y[r, i] = (x[r, i] - mean) * scale * layer.weight[i] + layer.bias[i]


@jit_reordering
def _silu(x):
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] * _sigmoid(flat[i])


@jit_reordering
def _feed_forward(x, layers, normed, wide, room):
    rows = x.shape[0]
    inner = wide[: rows * layers.up.bias.size].reshape(rows, layers.up.bias.size)
    _norm(x, rows, layers.norm, normed)
    _linear(normed, rows, layers.up, inner)
    _silu(inner)
    _add_linear(inner, layers.down, np.float32(0.5), x, room)


@jit_reordering
def _softmax(scores, rows):
    for r in range(rows):
        row = scores[r]
        # four at a time: each comparison waits for the one before
        m0 = m1 = m2 = m3 = row[0]
        for j in range(0, row.size - 3, 4):
            m0, m1, m2, m3 = max(m0, row[j]), max(m1, row[j + 1]), max(m2, row[j + 2]), max(m3, row[j + 3])
        for j in range(row.size - row.size % 4, row.size):
            m0 = max(m0, row[j])
        largest = max(max(m0, m1), max(m2, m3))
        total = np.float32(0.0)
        for j in range(row.size):
            row[j] = _exp(row[j] - largest)
            total += row[j]
        scale = np.float32(1.0) / total
        for j in range(row.size):
            row[j] *= scale


@jit_reordering
def _add_weighted(weights, row, first, values, y):
    """Adds to y [4, d] the values [W, d], weighted by columns first to first + W of four rows of the weights."""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    count, dim = values.shape
    whole = count - count % 4
    for j in range(0, whole, 4):
        v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        at = first + j
        a0, a1, a2, a3 = weights[row, at], weights[row, at + 1], weights[row, at + 2], weights[row, at + 3]
        r1, r2, r3 = row + 1, row + 2, row + 3
        b0, b1, b2, b3 = weights[r1, at], weights[r1, at + 1], weights[r1, at + 2], weights[r1, at + 3]
        c0, c1, c2, c3 = weights[r2, at], weights[r2, at + 1], weights[r2, at + 2], weights[r2, at + 3]
        d0, d1, d2, d3 = weights[r3, at], weights[r3, at + 1], weights[r3, at + 2], weights[r3, at + 3]
        for i in range(dim):
            p0, p1, p2, p3 = v0[i], v1[i], v2[i], v3[i]
            y0[i] += a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3
            y1[i] += b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3
            y2[i] += c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3
            y3[i] += d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3
    for j in range(whole, count):
        for i in range(dim):
            y0[i] += weights[row, first + j] * values[j, i]
            y1[i] += weights[row + 1, first + j] * values[j, i]
            y2[i] += weights[row + 2, first + j] * values[j, i]
            y3[i] += weights[row + 3, first + j] * values[j, i]


@jit_reordering
def _append(cache, latest, after):
    """``after`` [L, d], which may be the cache, is the end of the cache [L, d] and the latest [n, d] behind it."""
    (length, dim), count = cache.shape, latest.shape[0]
    kept = max(length - count, 0)
    skipped = length - kept
    for t in range(kept):
        to, old = after[t], cache[skipped + t]
        for j in range(dim):
            to[j] = old[j]
    for t in range(length - kept):
        to, new = after[kept + t], latest[count - skipped + t]
        for j in range(dim):
            to[j] = new[j]


@jit_reordering
def _attend(wide, chunk, before, after, y):
    """Attention of the rows [R, 3 D] that ``wide`` begins with over each stream's cache and its own, into y [R, D]."""
    heads, left, head_dim = before.keys.shape[1:]
    half, dim = head_dim // 2, heads * head_dim
    qkv = wide[: 3 * y.size].reshape(y.shape[0], 3 * dim)
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    longest = chunk.counts.max()
    padded = (longest + ROWS - 1) // ROWS * ROWS
    queries = np.zeros((padded, head_dim), np.float32)
    keys = np.zeros((longest, head_dim), np.float32)
    values = np.zeros((longest, head_dim), np.float32)
    room = np.zeros(padded * (left + longest), np.float32)
    sums = np.zeros((ROWS, head_dim), np.float32)
    for i in range(chunk.counts.size):
        b, count, begin = chunk.first + i, chunk.counts[i], chunk.begins[i]
        known = chunk.known[b]
        rows, width = (count + ROWS - 1) // ROWS * ROWS, known + count
        scores = room[: rows * width].reshape(rows, width)
        for h in range(heads):
            for t in range(count):
                q = qkv[begin + t, h * head_dim : (h + 1) * head_dim]
                k = qkv[begin + t, dim + h * head_dim : dim + (h + 1) * head_dim]
                v = qkv[begin + t, 2 * dim + h * head_dim : 2 * dim + (h + 1) * head_dim]
                cos, sin = chunk.cos[b, t], chunk.sin[b, t]
                for j in range(half):
                    queries[t, j] = (q[j] * cos[j] - q[half + j] * sin[j]) * scale
                    queries[t, half + j] = (q[half + j] * cos[j] + q[j] * sin[j]) * scale
                    keys[t, j] = k[j] * cos[j] - k[half + j] * sin[j]
                    keys[t, half + j] = k[half + j] * cos[j] + k[j] * sin[j]
                    values[t, j], values[t, half + j] = v[j], v[half + j]
            old = before.values[b, h, left - known :]
            _products(queries, rows, before.keys[b, h, left - known :], scores, np.int64(0))
            _products(queries, rows, keys[:count], scores, known)
            _softmax(scores, count)
            for t in range(0, rows, ROWS):
                for r in range(ROWS):
                    for j in range(head_dim):
                        sums[r, j] = np.float32(0.0)
                _add_weighted(scores, t, np.int64(0), old, sums)
                _add_weighted(scores, t, known, values[:count], sums)
                for r in range(min(ROWS, count - t)):
                    for j in range(head_dim):
                        y[begin + t + r, h * head_dim + j] = sums[r, j]
            _append(before.keys[b, h], keys[:count], after.keys[b, h])
            _append(before.values[b, h], values[:count], after.values[b, h])


@jit_reordering
def _gated_taps(gated, chunk, taps, before, after, y):
    """Gates the rows [R, 2 D]; the convolution of each stream's cached and own frames, into y [R, D]."""
    dim, kernel = taps.bias.size, taps.weight.shape[3]
    weight = np.empty((kernel, dim), np.float32)
    for i in range(dim):
        for k in range(kernel):
            weight[k, i] = taps.weight[i, 0, 0, k]
    window = np.empty((kernel - 1 + chunk.counts.max(), dim), np.float32)
    for i in range(chunk.counts.size):
        b, count, begin = chunk.first + i, chunk.counts[i], chunk.begins[i]
        for k in range(kernel - 1):
            for j in range(dim):
                window[k, j] = before.conv[b, k, j]
        for t in range(count):
            own = window[kernel - 1 + t]
            for j in range(dim):
                own[j] = gated[begin + t, j] * _sigmoid(gated[begin + t, dim + j])
        for t in range(count):
            out = y[begin + t]
            for j in range(dim):
                out[j] = taps.bias[j]
            for k in range(kernel):
                for j in range(dim):
                    out[j] += window[t + k, j] * weight[k, j]
        for k in range(kernel - 1):
            for j in range(dim):
                after.conv[b, k, j] = window[count + k, j]


@jit_reordering
def _project(x, norm, layer, normed, wide):
    """The layer of the norm of x, at the beginning of ``wide``."""
    rows, inner = x.shape[0], layer.bias.size
    _norm(x, rows, norm, normed)
    _linear(normed, rows, layer, wide[: rows * inner].reshape(rows, inner))


@jit_reordering
def _convolve(wide, chunk, taps, norm, before, after, y):
    """Gates the rows [R, 2 D] at the beginning of ``wide``; convolution, norm and SiLU of them, into y [R, D]."""
    rows = y.shape[0]
    _gated_taps(wide[: 2 * y.size].reshape(rows, 2 * y.shape[1]), chunk, taps, before, after, y)
    _norm(y, rows, norm, y)
    _silu(y)


def step_block(x, chunk, weights, before, after, normed, wide, room):  # type: ignore[no-untyped-def]
    """Takes the rows x [R, D] of the streams through a block, in place, and writes their caches after it.

    ``normed`` and ``room`` are [R, D], ``wide`` has room for R rows of the widest layer; nothing in them matters but
    that rows of ``normed`` are finite. Not compiled as a whole, which would take twice as long.
    """
    w, one = weights, np.float32(1.0)
    _feed_forward(x, w.ff1, normed, wide, room)
    _project(x, w.attention_norm, w.qkv, normed, wide)
    _attend(wide, chunk, before, after, normed)
    _add_linear(normed, w.attention_out, one, x, room)
    _project(x, w.conv_in_norm, w.gated, normed, wide)
    _convolve(wide, chunk, w.taps, w.conv_norm, before, after, normed)
    _add_linear(normed, w.conv_out, one, x, room)
    _feed_forward(x, w.ff2, normed, wide, room)


def _layers(block: Any) -> list[nn.Module]:
    """In the order of ``BlockWeights``, those of the feed-forward modules one by one."""
    ff1, ff2, attention, conv = block.ff1, block.ff2, block.attention, block.conv
    return [ff1.norm, ff1.up, ff1.down, attention.norm, attention.qkv, attention.out, conv.norm, conv.gated] + [
        *(conv.depthwise, conv.conv_norm, conv.out, ff2.norm, ff2.up, ff2.down)
    ]


_weights: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], BlockWeights]] = weakref.WeakKeyDictionary()


def weights_of(block: nn.Module) -> BlockWeights | None:
    """Where a block's weights lie, or None if it is not to be computed here.

    That is where a layer is of another type, such as a quantised one, or somebody watches or replaces what it does, or
    weights are not float32 on CPU.
    """
    layers = _layers(block)
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None
        if type(layer) not in (nn.Linear, nn.LayerNorm, nn.Conv2d):
            return None
    parameters = [parameter for layer in layers for parameter in layer._parameters.values()]
    addresses = [0 if one is None else one.data_ptr() for one in parameters]
    known = _weights.get(block)
    if known is not None and known[0] == addresses:
        return known[1]
    for one in parameters:
        if one is None or one.device.type != "cpu" or one.dtype != torch.float32 or not one.is_contiguous():
            return None
    arrays = [number_array(one.detach()) for one in parameters if one is not None]
    eps = [np.float32(getattr(layer, "eps", 0.0)) for layer in layers]
    pairs = [Affine(*pair) for pair in zip(arrays[::2], arrays[1::2], eps, strict=True)]
    between = dict(zip(BlockWeights._fields[1:-1], pairs[3:11], strict=True))
    ff1, ff2 = FeedForwardWeights(*pairs[:3]), FeedForwardWeights(*pairs[11:])
    found = BlockWeights(ff1=ff1, ff2=ff2, **between)
    _weights[block] = addresses, found
    return found


def weights_for(x: Tensor, blocks: Iterable[nn.Module]) -> list[BlockWeights] | None:
    """The weights of the blocks, or None if x is not to be taken through them here.

    Here: float32 on CPU, without gradients, and where nobody records what is computed.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
    ):
        return None
    found = []
    for block in blocks:
        weights = weights_of(block)
        if weights is None:
            return None
        found.append(weights)
    return found


def step_blocks(
    x: Tensor,
    weights: Sequence[BlockWeights],
    blocks: Sequence[tuple[Tensor, Tensor, Tensor]],
    lens: Tensor | None,
    known: Tensor,
    angle: Tensor,
    threads: int,
    in_place: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """A chunk of B streams through all blocks, on so many threads, each with streams of its own.

    Args:
        x: float32 [B, C, D].
        weights: of each block.
        blocks: caches of each: keys, values and those of the convolution.
        lens: int64 [B], frames that are there, or None for all.
        known: [B], cached frames since a stream began, at most L; exported models have them as float.
        angle: [B, C, d / 2].
        threads: how many share out the streams.
        in_place: whether the caches may be written over.

    Returns:
        float32 [B, C, D], 0 behind ``lens``; the caches of each block after the chunk.
    """
    batch_size, frames, dim = x.shape
    counts = np.full(batch_size, frames) if lens is None else lens.long().numpy()
    caches = [(keys.contiguous(), values.contiguous(), conv.contiguous()) for keys, values, conv in blocks]
    after = (
        caches
        if in_place
        else [
            (torch.empty_like(keys), torch.empty_like(values), torch.empty_like(conv)) for keys, values, conv in caches
        ]
    )
    before = [Caches(*(cache.numpy() for cache in own)) for own in caches]
    written = [Caches(*(cache.numpy() for cache in own)) for own in after]
    widest = max(max(3 * dim, one.ff1.up.bias.size) for one in weights)
    known_frames, cos, sin = known.long().numpy(), angle.cos().numpy(), angle.sin().numpy()
    there = np.arange(frames) < counts[:, None]
    out = torch.zeros_like(x)
    rows_in, rows_out = x.numpy(), out.numpy()

    def run(streams: np.ndarray) -> None:
        first, last = int(streams[0]), int(streams[-1]) + 1
        own = counts[first:last]
        total = int(own.sum())
        chunk = Chunk(first, own, np.cumsum(own) - own, known_frames, cos, sin)
        rows = np.zeros((-(-total // ROWS) * ROWS, dim), np.float32)
        rows[:total] = rows_in[first:last][there[first:last]]
        normed, room = np.zeros_like(rows), np.empty_like(rows)
        wide = np.empty(max(1, len(rows)) * widest, np.float32)
        for one, old, new in zip(weights, before, written, strict=True):
            step_block(rows, chunk, one, old, new, normed, wide, room)
        rows_out[first:last][there[first:last]] = rows[:total]

    run_each(run, np.array_split(np.arange(batch_size), max(1, min(batch_size, threads))))
    return out, after
