"""Kernels of packed logits [N, V] on CPU, and of the activation before them: compiled loops of numba_rows.py."""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.backends.numba_bfloat16 import number_array, store_number
from losses.backends.numba_rows import add_rows, gather_rows, hidden_rows, softmax_row
from losses.backends.threads import jit, serial_torch, start_tasks

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Bytes: a tile of hidden states and logits lies in a core's cache, a chunk of gradients by the logits in the
# processor's. Short utterances are taken together up to GROUP; logits are kept for the gradient up to CACHE of each of
# two groups at a time, or CACHE_OF_ONE.
TILE, GROUP, CACHE, CACHE_OF_ONE, CHUNK = 2**21, 10 * 2**20, 20 * 2**20, 52 * 2**20, 6 * 2**20
PACKED = 4 * 2**20  # bytes of a weight that may be kept twice
LEAST_TILE = 128  # cells of a tile at least, for the matrix product's sake


@jit
def _finish_row(row, out, total):
    """Round row into out and add it to total, if that has a size."""
    for i in range(row.size):
        out[i] = store_number(row[i], out[i])
    if total.size == row.size:
        for i in range(row.size):
            total[i] += row[i]


@jit
def gradient_rows(
    logits, at, labels, blank, normalize, normalizer, blank_occ, label_occ, scale, clamp, floor, out, to, total
):
    work = np.empty(logits.shape[1], dtype=normalizer.dtype)
    zero = normalizer.dtype.type(0)
    one = normalizer.dtype.type(1)
    for n in range(at.size):
        # without clamp the upstream gradient is applied to the occupancies, with clamp to the clamped gradient
        inner = scale[n] if clamp <= zero else one
        blanks = blank_occ[n] * inner
        labelled = label_occ[n] * inner
        taken = blanks + labelled
        if taken == zero:
            out[to[n]][:] = 0
            continue
        if normalize:
            softmax_row(logits[at[n]], normalizer[n], taken, abs(inner) * floor, work)
        else:
            work[:] = zero
        work[blank] -= blanks
        if labels[n] >= 0:
            work[labels[n]] -= labelled
        if clamp > zero:
            for i in range(work.size):
                x = work[i]
                x = clamp if x > clamp else x
                work[i] = (-clamp if x < -clamp else x) * scale[n]
        _finish_row(work, out[to[n]], total)


parallel = serial_torch
start = start_tasks


def shares(size: int, threads: int, most: int) -> list[slice]:
    """range(size) in so many parts that there is one for each thread and none is longer than `most`."""
    count = max(1, min(threads, size // 64), -(-size // most))
    bounds = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def hidden(enc: Tensor, pred: Tensor, rows: Tensor, columns: Tensor, activation: str, out: Tensor) -> None:
    """See losses/backends/__init__.py."""
    zero = (np.float64 if out.dtype == torch.float64 else np.float32)(0)
    arrays = [number_array(x) for x in (enc, pred)]
    hidden_rows(*arrays, rows.numpy(), columns.numpy(), activation == "tanh", zero, number_array(out))


def pack(weight: Tensor, rows: int) -> Tensor:
    """See losses/backends/__init__.py. float32 up to PACKED bytes: the layout that oneDNN would otherwise
    make anew in every product."""
    small = weight.dtype == torch.float32 and 0 < weight.numel() * weight.itemsize <= PACKED
    if small and _onednn():
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """See losses/backends/__init__.py. In float32 by oneDNN, a twentieth faster than torch.mm by MKL on AMD."""
    if weight.is_mkldnn or (weight.dtype == torch.float32 and weight.is_contiguous() and _onednn()):
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available()


def gather(logits: Tensor, labels: Tensor, blank: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """See losses/backends/__init__.py."""
    at = np.arange(logits.shape[0])
    gather_rows(number_array(logits), at, labels.numpy(), blank, True, *(x.numpy() for x in out))


def gradient(
    logits: Tensor,
    at: Tensor,
    labels: Tensor,
    blank: int,
    normalizer: Tensor,
    blank_occ: Tensor,
    label_occ: Tensor,
    scale: Tensor,
    clamp: float,
    out: Tensor,
) -> Tensor:
    """See losses/backends/__init__.py."""
    norm = normalizer.numpy()
    total = np.zeros(logits.shape[1], norm.dtype)
    number = norm.dtype.type
    occupied = [x.numpy() for x in (blank_occ, label_occ, scale)]
    floor = number(GRADIENT_FLOOR[normalizer.dtype])
    to = np.arange(at.shape[0])
    gradient_rows(
        number_array(logits), at.numpy(), labels.numpy(), blank, True, norm, *occupied, number(clamp), floor,
        number_array(out), to, total,
    )  # fmt: skip
    return torch.from_numpy(total)


def add(
    gradient: Tensor,
    hidden: Tensor,
    first: int,
    rows: Tensor,
    columns: Tensor,
    activation: str,
    enc_gradient: Tensor,
    pred_gradient: Tensor,
) -> None:
    """See losses/backends/__init__.py."""
    add_rows(
        number_array(gradient), number_array(hidden), first, rows.numpy(), columns.numpy(), activation == "tanh",
        enc_gradient.numpy(), pred_gradient.numpy(),
    )  # fmt: skip
