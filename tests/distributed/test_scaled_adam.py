"""ScaledAdam of several processes: with every way to share, the scale of a tensor is that of all of it."""

from __future__ import annotations

from pathlib import Path

from tests.asr.training.runs import differences, newest
from tests.distributed.processes import runs, together

# a large eps: the rounding of gradients near 0 does not become whole steps
COMMON = [
    "optim={name: scaled_adam, lr: 0.045, schedule: eden, warmup_steps: 1, eps: 1e-2, lr_scales: {predictor: 0.5}}",
    "data.max_duration_s=1.3",
    "training.ema_decay=0.5",
    "training.max_epochs=3",
]
WAYS = {
    "zero0": ["parallel.zero=0"],
    "zero1": ["parallel.zero=1"],
    "zero2": ["parallel.zero=2"],
    "zero3": ["parallel.zero=3"],
    "cpu": ["parallel.zero=3", "memory.offload=cpu"],
    "file": ["parallel.zero=3", "memory.offload=file"],
}
HSDP = ["parallel.zero=3", "parallel.replicas=2"]


def cases(size: int, steps: int, ways: dict[str, list[str]]) -> dict[str, list[str]]:
    spread = [f"training.accumulation={4 // size}", f"training.max_steps={steps}"]
    return {name: [*COMMON, *spread, *way] for name, way in ways.items()}


def check_equal(left: Path, right: Path) -> None:
    want, got = newest(left), newest(right)
    assert got["step"] == want["step"] and got["model"].keys() == want["model"].keys()
    for name, value in want["model"].items():
        assert float((got["model"][name] - value).abs().max()) < 1e-6, (right.name, name)
    for name, entry in want["training"]["optimizer"].items():
        assert got["training"]["optimizer"][name].keys() == entry.keys()


def test_runs_equal_those_of_one_process(data: Path, tmp_path: Path) -> None:
    together(1, runs, cases(1, 3, {"one": []}), data, tmp_path)
    together(2, runs, cases(2, 3, WAYS), data, tmp_path)
    for way in WAYS:
        check_equal(tmp_path / "one", tmp_path / way)
    for way in ("cpu", "file"):
        assert differences(newest(tmp_path / "zero3")["model"], newest(tmp_path / way)["model"]) == []


def test_one_process_goes_on_from_four(data: Path, tmp_path: Path) -> None:
    together(1, runs, cases(1, 6, {"one": []}), data, tmp_path)
    together(4, runs, cases(4, 3, {"4-1": HSDP}), data, tmp_path)
    together(1, runs, cases(1, 6, {"4-1": []}), data, tmp_path)
    check_equal(tmp_path / "one", tmp_path / "4-1")
