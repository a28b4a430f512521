"""The transducer lattice over blank and label log-probs: likelihood, gradients, occupancies, best path.

Graves 2012, "Sequence Transduction with Recurrent Neural Networks": log P(targets) sums over all alignments (eq.
16-18), and the derivative of -log P by the log-prob of a transition is minus the probability that the alignment takes
it (eq. 20).

Topologies:
    regular    label moves (t, u) -> (t, u+1), blank moves (t, u) -> (t+1, u); ends by blank from (T-1, U) [Graves 2012]
    modified   label moves (t, u) -> (t+1, u+1), blank as above; one symbol or blank a frame, needs U <= T
               [monotonic RNN-T, Tripathi et al. 2019; `rnnt_type="modified"` of k2 and fast_rnnt]
    constrained  as modified, but a label is followed by the blank of the next column in the same frame: its score is
               label[t, u] + blank[t, u+1] [`rnnt_type="constrained"` of k2 and fast_rnnt]

FastEmit (Yu et al. 2021, "FastEmit: Low-latency Streaming ASR with Sequence-level Emission Regularization"), eq. 14:
the gradient by a label's log-prob is multiplied by 1 + lambda, that of blank is left. As in other implementations this
is done to the occupancies, before the chain rule through log-softmax. The value is the plain -log P, so that losses at
different lambda can be compared (NeMo returns (1 + lambda) times it); finite differences of the value hence do not give
the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losses import backends
from losses.options import TransducerLossOptions
from losses.shapes import Lengths, check_lattice


class RefuseDoubleBackward(torch.autograd.Function):
    """Identity whose own backward raises. `inputs` tie it to all that the gradient depends on.

    torch's once_differentiable raises only where the upstream gradient itself needs gradients; otherwise second
    derivatives would come out as zero without a word.
    """

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the transducer loss can be differentiated once only: its gradient has no derivative here. "
            "Leave out create_graph=True, or detach the gradient (.detach()) before using it in another loss"
        )


def scale_(gradients: Sequence[Tensor | None], upstream: Tensor) -> list[Tensor | None]:
    """Gradients for an upstream gradient of 1, times the one that all utterances share (upstream [B]), in place.

    What is 0 stays 0 when that is not finite, so that padding has no gradient whatever happens.
    """
    if not upstream.numel():
        return list(gradients)
    scale = upstream[0]
    if scale.isfinite():
        return [None if x is None else x.mul_(scale) for x in gradients]
    return [None if x is None else torch.where(x == 0, x, x * scale) for x in gradients]


def forward_backward(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    lengths: Lengths,
    *,
    topology: str = "regular",
    backend: str | None = None,
    occupancies: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Negative log-likelihood float64 [B], occupancies of blank [B, T, U+1] and label [B, T, U]; outside of autograd.

    Inputs were checked. Half precision comes back as float32, other dtypes as they are.
    """
    dtype = torch.float64 if blank_log_probs.dtype == torch.float64 else torch.float32
    blank = blank_log_probs.detach().to(dtype).contiguous()
    label = step_scores(blank, label_log_probs.detach().to(dtype).contiguous(), topology)
    kernels = backends.load("lattice", backend, blank.device, dtype)
    nll, blank_occ, label_occ = kernels.forward_backward(blank, label, lengths, topology != "regular", occupancies)
    if topology == "constrained" and occupancies:
        blank_occ[:, :, 1:] += label_occ  # the blank that follows each label
    return nll, blank_occ, label_occ


def step_scores(blank: Tensor, label: Tensor, topology: str) -> Tensor:
    """Scores [B, T, U] of the transitions that emit a label."""
    return label + blank[:, :, 1:] if topology == "constrained" else label


