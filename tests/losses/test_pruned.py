"""The pruned loss: simple loss, bounds, and the lattice within the bounds, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losses import TransducerLossOptions, reference, transducer_loss
from losses.shapes import Lengths
from losses.simple import check_prune_range, largest_jump, prune_bounds, simple_loss
from tests.losses.problems import CASES, NAMES, OWN_BACKENDS, assert_close, make

SCALES = [(0.0, 0.0), (0.25, 0.0), (0.1, 0.2)]


def simple_inputs(problem, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """am and lm with NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for like, lens in ((problem.enc, problem.enc_lens), (problem.pred, problem.target_lens + 1)):
        x = torch.randn(*like.shape[:2], problem.weight.shape[0], generator=generator, dtype=torch.float64).to(dtype)
        for b, n in enumerate(lens.tolist()):
            x[b, n:] = torch.nan
        found.append(x.requires_grad_())
    return found[0], found[1]


def expected_simple(problem, am, lm, **scales) -> np.ndarray:
    """-log P of each utterance by loops."""
    found = []
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        blank, label = reference.simple_log_probs(
            am[b, :t].detach().double().numpy(), lm[b, : u + 1].detach().double().numpy(),
            problem.targets[b, :u].tolist(), blank=problem.blank, **scales,
        )  # fmt: skip
        found.append(reference.lattice(blank, label, problem.topology)[0])
    return np.array(found)


def run(problem, am, lm, **options):
    return transducer_loss(
        *problem.arguments(), method="pruned", topology=problem.topology, blank=problem.blank, reduction="none",
        simple=(am, lm), options=TransducerLossOptions(**options),
    )  # fmt: skip


