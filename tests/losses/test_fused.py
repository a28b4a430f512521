"""Packing, caching, leaving out rare cells, and the torch tiles of the fused loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losses import TransducerLossOptions, transducer_loss
from losses.backends import numba_packed, torch_packed
from losses.cells import OCCUPANCY_THRESHOLD, groups
from losses.fused import fused_loss
from losses.joint import Joint, Settings
from losses.shapes import Lengths, check_inputs
from losses.sizes import ROWS
from tests.losses.problems import CASES, OWN_BACKENDS, Problem, assert_close, cells_by_enumeration, make

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("room", [1, 12, 1000])
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_cells_are_those_that_an_alignment_passes(topology: str, room: int) -> None:
    lengths = Lengths([4, 2, 3, 1], [2, 2, 0, 1])
    found = []
    for group in groups(lengths, 5, 4, topology, room, 2 * room, torch.device("cpu")):
        count = len(group.rows)
        assert count <= room or len(group.utterances) == 1
        assert group.likely == min(count, 2 * room)
        for at, row, column in zip(group.at.tolist(), group.rows.tolist(), group.columns.tolist(), strict=True):
            b = group.utterances[at // (group.shape[1] * group.shape[2])]
            t, u = at // group.shape[2] % group.shape[1], at % group.shape[2]
            assert (row, column) == (b * 5 + t, b * 4 + u)
            found.append((b, t, u))
    expected = {
        (b, t, u)
        for b, (frames, tokens) in enumerate(zip(*lengths, strict=True))
        for t, u in cells_by_enumeration(frames, tokens, topology)
    }
    assert len(found) == len(expected) and set(found) == expected


def loss_and_gradients(problem: Problem, backend: str | None, shared: bool, **options) -> list[torch.Tensor]:
    """Of the fused loss, with an upstream gradient of 3 if it is shared."""
    lengths, blank = check_inputs(*problem.arguments(), topology=problem.topology, blank=problem.blank)
    loss = fused_loss(
        *problem.parameters, problem.targets, lengths, activation="tanh", topology=problem.topology, blank=blank,
        options=TransducerLossOptions(backend=backend, **options), shared_upstream=shared,
    ).loss  # fmt: skip
    weights = torch.full_like(problem.upstream, 3.0) if shared else problem.upstream
    return [loss, *torch.autograd.grad(loss, problem.parameters, weights.to(loss.dtype))]


@pytest.mark.parametrize("cache", [0, 700, 2**20])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", OWN_BACKENDS)
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_tiles_chunks_and_caches_of_any_size(
    topology: str, name: str, backend: str, shared: bool, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the reference, whatever is cut where."""
    for module in (numba_packed, torch_packed):
        monkeypatch.setattr(module, "TILE", 300)
        monkeypatch.setattr(module, "CHUNK", 800)
        monkeypatch.setattr(module, "GROUP", cache)
        monkeypatch.setattr(module, "CACHE", cache)
        monkeypatch.setattr(module, "CACHE_OF_ONE", cache)
        monkeypatch.setattr(module, "LEAST_TILE", dict.fromkeys((2, 4, 8), 2))
    problem = make(topology, name)
    if shared:
        problem.upstream = torch.full_like(problem.upstream, 3.0)
    loss, *gradients = loss_and_gradients(problem, backend, shared)
    expected = problem.expected()
    assert_close(loss, expected.nll)
    for found, wanted in zip(gradients, expected[1:], strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", OWN_BACKENDS)
def test_bfloat16_gradients_without_rare_cells(topology: str, activation: str, reduction: str, backend: str) -> None:
    """Sharp models, most of whose cells fall under the threshold, against float64, which leaves none out.

    Eight problems, since the rounding of a few cells decides about the error of a single one.
    """
    assert OCCUPANCY_THRESHOLD[torch.float64] == 0
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        batch, frames, tokens, dim, vocab_size = 2, 30, 12, 16, 40
        enc, pred = torch.randn(batch, frames, dim), torch.randn(batch, tokens + 1, dim)
        weight, bias = torch.randn(vocab_size, dim), torch.randn(vocab_size)
        sources = [x.bfloat16() for x in (enc, pred, weight, bias)]
        targets = torch.randint(1, vocab_size, (batch, tokens))
        lens = torch.tensor([30, 25]), torch.tensor([12, 7])
        gradients = []
        for dtype in (torch.float64, torch.bfloat16):
            inputs = [x.to(dtype).requires_grad_() for x in sources]
            transducer_loss(
                *inputs, targets, *lens, method="fused", activation=activation, topology=topology,
                reduction=reduction, options=TransducerLossOptions(backend=backend),
            ).loss.sum().backward()  # fmt: skip
            gradients.append([x.grad.double() for x in inputs])
        errors.append(
            max(float((found - exact).norm() / exact.norm()) for exact, found in zip(*gradients, strict=True))
        )
    assert sum(errors) / len(errors) < 0.014


def test_half_precision_sums_logits_that_are_not_rounded() -> None:
    """Log-probs of blank and label in bfloat16 are as in float32 but for the normaliser, where rounding averages out:
    hence the loss of 400 frames is right to a few parts in a million, where rounded logits are off by 1e-3."""
    torch.manual_seed(0)
    frames, tokens, dim, vocab_size = 400, 60, 256, 500
    enc, pred = 0.5 * torch.randn(1, frames, dim), 0.5 * torch.randn(1, tokens + 1, dim)
    weight = torch.randn(vocab_size, dim) / dim**0.5
    weight[0] *= 8  # blank's logits are large, as those of trained models
    targets = torch.randint(1, vocab_size, (1, tokens))
    arguments = enc, pred, weight, None, targets, torch.tensor([frames]), torch.tensor([tokens])
    exact = transducer_loss(*(x.double() if x is not None and x.is_floating_point() else x for x in arguments)).loss
    for backend in OWN_BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            found = transducer_loss(*arguments, options=TransducerLossOptions(backend=backend)).loss
        assert abs(found / exact - 1) < 1e-5


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_estimates_choose_the_cells(scale: float, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with a threshold, cells chosen by products in bfloat16: what is kept is as without estimates, and so are
    gradients; logits of a large scale make estimates that are off, which is noticed."""
    torch.manual_seed(0)
    sizes = (3, 60, 32), (3, 21, 32), (90, 32)
    sources = [0.7 * torch.randn(s) for s in sizes]
    sources[2] *= scale
    targets, lens = torch.randint(1, 90, (3, 20)), (torch.tensor([60, 41, 50]), torch.tensor([20, 20, 3]))
    found = {}
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(numba_packed, "estimates", lambda _, dtype=dtype: dtype)
        inputs = [x.clone().requires_grad_() for x in sources]
        options = TransducerLossOptions(occupancy_threshold=1e-6)
        output = transducer_loss(*inputs, None, targets, *lens, reduction=reduction, options=options)
        output.loss.sum().backward()
        found[dtype] = (
            [output.loss.detach(), *(x.grad for x in inputs)],
            output.info["kept_cells"],
            output.info["cells"],
        )
    (without, kept, cells), (estimated, kept_then, _) = found.values()
    assert kept < 0.8 * cells and abs(kept - kept_then) <= 0.002 * kept
    for x, y in zip(without, estimated, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5 * float(x.abs().max()))


def test_estimates_that_are_wrong_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of another model: all cells are computed, and the result is that without estimates."""
    torch.manual_seed(0)
    problem = make("regular", "odd sizes", dtype=torch.float32, vocab=30, dim=16)
    real, results = numba_packed.scores, []
    monkeypatch.setattr(numba_packed, "scores", lambda enc, *others: real(-4 * enc, *others))
    for estimates in (None, torch.bfloat16):
        monkeypatch.setattr(numba_packed, "estimates", lambda _, dtype=estimates: dtype)
        results.append(loss_and_gradients(problem, None, True, occupancy_threshold=1e-6))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * float(x.detach().abs().max()))


def test_estimates_off_along_a_whole_alignment_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A competitor of 32.126 is 32.25 in bfloat16: after an emission in the first frame, 400 frames look less likely by
    0.12 nats each than they are, and no cell that the estimates choose tells."""
    monkeypatch.setattr(numba_packed, "estimates", lambda _: torch.bfloat16)
    frames = 400
    enc, pred, weight = torch.zeros(1, frames, 4), torch.zeros(1, 2, 4), torch.zeros(3, 4)
    enc[0, :, 0] = pred[0, 1, 1] = enc[0, 0, 2] = enc[0, -1, 3] = 1
    weight[[0, 2], 0], weight[2, 1] = 32, 0.126
    weight[1] = torch.tensor([-40, 0, 68, 42.1])  # emitted in the first or in the last frame, about equally likely
    found = []
    for threshold in (0.0, 1e-6):
        inputs = [x.clone().requires_grad_() for x in (enc, pred, weight)]
        output = transducer_loss(
            *inputs, None, torch.tensor([[1]]), torch.tensor([frames]), torch.tensor([1]), activation="relu",
            options=TransducerLossOptions(occupancy_threshold=threshold),
        )  # fmt: skip
        output.loss.backward()
        found.append([output.loss.detach(), *(x.grad for x in inputs)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("threshold", [1e-8, 1e-6, 1e-4, 1e-2])
def test_error_of_a_threshold(threshold: float) -> None:
    """Each cell left out costs at most its occupancy: in float64 the error stays below cells times threshold."""
    problem = make("regular", "odd sizes", vocab=30, dim=16)
    exact = loss_and_gradients(problem, None, True)
    found = loss_and_gradients(problem, None, True, occupancy_threshold=threshold)
    assert torch.equal(found[0], exact[0])
    cells = 63 * 12 + 40 * 8
    for x, y, size in zip(found[1:], exact[1:], (30, 30, 1, 1), strict=True):
        # |gradient by the logits of a cell| <= 2 * occupancy; by the hidden states: times the weight's size
        assert 0 < (x - y).abs().max() <= 3.0 * 2 * threshold * cells * size


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2), (torch.float16, 6e-3)])
def test_torch_tiles_in_other_dtypes(dtype: torch.dtype, tolerance: float, shared: bool) -> None:
    problem = make("regular", "odd sizes", dtype=dtype)
    if shared:
        problem.upstream = torch.full_like(problem.upstream, 3.0)
    expected = problem.expected()
    loss, *gradients = loss_and_gradients(problem, "torch", shared)
    assert_close(loss, expected.nll, tolerance)
    for found, wanted in zip(gradients, expected[1:], strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, tolerance)


def test_threads_do_not_change_the_result() -> None:
    problem = make("regular", "odd sizes", dtype=torch.float32, vocab=200, dim=130)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (2, 2, 2):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(problem, None, True))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_bfloat16_where_the_processor_has_no_instructions_for_it() -> None:
    script = """
import torch
from losses import transducer_loss
torch.manual_seed(0)
inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((1, 9, 8), (1, 4, 8), (5, 8))]
loss = transducer_loss(*inputs, None, torch.tensor([[1, 2, 3]]), torch.tensor([9]), torch.tensor([3])).loss
loss.backward()
assert all(x.grad.isfinite().all() for x in inputs)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=True, timeout=120)


