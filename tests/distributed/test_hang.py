"""A process that hangs is named with its stack, and all end; a slow one is left alone."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from asr.training.faults import BadBatches, Termination
from asr.training.ranks import Ranks
from asr.training.trainer import Trainer
from asr.training.trainer_config import ParallelConfig
from asr.training.watchdog import Seen, State, Watchdog, find_hung
from tests.asr.training.runs import experiment, make_trainer, read_data
from tests.distributed.processes import start, together

LIMIT_S = 4.0
SETTINGS = ["data.max_duration_s=1.3", f"parallel.hang_timeout_s={LIMIT_S}", "training.max_epochs=2"]


def lie_down() -> None:
    threading.Event().wait(300)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(300)


def stop_the_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _compiled(trainer: Trainer) -> Trainer:
    """After a first step, which may have to compile for longer than these limits."""
    batches, own = next(trainer.batches_of_epoch())
    trainer.step(batches, BadBatches(trainer.out_dir, 0, 0, lambda **_: None, print), own)
    return trainer


def _hang(ranks: Ranks, data: Path, out: Path, name: str, zero: int) -> None:
    trainer = _compiled(make_trainer(experiment(*SETTINGS, f"parallel.zero={zero}"), read_data(data), out, ranks))
    step = trainer.step

    def timed_step(*arguments):  # type: ignore[no-untyped-def]
        if ranks.rank == 1 and trainer.progress.step == 3:
            (out / "step").touch()  # what the limit counts from is in here
        return step(*arguments)

    trainer.step = timed_step  # type: ignore[method-assign]

    def forward(*_: object) -> None:
        if ranks.rank == 1 and trainer.progress.step == 3:
            (out / "begin").touch()
            globals()[name]()

    # in the middle of a step, where others wait for gradients or for weights
    trainer.model.encoder.blocks[0].register_forward_pre_hook(forward)
    trainer.run(Termination())


@pytest.mark.parametrize(
    ("name", "zero", "where"),
    [
        ("lie_down", 3, r"it is in wait \(threading.py:\d+\) < wait .* < lie_down \(test_hang.py:\d+\)"),
        ("hold_the_interpreter", 0, r"it is in hold_the_interpreter \(test_hang.py:\d+\) < forward"),
        ("stop_the_process", 3, "it does not run at all"),
    ],
)
def test_a_hung_process_is_named(name: str, zero: int, where: str, data: Path, tmp_path: Path, capfd) -> None:
    processes = start(2, _hang, data, tmp_path, name, zero).processes
    try:
        processes[0].join(120)
        hung_s, step_s = (time.time() - (tmp_path / name).stat().st_mtime for name in ("begin", "step"))
        if name == "lie_down":
            processes[1].join(5)
        ended = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    error = capfd.readouterr().err
    print(error)
    found = re.findall(r"^error: (rank \d of 2) \(\S+, process (\d+)\) hangs .*hang_timeout_s=4\).*$", error, re.M)
    assert found == [("rank 1 of 2", str(processes[1].pid))]
    assert re.search(where, error)
    assert ended[0] == 1 and LIMIT_S <= step_s and hung_s < LIMIT_S + 6
    # one that holds the interpreter, or is stopped, is torchrun's to kill
    assert ended[1] == (1 if name == "lie_down" else None)
    path = tmp_path / "hangs" / "rank-1.txt"
    if name == "stop_the_process":
        assert not path.exists()
    else:
        assert f"all its stacks: {path}" in error
        assert f"in {name}" in path.read_text(encoding="utf-8")


def _slow(ranks: Ranks, data: Path, out: Path) -> None:
    trainer = _compiled(make_trainer(experiment(*SETTINGS), read_data(data), out, ranks))
    step, save = trainer.step, trainer.save

    def slow_step(*arguments):  # type: ignore[no-untyped-def]
        time.sleep(0.7 * (ranks.rank == 1))
        return step(*arguments)

    def slow_save():  # type: ignore[no-untyped-def]
        time.sleep(2 * LIMIT_S * (ranks.rank == 0 and trainer.progress.step == 2))
        return save()

    trainer.step, trainer.save = slow_step, slow_save  # type: ignore[method-assign]
    assert trainer.run(Termination()).reason == "finished"
    assert trainer.progress.step > 4


@pytest.mark.slow
def test_slow_steps_and_a_slow_checkpoint_are_left_alone(data: Path, tmp_path: Path) -> None:
    together(2, _slow, data, tmp_path)
    assert not (tmp_path / "hangs").exists()


def test_who_hangs() -> None:
    """By what the processes posted: 10 s without progress are too long, and each beats every second."""

    def hung(*processes: tuple[int, float, float, float]) -> list[int]:
        states = [State(1, entered, limit_s, "") for entered, limit_s, _, _ in processes]
        return find_hung(states, [Seen(100 - idle, 100 - silent) for _, _, idle, silent in processes], 100.0, 10.0)

    waits, works = (8, 10.0, 30.0, 1.0), (7, 10.0, 9.0, 1.0)
    assert hung(waits, works) == []
    assert hung(waits, (7, 10.0, 10.0, 1.0)) == [1]
    assert hung(waits, (7, 60.0, 30.0, 1.0)) == []  # writes a checkpoint
    assert hung((8, 10.0, 1.0, 1.0), (7, 10.0, 30.0, 1.0)) == []  # has waited for long, and may go on since 1 s
    assert hung((8, 10.0, 10.0, 1.0), (7, 10.0, 30.0, 1.0)) == [1]
    assert hung(waits, (8, 10.0, 10.0, 6.0)) == [1]  # stopped within an operation that it has entered
    assert hung(waits, (7, 60.0, 10.0, 10.0)) == [1]  # or while it wrote a checkpoint
    assert hung(waits, waits) == [0, 1]
    assert hung(waits, (7, 0.0, 30.0, 30.0)) == [0]  # has ended its watch: only the first is left
    assert hung((7, 0.0, 30.0, 30.0), (7, 0.0, 30.0, 30.0)) == []


def test_one_process_and_no_limit_need_no_watch(tmp_path: Path) -> None:
    watchdog, before = Watchdog(Ranks(), ParallelConfig(), tmp_path / "hangs"), threading.active_count()
    watchdog.start()
    assert threading.active_count() == before and not (tmp_path / "hangs").exists()
    watchdog.stop()


@pytest.mark.parametrize(("value", "nearest"), [(61, "60"), (-1, "0")])
def test_a_limit_beyond_that_of_the_run_is_refused(value: int, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=rf"hang_timeout_s={value} is outside \[0, 60\].*nearest that does is {nearest} "
    ):
        ParallelConfig(timeout_s=60, hang_timeout_s=value)
