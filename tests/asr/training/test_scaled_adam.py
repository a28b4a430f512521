"""ScaledAdam's steps against its equations in plain float64 loops, its state, and runs with it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asr.errors import CheckpointError
from asr.training.scaled_adam import ScaledAdam, ScaledAdamConfig
from asr.training.trainer import TrainData
from tests.asr.training.runs import differences, run, state_of
from tests.asr.training.test_interruption import after_step

BETA1, BETA2, EPS, LR = 0.9, 0.98, 1e-8, 0.045
RUN = ["optim={name: scaled_adam, lr: 0.045, schedule: eden, warmup_steps: 3}", "data.max_duration_s=1.3"]
LIMITS = {
    "the paper's": ScaledAdamConfig(),
    "slow scales": ScaledAdamConfig(max_growth=1e-3),
    "narrow": ScaledAdamConfig(min_rms=0.3, max_rms=0.6, eta=0.5),
    "no scales": ScaledAdamConfig(eta=0.0),
}


@dataclass
class Reference:
    """One tensor as a list of numbers, and the equations as they are printed."""

    theta: list[float]
    config: ScaledAdamConfig
    t: int = 0
    n: float = 0.0
    w: float = 0.0
    m: list[float] = field(default_factory=list)
    v: list[float] = field(default_factory=list)
    limited: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.m, self.v = [0.0] * len(self.theta), [0.0] * len(self.theta)

    def step(self, g: list[float], alpha: float) -> None:
        self.t += 1
        count, before = len(g), list(self.theta)
        c = math.sqrt(1 - BETA2**self.t) / (1 - BETA1**self.t)
        rms = math.sqrt(sum(x * x for x in before) / count)
        r = max(rms, self.config.min_rms)
        h = sum(g[i] * before[i] for i in range(count))
        self.n = BETA1 * self.n + (1 - BETA1) * h
        self.w = BETA2 * self.w + (1 - BETA2) * h * h
        growth = self._limited(-self.config.eta * alpha * c * self.n / (math.sqrt(self.w) + EPS), rms)
        if count == 1:  # plain Adam
            r, growth = self.config.scalar_lr, 0.0
        for i in range(count):
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * g[i]
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * g[i] * g[i]
            delta = -alpha * r * c * self.m[i] / (math.sqrt(self.v[i]) + EPS)
            self.theta[i] = before[i] + delta + growth * before[i]

    def _limited(self, growth: float, rms: float) -> float:
        config = self.config
        if rms < config.min_rms and growth < 0:
            self.limited.add("min_rms")
            growth = 0.0
        if rms and rms * (1 + growth) > config.max_rms:
            self.limited.add("max_rms")
            growth = config.max_rms / rms - 1
        if abs(growth) > config.max_growth:
            self.limited.add("max_growth")
            growth = math.copysign(config.max_growth, growth)
        return growth


def made(seed: int = 0) -> list[Tensor]:
    """Tensors of several scales: of ordinary ones, zeros, too large, and of one number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {(7, 5): 0.5, (3, 2, 4): 0.02, (6,): 0.0, (4, 3): 4.0, (): 1.0, (1,): 0.1}
    return [torch.nn.Parameter(scale * torch.randn(shape, generator=generator)) for shape, scale in shapes.items()]


