"""The optional peers as lattice kernels, each against the reference; skipped where one cannot be imported.

`make test-torchaudio` runs those of torchaudio. "k2 by its formula" puts a slow k2 of its documented recursion in place
of the compiled one, so that what is handed to it and read from it is tested everywhere.
"""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import align, lattice_loss, occupancy, reference, rnnt_loss
from losses.backends import BACKENDS, load, numba_logits, torch_logits
from tests.losses.problems import MODIFIED, REGULAR, Problem, assert_close, make

MISSING = {
    "torchaudio": "torchaudio cannot be imported beside this torch; make test-torchaudio runs this test",
    "k2": f"k2 has no wheel for torch {torch.__version__}",
}
# Relative rounding of sums in float32: four units in the last place.
SINGLE = 4 * torch.finfo(torch.float32).eps


def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor, return_grad: bool
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """The documented recursion of k2 in float64; gradients of the summed scores by autograd. Refuses what k2 does."""
    batch, rows, _ = px.shape
    frames = py.shape[2]
    assert px.shape[2] in (frames, frames + 1) and py.shape == (batch, rows + 1, frames)
    assert px.dtype == py.dtype and px.is_contiguous() and py.is_contiguous()
    assert boundary.dtype == torch.int64 and boundary.shape == (batch, 4)
    step = 1 if px.shape[2] == frames else 0
    with torch.enable_grad():
        x, y = px.clone().requires_grad_(), py.clone().requires_grad_()
        scores = []
        for b, (s0, t0, s1, t1) in enumerate(boundary.tolist()):
            assert 0 == s0 <= s1 <= rows and 0 == t0 <= t1 <= frames
            p: dict[tuple[int, int], Tensor] = {(0, 0): torch.zeros((), dtype=px.dtype)}
            for t in range(t1 + 1):
                for s in range(s1 + 1):
                    into = []
                    if (s - 1, t - step) in p:
                        into.append(p[s - 1, t - step] + x[b, s - 1, t - step])
                    if (s, t - 1) in p:
                        into.append(p[s, t - 1] + y[b, s, t - 1])
                    into = [term for term in into if term != -torch.inf]
                    if into:
                        p[s, t] = torch.stack(into).logsumexp(0)
            scores.append(p.get((s1, t1), x.sum() * 0 - torch.inf if x.isfinite().all() else torch.tensor(-torch.inf)))
        total = torch.stack(scores).to(px.dtype)
    if not return_grad:
        return total.detach()
    if not total.requires_grad:
        return total.detach(), (torch.zeros_like(px), torch.zeros_like(py))
    gradients = torch.autograd.grad(total, (x, y), torch.ones_like(total), allow_unused=True)
    filled = [torch.zeros_like(z) if g is None else g for z, g in zip((px, py), gradients, strict=True)]
    return total.detach(), (filled[0], filled[1])


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> str:
    """k2 by its formula, where the real one is asked for."""
    module = types.ModuleType("k2")
    module.mutual_information_recursion = mutual_information_recursion  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "k2", module)
    return "k2"


@pytest.fixture
def torchaudio() -> str:
    return importable("torchaudio")


@pytest.fixture
def k2() -> str:
    return importable("k2")


def importable(name: str) -> str:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        pytest.skip(MISSING[name])
    return name