@pytest.mark.parametrize(("topology", "name"), CASES)
@pytest.mark.parametrize(("lm_only_scale", "am_only_scale"), SCALES)
def test_simple_loss_and_its_gradients(topology: str, name: str, lm_only_scale: float, am_only_scale: float) -> None:
    problem = make(topology, name, blank=4)
    am, lm = simple_inputs(problem)
    scales = {"lm_only_scale": lm_only_scale, "am_only_scale": am_only_scale}
    loss = run(problem, am, lm, prune_range=problem.pred.shape[1] + 2, **scales).simple_loss
    assert_close(loss, expected_simple(problem, am, lm, **scales))
    (loss * problem.upstream).sum().backward()
    rng, step = np.random.default_rng(0), 1e-5
    for x in (am, lm):
        assert not x.grad[x.isnan()].any()
        inside = np.argwhere(~x.detach().isnan().numpy())
        for index in map(tuple, inside[rng.choice(len(inside), 12)]):
            with torch.no_grad():
                kept = x[index].item()
                values = []
                for value in (kept + step, kept - step):
                    x[index] = value
                    values.append(float(problem.upstream.numpy() @ expected_simple(problem, am, lm, **scales)))
                x[index] = kept
            assert float(x.grad[index]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("backend", [None, *OWN_BACKENDS])
@pytest.mark.parametrize("prune_range", [2, 3, 5, 100])
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_loss_within_the_bounds(topology: str, name: str, prune_range: int, backend: str | None) -> None:
    problem = make(topology, name)
    lengths = Lengths(problem.enc_lens.tolist(), problem.target_lens.tolist())
    try:
        check_prune_range(lengths, prune_range, topology)
    except ValueError:
        with pytest.raises(ValueError, match="cannot reach the last of"):
            run(problem, *simple_inputs(problem), prune_range=prune_range)
        return
    found = run(problem, *simple_inputs(problem), prune_range=prune_range, backend=backend)
    bounds = found.info["bounds"].numpy()
    expected = problem.expected(bounds=bounds, prune_range=prune_range)
    assert np.isfinite(expected.nll).all()
    assert_close(found.loss, expected.nll)
    (found.loss * problem.upstream).sum().backward()
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert_close(tensor.grad, gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("topology", list(NAMES))
def test_other_dtypes_and_one_upstream_gradient(topology: str, dtype: torch.dtype, tolerance: float) -> None:
    problem = make(topology, "odd sizes", dtype=dtype)
    problem.upstream = torch.ones_like(problem.upstream)
    am, lm = simple_inputs(problem, dtype)
    found = transducer_loss(
        *problem.arguments(), method="pruned", topology=topology, reduction="sum", simple=(am, lm),
        options=TransducerLossOptions(prune_range=4),
    )  # fmt: skip
    expected = problem.expected(bounds=found.info["bounds"].numpy(), prune_range=4)
    assert_close(found.loss, expected.nll.sum(), tolerance)
    assert_close(found.simple_loss, expected_simple(problem, am, lm, lm_only_scale=0.25).sum(), max(tolerance, 5e-6))
    (found.loss + found.simple_loss).backward()
    for tensor, gradient in zip(problem.parameters, expected[1:], strict=True):
        assert tensor.grad.dtype == dtype
        assert_close(tensor.grad, gradient, tolerance)
    assert am.grad.dtype == lm.grad.dtype == dtype


@pytest.mark.parametrize("topology", list(NAMES))
def test_bounds_keep_their_promises(topology: str) -> None:
    """Start at 0, never fall, never rise too fast, end with the last token; else the range of most occupancy."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        batch, frames, columns = (int(torch.randint(1, n, (), generator=generator)) for n in (4, 25, 15))
        enc_lens = torch.randint(1, frames + 1, (batch,), generator=generator)
        most = columns - 1 if topology == "regular" else frames
        target_lens = torch.randint(0, columns, (batch,), generator=generator).clamp(max=most)
        if topology != "regular":
            target_lens = torch.minimum(target_lens, enc_lens)
        lengths = Lengths(enc_lens.tolist(), target_lens.tolist())
        size = int(torch.randint(2, 7, (), generator=generator))
        try:
            check_prune_range(lengths, size, topology)
        except ValueError:
            assert topology == "regular"
            continue
        occupancy = torch.rand(batch, frames, columns, generator=generator)
        first = prune_bounds(occupancy, occupancy[:, :, 1:] * 0, lengths, size, topology)
        assert first.shape == (batch, frames) and first.dtype == torch.int64
        for b, (t, u) in enumerate(zip(*lengths, strict=True)):
            own = first[b, :t]
            rise = own.diff()
            assert own[0] == 0 and own[-1] == max(0, u + 1 - size)
            assert (rise >= 0).all() and (rise <= largest_jump(size, topology)).all()


def test_bounds_follow_the_occupancy() -> None:
    occupancy = torch.zeros(1, 6, 9)
    path = [1, 1, 2, 4, 6, 7]
    for t, u in enumerate(path):
        occupancy[0, t, u - 1 : u + 2] = torch.tensor([0.2, 0.6, 0.2])
    first = prune_bounds(occupancy, torch.zeros(1, 6, 8), Lengths([6], [8]), 3, "regular")
    assert first.tolist() == [[0, 0, 1, 3, 5, 6]]


def test_a_far_normaliser_does_not_underflow() -> None:
    """Predictor and encoder that agree on nothing: their product of probabilities is 0 in float32."""
    am, lm = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    am[..., 1], lm[..., 2] = 300.0, 300.0
    am.requires_grad_(), lm.requires_grad_()
    targets, lengths = torch.tensor([[3]]), Lengths([3], [1])
    losses = []
    for dtype in (torch.float32, torch.float64):
        loss = simple_loss(
            am.to(dtype), lm.to(dtype), targets, lengths, topology="regular", blank=0,
            options=TransducerLossOptions(lm_only_scale=0.0),
        ).loss  # fmt: skip
        losses.append([loss.double(), *torch.autograd.grad(loss.sum(), (am, lm))])
    logits = am.detach().double()[0, :, None] + lm.detach().double()[0]
    log_probs = logits.log_softmax(-1).numpy()
    exact = reference.lattice(log_probs[:, :, 0], log_probs[:, :1, 3])[0]
    for found in losses:
        assert float(found[0].detach()) == pytest.approx(exact, rel=1e-6)
    for x, y in zip(*losses, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", SCALES)
def test_autocast_leaves_the_simple_loss_alone(scales: tuple[float, float]) -> None:
    """Its gradient sums to zero over the tokens, so that no step is taken in a direction that changes nothing."""
    problem = make("regular", "odd sizes", dtype=torch.float32, vocab=40)
    am, lm = simple_inputs(problem, torch.float32)
    lengths = Lengths(problem.enc_lens.tolist(), problem.target_lens.tolist())
    options = TransducerLossOptions(lm_only_scale=scales[0], am_only_scale=scales[1])
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = simple_loss(am, lm, problem.targets, lengths, topology="regular", blank=0, options=options).loss
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), (am, lm))])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
    for gradient in found[1][1:]:
        assert gradient.sum(2).abs().max() < 1e-5 * gradient.abs().max()


def test_an_utterance_does_not_depend_on_the_others() -> None:
    problem = make("regular", "ragged")
    am, lm = simple_inputs(problem)
    together = run(problem, am, lm, prune_range=5, am_only_scale=0.2)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        alone = transducer_loss(
            problem.enc[b : b + 1, :t], problem.pred[b : b + 1, : u + 1], problem.weight, problem.bias,
            problem.targets[b : b + 1, :u], problem.enc_lens[b : b + 1], problem.target_lens[b : b + 1],
            method="pruned", simple=(am[b : b + 1, :t], lm[b : b + 1, : u + 1]), reduction="none",
            options=TransducerLossOptions(prune_range=5, am_only_scale=0.2),
        )  # fmt: skip
        assert float(alone.loss.detach()) == pytest.approx(float(together.loss[b].detach()), abs=1e-12)
        assert float(alone.simple_loss.detach()) == pytest.approx(float(together.simple_loss[b].detach()), abs=1e-12)
