"""Kernels of packed logits [N, V] on CPU, and of the activation before them: compiled loops of numba_rows.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.backends.numba_bfloat16 import number_array
from losses.backends.numba_rows import (
    add_rows,
    gather_rows,
    gradient_rows,
    hidden_rows,
    normalize_rows,
    score_rows,
)
from losses.backends.threads import serial_torch, start_tasks

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Bytes: a tile of hidden states and logits lies in a core's cache, a chunk of gradients by the logits in the
# processor's. Short utterances are taken together up to GROUP; logits are kept for the gradient up to CACHE of each of
# two groups at a time, or CACHE_OF_ONE.
TILE, GROUP, CACHE, CACHE_OF_ONE, CHUNK = 2**21, 10 * 2**20, 20 * 2**20, 46 * 2**20, 6 * 2**20
PACKED = 4 * 2**20  # bytes of a weight that may be kept twice
# Cells of a tile at least, for the sake of the matrix product, by bytes of a number: in half precision AMX wants more.
LEAST_TILE = {2: 128, 4: 64, 8: 64}
ALIGNED = 32  # columns of half precision logits come in multiples: a third faster than 500, on AMX


parallel = serial_torch
start = start_tasks


def shares(size: int, threads: int, most: int) -> list[slice]:
    """range(size) in so many parts that there is one for each thread and none is longer than `most`."""
    count = max(1, min(threads, size // 64), -(-size // most))
    bounds = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def width(vocab_size: int, dtype: torch.dtype) -> int:
    """See losses/backends/__init__.py."""
    return vocab_size if dtype.itemsize > 2 else -(-vocab_size // ALIGNED) * ALIGNED


def readable(x: Tensor) -> Tensor:
    """See losses/backends/__init__.py."""
    return x.float() if x.dtype == torch.float16 else x


def estimates(dtype: torch.dtype) -> torch.dtype | None:
    """See losses/backends/__init__.py. bfloat16 only where the processor has instructions for it."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and _onednn() and dtype == torch.float32 else None


def hidden(enc: Tensor, pred: Tensor, rows: Tensor, columns: Tensor, activation: str, out: Tensor) -> None:
    """See losses/backends/__init__.py."""
    zero = (np.float64 if out.dtype == torch.float64 else np.float32)(0)
    arrays = [number_array(x) for x in (enc, pred)]
    hidden_rows(*arrays, rows.numpy(), columns.numpy(), activation == "tanh", zero, number_array(out))


def scores(
    enc: Tensor,
    pred: Tensor,
    rows: Tensor,
    columns: Tensor,
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    blank: int,
    out: Tensor,
    logits: tuple[Tensor, Tensor],
) -> None:
    """See losses/backends/__init__.py."""
    arrays = [number_array(x) for x in (enc, pred)]
    added = number_array(weight.new_empty(0) if bias is None else bias)
    score_rows(
        *arrays, rows.numpy(), columns.numpy(), activation == "tanh", np.float32(0), number_array(weight), added,
        labels.numpy(), blank, number_array(out), *(x.numpy() for x in logits),
    )  # fmt: skip


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


def normalize(logits: Tensor, vocab_size: int, labels: Tensor, blank: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """See losses/backends/__init__.py."""
    normalize_rows(number_array(logits), vocab_size, labels.numpy(), blank, *(x.numpy() for x in out))


def gradient(
    logits: Tensor,
    vocab_size: int,
    at: Tensor,
    labels: Tensor,
    blank: int,
    normalizer: Tensor,
    blank_lp: Tensor,
    label_lp: Tensor,
    blank_occ: Tensor,
    label_occ: Tensor,
    scale: Tensor,
    clamp: float,
    out: Tensor,
) -> Tensor:
    """See losses/backends/__init__.py."""
    norm = normalizer.numpy()
    total = np.zeros(vocab_size, norm.dtype)
    number = norm.dtype.type
    of_cells = [x.numpy() for x in (normalizer, blank_lp, label_lp, blank_occ, label_occ, scale)]
    floor = number(GRADIENT_FLOOR[normalizer.dtype])
    gradient_rows(
        number_array(logits), at.numpy(), labels.numpy(), blank, *of_cells, number(clamp), floor, number_array(out),
        total,
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
