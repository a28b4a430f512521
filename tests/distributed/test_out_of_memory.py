"""Memory that does not suffice on one of several processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from asr.training.faults import BadBatches
from asr.training.pieces import NOT_COMPILED
from asr.training.ranks import Ranks
from tests.asr.training.runs import NO_DROPOUT, experiment, make_trainer, read_data
from tests.distributed.processes import together

SETTINGS = [*NO_DROPOUT, "data.max_duration_s=3", "optim.clip_grad_norm=0"]


def _steps(ranks: Ranks, data: Path, out: Path, zero: int, most: int, kept: bool = False) -> None:
    """Two steps where the second process has no memory for more than so many utterances at once.

    The error may be one that oneDNN keeps for as long as the thread lives.
    """
    trainer = make_trainer(experiment(*SETTINGS, f"parallel.zero={zero}"), read_data(data), out, ranks)
    said: list[str] = []
    trainer.stepper.say = said.append
    encode = trainer.model.encode
    tried: list[int] = []
    thread = threading.local()

    def limited(features: torch.Tensor, *args):  # type: ignore[no-untyped-def]
        tried.append(len(features))
        if ranks.rank == 1 and (len(features) > most or hasattr(thread, "failed")):
            if not kept:
                raise torch.OutOfMemoryError("CUDA out of memory")
            thread.failed = True
            raise RuntimeError(NOT_COMPILED)
        return encode(features, *args)

    trainer.model.encode = limited  # type: ignore[method-assign]
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
        assert max(right["tried"]) >= max(left["tried"]) > 1


@pytest.mark.slow
def test_all_begin_the_step_again_in_smaller_pieces(data: Path, tmp_path: Path) -> None:
    free = tmp_path / "free"
    together(2, _steps, data, free, 0, 99)
    for kept in (False, True):
        out = tmp_path / f"out-{kept}"
        together(2, _steps, data, out, 0, 1, kept)
        check_equal(out, free)
        said = [torch.load(out / f"{rank}.pt", weights_only=True)["said"] for rank in (0, 1)]
        assert said[0] == [] and "out of memory" in said[1][0]
        assert sorted(path.name for path in (out / "memory").iterdir()) == ["pieces-rank1.json"]


@pytest.mark.slow
def test_processes_that_wait_within_a_pass_start_again_with_what_they_know(data: Path, tmp_path: Path) -> None:
    free, out = tmp_path / "free", tmp_path / "out"
    together(2, _steps, data, free, 3, 99)
    for _ in range(9):  # each attempt learns of one batch
        try:
            together(2, _steps, data, out, 3, 1)
            break
        except Exception as error:
            assert "has to start again from its newest checkpoint" in str(error) or "Connection" in str(error)
    else:
        pytest.fail("never came through")
    assert (out / "memory" / "pieces-rank1.json").is_file()
    left, right = (torch.load(folder / "0.pt", weights_only=True)["records"] for folder in (free, out))
    assert [r["loss"] for r in right] == pytest.approx([r["loss"] for r in left], rel=1e-6)