def test_products_come_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN compiles code for each and keeps it."""
    rows = set()
    real = numba_packed.linear
    monkeypatch.setattr(numba_packed, "linear", lambda x, *others: (rows.add(len(x)), real(x, *others))[1])
    for frames in range(20, 40):
        enc, pred, weight = (
            torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((2, frames, 8), (2, 11, 8), (5, 8))
        )
        lens = torch.tensor([frames, frames - 7]), torch.tensor([10, 4])
        transducer_loss(enc, pred, weight, None, torch.ones(2, 10, dtype=torch.int64), *lens).loss.backward()
    assert all(n % ROWS == 0 for n in rows) and len(rows) <= 10


def test_no_cache_where_it_would_hold_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, expected in ((2, 0), (80, 128)):
        monkeypatch.setattr(numba_packed, "CACHE_OF_ONE", size * 1024)
        monkeypatch.setattr(numba_packed, "LEAST_TILE", dict.fromkeys((2, 4, 8), 2))
        problem = make("regular", "odd sizes", dtype=torch.float32, vocab=160, dim=6)
        lengths, blank = check_inputs(*problem.arguments(), topology="regular", blank=0)
        settings = Settings(lengths, "tanh", "regular", blank, TransducerLossOptions(), True)
        joint = Joint(*problem.parameters, problem.targets, torch.float32, settings)
        assert joint.room == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["batched", "samplewise", "fused", "pruned"])
def test_the_weights_memory_can_be_given_back(method: str, dtype: torch.dtype) -> None:
    """Sharded training gathers a weight, and frees its storage by resizing it, which numpy's views would forbid."""
    enc, pred = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((5, 8), (5,)))
    simple = (torch.randn(2, 6, 5), torch.randn(2, 4, 5)) if method == "pruned" else None
    targets, lens = torch.tensor([[1, 2, 3], [4, 1, 2]]), torch.tensor([6, 5])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = transducer_loss(
            enc, pred, weight, bias, targets, lens, torch.tensor([3, 2]), method=method, simple=simple
        )
    found.loss.backward()
    for x in (weight, bias):
        x.untyped_storage().resize_(0)
