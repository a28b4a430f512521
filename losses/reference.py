"""The truth for tests and benchmarks: transducer loss and every gradient in float64 by plain loops.

Slow on purpose, and independent of the rest of the package: numpy arrays and Python floats, no torch, no shared code,
each line as in the papers. Equations are those of Graves 2012 (16: alpha, 18: beta, 20: gradient by the transition
log-probs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Arc(NamedTuple):
    """A transition of the lattice: from node (t, u) to node (to_t, to_u), emitting blank or the label targets[u]."""

    t: int
    u: int
    to_t: int
    to_u: int
    is_label: bool


class JointGradients(NamedTuple):
    """Gradients of sum(upstream * nll) of a batch; zero in the padding."""

    nll: Array  # [B]
    enc: Array  # [B, T, J]
    pred: Array  # [B, U+1, J]
    weight: Array  # [V, J]
    bias: Array  # [V]


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a == -math.inf:
        return b
    if b == -math.inf:
        return a
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


# frames that a label takes
STEP = {"regular": 0, "modified": 1, "constrained": 1}


def arcs(frames: int, tokens: int, topology: str) -> Iterator[Arc]:
    """Transitions in an order in which every node is complete before it is left. Start (0, 0), end (frames, tokens).

    regular: label keeps the frame, and the end is reached by a blank from (frames - 1, tokens). modified, constrained:
    label also takes the frame.
    """
    step = STEP[topology]
    for t in range(frames):
        for u in range(tokens + 1):
            yield Arc(t, u, t + 1, u, False)
            if u < tokens:
                yield Arc(t, u, t + step, u + 1, True)


def lattice(blank: Array, label: Array, topology: str = "regular") -> tuple[float, Array, Array]:
    """-log P and the occupancies of one utterance from its log-probs of blank [T, U+1] and next label [T, U]."""
    frames, columns = blank.shape
    path = list(arcs(frames, columns - 1, topology))
    alpha = np.full((frames + 1, columns), -math.inf)
    beta = np.full((frames + 1, columns), -math.inf)
    alpha[0, 0] = 0.0
    beta[frames, columns - 1] = 0.0

    def score(arc: Arc) -> float:
        if not arc.is_label:
            return float(blank[arc.t, arc.u])
        # constrained: a label is followed by the blank of the next column in the same frame
        return float(label[arc.t, arc.u] + (blank[arc.t, arc.u + 1] if topology == "constrained" else 0.0))

    # No arc leaves the nodes (frames, u < U), so that the last blank counts from u = U only.
    for arc in path:
        alpha[arc.to_t, arc.to_u] = log_add(alpha[arc.to_t, arc.to_u], alpha[arc.t, arc.u] + score(arc))
    for arc in reversed(path):
        beta[arc.t, arc.u] = log_add(beta[arc.t, arc.u], beta[arc.to_t, arc.to_u] + score(arc))
    log_sum = float(alpha[frames, columns - 1])
    blank_occ, label_occ = np.zeros(blank.shape), np.zeros(label.shape)
    for arc in path:
        taken = math.exp(alpha[arc.t, arc.u] + score(arc) + beta[arc.to_t, arc.to_u] - log_sum)
        if not arc.is_label:
            blank_occ[arc.t, arc.u] += taken
            continue
        label_occ[arc.t, arc.u] += taken
        if topology == "constrained":
            blank_occ[arc.t, arc.u + 1] += taken
    return -log_sum, blank_occ, label_occ


def log_softmax(logits: Array) -> Array:
    """Log-softmax of one cell's logits [V]."""
    high = float(logits.max())
    return logits - (high + math.log(sum(math.exp(x - high) for x in logits)))


def logits_loss(
    logits: Array,
    targets: list[int],
    *,
    blank: int = 0,
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    alignment_power: float = 1.0,
    clamp: float = 0.0,
    normalize: bool = True,
    first: NDArray[np.int64] | None = None,
    prune_range: int = 0,
) -> tuple[float, Array]:
    """-log P of one utterance and its gradient by the logits [T, U+1, V], len(targets) = U.

    fastemit_lambda: label occupancies times 1 + lambda in the gradient, value unchanged (Yu et al. 2021, eq. 14).
    delay_penalty: added to the label log-probs of frame t, times (T - 1) / 2 - t (Kang et al. 2023, eq. 4).
    alignment_power: gamma in -(1 / gamma) log sum over alignments of P(alignment)^gamma.
    clamp > 0: every entry of the gradient limited to [-clamp, clamp]. normalize=False: logits are log-probs.
    first [T]: frame t has the cells first[t] <= u < first[t] + prune_range only; others have probability 0.
    """
    frames, columns, vocab_size = logits.shape
    tokens = len(targets)
    log_probs = np.array(logits, dtype=np.float64)
    if normalize:
        for t in range(frames):
            for u in range(columns):
                log_probs[t, u] = log_softmax(log_probs[t, u])
    blank_lp = log_probs[:, :, blank]
    label_lp = np.array(
        [
            [log_probs[t, u, targets[u]] + delay_penalty * ((frames - 1) / 2 - t) for u in range(tokens)]
            for t in range(frames)
        ]
    )
    label_lp = label_lp.reshape(frames, tokens)
    if first is not None:
        blank_lp = blank_lp.copy()
        for t in range(frames):
            for u in range(columns):
                if not first[t] <= u < first[t] + prune_range:
                    blank_lp[t, u] = -math.inf
                    label_lp[t, u : u + 1] = -math.inf
    nll, blank_occ, label_occ = lattice(alignment_power * blank_lp, alignment_power * label_lp, topology)
    nll /= alignment_power
    gradient = np.zeros(log_probs.shape)
    for t in range(frames):
        for u in range(columns):
            by_log_prob = np.zeros(vocab_size)
            by_log_prob[blank] -= blank_occ[t, u]
            if u < tokens:
                by_log_prob[targets[u]] -= (1.0 + fastemit_lambda) * label_occ[t, u]
            gradient[t, u] = by_log_prob
            if normalize:  # chain rule of log-softmax
                gradient[t, u] -= np.exp(log_probs[t, u]) * by_log_prob.sum()
    if clamp > 0:
        gradient = np.clip(gradient, -clamp, clamp)
    return nll, gradient


