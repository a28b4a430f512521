"""The public losses: arguments are checked here, the work is done by the method's own file, the reduction is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import backends, batched, fused, samplewise, shapes
from losses.options import TransducerLossOptions

# name -> function(enc, pred, weight, bias, targets, lengths, *, activation, topology, blank, options, shared_upstream)
# -> loss [B]. shared_upstream says that all utterances will get the same upstream gradient.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "batched": batched.batched_loss,
    "samplewise": samplewise.samplewise_loss,
    "fused": fused.fused_loss,
}


class TransducerLossOutput(NamedTuple):
    """What `transducer_loss` returns.

    loss: [B] for reduction "none", else a scalar; float64 for float64 inputs, else float32.
    simple_loss: the loss of a trivial joiner, for methods that have one, else None.
    info: "method", "topology", "cells" (lattice cells, sum of T_i * (U_i+1)) and "utterance_loss", [B], detached.
    """

    loss: Tensor
    simple_loss: Tensor | None
    info: dict[str, Any]


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


def transducer_loss(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    method: str = "batched",
    activation: str = "tanh",
    topology: str = "regular",
    simple: tuple[Tensor, Tensor] | None = None,
    blank: int = 0,
    reduction: str = "mean",
    memory_limit: str | int | None = None,
    options: TransducerLossOptions | None = None,
) -> TransducerLossOutput:
    """Transducer loss (Graves 2012) of the joiner logits(t, u) = activation(enc[t] + pred[u]) @ weight.T + bias.

    Args:
        enc: [B, T, J] encoder output, projected to the joiner; float64, float32, bfloat16 or float16.
        pred: [B, U+1, J] predictor output, projected; row u has seen the first u tokens. dtype of enc (any under
            autocast).
        weight: [V, J].  bias: [V] or None.
        targets: [B, U] int32 or int64, token ids in 0..V-1 other than blank; padded with anything.
        enc_lens: [B] int32 or int64, frames, 1..T.  target_lens: [B] int32 or int64, tokens, 0..U. Both on any device.
        method: a name of LOSSES: "batched" (all logits at once), "samplewise" (utterance by utterance) or "fused"
            (tiles of reachable cells, never all logits).
        activation: "tanh" or "relu".
        topology: "regular" (Graves 2012) or "modified" (one symbol a frame; target_lens[i] <= enc_lens[i]).
        simple: logits of a trivial joiner, ([B, T, V], [B, U+1, V]); only for methods that use one: none so far.
        blank: id of blank; negative ids count from the end.
        reduction: "none", "sum", "mean" (over utterances) or "mean-per-token" (sum / sum of target_lens).
        memory_limit: only for methods that can keep to one: none so far.
        options: see TransducerLossOptions.

    Returns:
        TransducerLossOutput. The loss is accumulated in float64; under autocast only the joiner's matrix product is
        cast.

    Padding of every input may hold anything, NaN included, and gets a zero gradient. An utterance with NaN within
    its lengths gets a non-finite loss, and no other does. B=0 gives 0.

    Raises:
        ValueError: for wrong shapes, dtypes, devices, lengths, tokens or names; says which, the value, the limit, the
            remedy.
        RuntimeError: when the gradient is differentiated again.
    """
    shapes.check_choice("method", method, tuple(LOSSES))
    shapes.check_choice("activation", activation, batched.ACTIVATIONS)
    shapes.check_choice("reduction", reduction, shapes.REDUCTIONS)
    if simple is not None:
        raise ValueError(f"simple is not used by method {method!r}; pass simple=None")
    if memory_limit is not None:
        raise ValueError(
            f"memory_limit={memory_limit!r} cannot be kept by method {method!r}; "
            "pass memory_limit=None and smaller batches"
        )
    lengths, blank = shapes.check_inputs(
        enc, pred, weight, bias, targets, enc_lens, target_lens, topology=topology, blank=blank
    )
    options = options or TransducerLossOptions()
    if not torch.is_grad_enabled():  # inside of an autograd.Function gradients look wanted all the same
        enc, pred, weight = enc.detach(), pred.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss = LOSSES[method](
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
    )
    info = {"method": method, "topology": topology, "cells": lengths.cells, "utterance_loss": loss.detach()}
    return TransducerLossOutput(reduce(loss, lengths.target, reduction), None, info)


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
    loss = batched.logits_loss(
        logits, targets, lengths, blank=blank, clamp=max(float(clamp), 0.0), normalize=fused_log_softmax
    )
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
