"""The reference against what needs no trust: all alignments by enumeration, and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from losses import reference


def all_alignments(blank: np.ndarray, label: np.ndarray, topology: str) -> list[float]:
    """Log-prob of every alignment, from its definition as a string of blanks and labels."""
    frames, tokens = blank.shape[0], blank.shape[1] - 1
    scores = []
    length = frames + tokens if topology == "regular" else frames
    for labels_at in itertools.combinations(range(length), tokens):
        t = u = 0
        score = 0.0
        for i in range(length):
            if t == frames:  # regular: labels after the last blank
                score = -math.inf
                break
            if i in labels_at:
                score += label[t, u] + (blank[t, u + 1] if topology == "constrained" else 0.0)
                u += 1
                t += topology != "regular"
            else:
                score += blank[t, u]
                t += 1
        if score > -math.inf:
            scores.append(score)
    return scores


SIZES = [(1, 0), (1, 1), (4, 0), (4, 3), (3, 3), (5, 2)]


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize(("frames", "tokens"), SIZES)
def test_the_lattice_sums_over_all_alignments(topology: str, frames: int, tokens: int) -> None:
    rng = np.random.default_rng(frames * 10 + tokens)
    blank, label = rng.normal(size=(frames, tokens + 1)), rng.normal(size=(frames, tokens))
    scores = all_alignments(blank, label, topology)
    count = math.comb(frames + tokens - 1, tokens) if topology == "regular" else math.comb(frames, tokens)
    assert len(scores) == count
    nll, _, label_occ = reference.lattice(blank, label, topology)
    assert nll == pytest.approx(-np.logaddexp.reduce(scores), abs=1e-12)
    np.testing.assert_allclose(label_occ.sum(0), 1.0, atol=1e-12)
    assert reference.best_alignment(blank, label, topology)[0] == pytest.approx(max(scores), abs=1e-12)


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradients_are_the_derivatives_of_the_value(topology: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    tensors = [rng.normal(size=s) for s in ((2, 4, 3), (2, 3, 3), (5, 3), (5,))]
    targets, lens = np.array([[1, 4], [3, 0]]), ([4, 2], [2, 1])
    upstream = np.array([0.7, -1.3])

    def run() -> reference.JointGradients:
        return reference.joint_loss(
            *tensors, targets, *lens, upstream=upstream, activation=activation, topology=topology, blank=2
        )

    for tensor, gradient in zip(tensors, run()[1:], strict=True):
        for index in np.ndindex(tensor.shape):
            kept, step = tensor[index], 1e-5
            tensor[index] = kept + step
            above = float(upstream @ run().nll)
            tensor[index] = kept - step
            below = float(upstream @ run().nll)
            tensor[index] = kept
            assert gradient[index] == pytest.approx((above - below) / (2 * step), abs=1e-8)


def test_fastemit_scales_the_label_part_of_the_gradient_and_not_the_value() -> None:
    rng = np.random.default_rng(2)
    log_probs = np.log(rng.dirichlet(np.ones(4), size=(3, 3)))
    plain, gradient = reference.logits_loss(log_probs, [1, 3], normalize=False)
    value, scaled = reference.logits_loss(log_probs, [1, 3], normalize=False, fastemit_lambda=0.5)
    assert value == plain
    np.testing.assert_allclose(scaled[..., 0], gradient[..., 0])
    np.testing.assert_allclose(scaled[..., 1:], 1.5 * gradient[..., 1:])


def test_clamp_limits_each_entry() -> None:
    logits = np.random.default_rng(3).normal(size=(3, 2, 4))
    _, free = reference.logits_loss(logits, [1])
    _, clamped = reference.logits_loss(logits, [1], clamp=0.1)
    assert np.abs(free).max() > 0.1
    np.testing.assert_array_equal(clamped, np.clip(free, -0.1, 0.1))
