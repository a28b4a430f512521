"""Memory that does not suffice on one of several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr.training.faults import BadBatches
from asr.training.ranks import Ranks
from asr.training.step import Stepper
from tests.asr.training.runs import NO_DROPOUT, experiment, make_trainer, read_data
from tests.distributed.processes import together

SETTINGS = [*NO_DROPOUT, "data.max_duration_s=3", "optim.clip_grad_norm=0"]


def _steps(ranks: Ranks, data: Path, out: Path, zero: int, most: int) -> None:
    """Two steps where the second process has no memory for more than so many utterances at once."""
    trainer = make_trainer(experiment(*SETTINGS, f"parallel.zero={zero}"), read_data(data), out, ranks)
    said: list[str] = []
    trainer.stepper.say = said.append
    forward = Stepper._forward
    tried: list[int] = []

    def limited(self, batch, *args):  # type: ignore[no-untyped-def]
        tried.append(batch.size)
        if ranks.rank == 1 and batch.size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, *args)

    Stepper._forward = limited  # type: ignore[method-assign]
    trainer.model.train()
    bad = BadBatches(out / "bad", 0, 0, lambda **_: None, print)
    records = []
    for number, (batches, own) in enumerate(trainer.batches_of_epoch()):
        if number == 2:
            break
        records.append(trainer.step(batches, bad, own))
    weights = trainer.parallel.weights()
    torch.save({"weights": weights, "records": records, "said": said, "tried": tried}, out / f"{ranks.rank}.pt")


def check_equal(out: Path, free: Path) -> None:
    for rank in (0, 1):
        left, right = (torch.load(folder / f"{rank}.pt", weights_only=True) for folder in (free, out))
        for one, other in zip(left["records"], right["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert max(right["tried"]) >= max(left["tried"]) > 2


def test_all_begin_the_step_again_in_smaller_pieces(data: Path, tmp_path: Path) -> None:
    free, out = tmp_path / "free", tmp_path / "out"
    together(2, _steps, data, free, 0, 99)
    together(2, _steps, data, out, 0, 2)
    check_equal(out, free)
    said = [torch.load(out / f"{rank}.pt", weights_only=True)["said"] for rank in (0, 1)]
    assert said[0] == [] and "out of memory" in said[1][0]
    assert sorted(path.name for path in (out / "memory").iterdir()) == ["pieces-rank1.json"]


def test_processes_that_wait_within_a_pass_start_again_with_what_they_know(data: Path, tmp_path: Path) -> None:
    free, out = tmp_path / "free", tmp_path / "out"
    together(2, _steps, data, free, 3, 99)
    for _ in range(9):  # each attempt learns of one batch
        try:
            together(2, _steps, data, out, 3, 2)
            break
        except Exception as error:
            assert "has to start again from its newest checkpoint" in str(error) or "Connection" in str(error)
    else:
        pytest.fail("never came through")
    assert (out / "memory" / "pieces-rank1.json").is_file()
    left, right = (torch.load(folder / "0.pt", weights_only=True)["records"] for folder in (free, out))
    assert [r["loss"] for r in right] == pytest.approx([r["loss"] for r in left], rel=1e-6)