def joint_loss(
    enc: Array,
    pred: Array,
    weight: Array,
    bias: Array | None,
    targets: NDArray[np.int64],
    enc_lens: list[int],
    target_lens: list[int],
    *,
    upstream: Array,
    activation: str = "tanh",
    topology: str = "regular",
    blank: int = 0,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    alignment_power: float = 1.0,
    clamp: float = 0.0,
    bounds: NDArray[np.int64] | None = None,
    prune_range: int = 0,
) -> JointGradients:
    """A batch through the joiner activation(enc[t] + pred[u]) @ weight.T + bias; gradients of sum(upstream * nll).

    bounds [B, T]: first of the prune_range columns of a frame that alignments may pass (Kuang et al. 2022).
    """
    batch = enc.shape[0]
    result = JointGradients(
        np.zeros(batch), np.zeros(enc.shape), np.zeros(pred.shape), np.zeros(weight.shape), np.zeros(weight.shape[0])
    )
    for b in range(batch):
        frames, columns = enc_lens[b], target_lens[b] + 1
        hidden = np.zeros((frames, columns, weight.shape[1]))
        logits = np.zeros((frames, columns, weight.shape[0]))
        for t in range(frames):
            for u in range(columns):
                x = enc[b, t] + pred[b, u]
                hidden[t, u] = np.tanh(x) if activation == "tanh" else np.maximum(x, 0.0)
                logits[t, u] = weight @ hidden[t, u] + (0.0 if bias is None else bias)
        labels = [int(y) for y in targets[b, : columns - 1]]
        result.nll[b], gradient = logits_loss(
            logits,
            labels,
            blank=blank,
            topology=topology,
            fastemit_lambda=fastemit_lambda,
            delay_penalty=delay_penalty,
            alignment_power=alignment_power,
            clamp=clamp,
            first=None if bounds is None else bounds[b],
            prune_range=prune_range,
        )
        for t in range(frames):
            for u in range(columns):
                by_logits = upstream[b] * gradient[t, u]
                result.bias[:] += by_logits
                result.weight[:] += np.outer(by_logits, hidden[t, u])
                slope = 1.0 - hidden[t, u] ** 2 if activation == "tanh" else (hidden[t, u] > 0).astype(np.float64)
                by_input = (by_logits @ weight) * slope
                result.enc[b, t] += by_input
                result.pred[b, u] += by_input
    return result


def simple_log_probs(
    am: Array, lm: Array, targets: list[int], *, blank: int = 0, lm_only_scale: float = 0.0, am_only_scale: float = 0.0
) -> tuple[Array, Array]:
    """Smoothed log-probs of blank [T, U+1] and next label [T, U] of the trivial joiner am[t] + lm[u], one utterance.

    (1 - a - l) log-softmax(am[t] + lm[u]) + l log-softmax(lm[u]) + a log-softmax(am[t] + log mean over u of
    softmax(lm[u]))  (Kuang et al. 2022).
    """
    frames, columns = am.shape[0], lm.shape[0]
    by_lm = [log_softmax(lm[u]) for u in range(columns)]
    prior = np.log(np.mean([np.exp(x) for x in by_lm], axis=0))
    blank_lp, label_lp = np.zeros((frames, columns)), np.zeros((frames, columns - 1))
    for t in range(frames):
        by_am = log_softmax(am[t] + prior)
        for u in range(columns):
            row = (1.0 - lm_only_scale - am_only_scale) * log_softmax(am[t] + lm[u])
            row = row + lm_only_scale * by_lm[u] + am_only_scale * by_am
            blank_lp[t, u] = row[blank]
            if u < columns - 1:
                label_lp[t, u] = row[targets[u]]
    return blank_lp, label_lp


def best_alignment(blank: Array, label: Array, topology: str = "regular") -> tuple[float, list[int]]:
    """Log-prob of the best alignment of one utterance and the frame of each label, by trying all alignments.

    Of equally good ones, the one that emits earlier. Exponential in the sizes: for a handful of frames and tokens.
    """
    frames, columns = blank.shape
    step = STEP[topology]

    def best(t: int, u: int) -> tuple[float, list[int]]:
        if t == frames:
            return (0.0 if u == columns - 1 else -math.inf), []
        score, emitted = best(t + 1, u)
        choice = score + float(blank[t, u]), emitted
        if u < columns - 1:
            score, emitted = best(t + step, u + 1)
            after = float(blank[t, u + 1]) if topology == "constrained" else 0.0
            move = score + float(label[t, u]) + after, [t, *emitted]
            choice = move if move[0] >= choice[0] else choice
        return choice

    return best(0, 0)