def regularized(
    blank_lp: Tensor,
    label_lp: Tensor,
    lengths: Lengths,
    topology: str,
    options: TransducerLossOptions,
    *,
    occupancies: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`forward_backward` with the options: the value, and what the occupancies are in the gradient."""
    if options.delay_penalty:
        label_lp = penalize_delay(label_lp, lengths, options.delay_penalty)
    power = options.alignment_power
    if power != 1.0:
        blank_lp, label_lp = blank_lp * power, label_lp * power
    nll, blank_occ, label_occ = forward_backward(
        blank_lp, label_lp, lengths, topology=topology, backend=options.backend, occupancies=occupancies
    )
    if label_occ is not None and options.fastemit_lambda:
        label_occ *= 1.0 + options.fastemit_lambda
    return nll / power, blank_occ, label_occ


def penalize_delay(label_lp: Tensor, lengths: Lengths, delay_penalty: float) -> Tensor:
    """label_lp [B, T, U] + lambda * ((T_b - 1) / 2 - t): early emissions gain (Kang et al. 2023, eq. 4)."""
    t = torch.arange(label_lp.shape[1], device=label_lp.device, dtype=label_lp.dtype)
    middle = (torch.tensor(lengths.enc, device=label_lp.device, dtype=label_lp.dtype) - 1) / 2
    return label_lp + (delay_penalty * (middle[:, None] - t))[:, :, None]


class LatticeLoss(torch.autograd.Function):
    """(blank, label, lengths, topology, fastemit_lambda, backend, occupancies) -> -log P [B], and the occupancies of
    blank and label, without a gradient: empty unless they or a gradient are wanted."""

    @staticmethod
    def forward(ctx, blank, label, lengths, topology, fastemit_lambda, backend, occupancies):
        wanted = any(ctx.needs_input_grad)
        nll, blank_occ, label_occ = forward_backward(
            blank, label, lengths, topology=topology, backend=backend, occupancies=wanted or occupancies
        )
        if wanted:
            ctx.fastemit_lambda = fastemit_lambda
            ctx.save_for_backward(blank, label, blank_occ, label_occ)
        if blank_occ is None or label_occ is None:
            blank_occ, label_occ = blank.new_empty(0), blank.new_empty(0)
        ctx.mark_non_differentiable(blank_occ, label_occ)
        return nll if blank.dtype == torch.float64 else nll.float(), blank_occ, label_occ

    @staticmethod
    def backward(ctx, upstream, *_):
        blank, label, blank_occ, label_occ = ctx.saved_tensors
        with torch.no_grad():
            scale = -upstream[:, None, None]
            # Cells of occupancy 0 stay at 0 when the upstream gradient of their utterance is not finite, so that
            # padding has no gradient whatever happens.
            grads = [
                torch.where(occ == 0, 0.0, occ * factor).to(source.dtype)
                for source, occ, factor in (
                    (blank, blank_occ, scale),
                    (label, label_occ, scale * (1.0 + ctx.fastemit_lambda)),
                )
            ]
        if torch.is_grad_enabled():
            grads = [RefuseDoubleBackward.apply(g, blank, label, upstream) for g in grads]
        return *grads, *[None] * 5


def lattice_loss(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """-log P(targets) of each utterance from the two log-probs that the lattice needs.

    Args:
        blank_log_probs: [B, T, U+1], log P(blank | t, u); float64, float32, bfloat16 or float16.
        label_log_probs: [B, T, U], log P(targets[u] | t, u); same dtype and device.
        enc_lens: [B] int32 or int64, frames, 1..T.  target_lens: [B] int32 or int64, tokens, 0..U.
        topology: "regular", "modified" or "constrained", see the head of this file.
        fastemit_lambda: FastEmit weight, 0 is off (Yu et al. 2021, eq. 14).
        backend: a name of BACKENDS; None takes numba on CPU and torch elsewhere.

    Returns:
        [B], float64 for float64 input, else float32 (accumulated in float64). inf where no alignment has a probability.

    Padding may hold anything, NaN included; its gradient is 0. Raises ValueError for wrong arguments; a second
    derivative raises RuntimeError.
    """
    lengths = check_lattice(blank_log_probs, label_log_probs, enc_lens, target_lens, topology=topology)
    arguments = (lengths, topology, fastemit_lambda, backend, False)
    return LatticeLoss.apply(blank_log_probs, label_log_probs, *arguments)[0]