def gradients_of(params: list[Tensor], step: int) -> list[Tensor]:
    """Noise, and a pull on the scale that turns round after some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    pull = -0.5 if step < 20 else 2.0
    return [torch.randn(p.shape, generator=generator) + pull * p.detach() for p in params]


def take_steps(optimizer: ScaledAdam, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        for p, g in zip(params, gradients_of(params, step), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("name", LIMITS)
def test_steps_are_those_of_the_equations(name: str) -> None:
    params, config = made(), LIMITS[name]
    references = [Reference(p.detach().double().flatten().tolist(), config) for p in params]
    optimizer = ScaledAdam(params, lr=LR, betas=(BETA1, BETA2), eps=EPS, config=config)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = alpha = LR / (1 + step / 20)
        for reference, p, g in zip(references, params, gradients_of(params, step), strict=True):
            p.grad = None if step == 5 and p.dim() == 3 else g  # a part of the model without a gradient
            if p.grad is not None:
                reference.step(g.double().flatten().tolist(), alpha)
        optimizer.step()
    for reference, p in zip(references, params, strict=True):
        expected = torch.tensor(reference.theta, dtype=torch.float64).view(p.shape)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)
    met = {"the paper's": {"max_rms", "min_rms"}, "slow scales": {"max_growth"}, "narrow": {"max_rms", "min_rms"}}
    assert met.get(name, set()) <= {limit for reference in references for limit in reference.limited}


def test_a_step_is_in_proportion_to_the_scale() -> None:
    small, large = made()[0], torch.nn.Parameter(100 * made()[0].detach())
    before = [p.detach().clone() for p in (small, large)]
    optimizer = ScaledAdam([small, large], lr=LR, eps=1e-16, config=ScaledAdamConfig(max_rms=1e3))
    for p in (small, large):
        p.grad = gradients_of([before[0]], 0)[0]
    optimizer.step()
    moved = [p.detach() - b for p, b in zip((small, large), before, strict=True)]
    torch.testing.assert_close(moved[1], 100 * moved[0], rtol=1e-4, atol=1e-5)
    assert float(moved[0].norm() / before[0].norm()) == pytest.approx(LR, rel=0.1)


def test_scalars_have_the_steps_of_adam() -> None:
    scalars = [p for p in made() if p.numel() == 1]
    others = [torch.nn.Parameter(p.detach().clone()) for p in scalars]
    optimizer = ScaledAdam(scalars, lr=LR, config=ScaledAdamConfig(scalar_lr=0.2))
    adam = torch.optim.Adam(others, lr=0.2 * LR, betas=(0.9, 0.98), eps=1e-9)
    for step in range(10):
        for ours, theirs, g in zip(scalars, others, gradients_of(scalars, step), strict=True):
            ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        adam.step()
    for ours, theirs in zip(scalars, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_its_state_goes_round() -> None:
    """Another optimizer goes on from it to the bit."""
    params, others = made(), made(1)
    optimizer = ScaledAdam(params, lr=LR)
    take_steps(optimizer, params, 0, 5)
    other = ScaledAdam(others, lr=LR)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    take_steps(optimizer, params, 5, 10)
    take_steps(other, others, 5, 10)
    assert differences(list(map(Tensor.detach, params)), list(map(Tensor.detach, others))) == []
    assert differences(optimizer.state_dict(), other.state_dict()) == []


@pytest.mark.parametrize(
    ("key", "value"), [("eta", -1.0), ("min_rms", 0.0), ("min_rms", 4.0), ("max_rms", math.nan), ("max_growth", 1.0)]
)
def test_values_out_of_range_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optim.scaled_adam.{key}={value}"):
        ScaledAdamConfig(**{key: value})


def test_runs_go_on_to_the_bit_also_with_moments_in_a_file(
    data: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the midst of the first epoch and of the second, with another place of the moments after each."""
    settings = [*RUN, "model.ctc=true", "optim.lr_scales={encoder: 0.5}"]
    run(data, tmp_path / "whole", *settings)
    expected = state_of(tmp_path / "whole")
    steps = expected["step"]
    with monkeypatch.context() as patches:
        after_step(3, steps // 2 + 2)(patches)
        for place in ("none", "file"):
            assert run(data, tmp_path / "parts", *settings, f"memory.offload={place}").reason == "terminated"
    assert run(data, tmp_path / "parts", *settings).reason == "finished"
    state = state_of(tmp_path / "parts")
    assert state["step"] == steps >= 10
    for part in ("model", "training"):
        assert differences(expected[part], state[part]) == [], part
    entry = state["training"]["optimizer"]["joiner.out.weight"]
    assert entry.keys() == {"step", "exp_avg", "exp_avg_sq", "scale_exp_avg", "scale_exp_avg_sq"}
    assert float(entry["scale_exp_avg_sq"]) > 0


def test_another_optimizers_state_is_refused(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, *RUN, "training.max_steps=1")
    with pytest.raises(CheckpointError, match="state of optim.name=scaled_adam, and this run's is adamw; go on with"):
        run(data, tmp_path, *RUN, "training.max_steps=2", "optim.name=adamw")
