"""Method "batched" on CPU: joiner and loss over the cells that an alignment can reach, packed into [N, J] and [N, V].

Three quarters of the padded [B, T, U+1] are such cells: padding drops out, and in "modified" also the two corners that
no alignment passes. The backward pass goes over fewer still, those whose occupancy counts for anything.

The joiner is inside the autograd.Function, so that activations and their derivative are gathered and added up by
compiled loops, sums over frames and columns are taken in float32 or float64, and nothing of the logits' size is copied.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from losses import backends, lattice
from losses.cells import OCCUPANCY_THRESHOLD, next_labels, reachable, spread
from losses.options import TransducerLossOptions
from losses.shapes import Lengths, product_dtype

# bfloat16 products have a multiple of this many rows: oneDNN compiles and keeps a program for every shape it meets, and
# the number of cells is another one in every step.
BLOCK_ROWS = 256


class Cells(NamedTuple):
    """Reachable cells in the order of (utterance, frame, column), int64 [N] each.

    at: index into [B * T * (U+1)];  rows: into [B * T];  columns: into [B * (U+1)].
    """

    at: Tensor
    rows: Tensor
    columns: Tensor


def reachable_cells(lengths: Lengths, frames: int, columns: int, topology: str) -> Cells:
    """The cells of padded lattices [B, frames, columns] that lie on some complete alignment."""
    at = reachable(lengths, frames, columns, topology)
    rows = at // columns
    found = (at, rows, rows // frames * columns + at % columns)
    return Cells(*(torch.from_numpy(x) for x in found))


class _PackedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, enc, pred, weight, bias, targets, lengths, activation, topology, blank, options):
        batch, frames, dim = enc.shape
        columns = pred.shape[1]
        dtype = product_dtype(enc, pred)
        kernels = backends.load("logits", "numba", enc.device, dtype)
        cells = reachable_cells(lengths, frames, columns, topology)
        num_cells = len(cells.at)
        if dtype == torch.bfloat16:
            cells = Cells(*(_whole_blocks(x) for x in cells))
        with torch.autocast("cpu", enabled=False):
            states = enc.detach().flatten(0, 1), pred.detach().flatten(0, 1)
            hidden = kernels.hidden_packed(*states, cells.rows, cells.columns, activation).to(dtype)
            logits = _linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
            labels = next_labels(targets, lengths).view(-1).index_select(0, cells.columns)
            blank_lp, label_lp, normalizer = kernels.gather_packed(logits, labels, blank)
            shape = (batch, frames, columns)
            nll, *occupancies = lattice.regularized(
                spread(blank_lp, cells.at, shape),
                spread(label_lp, cells.at, shape)[:, :, :-1],
                lengths,
                topology,
                options,
                backend="numba",
                occupancies=any(ctx.needs_input_grad),
            )
        if occupancies[0] is not None:
            ctx.save_for_backward(enc, pred, weight, bias, hidden, logits, labels, normalizer, *occupancies, *cells)
            ctx.kernels, ctx.activation, ctx.blank, ctx.num_cells = kernels, activation, blank, num_cells
        return nll.to(blank_lp.dtype)

    @staticmethod
    def backward(ctx, upstream):
        sources = ctx.saved_tensors[:4]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            gradients = _gradients(ctx, upstream)
        if torch.is_grad_enabled():
            tied = [x for x in (*sources, upstream) if x is not None]
            gradients = [None if g is None else lattice.RefuseDoubleBackward.apply(g, *tied) for g in gradients]
        return *gradients, *[None] * 6


def _gradients(ctx, upstream: Tensor) -> list[Tensor | None]:
    """By enc, pred, weight and bias."""
    enc, pred, weight, bias, hidden, logits, labels, normalizer, blank_occ, label_occ, *parts = ctx.saved_tensors
    cells = Cells(*parts)
    batch, frames, dim = enc.shape
    per_cell = frames * pred.shape[1]
    blanks = blank_occ.view(-1).index_select(0, cells.at)
    labelled = torch.nn.functional.pad(label_occ, (0, 1)).view(-1).index_select(0, cells.at)
    # NaN, of a loss that is not finite, goes on
    wanted = ~(blanks + labelled <= OCCUPANCY_THRESHOLD[logits.dtype])[: ctx.num_cells]
    chosen = torch.nonzero(wanted).squeeze(1)
    num_chosen = len(chosen)
    if logits.dtype == torch.bfloat16:
        chosen = _whole_blocks(chosen)
    at, rows, columns = (x.index_select(0, chosen) for x in cells)
    utterance = at.div(per_cell, rounding_mode="floor")
    scale = upstream.to(normalizer.dtype).index_select(0, utterance)
    scale[num_chosen:] = 0.0
    by_logits, by_bias = ctx.kernels.gradient_packed(
        chosen,
        logits,
        labels,
        normalizer,
        blanks.index_select(0, chosen),
        labelled.index_select(0, chosen),
        scale,
        ctx.blank,
    )
    hidden = hidden.index_select(0, chosen)
    starts = torch.searchsorted(utterance, torch.arange(batch + 1)).tolist()
    by_enc, by_pred = ctx.kernels.add_packed(
        by_logits @ weight.to(by_logits.dtype),
        hidden,
        starts,
        rows,
        columns,
        ctx.activation,
        (batch * frames, batch * pred.shape[1]),
    )
    by_weight = (by_logits.t() @ hidden).to(weight.dtype) if ctx.needs_input_grad[2] else None
    return [
        by_enc.view_as(enc).to(enc.dtype),
        by_pred.view_as(pred).to(pred.dtype),
        by_weight,
        None if bias is None else by_bias.to(bias.dtype),
    ]


def packed_loss(
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
    options: TransducerLossOptions,
) -> Tensor:
    """-log P of each utterance [B] from checked inputs on CPU, as `losses.batched.batched_loss`; not for float16."""
    arguments = (targets.long(), lengths, activation, topology, blank, options)
    return _PackedLoss.apply(enc, pred, weight, bias, *arguments)


def _whole_blocks(cells: Tensor) -> Tensor:
    """Indices of cells [N] with the last one repeated until N is a multiple of BLOCK_ROWS."""
    missing = -len(cells) % BLOCK_ROWS
    return torch.cat([cells, cells[-1:].expand(missing)]) if len(cells) and missing else cells


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight' + bias. In bfloat16 by oneDNN alone: torch's own function first fills the result with the bias."""
    if x.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled and _onednn_has_bfloat16():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
