"""Validation over several processes gives what one finds, also where shares are uneven or empty."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from asr.errors import Terminated
from asr.training.faults import Termination
from asr.training.metrics import MetricsWriter
from asr.training.ranks import Ranks
from tests.asr.training.runs import experiment, make_trainer, read_data, records
from tests.distributed.processes import together

# three batches of one cut each
ONE_BY_ONE = ["decoding.batch_duration_s=0.1", "training.ema_decay=0.5"]


def _validate(ranks: Ranks, data: Path, out: Path, zero: int) -> None:
    trainer = make_trainer(experiment(*ONE_BY_ONE, f"parallel.zero={zero}"), read_data(data), out, ranks)
    stop = Termination()
    metrics = MetricsWriter(out if ranks.first else None, False)
    result = trainer.validate(metrics, stop)
    metrics.close()
    (out / f"{ranks.rank}.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    # a signal to one, in the midst of it
    judged = trainer.model.training
    stop.requested = ranks.rank == ranks.size - 1
    with pytest.raises(Terminated):
        trainer.validate(MetricsWriter(None, False), stop)
    assert trainer.model.training == judged
    ranks.wait()  # and all of them are still there


@pytest.mark.parametrize(("size", "zero"), [(2, 0), (2, 3), (4, 2)])
def test_the_result_is_that_of_one_process(size: int, zero: int, data: Path, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("many", size)):
        (tmp_path / name).mkdir()
        together(processes, _validate, data, tmp_path / name, zero)
    want = json.loads((tmp_path / "one" / "0.json").read_text(encoding="utf-8"))
    assert want["words"] > 0 and want["errors"] > 0
    for rank in range(size):
        got = json.loads((tmp_path / "many" / f"{rank}.json").read_text(encoding="utf-8"))
        assert got == {**want, "loss": pytest.approx(want["loss"], rel=1e-6)}
    line = records(tmp_path / "many", "valid")
    assert len(line) == 1 and (line[0]["errors"], line[0]["words"]) == (want["errors"], want["words"])
    left, right = (torch.load(tmp_path / name / "best.pt")["model"] for name in ("one", "many"))
    assert all(torch.equal(left[key], right[key]) for key in left)
