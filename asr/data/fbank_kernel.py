"""The loops of log-mel energies, compiled: those of kaldi-native-fbank, several times as fast.

That library makes the tables of sines and cosines of its FFT anew for each frame, which takes longer than all else.
Here they are made once, and the steps are the same in float32: a frame with reflection at the ends, removal of its
mean, pre-emphasis, window, FFT of real numbers as one of half as many complex ones in stages of radix 4, power, mel
sums, logarithm. Window and mel weights are the library's own. Only rounding differs, and does so already between
builds of the library, since its FFT is compiled with -ffast-math: here too, sums may be taken in any order, but always
in the same one on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from losses.backends.threads import jit_reordering

FFT_SIZE = 512
HALF = FFT_SIZE // 2
STAGES = 4
"""HALF is 4 ** STAGES."""


class Tables(NamedTuple):
    """What the loops read, all float32 or int64: the window [L]; roots of unity of the complex FFT [2, HALF] and of the
    step from it to the real one [2, HALF / 2]; the order in which samples enter [HALF]; and mel weights, those of a bin
    one after the other: first FFT bin [F], where its weights begin [F + 1], weights."""

    window: np.ndarray
    roots: np.ndarray
    half_roots: np.ndarray
    order: np.ndarray
    first_bin: np.ndarray
    begin: np.ndarray
    weights: np.ndarray


def make_tables(window: Sequence[float], mel: np.ndarray) -> Tables:
    """Of a window [L] and a matrix of mel weights [F, HALF + 1] without gaps within a row."""
    angles = np.array([-2 * math.pi * i / HALF for i in range(HALF)])
    half_angles = np.array([-math.pi * ((i + 1) / HALF + 0.5) for i in range(HALF // 2)])
    order = np.zeros(HALF, np.int64)
    for i in range(HALF):
        for stage in range(STAGES):
            order[i] += (i // 4**stage % 4) * 4 ** (STAGES - 1 - stage)
    used = [np.flatnonzero(row) for row in mel]
    rows = [row[nonzero[0] : nonzero[-1] + 1] for row, nonzero in zip(mel, used, strict=True)]
    return Tables(
        window=np.asarray(window, np.float32),
        roots=np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32),
        half_roots=np.stack([np.cos(half_angles), np.sin(half_angles)]).astype(np.float32),
        order=order,
        first_bin=np.array([nonzero[0] for nonzero in used]),
        begin=np.cumsum([0, *(len(row) for row in rows)]),
        weights=np.concatenate(rows).astype(np.float32),
    )


@jit_reordering
def log_mel(wave, start, shift, preemphasis, tables, out):  # type: ignore[no-untyped-def]
    """Frames of ``wave``, float32 [N], written to ``out``, float32 [T, F].

    The first frame begins at sample ``start``, each other one ``shift`` samples after the one before. Where a frame
    leaves the wave at either end, it goes on with its mirror image. ``preemphasis`` is a float32.
    """
    size = tables.window.size
    frame = np.empty(size, np.float32)
    re, im = np.empty(HALF, np.float32), np.empty(HALF, np.float32)
    power = np.empty(HALF, np.float32)
    for t in range(out.shape[0]):
        _extract(wave, start + t * shift, preemphasis, tables.window, frame)
        for i in range(HALF):
            source = 2 * tables.order[i]
            re[i] = frame[source] if source < size else np.float32(0)
            im[i] = frame[source + 1] if source + 1 < size else np.float32(0)
        _complex_fft(re, im, tables.roots)
        _power(re, im, tables.half_roots, power)
        for f in range(out.shape[1]):
            energy = np.float32(0)
            offset = tables.first_bin[f] - tables.begin[f]
            for j in range(tables.begin[f], tables.begin[f + 1]):
                energy += tables.weights[j] * power[offset + j]
            out[t, f] = math.log(max(energy, np.float32(1.1920929e-07)))


@jit_reordering
def _extract(wave, start, preemphasis, window, frame):  # type: ignore[no-untyped-def]
    size = frame.size
    if start >= 0 and start + size <= wave.size:
        for i in range(size):
            frame[i] = wave[start + i]
    else:
        for i in range(size):
            source = start + i
            while source < 0 or source >= wave.size:
                source = -source - 1 if source < 0 else 2 * wave.size - 1 - source
            frame[i] = wave[source]
    total = np.float32(0)
    for i in range(size):
        total += frame[i]
    mean = total / np.float32(size)
    for i in range(size):
        frame[i] -= mean
    for i in range(size - 1, 0, -1):
        frame[i] = (frame[i] - preemphasis * frame[i - 1]) * window[i]
    frame[0] = (frame[0] - preemphasis * frame[0]) * window[0]


@jit_reordering
def _complex_fft(re, im, roots):  # type: ignore[no-untyped-def]
    m, stride = 1, HALF // 4
    while m < HALF:
        for block in range(0, HALF, 4 * m):
            for k in range(m):
                a, b, c, d = block + k, block + k + m, block + k + 2 * m, block + k + 3 * m
                r, i = roots[0, stride * k], roots[1, stride * k]
                b_re, b_im = re[b] * r - im[b] * i, re[b] * i + im[b] * r
                r, i = roots[0, 2 * stride * k], roots[1, 2 * stride * k]
                c_re, c_im = re[c] * r - im[c] * i, re[c] * i + im[c] * r
                r, i = roots[0, 3 * stride * k], roots[1, 3 * stride * k]
                d_re, d_im = re[d] * r - im[d] * i, re[d] * i + im[d] * r
                less_re, less_im = re[a] - c_re, im[a] - c_im
                more_re, more_im = re[a] + c_re, im[a] + c_im
                sum_re, sum_im = b_re + d_re, b_im + d_im
                gap_re, gap_im = b_re - d_re, b_im - d_im
                re[c], im[c] = more_re - sum_re, more_im - sum_im
                re[a], im[a] = more_re + sum_re, more_im + sum_im
                re[b], im[b] = less_re + gap_im, less_im - gap_re
                re[d], im[d] = less_re - gap_im, less_im + gap_re
        m, stride = 4 * m, stride // 4


@jit_reordering
def _power(re, im, half_roots, power):  # type: ignore[no-untyped-def]
    half = np.float32(0.5)
    first = re[0] + im[0]
    power[0] = first * first
    for k in range(1, HALF // 2 + 1):
        n = HALF - k
        sum_re, sum_im = re[k] + re[n], im[k] - im[n]
        gap_re, gap_im = re[k] - re[n], im[k] + im[n]
        r, i = half_roots[0, k - 1], half_roots[1, k - 1]
        turned_re, turned_im = gap_re * r - gap_im * i, gap_re * i + gap_im * r
        low_re, low_im = half * (sum_re + turned_re), half * (sum_im + turned_im)
        high_re, high_im = half * (sum_re - turned_re), half * (turned_im - sum_im)
        power[k] = low_re * low_re + low_im * low_im
        power[n] = high_re * high_re + high_im * high_im
