"""memory_limit: what it says, that results stay, and that measured memory stays within it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from losses import TransducerLossOptions, joint, memory, transducer_loss
from losses.bench import memory_limit as command
from losses.memory import MemoryLimitError, parse_limit, text_of
from losses.sizes import ROWS
from tests.losses.problems import assert_close, make


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        ("2GiB", 2**31), ("500MB", 500_000_000), ("1.5 GiB", 3 * 2**29), ("64kib", 65536), ("7", 7), ("12B", 12),
        (".5KB", 500), (4096, 4096), ("1TB", 10**12),
    ],
)  # fmt: skip
def test_sizes_are_read(limit: str | int, size: int) -> None:
    assert parse_limit(limit) == size


@pytest.mark.parametrize("limit", ["", "GiB", "2 gallons", "-1GiB", "1e9", "2GiB.", "1,5GB", 2e9, True, None, b"2GiB"])
def test_what_is_not_a_size(limit: object) -> None:
    with pytest.raises(ValueError, match=r"memory_limit=.* is not a size; pass [^\n]*$"):
        parse_limit(limit)


@pytest.mark.parametrize("limit", [0, -5, "0MiB", "0.0001B"])
def test_sizes_of_nothing(limit: object) -> None:
    with pytest.raises(ValueError, match="is not a size above 0; pass None for no limit"):
        parse_limit(limit)


@pytest.mark.parametrize("size", [1, 1000, 1024, 123_456, 2**20 - 1, 2**20 + 1, 987_654_321, 2**40 + 7])
def test_a_size_in_words_is_no_less(size: int) -> None:
    assert size <= parse_limit(text_of(size)) <= 1.1 * size + 1024


def run(problem: Any, **arguments: Any) -> tuple[Any, list[torch.Tensor]]:
    """Output and gradients; each utterance has another upstream gradient for reduction "none"."""
    found = transducer_loss(*problem.arguments(), topology=problem.topology, blank=problem.blank, **arguments)
    upstream = problem.upstream if found.loss.ndim else torch.tensor(3.0, dtype=torch.float64)
    simple = arguments.get("simple") or ()
    total = (found.loss * upstream).sum()
    if found.simple_loss is not None:
        total = total + found.simple_loss.sum()
    return found, list(torch.autograd.grad(total, [*problem.parameters, *simple]))


def smallest(problem: Any, **arguments: Any) -> int:
    with pytest.raises(MemoryLimitError) as caught:
        run(problem, memory_limit=1, **arguments)
    assert isinstance(caught.value, ValueError)
    return caught.value.smallest


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("method", ["batched", "samplewise", "fused", "pruned"])
def test_results_are_those_without_a_limit(method: str, topology: str, reduction: str, backend: str) -> None:
    problem = make(topology, "odd sizes", vocab=70, dim=33)
    arguments: dict[str, Any] = {"method": method, "reduction": reduction}
    arguments["options"] = TransducerLossOptions(backend=backend, prune_range=6)
    if method == "pruned":
        generator = torch.Generator().manual_seed(1)
        arguments["simple"] = tuple(
            torch.randn(*x.shape[:2], 70, generator=generator, dtype=torch.float64, requires_grad=True)
            for x in (problem.enc, problem.pred)
        )
    expected, gradients = run(problem, **arguments)
    assert "memory_plan" not in expected.info
    least = smallest(problem, **arguments)
    plans = set()
    for limit in (least, 4 * least, "1TiB"):
        found, others = run(problem, memory_limit=limit, **arguments)
        plans.add(found.info["memory_plan"].partition(":")[2])
        assert_close(found.loss, expected.loss.detach().numpy())
        for x, y in zip(others, gradients, strict=True):
            assert_close(x, y.numpy())
    assert len(plans) > 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_utterance_chunk_and_tile_at_a_time(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """The least limit cuts the batch into the least pieces, without a cache."""
    problem = make("regular", "odd sizes", vocab=70, dim=33)
    seen = []
    real = joint.rows_in
    monkeypatch.setattr(joint, "rows_in", lambda *a: (seen.append((a[0], real(*a))), real(*a))[1])
    run(problem, memory_limit=smallest(problem))
    sizes, rows = seen[-1]
    assert (rows.tile, rows.cache, rows.chunk) == (ROWS, 0, ROWS) and sizes.threads == 1
    seen.clear()
    run(problem, memory_limit="1TiB")
    assert seen[-1][0].cache > 0 and seen[-1][0].threads == 0


def test_the_named_limit_is_kept_and_less_is_not() -> None:
    problem = make("regular", "odd sizes", vocab=200, dim=65)
    for method in ("fused", "samplewise", "batched"):
        least = smallest(problem, method=method)
        text = text_of(least)
        assert run(problem, memory_limit=text, method=method)[0].loss.isfinite()
        with pytest.raises(MemoryLimitError, match=f"the smallest limit that fits is {text}, mostly for [^\n]*; pass"):
            run(problem, memory_limit=int(least * 0.9), method=method)


def test_without_gradients_less_is_needed() -> None:
    problem = make("regular", "odd sizes", vocab=200, dim=65)
    least = smallest(problem)
    with torch.no_grad(), pytest.raises(MemoryLimitError) as caught:
        transducer_loss(*problem.arguments(), memory_limit=1)
    assert caught.value.smallest < least
    with torch.no_grad():
        transducer_loss(*problem.arguments(), memory_limit=caught.value.smallest)


def test_the_plan_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_said", set())
    problem = make("regular", "odd sizes", vocab=70, dim=33)
    least = smallest(problem)
    with caplog.at_level(logging.INFO, "losses"):
        plans = [run(problem, memory_limit=x)[0].info["memory_plan"] for x in (least, least, "1TiB", "1TiB")]
    assert len(caplog.records) == 2
    for record, plan in zip(caplog.records, plans[::2], strict=True):
        assert record.levelno == logging.INFO and plan in record.getMessage() and "B=2, T=65" in record.getMessage()
    assert "method 'fused' in smaller sizes: least tile, one utterance at a time, no cache" in plans[0]
    assert "the default sizes would take" in plans[0] and "takes at most" in plans[0]
    assert "method 'fused' in its default sizes" in plans[2]


def test_another_method_stands_in_and_leaves_no_cell_out() -> None:
    problem = make("regular", "odd sizes", vocab=2000, dim=33, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.weight.mul_(4)  # a sharp model, most of whose cells are below the threshold
    least = smallest(problem)
    kept = {}
    for method in ("fused", "batched", "samplewise"):
        info = run(problem, method=method, memory_limit=least)[0].info
        kept[method] = info["kept_cells"]
        assert info["method"] == method and "method 'fused'" in info["memory_plan"]
        assert (f"instead of {method}, which would take" in info["memory_plan"]) == (method != "fused")
    assert kept["fused"] < kept["batched"] == kept["samplewise"]
    for method in ("batched", "samplewise"):
        assert f"method '{method}'" in run(problem, method=method, memory_limit="1TiB")[0].info["memory_plan"]


def test_an_empty_batch() -> None:
    enc, pred, weight = (torch.zeros(s, requires_grad=True) for s in ((0, 4, 3), (0, 3, 3), (5, 3)))
    none = torch.zeros(0, dtype=torch.int64)
    for method in ("fused", "batched", "samplewise"):
        found = transducer_loss(
            enc, pred, weight, None, torch.zeros(0, 2, dtype=torch.int64), none, none, method=method, memory_limit=1
        )
        assert found.loss == 0 and "nothing to compute" in found.info["memory_plan"]


def test_problems_are_as_documented() -> None:
    for seed in range(200):
        problem = command.draw(seed)
        logits = problem.batch * problem.frames * (problem.tokens + 1) * problem.vocab_size
        assert logits <= command.LOGITS[1] and problem == command.draw(seed)
        _, (targets, enc_lens, target_lens), _ = command.make(problem, "fused") if seed < 5 else (0, (0, 0, 0), 0)
        if seed < 5:
            assert targets.shape[1] == target_lens.max() and enc_lens.max() == problem.frames
            assert problem.topology == "regular" or bool((target_lens <= enc_lens).all())


def kept_to(results: list[dict[str, Any]]) -> None:
    print("\n".join(command.row(r) for r in results))
    assert not [r for r in results if r["failures"]]


@pytest.mark.timeout(600)
def test_memory_of_a_problem() -> None:
    """The first small one, measured in processes of its own."""
    problems = map(command.draw, range(60))
    small = (p for p in problems if np.prod([getattr(p, n) for n in ("batch", "frames", "tokens")]) < 9e3)
    kept_to([command.measure(next(small))])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["pruned", "batched", "samplewise"])
def test_memory_of_other_methods(method: str) -> None:
    """At what they are estimated to take, at half of it and at the least."""
    for seed in range(3):
        problem = command.draw(seed)
        limit = parse_limit(command.child(problem, method, "1TiB")["plan"].rsplit(" ", 1)[1])
        for share in (1.0, 0.5, 0.0):
            tried = max(int(limit * share), command.smallest_limit(problem, method))
            assert command.child(problem, method, str(tried))["peak"] <= tried


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_memory_of_fifty_problems() -> None:
    kept_to([command.measure(command.draw(s)) for s in range(50)])
