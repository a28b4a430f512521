"""Activations that are computed again: the same gradients, fewer bytes, and a budget that holds."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asr.config import load_experiment
from asr.errors import UserError
from asr.models.transducer import Transducer, build_model
from asr.training.activations import (
    MODES,
    Cost,
    checkpoint_activations,
    choose_modes,
    measure,
    saved_bytes,
    total_bytes,
    within_budget,
)
from asr.training.benchmark import random_batch
from asr.training.trainer import TrainData
from tests.asr.training.runs import experiment, make_trainer

# as many layers as preset m has, and dropout, which must fall on the same elements
EXPERIMENT = load_experiment(None, ["model.preset=xs", "model.encoder={num_layers: 8, dropout: 0.1}"])
BATCH = random_batch(12.0, 4.0, 3.0, 50, 80)
MIXED = ["selective", "full", "full", "selective", "none", "full", "none", "selective", "none"]


def encoder_bytes(model: Transducer, dtype: torch.dtype, chunk_frames: int = 0) -> int:
    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.encode(BATCH.features, BATCH.feature_lens, chunk_frames)[0]

    return saved_bytes(forward)


def gradients(model: Transducer, dtype: torch.dtype, chunk_frames: int) -> list[Tensor | None]:
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model(
            BATCH.features, BATCH.feature_lens, BATCH.targets, BATCH.target_lens, EXPERIMENT.loss, chunk_frames
        )
    losses.loss.backward()
    return [losses.loss.detach(), *(p.grad for p in model.parameters())]


def model_with(modes: list[str]) -> Transducer:
    torch.manual_seed(1)
    model = build_model(EXPERIMENT, 50).train()
    names = list(model.state_dict())
    checkpoint_activations(model.encoder, modes)
    assert list(model.state_dict()) == names
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_frames", [0, 8])
def test_gradients_are_the_same_to_the_bit(dtype: torch.dtype, chunk_frames: int) -> None:
    expected = gradients(model_with(["none"] * 9), dtype, chunk_frames)
    for modes in (["selective"] * 9, ["full"] * 9, MIXED):
        for left, right in zip(expected, gradients(model_with(modes), dtype, chunk_frames), strict=True):
            assert left is not None and right is not None and torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_keeps_a_fifteenth_and_selective_two_thirds(dtype: torch.dtype) -> None:
    kept = {mode: encoder_bytes(model_with([mode] * 9), dtype) for mode in MODES}
    assert kept["full"] < kept["none"] / 15
    assert kept["selective"] < kept["none"] * 2 / 3


def test_saved_bytes_are_those_of_the_graph() -> None:
    """Without checkpointing all that lives on is in the graph, where torch's hooks see it."""
    model = model_with(["none"] * 9)
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.encode(BATCH.features, BATCH.feature_lens)
    assert encoder_bytes(model, torch.float32) == sum(seen.values()) and out is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_add_up_to_the_encoder(dtype: torch.dtype) -> None:
    model = model_with(["none"] * 9)
    state = torch.get_rng_state()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    costs = measure(model.encoder, *BATCH.features.shape[:2], autocast)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    for modes in (["none"] * 9, MIXED, ["full"] * 9):
        # besides: what all blocks share, masks and angles
        shared = encoder_bytes(model_with(modes), dtype) - total_bytes(costs, modes)
        assert 0 <= shared < 50_000, modes


def test_choice_takes_the_least_time_within_the_limit() -> None:
    costs = {
        "none": (Cost(100, 10.0), Cost(100, 10.0)),
        "selective": (Cost(100, 11.0), Cost(50, 12.0)),
        "full": (Cost(10, 13.0), Cost(10, 15.0)),
    }
    assert choose_modes(costs, 2, 300) == ["none", "none", "none"]
    assert choose_modes(costs, 2, 250) == ["none", "selective", "none"]
    assert choose_modes(costs, 2, 190) == ["full", "selective", "none"]
    assert choose_modes(costs, 2, 30) == ["full", "full", "full"]
    assert choose_modes(costs, 2, 29) is None
    modes, why = within_budget(costs, 2, 0.1)
    assert modes == ["full", "full", "full"] and "2 full; subsampling full" in why and "(0.100)" in why
    with pytest.raises(UserError, match="activation_budget=0.09.*smallest budget.* is 0.100"):
        within_budget(costs, 2, 0.09)


def test_a_trainer_keeps_to_its_budget(data: TrainData, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(), data, tmp_path / "none")
    costs = measure(trainer.model.encoder, 4, 100, nullcontext)
    with pytest.raises(UserError, match="smallest budget") as found:
        make_trainer(experiment("memory={checkpointing: budget, activation_budget: 0.001}"), data, tmp_path / "less")
    least = float(str(found.value).rsplit(" ", 1)[1])
    assert 0 < least < 0.5
    for budget in (least, 1.0):
        settings = f"memory={{checkpointing: budget, activation_budget: {budget}}}"
        trainer = make_trainer(experiment(settings), data, tmp_path / str(budget))
        wrapped = any("_checkpoint_wrapped_module" in name for name, _ in trainer.model.named_modules())
        assert wrapped == (budget < 1)
    assert costs["none"][1].saved_bytes > costs["full"][1].saved_bytes
    with pytest.raises(UserError, match=r"activation_budget=0.0 is outside \(0, 1\]"):
        experiment("memory.activation_budget=0.0")
