"""The lattice on every backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import lattice_loss, occupancy, reference
from tests.losses.problems import CASES, OWN_BACKENDS, Problem, assert_close, make

each_backend = pytest.mark.parametrize("backend", OWN_BACKENDS)
each_case = pytest.mark.parametrize(("topology", "name"), CASES)


def reference_gradients(problem: Problem, fastemit_lambda: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses [B] and gradients of sum(upstream * losses) by both log-probs, 0 in the padding."""
    blank, label = (x.numpy() for x in problem.log_probs())
    losses, by_blank, by_label = np.zeros(len(blank)), np.zeros(blank.shape), np.zeros(label.shape)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        nll, blank_occ, label_occ = reference.lattice(blank[b, :t, : u + 1], label[b, :t, :u], problem.topology)
        weight = float(problem.upstream[b])
        losses[b] = nll
        by_blank[b, :t, : u + 1] = -weight * blank_occ
        by_label[b, :t, :u] = -weight * (1 + fastemit_lambda) * label_occ
    return losses, by_blank, by_label


@each_backend
@each_case
@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.25])
def test_loss_and_gradients_equal_the_reference(topology: str, name: str, backend: str, fastemit_lambda: float) -> None:
    problem = make(topology, name)
    blank, label = (x.requires_grad_() for x in problem.log_probs())
    loss = lattice_loss(
        blank,
        label,
        problem.enc_lens,
        problem.target_lens,
        topology=topology,
        fastemit_lambda=fastemit_lambda,
        backend=backend,
    )
    (loss * problem.upstream).sum().backward()
    losses, by_blank, by_label = reference_gradients(problem, fastemit_lambda)
    assert loss.dtype == torch.float64
    assert_close(loss, losses)
    assert_close(blank.grad, by_blank)
    assert_close(label.grad, by_label)
    # exactly 0, not nearly, where an utterance is not
    assert not blank.grad[torch.from_numpy(by_blank == 0) & blank.isnan()].any()
    assert not label.grad[torch.from_numpy(by_label == 0) & label.isnan()].any()


@each_backend
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_large_problems_go_over_threads_and_stay_exact(topology: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    blank = torch.randn(9, 61, 33, generator=generator, dtype=torch.float64) - 2
    label = torch.randn(9, 61, 32, generator=generator, dtype=torch.float64) - 4
    enc_lens, target_lens = torch.arange(61, 34, -3), torch.arange(32, 14, -2)
    actual = lattice_loss(blank, label, enc_lens, target_lens, topology=topology, backend=backend)
    expected = [
        reference.lattice(blank[b, :t, : u + 1].numpy(), label[b, :t, :u].numpy(), topology)[0]
        for b, (t, u) in enumerate(zip(enc_lens.tolist(), target_lens.tolist(), strict=True))
    ]
    assert_close(actual, np.array(expected))


@each_backend
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_gradcheck(topology: str, backend: str) -> None:
    problem = make(topology, "ragged", padding=0)
    blank, label = (x.nan_to_num(-1.0).requires_grad_() for x in problem.log_probs())
    assert torch.autograd.gradcheck(
        lambda b, s: lattice_loss(b, s, problem.enc_lens, problem.target_lens, topology=topology, backend=backend),
        (blank, label),
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_from_their_exact_values(dtype: torch.dtype, backend: str) -> None:
    problem = make("regular", "odd sizes")
    blank, label = (x.to(dtype).requires_grad_() for x in problem.log_probs())
    exact = [x.detach().double().requires_grad_() for x in (blank, label)]
    lens = problem.enc_lens, problem.target_lens
    loss = lattice_loss(blank, label, *lens, backend=backend)
    expected = lattice_loss(*exact, *lens, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    for x, y in zip((blank, label), exact, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol={torch.float32: 2e-6}.get(dtype, 4e-3))


@each_backend
def test_extreme_log_probs(backend: str) -> None:
    """Paths of e^-40000 against others, impossible labels, and blanks that are certain."""
    blank = torch.zeros(1, 40, 21, dtype=torch.float64)
    label = torch.full((1, 40, 20), -2000.0, dtype=torch.float64)
    label[0, ::2] = -torch.inf
    label.requires_grad_()
    loss = lattice_loss(blank, label, torch.tensor([40]), torch.tensor([20]), backend=backend)
    expected, _, occupied = reference.lattice(blank[0].numpy(), label.detach()[0].numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    loss.sum().backward()
    assert_close(-label.grad[0], occupied)


@each_backend
def test_without_an_alignment_the_loss_is_infinite(backend: str) -> None:
    blank, label = torch.zeros(2, 3, 3), torch.zeros(2, 3, 2)
    label[0] = -torch.inf
    lens = torch.tensor([3, 3]), torch.tensor([2, 2])
    loss = lattice_loss(blank, label, *lens, backend=backend)
    assert loss[0] == torch.inf and loss[1].isfinite()
    assert occupancy(blank, label, *lens, backend=backend).label[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["blank", "label"])
def test_non_finite_input_makes_the_loss_of_its_utterance_non_finite_and_no_other(
    bad: float, where: str, backend: str
) -> None:
    blank, label = torch.full((3, 9, 5), -1.0), torch.full((3, 9, 4), -2.0)
    lens = torch.tensor([9, 9, 9]), torch.tensor([4, 4, 4])
    good = lattice_loss(blank, label, *lens, backend=backend)
    (blank if where == "blank" else label)[1, 4, 2] = bad
    loss = lattice_loss(blank, label, *lens, backend=backend)
    assert not loss[1].isfinite()
    assert torch.equal(loss[::2], good[::2])


@each_backend
def test_empty_batch(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    blank = torch.zeros(0, 4, 3, requires_grad=True)
    loss = lattice_loss(blank, torch.zeros(0, 4, 2), none, none, backend=backend)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert blank.grad.shape == blank.shape


def test_an_infinite_upstream_gradient_stays_out_of_the_padding() -> None:
    problem = make("regular", "ragged")
    blank, label = (x.requires_grad_() for x in problem.log_probs())
    loss = lattice_loss(blank, label, problem.enc_lens, problem.target_lens)
    loss.backward(torch.full_like(loss, torch.inf))
    assert not blank.grad[blank.isnan()].any()


def second_derivatives(gradient: Tensor, leaf: Tensor) -> None:
    torch.autograd.grad(gradient.pow(2).sum() + leaf.nan_to_num().sum(), leaf)


@each_backend
def test_double_backward_raises_and_never_lies(backend: str) -> None:
    problem = make("regular", "ragged")
    blank, label = (x.requires_grad_() for x in problem.log_probs())
    loss = lattice_loss(blank, label, problem.enc_lens, problem.target_lens, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), blank, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only.*create_graph"):
        second_derivatives(gradient, blank)
