"""rnnt_loss as a drop-in for torchaudio.functional.rnnt_loss."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from losses import TransducerLossOptions, log_probs, reference, rnnt_loss
from losses.batched import logits_loss
from losses.shapes import check_logits
from tests.losses.problems import OWN_BACKENDS, assert_close, make

SIGNATURE = [
    ("logits", inspect.Parameter.empty),
    ("targets", inspect.Parameter.empty),
    ("logit_lengths", inspect.Parameter.empty),
    ("target_lengths", inspect.Parameter.empty),
    ("blank", -1),
    ("clamp", -1),
    ("reduction", "mean"),
    ("fused_log_softmax", True),
]


def test_signature_is_that_of_torchaudio() -> None:
    parameters = inspect.signature(rnnt_loss).parameters.values()
    assert [(p.name, p.default) for p in parameters] == SIGNATURE
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def expected(problem, **options) -> tuple[np.ndarray, np.ndarray]:
    """Losses [B] and gradients by logits of sum(upstream * losses), 0 in the padding."""
    logits = problem.logits().numpy()
    losses, gradients = np.zeros(len(logits)), np.zeros(logits.shape)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        labels = problem.targets[b, :u].tolist()
        blank = problem.blank % logits.shape[3]
        losses[b], gradient = reference.logits_loss(logits[b, :t, : u + 1], labels, blank=blank, **options)
        gradients[b, :t, : u + 1] = gradient * float(problem.upstream[b])
    return losses, gradients


@pytest.mark.parametrize("name", ["ragged", "no tokens", "one frame", "more tokens than frames", "odd sizes"])
@pytest.mark.parametrize("clamp", [-1.0, 0.0, 0.05])
@pytest.mark.parametrize("fused", [True, False])
def test_values_and_gradients_equal_the_reference(name: str, clamp: float, fused: bool) -> None:
    """blank=-1 is the last token; clamp acts before the upstream gradient; NaN padding."""
    problem = make("regular", name, blank=-1, lens=torch.int32)
    logits = problem.logits().requires_grad_()
    loss = rnnt_loss(
        logits,
        problem.targets,
        problem.enc_lens,
        problem.target_lens,
        clamp=clamp,
        reduction="none",
        fused_log_softmax=fused,
    )
    (loss * problem.upstream).sum().backward()
    losses, gradients = expected(problem, clamp=clamp, normalize=fused)
    assert_close(loss, losses)
    assert_close(logits.grad, gradients)
    assert not logits.grad[logits.isnan()].any()


@pytest.mark.parametrize("backend", OWN_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp", [0.0, 0.05])
@pytest.mark.parametrize("fused", [True, False])
def test_backends_agree(backend: str, dtype: torch.dtype, clamp: float, fused: bool) -> None:
    """Each against the reference on the exact values of its own dtype; large vocabulary, strided logits."""
    problem = make("regular", "odd sizes", vocab=301, padding=1)
    rounded = problem.logits().to(dtype)
    problem.logits = rounded.double  # type: ignore[method-assign]
    losses, gradients = expected(problem, clamp=clamp, normalize=fused)
    logits = rounded.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    lengths, blank = check_logits(logits, problem.targets, problem.enc_lens, problem.target_lens, blank=0)
    options = TransducerLossOptions(clamp=clamp, backend=backend)
    loss = logits_loss(logits, problem.targets, lengths, blank=blank, options=options, normalize=fused)
    (loss * problem.upstream).sum().backward()
    exact = dtype == torch.float64
    assert_close(loss, losses, 1e-10 if exact else 2e-6)
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, gradients, {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype])


def test_reductions_and_int64() -> None:
    problem = make("regular", "ragged", blank=-1)
    arguments = problem.logits(), problem.targets, problem.enc_lens, problem.target_lens
    losses = torch.from_numpy(expected(problem)[0])
    torch.testing.assert_close(rnnt_loss(*arguments), losses.mean())
    torch.testing.assert_close(rnnt_loss(*arguments, -1, -1, "sum"), losses.sum())
    torch.testing.assert_close(rnnt_loss(*arguments, reduction="none"), losses)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_half_precision_logits(dtype: torch.dtype, tolerance: float) -> None:
    problem = make("regular", "odd sizes")
    logits = problem.logits().to(dtype).requires_grad_()
    problem.logits = logits.detach().double  # type: ignore[method-assign]
    losses, gradients = expected(problem)
    loss = rnnt_loss(logits, problem.targets, problem.enc_lens, problem.target_lens, blank=0, reduction="none")
    assert loss.dtype == torch.float32
    assert_close(loss, losses, 2e-6)
    (loss * problem.upstream).sum().backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, gradients, tolerance)


def test_impossible_tokens_get_no_gradient() -> None:
    """Logits of -inf mask tokens that are neither blank nor label."""
    logits = torch.randn(1, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 4:] = -torch.inf
    logits.requires_grad_()
    loss = rnnt_loss(logits, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]), blank=0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert not logits.grad[..., 4:].any()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.randn(1, 5, 3, 7, generator=torch.Generator().manual_seed(0)) * 1e4
    logits.requires_grad_()
    loss = rnnt_loss(logits, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]), blank=0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad.sum(-1).abs() < 1e-5).all()


@pytest.mark.parametrize("backend", OWN_BACKENDS)
def test_the_gradient_holds_no_denormal_numbers(backend: str) -> None:
    """They mean nothing and make the matrix products behind the logits up to 150 times slower."""
    generator = torch.Generator().manual_seed(0)
    values = 4 * torch.randn(1, 60, 25, 40, generator=generator, dtype=torch.float64)
    targets, lens = torch.randint(1, 40, (1, 24), generator=generator), (torch.tensor([60]), torch.tensor([24]))
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        logits = values.clone().to(dtype).requires_grad_()
        lengths, blank = check_logits(logits, targets, *lens, blank=0)
        logits_loss(
            logits, targets, lengths, blank=blank, options=TransducerLossOptions(backend=backend)
        ).sum().backward()
        gradients[dtype] = logits.grad

    def denormal(x: torch.Tensor) -> torch.Tensor:
        return (x != 0) & (x.abs() < torch.finfo(torch.float32).tiny)

    assert denormal(gradients[torch.float64]).any()  # the problem has entries that small
    assert not denormal(gradients[torch.float32]).any()
    torch.testing.assert_close(gradients[torch.float32].double(), gradients[torch.float64], rtol=0, atol=1e-5)


def test_log_probs_are_those_of_the_joiner() -> None:
    problem = make("regular", "ragged")
    found = log_probs(problem.logits(), problem.targets, problem.enc_lens, problem.target_lens)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        for actual, wanted, width in zip(found, problem.log_probs(), (u + 1, u), strict=True):
            torch.testing.assert_close(actual[b, :t, :width], wanted[b, :t, :width])
            assert not actual[b, t:].any() and not actual[b, :, width:].any()


def test_equals_torchaudio() -> None:
    functional = pytest.importorskip(
        "torchaudio.functional",
        reason="torchaudio does not import here; get it in a virtual environment of its own with "
        "`pip install torch==2.11.0 torchaudio==2.11.0`",
        exc_type=ImportError,
    )
    their = [(p.name, p.default) for p in inspect.signature(functional.rnnt_loss).parameters.values()]
    assert their == SIGNATURE
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 12, 6, 17, generator=generator)
    targets = torch.randint(0, 16, (3, 5), generator=generator, dtype=torch.int32)
    lens = torch.tensor([12, 9, 5], dtype=torch.int32), torch.tensor([5, 3, 0], dtype=torch.int32)
    for clamp in (-1.0, 0.02):
        for fused in (True, False):
            for reduction in ("mean", "sum", "none"):
                results = []
                for function in (rnnt_loss, functional.rnnt_loss):
                    logits = values.clone() if fused else values.log_softmax(-1)
                    logits.requires_grad_()
                    loss = function(logits, targets, *lens, clamp=clamp, reduction=reduction, fused_log_softmax=fused)
                    (loss * torch.tensor([0.5, 2.0, -3.0] if reduction == "none" else 1.5)).sum().backward()
                    results.append((loss.detach(), logits.grad))
                torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
