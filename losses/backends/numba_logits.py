"""Normaliser, gather and gradient of the logits on CPU: compiled loops of numba_rows.py, frames over threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from losses.backends import GRADIENT_FLOOR
from losses.backends.numba_bfloat16 import number_array
from losses.backends.numba_rows import gather_tiles, gradient_tiles
from losses.backends.threads import run_groups
from losses.shapes import Lengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SMALL_PROBLEM = 2**15  # logits below which handing work to another thread costs more than it saves
TILE = 2**17  # logits of a piece of work


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
