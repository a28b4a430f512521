"""The public losses: arguments are checked here, the work is done by the method's own file, the reduction is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import backends, batched, fused, pruned, samplewise, shapes
from losses.memory import Plan, Work, plan
from losses.options import TransducerLossOptions
from losses.result import MethodLoss
from losses.simple import check_prune_range

# name -> function(enc, pred, weight, bias, targets, lengths, *, activation, topology, blank, options, shared_upstream),
# with simple for those of USE_SIMPLE. shared_upstream says that all utterances will get the same upstream gradient.
LOSSES: dict[str, Callable[..., MethodLoss]] = {
    "batched": batched.batched_loss,
    "samplewise": samplewise.samplewise_loss,
    "fused": fused.fused_loss,
    "pruned": pruned.pruned_loss,
}
USE_SIMPLE = ("pruned",)

# What no paper defines together: (method or topology, option) -> why. The option counts when it is not at its default.
REFUSED = {
    ("pruned", "fastemit_lambda"): "FastEmit is defined on the whole lattice (Yu et al. 2021)",
    ("pruned", "alignment_power"): "the bounds follow the sum over alignments (Kuang et al. 2022)",
    ("pruned", "clamp"): "the gradient of two joiners has no common limit",
    (
        "constrained",
        "fastemit_lambda",
    ): "each label brings a blank, of which FastEmit knows nothing",
}


class TransducerLossOutput(NamedTuple):
    """What `transducer_loss` returns.

    loss: [B] for reduction "none", else a scalar; float64 for float64 inputs, else float32.
    simple_loss: the loss of the trivial joiner, reduced likewise, for method "pruned", else None.
    info: "method", "topology", "cells" (lattice cells, sum of T_i * (U_i+1)) and "utterance_loss", [B], detached;
        "kept_cells", those with a gradient that counts, of "fused" and "pruned"; "bounds" [B, T], the first column that
        each frame keeps, and "prune_range" of "pruned"; "memory_plan", text, where a memory_limit was given.
    """

    loss: Tensor
    simple_loss: Tensor | None
    info: dict[str, Any]


def check_combination(method: str, topology: str, options: TransducerLossOptions) -> None:
    """Refuse options that are not defined for the method or topology."""
    for (name, option), why in REFUSED.items():
        value = getattr(options, option)
        if name in (method, topology) and value != getattr(TransducerLossOptions, option):
            kind = "method" if name == method else "topology"
            raise ValueError(f"{option}={value} is not defined for {kind} {name!r}: {why}; leave it at its default")


def reduce(loss: Tensor, target_lens: list[int], reduction: str) -> Tensor:
    """none: [B]; sum; mean: over utterances; mean-per-token: sum over utterances / sum of target_lens (at least 1).

    A batch without utterances gives 0 and not NaN.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "mean":
        return total / max(1, len(target_lens))
    if reduction == "mean-per-token":
        return total / max(1, sum(target_lens))
    return total


def _plan(limit, method, enc, pred, weight, bias, simple, lengths, topology, options, shared_upstream) -> Plan:
    """How the method keeps to the limit; detached inputs want no gradient."""
    wanted = (
        enc.requires_grad, pred.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad,
    )  # fmt: skip
    work = Work(
        lengths, enc.shape[1], pred.shape[1], weight.shape[0], weight.shape[1],
        torch.promote_types(enc.dtype, pred.dtype), weight.dtype,
        shapes.product_dtype(enc, pred), wanted, shared_upstream, topology, options, enc.device,
        threads=torch.get_num_threads() if enc.device.type == "cpu" else 1,
        copies=sum(x.numel() * x.itemsize for x in (enc, pred, weight) if not x.is_contiguous()),
        simple=0 if simple is None else simple[0].itemsize,
    )  # fmt: skip
    return plan(method, work, limit)


