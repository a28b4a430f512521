"""Offload on several processes: weights, optimizer state and checkpoints are those of a run without it, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr.training.faults import BadBatches
from asr.training.parallel import whole
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
    batches, own = next(iter(trainer.batches_of_epoch()))
    trainer.step(batches, BadBatches(out, 0, 0, lambda **_: None, print), own)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (place,) = (line.split()[0].split("-") for line in lines if "optimizer-rank" in line)
    first, last = (int(x, 16) for x in place)

    def inside() -> bool:
        state = trainer.parallel.optimizer.state.values()
        shares = [x.to_local() for entry in state for x in entry.values() if x.dim() > 0]
        return bool(shares) and all(first <= x.data_ptr() < last for x in shares if x.numel())

    assert inside()
    trainer.parallel.new_optimizer_state(whole(trainer.parallel.optimizer_state()))  # of a checkpoint
    assert inside()


def test_shares_lie_in_the_file(data: Path, tmp_path: Path) -> None:
    together(2, _inside, data, tmp_path)
