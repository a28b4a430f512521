"""The losses on CUDA against the float64 reference, which runs on CPU, and within a memory limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import LOSSES, TransducerLossOptions, lattice_loss, rnnt_loss, transducer_loss
from losses.bench import cases
from losses.bench.cuda import on_device
from losses.memory import MemoryLimitError
from tests.losses.problems import CASES, Problem, assert_close, make
from tests.losses.test_lattice import reference_gradients
from tests.losses.test_transducer_loss import loss_of

each_method = pytest.mark.parametrize("method", list(LOSSES))
each_case = pytest.mark.parametrize(("topology", "name"), CASES)


def moved(problem: Problem) -> Problem:
    """On the device, with leaves of its own."""
    found = {
        field.name: getattr(problem, field.name).detach().cuda()
        for field in dataclasses.fields(problem)
        if isinstance(getattr(problem, field.name), Tensor)
    }
    for name in ("enc", "pred", "weight", "bias"):
        found[name].requires_grad_()
    return dataclasses.replace(problem, **found)


@each_method
@each_case
def test_float64_equals_the_reference(topology: str, name: str, method: str) -> None:
    problem = make(topology, name, blank=4)
    there = moved(problem)
    found = loss_of(*there.arguments(), method=method, topology=topology, blank=4, reduction="none")
    (found.loss * there.upstream).sum().backward()
    expected = problem.expected()
    assert found.loss.device.type == "cuda"
    assert_close(found.loss.cpu(), expected.nll)
    for tensor, gradient in zip(there.parameters, expected[1:], strict=True):
        assert_close(tensor.grad.cpu(), gradient)


@each_method
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 4e-3)])
def test_other_formats(method: str, dtype: str, tolerance: float) -> None:
    problem = make("regular", "odd sizes", dtype=getattr(torch, dtype), vocab=64, dim=32)
    there = moved(problem)
    found = loss_of(*there.arguments(), method=method, reduction="none")
    (found.loss * there.upstream).sum().backward()
    expected = problem.expected()
    assert_close(found.loss.cpu(), expected.nll, tolerance)
    for tensor, gradient in zip(there.parameters, expected[1:], strict=True):
        assert tensor.grad.dtype == getattr(torch, dtype)
        assert_close(tensor.grad.cpu(), gradient, tolerance)


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(method: str, dtype: torch.dtype) -> None:
    problem = make("regular", "odd sizes", dtype=torch.float32, vocab=64, dim=32)
    there = moved(problem)
    with torch.autocast("cuda", dtype):
        found = loss_of(*there.arguments(), method=method, reduction="none")
    (found.loss * there.upstream).sum().backward()
    expected = problem.expected()
    assert_close(found.loss.cpu(), expected.nll, 2e-2)
    for tensor, gradient in zip(there.parameters, expected[1:], strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad.cpu(), gradient, 2e-2)


@each_method
@pytest.mark.parametrize("options", [{"fastemit_lambda": 0.1}, {"delay_penalty": 0.05}, {"clamp": 0.1}], ids=str)
def test_options_give_what_they_give_on_cpu(method: str, options: dict[str, float]) -> None:
    problem = make("regular", "ragged")
    chosen = {"options": TransducerLossOptions(prune_range=9, **options)}
    simple = [torch.zeros(*x.shape[:2], 9, dtype=torch.float64) for x in (problem.enc, problem.pred)]
    there = moved(problem)
    results = []
    for side, other in ((problem, simple), (there, [x.cuda() for x in simple])):
        named = chosen | ({"simple": tuple(other)} if method == "pruned" else {})
        try:
            found = transducer_loss(*side.arguments(), method=method, reduction="none", **named)
        except ValueError as error:
            results.append((str(error),))
            continue
        found.loss.sum().backward()
        results.append((found.loss.cpu(), *(x.grad.cpu() for x in side.parameters)))
    for one, two in zip(*results, strict=True):
        if isinstance(one, str):
            assert one == two
        else:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@each_case
def test_the_lattice_alone(topology: str, name: str) -> None:
    problem = make(topology, name)
    blank, label = (x.cuda().requires_grad_() for x in problem.log_probs())
    loss = lattice_loss(blank, label, problem.enc_lens.cuda(), problem.target_lens.cuda(), topology=topology)
    (loss * problem.upstream.cuda()).sum().backward()
    losses, by_blank, by_label = reference_gradients(problem)
    assert_close(loss.cpu(), losses)
    assert_close(blank.grad.cpu(), by_blank)
    assert_close(label.grad.cpu(), by_label)


def test_of_logits() -> None:
    problem = make("regular", "ragged")
    logits = problem.logits().nan_to_num(0.0).cuda().requires_grad_()
    lengths = problem.enc_lens.cuda(), problem.target_lens.cuda()
    targets = problem.targets.where(problem.targets < 9, 1).cuda()
    rnnt_loss(logits, targets, *lengths, blank=0, reduction="sum").backward()
    here = logits.detach().cpu().requires_grad_()
    rnnt_loss(here, targets.cpu(), *(x.cpu() for x in lengths), blank=0, reduction="sum").backward()
    torch.testing.assert_close(logits.grad.cpu(), here.grad, rtol=1e-9, atol=1e-12)


def test_tensors_of_two_devices_are_refused() -> None:
    problem = make("regular", "ragged")
    there = moved(problem)
    with pytest.raises(ValueError, match="pred is on cpu but enc is on cuda"):
        transducer_loss(there.enc, *problem.arguments()[1:])


def step(case: cases.Case, method: str, limit: str | int | None, products: torch.dtype) -> tuple[int, float, Any]:
    """Bytes that a step takes at most above its inputs and gradients, its loss, and what it says."""
    leaves = [x.detach().requires_grad_() for x in case.sources]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    simple = tuple(leaves[3:]) or None
    with torch.autocast("cuda", products, enabled=products != torch.float32):
        found = transducer_loss(
            *leaves[:3], None, case.targets, case.enc_lens, case.target_lens,
            method=method, reduction="sum", memory_limit=limit, simple=simple,
        )  # fmt: skip
    total = found.loss if found.simple_loss is None else found.loss + found.simple_loss
    total.backward()
    left = sum(x.grad.numel() * x.grad.itemsize for x in leaves)
    return torch.cuda.max_memory_allocated() - before - left, float(total.detach()), found.info


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["S", "M", "16x300x40x2000", "3x700x90x300"])
def test_memory_limit_is_kept(name: str, products: torch.dtype) -> None:
    """From the smallest that fits up to half of what batched takes, for each method; the loss stays."""
    case = on_device(cases.make(name, simple=True))
    plain = dataclasses.replace(case, am=None, lm=None)
    step(plain, "fused", None, products)  # workspaces of the library come once
    most, expected, _ = step(plain, "batched", None, products)
    for method in ("samplewise", "fused", "pruned"):
        own = case if method == "pruned" else plain
        step(own, method, None, products)
        with pytest.raises(MemoryLimitError) as caught:
            step(own, method, 1, products)
        least = caught.value.smallest
        for limit in (least, int((least * most / 2) ** 0.5), most // 2):
            if limit < least:
                continue
            peak, loss, info = step(own, method, limit, products)
            assert peak <= limit, (method, limit, peak, info)
            if method != "pruned":
                assert loss == pytest.approx(expected, rel=1e-4 if products == torch.float32 else 5e-3)
