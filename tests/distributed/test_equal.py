"""Several processes train what one trains: with DDP, ZeRO and FSDP2, for every loss, from any one's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from losses import LOSSES
from tests.asr.training.runs import newest, records
from tests.distributed.processes import runs, sgd_steps, together

STEPS = 3
# what a process draws depends on the batch alone: dropout stays on
COMMON = ["training.ema_decay=0.5", "data.max_duration_s=1.3"]


def spread(size: int, *settings: str) -> list[str]:
    """Settings of so many processes that take as many batches a step as one process with accumulation 4 does."""
    return [*COMMON, f"training.accumulation={4 // size}", *settings]


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("size", [2, 4])
def test_steps_equal_those_of_one_process(size: int, data: Path, tmp_path: Path) -> None:
    kinds = {
        "fp32-fused": [],
        "fp32-utterances": ["training.normalize=utterances"],
        **{f"fp32-{method}": [f"loss.method={method}"] for method in LOSSES if method != "fused"},
        "bf16-fused": ["training.precision=bf16"],
        "bf16-pruned": ["training.precision=bf16", "loss.method=pruned"],
        "fp16-fused": ["training.precision=fp16"],
        "fp32-override": ["training.precision=bf16", "training.precision_overrides={encoder: fp32, joiner: fp32}"],
        "fp32-unused-ctc": ["model.ctc=true"],
        "fp32-full": ["memory.checkpointing=full"],
        "fp32-selective": ["memory.checkpointing=selective"],
        "fp32-budget": ["memory={checkpointing: budget, activation_budget: 0.7}"],
        "fp32-ctc": ["model.ctc=true", "loss.ctc_weight=0.3"],
    }
    ways = {"zero0": ["parallel.zero=0"], "zero2": ["parallel.zero=2"], "zero3": ["parallel.zero=3"]}
    if size == 4:
        ways["hsdp"] = ["parallel.zero=3", "parallel.replicas=2"]
        kinds = {name: kinds[name] for name in ("fp32-fused", "fp32-pruned")}
    else:
        ways["gather"] = ["parallel.zero=3", "parallel.gather=bf16"]
    cases = {
        f"{k}-{w}": spread(size, *kinds[k], *ways[w])
        for k in kinds
        for w in ways
        if w != "gather" or k.startswith("bf16")
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    together(1, sgd_steps, {k: spread(1, *kinds[k]) for k in kinds}, STEPS, data, tmp_path / "one")
    together(size, sgd_steps, cases, STEPS, data, tmp_path / "many")
    for name in cases:
        kind, way = name.rsplit("-", 1)
        one = torch.load(tmp_path / "one" / f"{kind}.pt")
        many = torch.load(tmp_path / "many" / f"{name}.pt")
        bound = 1e-6 if kind.startswith("fp32") else 1e-3
        assert largest_difference(one["weights"], many["weights"]) < bound, name
        for left, right in zip(one["records"], many["records"], strict=True):
            assert {k for k in left if left[k] is None} == {k for k in right if right[k] is None}
            expected = {k: v for k, v in left.items() if v is not None}
            relative = 1e-5 if kind.startswith("fp32") else 1e-3
            norm = expected.pop("grad_norm")
            assert {k: right[k] for k in expected} == pytest.approx(expected, rel=relative), name
            # biases and norms are rounded too where they are sent in bf16
            assert right["grad_norm"] == pytest.approx(norm, rel=5e-3 if way == "gather" else relative), name
        shares = {"zero0": 1, "hsdp": size // 2}.get(way, size)
        assert many["share"] <= 1.1 * one["share"] / shares


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(data: Path, tmp_path: Path) -> None:
    """Steps 1 to 3 on one kind of processes, the rest on another: the same batches, each once, and the same weights."""
    ways = {1: [], 2: ["parallel.zero=3"], 4: ["parallel.zero=1"]}

    def settings(size: int, steps: int) -> list[str]:
        # a large eps: AdamW's step does not turn the rounding of gradients near 0 into whole steps; and a learning rate
        # that does not depend on the limit of steps
        limits = ["optim.eps=1e-2", "optim.schedule=constant", f"training.max_steps={steps}", "training.max_epochs=3"]
        return spread(size, *ways[size], *limits)

    together(1, runs, {"whole": settings(1, 6)}, data, tmp_path)
    want = newest(tmp_path / "whole")
    for first, then in ((2, 1), (1, 4), (4, 2)):
        name = f"{first}-{then}"
        together(first, runs, {name: settings(first, 3)}, data, tmp_path)
        together(then, runs, {name: settings(then, 6)}, data, tmp_path)
        got = newest(tmp_path / name)
        left, right = want["training"]["progress"], got["training"]["progress"]
        for key in ("step", "epoch", "batch", "consumed_s"):
            assert right[key] == pytest.approx(left[key]), key
        assert largest_difference(want["model"], got["model"]) < 1e-6
        assert largest_difference(want["training"]["ema"], got["training"]["ema"]) < 1e-6
        for one, many in zip(records(tmp_path / "whole", "train"), records(tmp_path / name, "train"), strict=True):
            assert many["batch_seconds"] == pytest.approx(one["batch_seconds"]) and many["batch"] == one["batch"]
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
