"""Optimizer state in a mapped file: the same weights and checkpoints, and less anonymous memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from asr.checkpoint import step_checkpoints
from asr.errors import UserError
from asr.training.offload import map_moments
from asr.training.trainer import TrainData
from asr.training.trainer_config import ParallelConfig
from tests.asr.training.runs import differences, run, state_of

FILE = "memory.offload=file"


def test_a_run_and_its_checkpoints_are_the_same(data: TrainData, tmp_path: Path) -> None:
    """Also where a part of the model has no gradient, and across a stop and a resume from one kind to the other."""
    settings = ["data.max_duration_s=1.3", "model.ctc=true", "optim.schedule=constant"]
    ways = {"none": [[], []], "none-file": [[], [FILE]], "file-none": [[FILE], []], "file": [[FILE], [FILE]]}
    for name, (first, then) in ways.items():
        out = tmp_path / name
        run(data, out, *settings, "training.max_steps=3", *first)
        run(data, out, *settings, "training.max_steps=6", *then)
        state, expected = state_of(out), state_of(tmp_path / "none")
        assert state["step"] == 6 and not list(out.glob("optimizer*"))
        for part in ("model", "training"):
            assert differences(expected[part], state[part]) == [], name
        sizes = [step_checkpoints(tmp_path / n / "checkpoints")[-1].stat().st_size for n in ("none", name)]
        assert abs(sizes[0] - sizes[1]) < 1024


def test_moments_lie_in_a_file_without_a_name(tmp_path: Path) -> None:
    weight, unused = torch.nn.Parameter(torch.ones(5, 3).t()), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight, unused], fused=True)
    mapped = map_moments(optimizer, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moment = optimizer.state[weight]["exp_avg"]
    assert moment is mapped[weight]["exp_avg"] and bool((moment > 0).all()) and unused not in optimizer.state
    # no view of the whole file, which checkpoints would write as often as there are weights
    assert moment.stride() == weight.stride() and moment.untyped_storage().nbytes() == 60


def test_a_full_disk_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    weight = torch.nn.Parameter(torch.zeros(2**18))
    with pytest.raises(UserError, match="needs 2 MiB in .* 1 MiB are free; choose another output folder"):
        map_moments(torch.optim.AdamW([weight]), tmp_path / "state")
    with pytest.raises(UserError, match="they are on meta; choose --device cpu, or memory.offload=cpu"):
        map_moments(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, device="meta"))]), tmp_path / "state")


@pytest.mark.parametrize(
    ("zero", "size", "offload", "message"),
    [
        (0, 1, "cpu", "1 process and zero=0: choose memory.offload=file, or start several"),
        (3, 1, "cpu", "1 process and zero=3: choose memory.offload=file"),
        (0, 2, "cpu", "2 processes and zero=0: set parallel.zero=3"),
        (1, 4, "cpu", "4 processes and zero=1: set parallel.zero=3"),
        (1, 2, "file", "does not go with parallel.zero=1.*set parallel.zero=2"),
    ],
)
def test_what_does_not_go_together_names_what_does(zero: int, size: int, offload: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelConfig(zero=zero).check(size, offload)  # type: ignore[arg-type]


def test_what_goes_together() -> None:
    for zero, size, offload in ((0, 1, "file"), (0, 2, "file"), (2, 2, "cpu"), (3, 4, "cpu"), (3, 4, "file")):
        ParallelConfig(zero=zero).check(size, offload)  # type: ignore[arg-type]


def test_a_command_refuses_before_it_reads_anything(tmp_path: Path) -> None:
    words = ["--train-cuts", "no", "--valid-cuts", "no", "--out-dir", str(tmp_path), "--set", "memory.offload=cpu"]
    done = subprocess.run([sys.executable, "-m", "asr.cli.train", *words], capture_output=True, text=True)
    assert done.returncode == 2 and "choose memory.offload=file" in done.stderr
