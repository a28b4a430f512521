"""What goes wrong on one of several processes is known to all of them."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asr.errors import StartAgain, Terminated, UserError
from asr.training.faults import BadBatches, Termination, TooManyBadBatches
from asr.training.ranks import Ranks, _meet, one_speaks, place
from asr.training.trainer import Trainer
from asr.training.trainer_config import ParallelConfig
from tests.asr.training.runs import (
    NO_DROPOUT,
    experiment,
    make_trainer,
    newest,
    read_data,
    records,
    spoil,
    write_data,
)
from tests.distributed.processes import ALL_BATCHES, together

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_torchrun_says_where_a_process_is() -> None:
    assert place({}) == Ranks(0, 1, 0) and place(TORCHRUN) == Ranks(1, 2, 1)
    assert place({}).first and not place(TORCHRUN).first
    for change, message in (
        ({"MASTER_ADDR": None}, "MASTER_ADDR are not set.*torchrun"),
        ({"RANK": "one"}, "RANK=one.*whole numbers"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ):
        found = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
        with pytest.raises(UserError, match=message):
            place(found)


def test_new_processes_meet_apart_from_what_lost_ones_left() -> None:
    """Whole meetings, one that nobody was greeted in, and late comers: all in one store, as after lost processes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(rank: int, late_s: float) -> str:
        time.sleep(late_s)
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        own = _meet(store, Ranks(rank, 3, rank), 10.0)
        own.set(f"was here {rank}", "")
        own.wait([f"was here {other}" for other in range(3)], timedelta(seconds=10))
        return own.underlying_store.get("meeting").decode()

    met = []
    with ThreadPoolExecutor(3) as threads:
        for delays in ([0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.3, 0.1]):
            (meeting,) = set(threads.map(meet, range(3), delays))
            met.append(meeting)
            server.set("meeting", "of lost ones")
            server.set("of lost ones/1", "a lost one")
    assert len(set(met)) == 3
    with pytest.raises(RuntimeError, match="the first of 3 processes was not met within 0.1 s"):
        _meet(dist.TCPStore("127.0.0.1", server.port, is_master=False), Ranks(1, 3, 1), 0.1)


def test_replicas_must_divide_the_processes() -> None:
    ParallelConfig(zero=3, replicas=2).check(4)
    ParallelConfig(zero=3, replicas=2).check(1)
    with pytest.raises(UserError, match="replicas=4 does not divide the 6 processes.* the nearest that does is 3"):
        ParallelConfig(zero=3, replicas=4).check(6)


def _raise_on_first(ranks: Ranks, out: Path) -> None:
    assert ranks.sum([1.0, float(ranks.rank)]) == [2.0, 1.0]
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    assert ranks.from_first(lambda: {"of": ranks.rank}) == {"of": 0}
    with pytest.raises(UserError, match="only the first says so"):
        ranks.from_first(_refuse if ranks.first else pytest.fail)
    (out / str(ranks.rank)).touch()


def _refuse() -> None:
    raise UserError("only the first says so")


