"""Offload on several processes: weights, optimizer state and checkpoints are those of a run without it, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr.training.faults import BadBatches
from asr.training.ranks import Ranks
from tests.asr.training.runs import differences, experiment, make_trainer, newest, read_data
from tests.distributed.processes import runs, together

# clipping that scales each gradient, and an average of the weights
COMMON = ["data.max_duration_s=1.3", "training.ema_decay=0.5", "optim.clip_grad_norm=0.5", "optim.schedule=constant"]


@pytest.mark.parametrize("offload", ["cpu", "file"])
def test_runs_are_equal_also_after_a_resume(offload: str, data: Path, tmp_path: Path) -> None:
    zeros = (2, 3) if offload == "cpu" else (0, 2, 3)
    for steps in (2, 4):
        cases = {
            f"{zero}-{kind}": [
                *COMMON, f"training.max_steps={steps}", f"parallel.zero={zero}", f"memory.offload={kind}"
            ]
            for zero in zeros
            for kind in ("none", offload)
        }  # fmt: skip
        together(2, runs, cases, data, tmp_path)
    for zero in zeros:
        expected, found = newest(tmp_path / f"{zero}-none"), newest(tmp_path / f"{zero}-{offload}")
        assert expected["step"] == found["step"] == 4
        assert differences(expected["model"], found["model"]) == []
        for part in ("optimizer", "ema"):
            assert differences(expected["training"][part], found["training"][part]) == []


def _inside(ranks: Ranks, data: Path, out: Path) -> None:
    trainer = make_trainer(experiment(*COMMON, "parallel.zero=3", "memory.offload=file"), read_data(data), out, ranks)
    trainer.model.train()
    batches, own = next(trainer._steps_of_epoch())
    trainer.step(batches, BadBatches(out, 0, 0, lambda **_: None, print), own)
    moments = [
        x.to_local() for state in trainer.parallel.optimizer.state.values() for x in state.values() if x.dim() > 0
    ]
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "optimizer-rank" in line]
    (first, last), *others = [[int(x, 16) for x in line.split("-")] for line in mapped]
    assert not others and moments and all(first <= x.data_ptr() < last for x in moments if x.numel())


def test_shares_lie_in_the_file(data: Path, tmp_path: Path) -> None:
    together(2, _inside, data, tmp_path)
