"""Batches that memory does not hold: split, tried again, left out, and known after a restart."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asr.data.batch import Batch, collate
from asr.data.loader import train_loader
from asr.errors import UserError
from asr.training.benchmark import random_batch
from asr.training.pieces import Pieces, is_out_of_memory, split, stand_in
from asr.training.trainer import TrainData, Trainer
from tests.asr.training.runs import DURATIONS_S, NO_DROPOUT, TOKENIZER, experiment, make_trainer, records, run
from tests.asr.training.test_trainer import allow

WHOLE = [*NO_DROPOUT, "data.max_duration_s=100", "data.num_buckets=1", "optim.clip_grad_norm=0"]


def batch_of(data: TrainData) -> Batch:
    (batch,) = train_loader(data.train_cuts, TOKENIZER, experiment(*WHOLE).data, seed=0, epoch=0)
    return batch


def memory_for(monkeypatch: pytest.MonkeyPatch, frames: int, where: str = "forward") -> list[int]:
    """No memory for more padded frames than this; the sizes that were tried."""
    tried: list[int] = []
    forward = Trainer.step.__globals__["Stepper"]._forward

    def limited(self, batch, *args):  # type: ignore[no-untyped-def]
        tried.append(batch.features.shape[0] * batch.features.shape[1])
        if tried[-1] > frames and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        losses = forward(self, batch, *args)
        if tried[-1] > frames:
            losses.loss.register_hook(_no_memory)
        return losses

    monkeypatch.setattr("asr.training.step.Stepper._forward", limited)
    return tried


def _no_memory(_: torch.Tensor) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: ...")


def test_pieces_hold_each_utterance_once() -> None:
    batch = random_batch(20.0, 2.0, 3.0, 10, 4)
    for count in (1, 2, 3, 10, 99):
        parts = split(batch, count)
        assert len(parts) == min(count, 10)
        assert sorted(x for part in parts for x in part.cut_ids) == sorted(batch.cut_ids)
        for part in parts:
            assert part.features.shape[1] == part.feature_lens.max() and part.targets.shape[1] == part.target_lens.max()
            rows = [batch.cut_ids.index(x) for x in part.cut_ids]
            assert torch.equal(part.features, batch.features[rows, : part.features.shape[1]])
            assert torch.equal(part.targets, batch.targets[rows, : part.targets.shape[1]])
            assert part.durations_s == [batch.durations_s[i] for i in rows]
    small = stand_in(batch)
    assert small.size == 1 and small.features.shape[1] <= 64 and small.targets.shape == (1, 0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_split_batch_gives_the_same_step(
    data: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    batch = batch_of(data)
    whole = make_trainer(experiment(*WHOLE), data, tmp_path / "whole")
    expected = whole.step([batch], allow(whole))
    trainer = make_trainer(experiment(*WHOLE), data, tmp_path / "split")
    lines, events = [], []
    trainer.stepper.say = lines.append
    trainer.stepper.record = lambda **fields: events.append(fields)
    tried = memory_for(monkeypatch, batch.features.shape[1] * 3, where)
    bad = allow(trainer)
    record = trainer.step([batch], bad)
    assert {k: record[k] for k in expected if expected[k] is not None} == pytest.approx(
        {k: v for k, v in expected.items() if v is not None}, rel=1e-6
    )
    assert bad.count == 0
    for p, q in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    # 11 utterances: whole, the first of two, then four pieces of three or fewer
    assert len(tried) == 6 and [e["pieces"] for e in events] == [1, 2]
    assert "out of memory" in lines[0] and "in 2 pieces" in lines[0] and all(x in lines[0] for x in batch.cut_ids)
    tried.clear()
    trainer.step([batch], bad)
    assert len(tried) == 4  # it is known now
    again = make_trainer(experiment(*WHOLE), data, tmp_path / "split")
    assert again.stepper.pieces.of(batch) == 4  # to a run that starts again too
    less = make_trainer(experiment(*WHOLE, "memory.checkpointing=full"), data, tmp_path / "split")
    assert less.stepper.pieces.of(batch) == 1  # but not to one that takes less memory


def test_utterances_that_do_not_fit_alone_are_left_out(
    data: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(*WHOLE)
    batch = batch_of(data)
    parts = split(batch, batch.size)
    most = parts[0].features.shape[1]
    longest, rest = ([p for p in parts if (p.features.shape[1] == most) == is_longest] for is_longest in (True, False))
    trainer, alone = (make_trainer(config, data, tmp_path / name) for name in ("both", "alone"))
    memory_for(monkeypatch, most - 1)
    bad = allow(trainer, len(longest))
    record = trainer.step([batch], bad)
    expected = alone.step(rest, allow(alone))
    assert bad.count == len(longest) and record["loss"] == pytest.approx(expected["loss"])
    assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    dumps = [torch.load(path, weights_only=True) for path in (tmp_path / "both" / "bad_batches").glob("*.pt")]
    assert {x for d in dumps for x in d["cut_ids"]} == {x for p in longest for x in p.cut_ids}
    assert all("memory" in d["reason"] for d in dumps)
    # a batch of which nothing is left moves no weight, and has no loss
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    record = trainer.step([longest[0]], allow(trainer, 1))
    assert math.isnan(record["loss"]) and record["batch_size"] == 1
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    memory_for(monkeypatch, 1)
    with pytest.raises(UserError, match="the model is too large"):
        trainer.step([batch], bad)


def test_the_limit_falls_after_so_many_events(tmp_path: Path) -> None:
    batches = [
        collate([torch.zeros(100, 2).numpy()] * 8, [[1]] * 8, [f"{k}-{i}" for i in range(8)], [""] * 8, [1.0] * 8)
        for k in range(3)
    ]
    pieces = Pieces(tmp_path, 2)
    assert [pieces.of(b) for b in batches] == [1, 1, 1]
    assert pieces.ran_out(batches[0], batches[0], 1) == "tried again in 2 pieces"
    assert [pieces.of(b) for b in batches] == [2, 1, 1]
    said = pieces.ran_out(batches[0], split(batches[0], 2)[1], 2)
    assert said == (
        "tried again in 4 pieces; from now on no piece is larger than 0.8 of this one of 4 utterances of 1.0 s"
    )
    assert [pieces.of(b) for b in batches] == [4, 3, 3]  # 3 utterances are 0.75 of 4
    assert [Pieces(tmp_path, 2).of(b) for b in batches] == [4, 3, 3]
    # what was measured otherwise is another limit
    assert Pieces(tmp_path, 2, lambda size, frames: 1e9 * size).limit == float("inf")


def test_what_counts_as_no_memory() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert is_out_of_memory(error.value)


def test_a_run_says_what_it_split(data: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(monkeypatch, 150)
    result = run(data, tmp_path, "memory.lower_after=1")
    assert result.reason == "finished"
    events = records(tmp_path, "out_of_memory")
    assert events and set(events[0]["cut_ids"]) <= {f"train{i:03d}" for i in range(len(DURATIONS_S))}
    assert len({r["step"] for r in events}) < len(records(tmp_path, "train"))  # the limit fell


CHILD = """
import json, resource, sys, torch
from pathlib import Path
from asr.errors import UserError
from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches
torch.set_num_threads(1)
settings = ["model.encoder.dropout=0", "model.predictor.dropout=0", "optim.clip_grad_norm=0"]
trainer = make_trainer("xs", "fp32", 30, Path(sys.argv[1]), settings)
trainer.model.train()
bad = BadBatches(Path(sys.argv[1]), 0, 0, lambda **_: None, print)
small, large = (random_batch(audio_s, 4.0, 3.0, 30, 80) for audio_s in (8.0, 640.0))
trainer.step([small], bad)  # what is imported and compiled on the way
if sys.argv[2] == "limited":
    data = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData"))
    limit = 1024 * int(data.split()[1]) + (300 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
record = trainer.step([large], bad)
print(json.dumps({"loss": record["loss"], "norm": record["grad_norm"], "events": trainer.stepper.pieces.events}))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_a_limit_of_the_system_is_kept_to(tmp_path: Path) -> None:
    """160 utterances of 4 s where the system grants 300 MiB: the same loss and gradient, in pieces."""
    results = {}
    for kind in ("free", "limited"):
        words = [sys.executable, "-c", CHILD, str(tmp_path / kind), kind]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        results[kind] = json.loads(done.stdout.splitlines()[-1])
    free, limited = results["free"], results["limited"]
    assert free["events"] == 0 and limited["events"] >= 1
    assert limited["loss"] == pytest.approx(free["loss"], rel=1e-6)
    assert limited["norm"] == pytest.approx(free["norm"], rel=1e-4)