def transducer_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    method: str = "fused",
    activation: str = "tanh",
    topology: str = "regular",
    simple: tuple[Tensor, Tensor] | None = None,
    blank: int = 0,
    reduction: str = "mean",
    memory_limit: str | int | None = None,
    options: TransducerLossOptions | None = None,
    check_values: bool | None = None,
) -> TransducerLossOutput:
    """Transducer loss (Graves 2012) of the joiner logits(t, u) = activation(enc[t] + pred[u]) @ weight.T + bias.

    Args:
        enc: [B, T, J] encoder output, projected to the joiner; float64, float32, bfloat16 or float16.
        pred: [B, U+1, J] predictor output, projected; row u has seen the first u tokens. dtype of enc (any under
            autocast).
        weight: [V, J].  bias: [V] or None.
        targets: [B, U] int32 or int64, token ids in 0..V-1 other than blank; padded with anything.
        enc_lens: [B] int32 or int64, frames, 1..T.  target_lens: [B] int32 or int64, tokens, 0..U. Both on any device.
        method: a name of LOSSES: "batched" (all logits at once), "samplewise" (utterance by utterance; Braun et al.
            2022), "fused" (tiles of reachable cells, never all logits) or "pruned" (options.prune_range columns of each
            frame; Kuang et al. 2022). The first three give the same value; in half precision "batched" and "samplewise"
            sum rounded logits along a path, and "fused" does not.
        activation: "tanh" or "relu".
        topology: "regular" (Graves 2012), "modified" or "constrained" (one symbol a frame; target_lens[i] <=
            enc_lens[i]), see losses/lattice.py.
        simple: logits (am [B, T, V], lm [B, U+1, V]) of the trivial joiner am[t] + lm[u]; "pruned" needs them, others
            refuse them.
        blank: id of blank; negative ids count from the end.
        reduction: "none", "sum", "mean" (over utterances) or "mean-per-token" (sum / sum of target_lens).
        memory_limit: bytes, as an int or as text ("2GiB", "500MB"), that the loss may take above its inputs and their
            gradients, in forward and backward pass; see losses/memory.py. "fused" and "pruned" work in smaller pieces,
            "samplewise" in smaller groups; where "batched" or "samplewise" would take more, "fused" stands in, with
            the same value and, unless an occupancy_threshold is given, no cell left out. What was chosen and why is in
            info["memory_plan"], and is logged once for each choice (logger "losses", INFO). None: no limit.
        options: see TransducerLossOptions.
        check_values: refuse tokens outside of the vocabulary and input that is not finite; None: on CPU. Without it
            they make the loss of that utterance NaN or inf, and of no other.

    Returns:
        TransducerLossOutput. The loss is accumulated in float64; under autocast only the joiner's matrix product is
        cast.

    Padding of every input may hold anything, NaN included, and gets a zero gradient. B=0 gives 0.

    Raises:
        ValueError: for wrong shapes, dtypes, devices, lengths, tokens or names; says which, the value, the limit, the
            remedy. MemoryLimitError, a ValueError, when nothing keeps to memory_limit; `smallest` is the limit that
            would be kept, in bytes.
        RuntimeError: when the gradient is differentiated again.
    """
    shapes.check_choice("method", method, tuple(LOSSES))
    shapes.check_choice("activation", activation, batched.ACTIVATIONS)
    shapes.check_choice("reduction", reduction, shapes.REDUCTIONS)
    options = options or TransducerLossOptions()
    check_combination(method, topology, options)
    lengths, blank = shapes.check_inputs(
        enc, pred, weight, bias, targets, enc_lens, target_lens, topology=topology, blank=blank
    )
    shapes.check_simple(simple, method, method in USE_SIMPLE, enc, weight, targets)
    if method in USE_SIMPLE:
        check_prune_range(lengths, options.prune_range, topology)
    wrong = None
    if enc.device.type == "cpu" if check_values is None else check_values:
        shapes.check_targets(targets, lengths.target, weight.shape[0], blank)
        shapes.check_finite(enc, pred, weight, bias, simple, lengths)
    else:
        targets, wrong = shapes.safe_targets(targets, lengths, weight.shape[0], blank)
    if not torch.is_grad_enabled():  # inside of an autograd.Function gradients look wanted all the same
        enc, pred, weight = enc.detach(), pred.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
        simple = None if simple is None else (simple[0].detach(), simple[1].detach())
    more: dict[str, Any] = {} if simple is None else {"simple": simple}
    chosen = method
    if memory_limit is not None:
        shared = reduction != "none"
        kept = _plan(memory_limit, method, enc, pred, weight, bias, simple, lengths, topology, options, shared)
        chosen, more = kept.method, {**more, **kept.arguments}
        if kept.exact and options.occupancy_threshold is None:
            options = dataclasses.replace(options, occupancy_threshold=0.0)
    found = LOSSES[chosen](
        enc,
        pred,
        weight,
        bias,
        targets,
        lengths,
        activation=activation,
        topology=topology,
        blank=blank,
        options=options,
        shared_upstream=reduction != "none",
        **more,
    )
    losses = [found.loss, found.simple_loss]
    if wrong is not None:
        losses = [None if x is None else x.masked_fill(wrong, torch.nan) for x in losses]
    loss, simple_loss = losses
    assert loss is not None
    info = {"method": method, "topology": topology, "cells": lengths.cells, "utterance_loss": loss.detach()}
    if memory_limit is not None:
        info["memory_plan"] = kept.text
    reduced = None if simple_loss is None else reduce(simple_loss, lengths.target, reduction)
    return TransducerLossOutput(reduce(loss, lengths.target, reduction), reduced, {**info, **found.found})


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
) -> Tensor:
    """Drop-in for `torchaudio.functional.rnnt_loss`: same names, order, defaults and meaning.

    Args:
        logits: [B, T, U+1, V] joiner output; float32 or float16 as there, and float64 and bfloat16.
        targets: [B, U] int32 as there, or int64; zero padded.
        logit_lengths: [B] int32 or int64, frames.  target_lengths: [B] int32 or int64, tokens.
        blank: id of blank; negative ids count from the end.
        clamp: limit of the gradient by the logits of the unreduced loss; 0 or less is off.
        reduction: "none", "mean" (over utterances) or "sum".
        fused_log_softmax: False when logits are log-probs already (log_softmax was called outside).

    Returns:
        [B] for "none", else a scalar; float64 for float64 logits, else float32 (torchaudio: dtype of logits, so that
        float16 costs overflow at 65504).

    Differs from torchaudio where that refuses: the padding may be larger than the longest utterance, and B=0 works.
    Raises as `transducer_loss`.
    """
    shapes.check_choice("reduction", reduction, ("none", "mean", "sum"))
    lengths, blank = shapes.check_logits(logits, targets, logit_lengths, target_lengths, blank=blank)
    options = TransducerLossOptions(clamp=max(float(clamp), 0.0))
    loss = batched.logits_loss(logits, targets, lengths, blank=blank, options=options, normalize=fused_log_softmax)
    return reduce(loss, lengths.target, reduction)


@torch.no_grad()
def log_probs(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, *, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probs of blank [B, T, U+1] and of the next label [B, T, U] for `occupancy` and `viterbi_alignment`.

    logits [B, T, U+1, V] are a joiner's; other arguments and errors as in `rnnt_loss`. float64 for float64 logits, else
    float32; 0 in the padding. No gradient.
    """
    lengths, blank = shapes.check_logits(logits, targets, logit_lengths, target_lengths, blank=blank)
    kernels = backends.load("logits", None, logits.device, logits.dtype)
    blank_lp, label_lp, _ = kernels.gather(logits.detach(), targets.long(), lengths, blank, True)
    return blank_lp, label_lp