def occupancies(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss [B] and occupancies of blank and label by the reference, from log-probs of this dtype."""
    blank, label = (x.to(dtype).double().numpy() for x in problem.log_probs())
    losses, by_blank, by_label = np.zeros(len(blank)), np.zeros(blank.shape), np.zeros(label.shape)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        found = reference.lattice(blank[b, :t, : u + 1], label[b, :t, :u], problem.topology)
        losses[b], by_blank[b, :t, : u + 1], by_label[b, :t, :u] = found
    return losses, by_blank, by_label


def check_parity(backend: str, topology: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Loss, occupancies and gradients; the padding of the log-probs holds NaN.

    tolerance: of a loss, relative; of an occupancy, which is the exponential of sums as large as the loss, that times
    the largest loss.
    """
    problem = make(topology, name)
    losses, by_blank, by_label = occupancies(problem, dtype)
    of_loss, tolerance = tolerance, tolerance * max(1.0, float(np.abs(losses).max()))
    lens = problem.enc_lens, problem.target_lens
    blank, label = (x.to(dtype).requires_grad_() for x in problem.log_probs())
    loss = lattice_loss(blank, label, *lens, topology=topology, backend=backend)
    assert_close(loss, losses, of_loss)
    with torch.no_grad():
        assert_close(lattice_loss(blank, label, *lens, topology=topology, backend=backend), losses, of_loss)
    found = occupancy(blank, label, *lens, topology=topology, backend=backend)
    assert_close(found.blank, by_blank, tolerance)
    assert_close(found.label, by_label, tolerance)
    assert not found.blank[torch.from_numpy(by_blank == 0) & blank.isnan()].any()
    (loss * problem.upstream).sum().backward()
    weight = problem.upstream.numpy()[:, None, None]
    rounding = tolerance if dtype in (torch.float32, torch.float64) else 4e-3  # gradients in the dtype of the input
    assert_close(blank.grad, -weight * by_blank, rounding)
    assert_close(label.grad, -weight * by_label, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", REGULAR)
def test_torchaudio_equals_the_reference(torchaudio: str, name: str, dtype: torch.dtype) -> None:
    check_parity(torchaudio, "regular", name, dtype, SINGLE)


@pytest.mark.parametrize("which", ["formula", "k2"])
@pytest.mark.parametrize(
    ("topology", "name"), [("regular", name) for name in REGULAR] + [("modified", name) for name in MODIFIED]
)
def test_k2_equals_the_reference(request: pytest.FixtureRequest, which: str, topology: str, name: str) -> None:
    check_parity(request.getfixturevalue(which), topology, name, torch.float64, 1e-12)


@pytest.mark.parametrize("which", ["formula", "k2", "torchaudio"])
def test_without_an_alignment_the_loss_is_infinite_and_occupancies_are_nan(
    request: pytest.FixtureRequest, which: str
) -> None:
    backend = request.getfixturevalue(which)
    blank, label = torch.full((2, 3, 3), -1.0), torch.full((2, 3, 2), -1.0)
    label[0, :, 1] = -torch.inf
    lens = torch.tensor([3, 2]), torch.tensor([2, 1])
    loss = lattice_loss(blank, label, *lens, backend=backend)
    assert loss[0] == torch.inf and loss[1].isfinite()
    found = occupancy(blank, label, *lens, backend=backend)
    expected = occupancy(blank, label, *lens, backend="torch")
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.label[0].isnan().all()


@pytest.mark.parametrize("which", ["formula", "k2", "torchaudio"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_input_stays_in_its_utterance(request: pytest.FixtureRequest, which: str, bad: float) -> None:
    backend = request.getfixturevalue(which)
    blank, label = torch.full((3, 9, 5), -1.0), torch.full((3, 9, 4), -2.0)
    lens = torch.tensor([9, 9, 9]), torch.tensor([4, 4, 4])
    good = lattice_loss(blank, label, *lens, backend=backend)
    label[1, 4, 2] = bad
    loss = lattice_loss(blank, label, *lens, backend=backend)
    assert not loss[1].isfinite()
    assert torch.equal(loss[::2], good[::2])


@pytest.mark.parametrize("which", ["formula", "k2", "torchaudio"])
def test_empty_batch(request: pytest.FixtureRequest, which: str) -> None:
    backend, none = request.getfixturevalue(which), torch.zeros(0, dtype=torch.int64)
    blank = torch.zeros(0, 4, 3, requires_grad=True)
    loss = lattice_loss(blank, torch.zeros(0, 4, 2), none, none, backend=backend)
    loss.sum().backward()
    assert loss.shape == (0,) and blank.grad.shape == blank.shape


def test_extreme_log_probs_in_torchaudio(torchaudio: str) -> None:
    """Impossible labels among possible ones, of which torchaudio itself would make NaN."""
    blank, label = torch.zeros(1, 9, 4), torch.full((1, 9, 3), -200.0)
    label[0, ::2] = -torch.inf
    lens = torch.tensor([9]), torch.tensor([3])
    nll, _, occupied = reference.lattice(blank[0].double().numpy(), label[0].double().numpy())
    assert lattice_loss(blank, label, *lens, backend=torchaudio).item() == pytest.approx(nll, rel=SINGLE)
    assert_close(occupancy(blank, label, *lens, backend=torchaudio).label[0], occupied, SINGLE * nll)


def test_torchaudio_refuses_what_it_has_not(torchaudio: str) -> None:
    lens = torch.tensor([3]), torch.tensor([2])
    with pytest.raises(ValueError, match="topology 'regular' only.*use 'numba' or 'torch'"):
        lattice_loss(torch.zeros(1, 3, 3), torch.zeros(1, 3, 2), *lens, topology="modified", backend=torchaudio)
    double = torch.zeros(1, 3, 3).double(), torch.zeros(1, 3, 2).double()
    with pytest.raises(ValueError, match="float32, the log-probs are torch.float64; cast them, or use 'torch'"):
        lattice_loss(*double, *lens, backend=torchaudio)


@pytest.mark.parametrize("clamp", [-1.0, 0.05])
@pytest.mark.parametrize("fused", [True, False])
def test_rnnt_loss_equals_torchaudio(torchaudio: str, fused: bool, clamp: float) -> None:
    """The drop-in against what it replaces: loss and gradient by the logits."""
    functional = importlib.import_module("torchaudio.functional")
    problem = make("regular", "odd sizes", padding=0, lens=torch.int32)
    values = (
        problem.logits().nan_to_num(0.0).float().log_softmax(-1)
    )  # for both: log-softmax leaves log-probs as they are
    targets = torch.where(problem.targets < problem.weight.shape[0], problem.targets, 1)
    rest = targets, problem.enc_lens, problem.target_lens, problem.blank, clamp, "sum", fused
    found = []
    for loss in (rnnt_loss, functional.rnnt_loss):
        logits = values.clone().requires_grad_()
        value = loss(logits, *rest)
        value.backward()
        found.append((value, logits.grad))
    largest = float(rnnt_loss(values, targets, *rest[1:4], reduction="none", fused_log_softmax=fused).max())
    (own, by_own), (theirs, by_theirs) = found
    torch.testing.assert_close(own, theirs, rtol=SINGLE, atol=0)
    torch.testing.assert_close(by_own, by_theirs, rtol=0, atol=SINGLE * largest)


@pytest.mark.parametrize("which", ["formula", "k2", "torchaudio"])
def test_the_joiner_takes_the_default_kernels_and_the_lattice_the_peer(
    request: pytest.FixtureRequest, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = request.getfixturevalue(which)
    kernels = load("lattice", backend, torch.device("cpu"), torch.float32)
    calls = []
    own = kernels.forward_backward
    monkeypatch.setattr(kernels, "forward_backward", lambda *arguments: calls.append(backend) or own(*arguments))
    problem = make("regular", "ragged", dtype=torch.float32)
    found, expected = (align(*problem.arguments(), backend=b) for b in (backend, None))
    assert calls == [backend]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["torchaudio", "k2"])
def test_a_missing_peer_is_an_error_that_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    lens = torch.tensor([3]), torch.tensor([2])
    with pytest.raises(ImportError, match=f"backend '{name}' needs {name}.*install the.*built for this torch"):
        lattice_loss(torch.zeros(1, 3, 3), torch.zeros(1, 3, 2), *lens, backend=name)
    with pytest.raises(ImportError, match=f"backend '{name}' needs {name}"):
        load("logits", name, torch.device("cpu"), torch.float32)


def test_other_kinds_of_kernels_are_the_default_ones(formula: str) -> None:
    assert set(BACKENDS["k2"]) == set(BACKENDS["torchaudio"]) == {"lattice"}
    assert load("logits", formula, torch.device("cpu"), torch.float32) is numba_logits
    assert load("logits", formula, torch.device("cpu"), torch.float16) is torch_logits
