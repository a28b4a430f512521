"""Schedules against their equations, weight decay by kind of parameter, and the moving average of the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from asr.errors import UserError
from asr.models.transducer import build_model
from asr.training.faults import BadBatches
from asr.training.optim import EdenConfig, OptimConfig, WeightAverage, learning_rate, make_optimizer
from asr.training.trainer import TrainData
from tests.asr.training.runs import experiment, make_trainer, records, run


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


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        # base 0.08, alpha_step 100, alpha_epoch 4, alpha_start 0.5, t_warmup 10; t is the step from 1 on
        (0, 0, 0.08 * (10_001 / 10_000) ** -0.25 * 0.55),
        (4, 0, 0.08 * (10_025 / 10_000) ** -0.25 * 0.75),
        (9, 0, 0.08 * (10_100 / 10_000) ** -0.25),
        (99, 0, 0.08 * 2**-0.25),
        (99, 4, 0.08 * 2**-0.5),
        (299, 3, 0.08 * 10**-0.25 * (25 / 16) ** -0.25),
        (9999, 400, 0.08 * 10_001**-0.5),
    ],
)
def test_eden_is_its_formula(step: int, epoch: int, expected: float) -> None:
    eden = EdenConfig(steps=100, epochs=4, start=0.5)
    config = OptimConfig(lr=0.08, schedule="eden", warmup_steps=10, eden=eden)
    assert learning_rate(config, step, 0.3, epoch) == pytest.approx(expected, rel=1e-12)


def test_eden_without_rise_begins_at_lr() -> None:
    config = OptimConfig(lr=0.045, schedule="eden", warmup_steps=0, eden=EdenConfig(steps=1e6))
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.045, rel=1e-9)


@pytest.mark.parametrize(("key", "value"), [("steps", 0.0), ("epochs", math.inf), ("start", 1.5), ("start", -0.1)])
def test_eden_refuses_values_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optim.eden.{key}={value}"):
        EdenConfig(**{key: value})


def test_eden_counts_the_epochs_of_a_run(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "optim={schedule: eden, lr: 0.01, eden: {steps: 1e6, epochs: 1.0}}", "training.ema_decay=0")
    lines = records(tmp_path, "train")
    assert {line["epoch"] for line in lines} == {0, 1}
    for line in lines:
        rise = 0.5 + 0.5 * min(1.0, line["step"] / 3)
        expected = 0.01 * (1 + (line["step"] / 1e6) ** 2) ** -0.25 * (1 + line["epoch"] ** 2) ** -0.25 * rise
        assert line["lr"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "scaled_adam"])
def test_learning_rates_by_part(name: str, data: TrainData, tmp_path: Path) -> None:
    """The longest name counts, also where checkpointing has wrapped the parts; all of a part have their rate."""
    scales = {"encoder": 0.1, "encoder.blocks.0.ff1": 0.5, "encoder.blocks.0.ff1.up.bias": 2.0, "joiner": 3.0}
    text = ", ".join(f"{part}: {scale}" for part, scale in scales.items())
    settings = f"optim.lr_scales={{{text}}}", "memory.checkpointing=full", "optim.schedule=constant"
    trainer = make_trainer(experiment(*settings, f"optim.name={name}", "optim.lr=0.01"), data, tmp_path)
    trainer.model.train()
    batches, own = next(iter(trainer.batches_of_epoch()))
    record = trainer.step(batches, BadBatches(tmp_path, 0, 0, lambda **_: None, print), own)
    names = {value: key for key, value in trainer.model.state_dict(keep_vars=True).items()}
    groups = trainer.parallel.optimizer.param_groups
    rates = {names[p]: group["lr"] / record["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {names[p] for p in trainer.model.parameters()}
    for key, rate in rates.items():
        longest = max((part for part in scales if f"{key}.".startswith(f"{part}.")), key=len, default=None)
        assert rate == pytest.approx(scales[longest] if longest else 1.0), key
    assert {round(rate, 6) for rate in rates.values()} == {0.1, 0.5, 1.0, 2.0, 3.0}


def test_a_smaller_rate_moves_less() -> None:
    """From zero moments AdamW moves each weight by its learning rate, ScaledAdam besides by its scale."""
    for name in ("adamw", "scaled_adam"):
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        model["b"].load_state_dict(model["a"].state_dict())
        before = model["a"].weight.detach().clone()
        config = OptimConfig(name=name, lr=0.01, weight_decay=0.0, lr_scales={"b": 0.25})  # type: ignore[arg-type]
        optimizer = make_optimizer(model, config)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        moved = [model[part].weight.detach() - before for part in ("a", "b")]
        torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-4, atol=1e-7)
        assert float(moved[0].abs().min()) > 1e-4


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("encodr", "has 'encodr', which is no part of the model; did you mean encoder"),
        ("encoder.block", r"has 'encoder\.block', .*did you mean encoder\.blocks"),
        ("zzz", "its parts: encoder, predictor, joiner"),
    ],
)
def test_a_name_that_is_no_part_is_told(part: str, message: str) -> None:
    model = build_model(experiment(), 7)
    with pytest.raises(UserError, match=message):
        make_optimizer(model, OptimConfig(lr_scales={"encoder": 0.5, part: 0.1}))


BAD = [{"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"warmup_steps": -1}, {"betas": [0.9]}, {"betas": [0.9, 1.0]},
       {"clip_grad_norm": -1.0}, {"clip_grad_norm": math.nan}, {"weight_decay": -0.1}, {"eps": 0.0},
       {"final_lr_ratio": 1.1}, {"final_lr_ratio": -0.1},
       {"lr_scales": {"encoder": 0.0}}]  # fmt: skip


@pytest.mark.parametrize("values", BAD, ids=str)
def test_values_out_of_range_are_refused_by_name(values: dict) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(values))}[=.]"):
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
