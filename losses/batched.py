"""Method "batched": the logits of the whole batch at once, [B, T, U+1, V]. Simple and exact; memory grows with T * U * V.

`logits_loss` is one autograd.Function from logits to the loss of each utterance. With p = softmax(logits), b and l the
occupancies of a cell's blank and label transition (losses/lattice.py), the gradient of -log P by the logits of that cell is

    p * (b + l) - b * [token is blank] - l * [token is the next label]                       (Li et al. 2019, sec. 3.2)

so that besides the logits only [B, T, U+1] arrays are kept, and one more array of the logits' size, the gradient, is made.
Both passes go through the true T_i x (U_i+1) cells in tiles of frames that stay in the cache; padding is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losses import lattice
from losses.shapes import Lengths

ACTIVATIONS = ("tanh", "relu")
CPU_TILE = 2**18  # logits of a tile: with its float32 temporary about the second-level cache of a core
GRADIENT_FLOOR = {torch.float32: 1e-25, torch.float64: 1e-150}


def _compute_dtype(logits: Tensor) -> torch.dtype:
    """Half precision is computed in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _tiles(lengths: Lengths, logits: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(utterance, frames, tokens) that together cover the true cells."""
    for b, (frames, tokens) in enumerate(zip(lengths.enc, lengths.target, strict=True)):
        rows = frames
        if logits.device.type == "cpu":
            rows = max(1, CPU_TILE // ((tokens + 1) * logits.shape[3]))
        for start in range(0, frames, rows):
            yield b, slice(start, min(start + rows, frames)), tokens


def _label_index(targets: Tensor, b: int, t: slice, tokens: int) -> Tensor:
    """[t, U_b, 1]: the next label of each cell, for gather and scatter along V."""
    return targets[b, None, :tokens, None].expand(t.stop - t.start, tokens, 1)


def cell_log_probs(
    logits: Tensor, targets: Tensor, lengths: Lengths, *, blank: int, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of blank [B, T, U+1] and next label [B, T, U], and the log-normaliser [B, T, U+1], outside of autograd.

    float32, or float64 for float64 logits; 0 in the padding. `normalize=False` takes logits for log-probs: no normaliser.
    `targets` are int64; nothing is checked here.
    """
    logits = logits.detach()
    dtype = _compute_dtype(logits)
    blank_lp = torch.zeros(logits.shape[:3], dtype=dtype, device=logits.device)
    label_lp = torch.zeros_like(blank_lp[:, :, 1:], memory_format=torch.contiguous_format)
    normalizer = torch.zeros_like(blank_lp) if normalize else None
    for b, t, u in _tiles(lengths, logits):
        cells = logits[b, t, : u + 1].to(dtype)
        blanks, labels = blank_lp[b, t, : u + 1], label_lp[b, t, :u]
        blanks.copy_(cells[..., blank])
        labels.copy_(cells[:, :u].gather(2, _label_index(targets, b, t, u)).squeeze(2))
        if normalizer is not None:
            norm = normalizer[b, t, : u + 1]
            norm.copy_(torch.logsumexp(cells, dim=2))
            blanks -= norm
            labels -= norm[:, :u]
    return blank_lp, label_lp, normalizer


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, lengths, blank, topology, fastemit_lambda, clamp, normalize, backend):
        with torch.autocast(logits.device.type, enabled=False):
            blank_lp, label_lp, normalizer = cell_log_probs(logits, targets, lengths, blank=blank, normalize=normalize)
            wanted = ctx.needs_input_grad[0]
            nll, blank_occ, label_occ = lattice.forward_backward(
                blank_lp, label_lp, lengths, topology=topology, backend=backend, occupancies=wanted
            )
        if wanted:
            if fastemit_lambda:
                label_occ *= 1.0 + fastemit_lambda
            ctx.save_for_backward(logits, targets, normalizer, blank_occ, label_occ)
            ctx.lengths, ctx.blank, ctx.clamp = lengths, blank, clamp
        return nll.to(blank_lp.dtype)

    @staticmethod
    def backward(ctx, upstream):
        logits, targets, normalizer, blank_occ, label_occ = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            gradient = _logits_gradient(
                logits, targets, normalizer, blank_occ, label_occ, upstream, ctx.lengths, ctx.blank, ctx.clamp
            )
        if torch.is_grad_enabled():
            gradient = lattice.RefuseDoubleBackward.apply(gradient, logits, upstream)
        return gradient, None, None, None, None, None, None, None, None


