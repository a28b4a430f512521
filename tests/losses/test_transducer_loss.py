"""transducer_loss, every method, against the reference: loss, gradients of encoder, predictor, weight and bias."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from losses import LOSSES, TransducerLossOptions, lattice, transducer_loss
from losses.api import REFUSED
from tests.losses.problems import CASES, assert_close, make
from tests.losses.test_lattice import second_derivatives


def loss_of(*arguments: Any, method: str, options: TransducerLossOptions | None = None, **named: Any) -> Any:
    """transducer_loss without the check of values; "pruned" with all columns of each frame, so that it is exact."""
    if method == "pruned":
        enc, pred, weight, *_ = arguments
        dtype = torch.promote_types(enc.dtype, torch.float32)
        sizes = [(*x.shape[:2], weight.shape[0]) for x in (enc, pred)]
        named["simple"] = tuple(torch.zeros(s, dtype=dtype, device=enc.device) for s in sizes)
        options = dataclasses.replace(options or TransducerLossOptions(), prune_range=max(2, pred.shape[1]))
    return transducer_loss(*arguments, method=method, options=options, check_values=False, **named)


def skip_undefined(method: str, topology: str, chosen: dict[str, float]) -> None:
    if any((name, option) in REFUSED for name in (method, topology) for option in chosen):
        pytest.skip("refused by name: tests/losses/test_errors.py")


each_method = pytest.mark.parametrize("method", list(LOSSES))
each_case = pytest.mark.parametrize(("topology", "name"), CASES)


@each_method
@each_case
@pytest.mark.parametrize(("activation", "blank"), [("tanh", 0), ("relu", -1), ("tanh", 4)])
def test_loss_and_gradients_equal_the_reference(
    topology: str, name: str, activation: str, blank: int, method: str
) -> None:
    """Ragged lengths, NaN padding, and another weight for each utterance."""
    problem = make(topology, name, blank=blank)
    output = loss_of(
        *problem.arguments(), method=method, activation=activation, topology=topology, blank=blank, reduction="none"
    )
    expected = problem.expected(activation=activation)
    (output.loss * problem.upstream).sum().backward()
    assert_close(output.loss, expected.nll)
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert_close(tensor.grad, gradient)
    for tensor in (problem.enc, problem.pred):
        assert not tensor.grad[tensor.isnan()].any()


@each_method
def test_reductions(method: str) -> None:
    problem = make("regular", "ragged")
    none, total, mean, token = (
        loss_of(*problem.arguments(), method=method, reduction=r).loss
        for r in ("none", "sum", "mean", "mean-per-token")
    )
    nll = torch.from_numpy(problem.expected().nll)
    torch.testing.assert_close(none, nll)
    torch.testing.assert_close(total, nll.sum())
    torch.testing.assert_close(mean, nll.mean())
    torch.testing.assert_close(token, nll.sum() / problem.target_lens.sum())


@each_method
def test_mean_per_token_without_tokens_divides_by_one(method: str) -> None:
    problem = make("regular", "no tokens")
    loss = loss_of(*problem.arguments(), method=method, reduction="mean-per-token").loss
    torch.testing.assert_close(loss, torch.from_numpy(problem.expected().nll).sum())


@each_method
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"fastemit_lambda": 0.3},
        {"delay_penalty": 0.2},
        {"alignment_power": 3.0},
        {"fastemit_lambda": 0.1, "delay_penalty": 0.05},
        {"clamp": 0.05},
        {"clamp": 0.1, "fastemit_lambda": 0.3},
    ],
)
def test_options(topology: str, method: str, chosen: dict[str, float]) -> None:
    skip_undefined(method, topology, chosen)
    problem = make(topology, "ragged")
    options = TransducerLossOptions(**chosen)
    loss = loss_of(*problem.arguments(), method=method, topology=topology, reduction="none", options=options).loss
    expected = problem.expected(**chosen)
    (loss * problem.upstream).sum().backward()
    assert_close(loss, expected.nll)
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert_close(tensor.grad, gradient)


@each_method
@each_case
@pytest.mark.parametrize("chosen", [{}, {"fastemit_lambda": 0.2, "delay_penalty": 0.1, "alignment_power": 2.0}])
def test_one_upstream_gradient_for_all(topology: str, name: str, chosen: dict[str, float], method: str) -> None:
    """Reductions that sum; with options, and twice through one graph with another factor."""
    skip_undefined(method, topology, chosen)
    problem = make(topology, name)
    problem.upstream = torch.full_like(problem.upstream, 0.7)
    options = TransducerLossOptions(**chosen)
    loss = loss_of(*problem.arguments(), method=method, topology=topology, reduction="sum", options=options).loss
    expected = problem.expected(**chosen)
    assert_close(loss, expected.nll.sum())
    torch.autograd.grad(3.0 * loss, problem.parameters, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(0.7 * loss, problem.parameters), expected[1:], strict=True):
        assert_close(found, wanted)


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_only_the_gradients_that_are_wanted(method: str, reduction: str) -> None:
    problem = make("regular", "ragged")
    everything = loss_of(*problem.arguments(), method=method, reduction=reduction).loss.sum()
    expected = torch.autograd.grad(everything, problem.parameters)
    for wanted in itertools.product([True, False], repeat=4):
        if not any(wanted):
            continue
        for x, needed in zip(problem.parameters, wanted, strict=True):
            x.grad = None
            x.requires_grad_(needed)
        loss_of(*problem.arguments(), method=method, reduction=reduction).loss.sum().backward()
        for x, needed, gradient in zip(problem.parameters, wanted, expected, strict=True):
            assert (x.grad is not None) == needed
            if needed:
                torch.testing.assert_close(x.grad, gradient)


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_without_any_gradient(method: str, reduction: str) -> None:
    problem = make("regular", "ragged")
    with torch.no_grad():
        loss = loss_of(*problem.arguments(), method=method, reduction=reduction).loss
    assert not loss.requires_grad
    assert_close(loss.sum(), problem.expected().nll.sum())


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_padding_has_no_gradient_whatever_comes_from_above(method: str, reduction: str, factor: float) -> None:
    problem = make("regular", "ragged")
    loss = loss_of(*problem.arguments(), method=method, reduction=reduction).loss
    (loss.sum() * factor).backward()
    for tensor in (problem.enc, problem.pred):
        assert not tensor.grad[tensor.isnan()].any()
        assert not tensor.grad[~tensor.isnan()].isfinite().all()


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_without_bias_and_with_int32(method: str, reduction: str) -> None:
    problem = make("modified", "ragged", lens=torch.int32)
    with torch.no_grad():
        problem.bias.zero_()
    if reduction == "sum":
        problem.upstream = torch.ones_like(problem.upstream)
    enc, pred, weight, _, *rest = problem.arguments()
    loss = loss_of(enc, pred, weight, None, *rest, method=method, topology="modified", reduction=reduction).loss
    expected = problem.expected()
    weighted = loss if reduction == "sum" else (loss * problem.upstream).sum()
    found = torch.autograd.grad(weighted, [enc, pred, weight])
    for gradient, wanted in zip(found, expected[1:4], strict=True):
        assert_close(gradient, wanted)


@each_method
def test_without_bias_and_with_int32(method: str) -> None:
    problem = make("regular", "ragged", lens=torch.int32)
    with torch.no_grad():
        problem.bias.zero_()
    enc, pred, weight, _, *rest = problem.arguments()
    loss = loss_of(enc, pred, weight, None, *rest, method=method, reduction="none").loss
    assert_close(loss, problem.expected().nll)


@each_method
def test_gradcheck(method: str) -> None:
    problem = make("regular", "ragged", padding=0, dim=3, vocab=4)
    inputs = [x.detach().nan_to_num(0.5).requires_grad_() for x in problem.parameters]
    rest = problem.targets, problem.enc_lens, problem.target_lens
    assert torch.autograd.gradcheck(lambda *p: loss_of(*p, *rest, method=method).loss, inputs)


@each_method
def test_loss_scaling_by_utterance(method: str) -> None:
    """A float32 loss times 2^16 gives 2^16 times the gradient, to the last bit: the scale is a power of two."""
    gradients = []
    for scale in (1.0, 2.0**16):
        problem = make("regular", "ragged", dtype=torch.float32)
        loss = loss_of(*problem.arguments(), method=method, reduction="none").loss
        (loss * problem.upstream.float() * scale).sum().backward()
        gradients.append([x.grad / scale for x in problem.parameters])
    for plain, scaled in zip(*gradients, strict=True):
        assert torch.equal(plain, scaled)


DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 5e-2), (torch.float16, 6e-3)]


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_other_dtypes(dtype: torch.dtype, tolerance: float, method: str, reduction: str) -> None:
    problem = make("regular", "odd sizes", dtype=dtype)
    if reduction == "sum":
        problem.upstream = torch.ones_like(problem.upstream)
    expected = problem.expected()
    loss = loss_of(*problem.arguments(), method=method, reduction=reduction).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected.nll if reduction == "none" else expected.nll.sum(), tolerance)
    (loss * problem.upstream.float() if reduction == "none" else loss).sum().backward()
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert tensor.grad.dtype == dtype
        assert_close(tensor.grad, gradient, tolerance)


@each_method
def test_under_autocast_the_lattice_stays_in_float32(method: str) -> None:
    """float32 parameters with bfloat16 activations, as a model under autocast gives them."""
    problem = make("regular", "odd sizes", dtype=torch.float32)
    expected = problem.expected()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enc, pred, *rest = problem.arguments()
        loss = loss_of(enc.bfloat16(), pred.bfloat16(), *rest, method=method, reduction="none").loss
        (loss * problem.upstream.float()).sum().backward()
    assert loss.dtype == torch.float32
    assert_close(loss, expected.nll, 5e-2)
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, gradient, 5e-2)


@each_method
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean-per-token"])
def test_empty_batch(reduction: str, method: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    enc = torch.zeros(0, 6, 4, requires_grad=True)
    weight = torch.zeros(5, 4, requires_grad=True)
    loss = loss_of(
        enc, torch.zeros(0, 3, 4), weight, None, none.view(0, 2), none, none, method=method, reduction=reduction
    ).loss
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert not weight.grad.any()


@each_method
def test_a_bad_frame_spoils_its_utterance_only(method: str) -> None:
    problem = make("regular", "ragged")
    good = loss_of(*problem.arguments(), method=method, reduction="none").loss
    with torch.no_grad():
        problem.enc[1, 2] = torch.nan
    loss = loss_of(*problem.arguments(), method=method, reduction="none").loss
    assert loss[1].isnan()
    assert torch.equal(loss[[0, 2, 3]], good[[0, 2, 3]])


@each_method
def test_what_it_found_out(method: str) -> None:
    problem = make("regular", "ragged")
    output = loss_of(*problem.arguments(), method=method)
    assert (output.simple_loss is None) == (method != "pruned")
    assert output.info["method"] == method and output.info["topology"] == "regular"
    assert output.info["cells"] == 7 * 4 + 4 * 5 + 1 * 3 + 5 * 1
    assert not output.info["utterance_loss"].requires_grad
    torch.testing.assert_close(output.info["utterance_loss"].mean(), output.loss.detach())


@each_method
def test_double_backward_raises(method: str) -> None:
    problem = make("regular", "ragged")
    loss = loss_of(*problem.arguments(), method=method).loss
    (gradient,) = torch.autograd.grad(loss, problem.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        second_derivatives(gradient, problem.weight)


@each_method
def test_backward_twice_through_a_kept_graph(method: str) -> None:
    problem = make("regular", "ragged")
    loss = loss_of(*problem.arguments(), method=method).loss
    first = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    second = torch.autograd.grad(loss, problem.parameters)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@each_method
def test_without_gradients_no_work_is_done_for_them(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = lattice.forward_backward

    def forward_backward(*arguments: Any, occupancies: bool = True, **named: Any) -> Any:
        asked.append(occupancies)
        return real(*arguments, occupancies=occupancies, **named)

    monkeypatch.setattr(lattice, "forward_backward", forward_backward)
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 5, 8), (2, 4, 8), (6, 8))]
    rest = torch.ones(2, 3, dtype=torch.int64), torch.tensor([5, 4]), torch.tensor([3, 2])
    with torch.no_grad():
        assert not loss_of(*inputs, None, *rest, method=method).loss.requires_grad
    assert asked and not asked[-1]  # pruning needs the occupancies of the simple lattice, the first one
    loss_of(*inputs, None, *rest, method=method).loss.backward()
    assert asked[-1]
