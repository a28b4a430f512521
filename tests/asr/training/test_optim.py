"""Schedules against their equations, weight decay by kind of parameter, and the moving average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from asr.models.transducer import build_model
from asr.training.optim import OptimConfig, WeightAverage, learning_rate, make_optimizer
from tests.asr.training.runs import experiment


@pytest.mark.parametrize("schedule", ["cosine", "noam", "constant"])
def test_the_rise_is_linear_and_does_not_start_at_zero(schedule: str) -> None:
    config = OptimConfig(lr=0.4, warmup_steps=8, schedule=schedule)  # type: ignore[arg-type]
    for step in range(8):
        assert learning_rate(config, step, 0.0) == pytest.approx(0.4 * (step + 1) / 8)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_cosine(progress: float) -> None:
    config = OptimConfig(lr=3e-3, warmup_steps=10, final_lr_ratio=0.1)
    low, high = 3e-4, 3e-3
    expected = low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
    assert learning_rate(config, 500, progress) == pytest.approx(expected)
    assert learning_rate(config, 4, progress) == pytest.approx(expected / 2)


def test_cosine_ends_at_the_final_rate_and_stays_there() -> None:
    config = OptimConfig(lr=2e-3, warmup_steps=0, final_lr_ratio=0.02)
    assert learning_rate(config, 0, 0.0) == pytest.approx(2e-3)
    assert learning_rate(config, 10_000, 1.0) == pytest.approx(4e-5)
    assert learning_rate(config, 10_000, 1.3) == pytest.approx(4e-5)


def test_noam_is_vaswani_equation_3_with_its_peak_at_lr() -> None:
    warmup, dim = 50, 256
    config = OptimConfig(lr=1e-3, warmup_steps=warmup, schedule="noam")

    def equation_3(n: int) -> float:
        return dim**-0.5 * min(n**-0.5, n * warmup**-1.5)

    scale = 1e-3 / equation_3(warmup)
    rates = [learning_rate(config, step, 0.0) for step in range(1000)]
    assert rates == pytest.approx([scale * equation_3(step + 1) for step in range(1000)])
    assert max(range(1000), key=rates.__getitem__) == warmup - 1
    assert rates[warmup - 1] == pytest.approx(1e-3)


def test_noam_without_rise_starts_at_lr() -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=0, schedule="noam")
    assert learning_rate(config, 0, 0.0) == pytest.approx(1e-3)
    assert learning_rate(config, 99, 0.0) == pytest.approx(1e-4)


def test_constant() -> None:
    config = OptimConfig(lr=5e-3, warmup_steps=2, schedule="constant")
    assert [learning_rate(config, step, 1.0) for step in (2, 77)] == [5e-3, 5e-3]


BAD = [{"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"warmup_steps": -1}, {"betas": [0.9]}, {"betas": [0.9, 1.0]},
       {"clip_grad_norm": -1.0}, {"clip_grad_norm": math.nan}, {"weight_decay": -0.1}, {"eps": 0.0},
       {"final_lr_ratio": 1.1}, {"final_lr_ratio": -0.1}]  # fmt: skip


@pytest.mark.parametrize("values", BAD, ids=str)
def test_values_out_of_range_are_refused_by_name(values: dict) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(values))}="):
        OptimConfig(**values)


@pytest.mark.parametrize(("predictor", "method"), [("stateless", "fused"), ("lstm", "fused"), ("stateless", "pruned")])
def test_only_matrices_decay(predictor: str, method: str) -> None:
    config = experiment(f"model.predictor.kind={predictor}", "model.ctc=true", f"loss.method={method}")
    model = build_model(config, 7)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3, betas=[0.8, 0.95], eps=1e-7))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert ("joiner.simple.am.weight" in decay) == (method == "pruned")
    plain = {name for name, value in decay.items() if value == 0.0}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    biases = {name for name in decay if ".bias" in name}
    assert len(norms) >= 4 and len(biases) >= 10
    assert plain == norms | biases | {"predictor.embedding.weight"}
    assert {value for name, value in decay.items() if name not in plain} == {0.3}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.95), 1e-7)}


def test_a_step_is_adamw_with_decoupled_decay() -> None:
    """One step from zero moments moves each weight by lr against the sign, after a decay of lr * weight_decay."""
    model = nn.Linear(3, 2)
    config = OptimConfig(lr=0.01, weight_decay=0.5, eps=1e-12)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    make_optimizer(model, config).step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.01 * 0.5) + 0.01)
    torch.testing.assert_close(model.bias.detach(), before["bias"] + 0.01)


def test_the_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.register_buffer("count", torch.tensor(0))
    average = WeightAverage(model, 0.6)
    expected = model.weight.detach().double().clone()
    decays = []
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 4))
        average.update(model, step)
        decays.append(min(0.6, (1 + step) / (10 + step)))
        expected = decays[-1] * expected + (1 - decays[-1]) * model.weight.detach().double()
    assert decays[0] == 0.1 and decays[-1] == 0.6 and len(set(decays)) > 10
    torch.testing.assert_close(average.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert average.weights["weight"].data_ptr() != model.weight.data_ptr()
    assert average.weights["count"] == 0

    other = WeightAverage(model, 0.6)
    other.load(average.weights)
    average.update(model, 30)
    assert not torch.equal(other.weights["weight"], average.weights["weight"]), "the loaded weights are shared"
    other.update(model, 30)
    assert torch.equal(other.weights["weight"], average.weights["weight"])
