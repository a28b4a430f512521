"""Method "pruned" (Kuang et al. 2022): the joiner is computed for S columns of each frame only, those that the loss of
a trivial, linear joiner finds likely (losses/simple.py), through the same tiles as method "fused".

The loss is that of the lattice without all other cells, an upper bound of the exact -log P and equal to it where S =
U + 1. Both losses are returned; training takes their weighted sum, since the trivial joiner has to learn too.
"""

from __future__ import annotations

from torch import Tensor

from losses.cells import Bounds
from losses.fused import fused_loss
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.shapes import Lengths
from losses.simple import prune_bounds, simple_loss
from losses.sizes import Sizes


def pruned_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Lengths,
    *,
    simple: tuple[Tensor, Tensor],
    activation: str,
    topology: str,
    blank: int,
    options: TransducerLossOptions,
    shared_upstream: bool = False,
    sizes: Sizes | None = None,
) -> MethodLoss:
    """Pruned and simple -log P of each utterance from checked inputs; "bounds" [B, T], "prune_range", "kept_cells".

    shared_upstream, sizes: as for losses.fused.fused_loss; the simple loss is differentiated by torch in either case.
    """
    am, lm = simple
    trivial = simple_loss(am, lm, targets.long(), lengths, topology=topology, blank=blank, options=options)
    first = prune_bounds(trivial.blank_occ, trivial.label_occ, lengths, options.prune_range, topology)
    full = fused_loss(
        enc, pred, weight, bias, targets, lengths,
        activation=activation, topology=topology, blank=blank, options=options, shared_upstream=shared_upstream,
        bounds=Bounds(first.cpu().numpy(), options.prune_range), sizes=sizes,
    )  # fmt: skip
    found = {**full.found, "bounds": first, "prune_range": options.prune_range}
    return MethodLoss(full.loss, trivial.loss, found)