def _logits_gradient(
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
    """Gradient by the logits, 0 in the padding: the formula at the head, clamped, times the utterance's upstream gradient.

    On CPU, entries below GRADIENT_FLOOR times the upstream gradient become 0: they mean nothing, but most of them are
    denormal numbers (an unlikely token in an unlikely cell), over which a matrix product takes up to 150 times as long.
    """
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for b, (frames, tokens) in enumerate(zip(lengths.enc, lengths.target, strict=True)):
        gradient[b, frames:] = 0.0
        gradient[b, :frames, tokens + 1 :] = 0.0
    dtype = _compute_dtype(logits)
    upstream = upstream.to(dtype)
    floors = None
    if logits.device.type == "cpu":
        floors = [GRADIENT_FLOOR[dtype] * (1.0 if clamp > 0 else abs(g)) for g in upstream.tolist()]
    for b, t, u in _tiles(lengths, logits):
        cells, out = logits[b, t, : u + 1], gradient[b, t, : u + 1]
        blanks, labels = blank_occ[b, t, : u + 1], label_occ[b, t, :u]
        if clamp <= 0:  # nothing between the occupancies and the upstream gradient: scale the small arrays
            blanks, labels = blanks * upstream[b], labels * upstream[b]
        work = out if dtype == logits.dtype else torch.empty_like(cells, dtype=dtype)
        if normalizer is None:
            work.zero_()
        else:
            taken = blanks.clone()
            taken[:, :u] += labels
            torch.sub(cells, normalizer[b, t, : u + 1, None], out=work)
            work.exp_().mul_(taken[..., None])
        work[..., blank] -= blanks
        work[:, :u].scatter_add_(2, _label_index(targets, b, t, u), -labels[..., None])
        if floors is not None:
            torch.hardshrink(work, floors[b], out=work)
        if clamp > 0:
            work.clamp_(-clamp, clamp).mul_(upstream[b])
        if work is not out:
            out.copy_(work)
    return gradient


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    lengths: Lengths,
    *,
    blank: int,
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    clamp: float = 0.0,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """-log P of each utterance [B] from checked logits [B, T, U+1, V]; float64 for float64 logits, else float32.

    clamp > 0 limits each entry of the gradient by the logits to [-clamp, clamp] before the upstream gradient is applied.
    normalize=False takes logits for log-probs and returns the gradient by those.
    """
    arguments = (lengths, blank, topology, fastemit_lambda, clamp, normalize, backend)
    return _LogitsLoss.apply(logits, targets.long(), *arguments)


def batched_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Lengths,
    *,
    activation: str,
    topology: str,
    blank: int,
    fastemit_lambda: float,
) -> Tensor:
    """-log P of each utterance [B] from checked inputs: the joiner over all cells, then `logits_loss`."""
    # Zeros in the padding: else a NaN there would meet the gradient's 0 in the weight's matrix product, and 0 * NaN is NaN.
    enc = enc.masked_fill(_padding(lengths.enc, enc), 0.0)
    pred = pred.masked_fill(_padding([u + 1 for u in lengths.target], pred), 0.0)
    hidden = enc[:, :, None] + pred[:, None]
    hidden = hidden.tanh_() if activation == "tanh" else hidden.relu_()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits_loss(
        logits, targets, lengths, blank=blank, topology=topology, fastemit_lambda=fastemit_lambda
    )


def _padding(lens: list[int], like: Tensor) -> Tensor:
    """[B, N, 1]: positions of like [B, N, ...] beyond the lengths."""
    n = torch.arange(like.shape[1], device=like.device)
    return (n >= torch.tensor(lens, dtype=torch.int64, device=like.device)[:, None])[..., None]