def test_all_hear_of_what_the_first_finds(tmp_path: Path) -> None:
    together(2, _raise_on_first, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def _skip(ranks: Ranks, data: Path, out: Path) -> None:
    for zero, allowed in product((0, 3), (1, 0)):
        settings = [f"parallel.zero={zero}", "training.accumulation=2", f"training.max_bad_batches={allowed}"]
        trainer = make_trainer(experiment(*ALL_BATCHES, *settings), read_data(data), out, ranks)
        trainer.model.train()
        folder = out / f"{zero}-{allowed}"
        bad = BadBatches(folder / "bad", allowed, 0, lambda **_: None, lambda _: None, f"-rank{ranks.rank}")
        try:
            for batches, own in trainer.batches_of_epoch():
                trainer.step(batches, bad, own)
        except TooManyBadBatches:
            (folder / f"stopped-{ranks.rank}").touch()
            continue
        weights = trainer.parallel.weights()
        assert all(bool(x.isfinite().all()) for x in weights.values())
        assert bad.count == trainer.progress.bad_batches == 1
        torch.save(weights, folder / f"weights-{ranks.rank}.pt")


def test_a_bad_batch_of_one_process_is_left_out_by_all(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    cuts = read_data(tmp_path / "data").train_cuts
    spoil(cuts, next(iter(cuts)).id)
    for zero, allowed in product((0, 3), (1, 0)):
        (tmp_path / f"{zero}-{allowed}").mkdir()
    together(2, _skip, tmp_path / "data", tmp_path)
    for zero, allowed in product((0, 3), (1, 0)):
        out = tmp_path / f"{zero}-{allowed}"
        assert len(list((out / "bad").glob("step-*-rank[01].pt"))) == 1
        if allowed:
            left, right = (torch.load(out / f"weights-{rank}.pt") for rank in (0, 1))
            assert all(torch.equal(left[name], right[name]) for name in left)
        else:
            assert (out / "stopped-0").exists() and (out / "stopped-1").exists()


def _last_is_bad(ranks: Ranks, data: Path, out: Path) -> None:
    """Two steps of four batches, of which the last two, or the last of two processes, are of no number at first."""
    for zero in (0, 2, 3):
        for spoilt in (math.nan, math.inf):
            settings = [*ALL_BATCHES, *NO_DROPOUT, f"parallel.zero={zero}", f"training.accumulation={4 // ranks.size}"]
            trainer = make_trainer(experiment(*settings), read_data(data), out / f"{ranks.size}", ranks)
            trainer.parallel.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
            trainer.model.train()
            bad = BadBatches(out / "bad", 2, 0, lambda **_: None, lambda _: None, f"-rank{ranks.rank}")
            records = []
            for batches, own in islice(trainer.batches_of_epoch(), 2):
                if not records and ranks.rank == ranks.size - 1:
                    for batch in batches[2 // ranks.size :]:
                        batch.features[:] = spoilt
                records.append(trainer.step(batches, bad, own))
            assert bad.count == 2 // ranks.size
            weights = trainer.parallel.weights()
            if ranks.first:
                numbers = [(record["loss"], record["grad_norm"]) for record in records]
                torch.save((weights, numbers), out / f"{ranks.size}-{zero}-{spoilt}.pt")


def test_the_rest_of_a_step_counts_whose_last_batch_is_bad(data: Path, tmp_path: Path) -> None:
    """As on one process: the gradients of the other batches are averaged, divided by their count, clipped and used,
    and the next step begins with the new weights."""
    for size in (1, 2):
        together(size, _last_is_bad, data, tmp_path)
    expected, numbers = torch.load(tmp_path / "1-0-nan.pt")
    for path in tmp_path.glob("2-*.pt"):
        weights, found = torch.load(path)
        for one, other in zip(numbers, found, strict=True):
            assert other == pytest.approx(one, rel=1e-5), path
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def _stop_second(ranks: Ranks, data: Path, out: Path) -> None:
    trainer = make_trainer(experiment(*ALL_BATCHES, "parallel.zero=3"), read_data(data), out, ranks)
    stop = Termination()
    step = trainer.step

    def stopping(*arguments):  # type: ignore[no-untyped-def]
        record = step(*arguments)
        stop.requested = trainer.progress.step == 2 and ranks.rank == 1
        return record

    trainer.step = stopping  # type: ignore[method-assign]
    result = trainer.run(stop)
    assert (result.reason, result.step) == ("terminated", 2)
    with pytest.raises(Terminated):
        if stop.requested:
            raise Terminated


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    together(2, _stop_second, data, tmp_path)
    assert newest(tmp_path)["step"] == 2 and records(tmp_path, "end")[-1]["reason"] == "terminated"


def test_a_signal_while_processes_ask_each_other_is_not_lost() -> None:
    """The first waits there for the slowest most of the time."""
    stop = Termination()

    class Asking(Ranks):
        def sum(self, values: Sequence[float]) -> list[float]:
            found = list(values)
            stop._handle(signal.SIGTERM, None)
            return found

    trainer: Any = SimpleNamespace(ranks=Asking(0, 2, 0))
    Trainer._check(trainer, stop)
    assert stop.requested
    with pytest.raises(Terminated):
        Trainer._check(trainer, stop)


LEAVE = """
from pathlib import Path
from asr.training.ranks import started
with started("cpu", 60.0) as ranks:
    import torch.distributed.fsdp
    ranks.wait()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert names and not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the names of threads, as Linux tells them")
def test_no_thread_of_the_processes_talk_outlives_it() -> None:
    """One that does may abort the process when its interpreter shuts down, after all of its work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", LEAVE]
    both = [
        subprocess.Popen(words, env={**where, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


ENDS = {
    "both are the user's": (UserError("x"), UserError("x"), "2"),
    "the second follows from it": (UserError("x"), RuntimeError("the other has closed the connection"), "2"),
    "both start again": (StartAgain("x"), StartAgain("x"), "1"),
    "neither is the user's": (RuntimeError("x"), RuntimeError("x"), "1"),
    "the second is the user's": (RuntimeError("x"), UserError("x"), "1"),
}
"""The error of the process that fails first, the other's, and the exit code of the other."""


def _refused(ranks: Ranks, out: Path) -> None:
    assert ranks.store is not None
    for name, (*errors, _) in ENDS.items():
        own = dataclasses.replace(ranks, store=dist.PrefixStore(name, ranks.store))
        if not ranks.first:
            ranks.store.wait([f"{name} failed"], timedelta(seconds=30))
        try:
            with one_speaks(own):
                raise errors[ranks.rank]
        except SystemExit as end:
            found = str(end.code)
        except Exception as error:
            found = type(error).__name__
        (out / f"{name} {ranks.rank}").write_text(found, encoding="utf-8")
        if ranks.first:
            ranks.store.set(f"{name} failed", "")


def test_all_end_with_the_code_of_the_first_error(tmp_path: Path) -> None:
    """Only what the user can mend ends with 2, whichever process is seen to end first."""
    together(2, _refused, tmp_path)
    for name, (error, _, code) in ENDS.items():
        assert (tmp_path / f"{name} 0").read_text(encoding="utf-8") == type(error).__name__
        assert (tmp_path / f"{name} 1").read_text(encoding="utf-8") == code, name


SLOW = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
print("up", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


def test_processes_have_the_whole_grace_to_save(tmp_path: Path) -> None:
    """Not the 30 s that torchrun leaves them: here less, which takes less time to see."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["--standalone", "--nproc-per-node=1", "--max-restarts=0", str(tmp_path / "slow.py")]
    code = f"import sys; from asr.training import launch; launch.GRACE_S = 2.0; sys.exit(launch.main({words}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    begin = time.monotonic()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert 2.0 <= time.monotonic() - begin < 25.0
