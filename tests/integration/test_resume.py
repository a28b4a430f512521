"""A run that was killed and went on is the run that was not, to the bit: weights, averages, every logged loss."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from asr import checkpoint
from tests.asr.training.runs import CLOCK, differences, newest, records, state_of
from tests.integration.resume_run import Death, members, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def finish(process: Any, *, killed: bool, timeout_s: float = 90.0) -> None:
    """Waits for the end, and for that of the data workers, which see within seconds that their parent is gone."""
    process.join(timeout_s)
    try:
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
        deadline = time.monotonic() + 10
        while left := members(process.pid):
            assert time.monotonic() < deadline, f"data workers {left} were left behind"
            time.sleep(0.05)
    finally:
        process.kill()


def logged(out: Path) -> dict[tuple[str, int], set[str]]:
    """What was logged for each step, by all processes together, without what depends on the clock."""
    found: dict[tuple[str, int], set[str]] = {}
    for record in records(out):
        if record["kind"] in ("train", "valid"):
            text = repr({name: value for name, value in record.items() if name not in CLOCK})
            found.setdefault((record["kind"], record["step"]), set()).add(text)
    return found


def results(out: Path) -> dict[str, Any]:
    """Everything that must not depend on an interruption."""
    return {
        "newest": state_of(out),
        "best": torch.load(out / "best.pt", weights_only=True),
        "names": [path.name for path in checkpoint.step_checkpoints(out / "checkpoints")],
        "logged": logged(out),
    }


def assert_same(out: Path, reference: dict[str, Any]) -> None:
    assert differences(reference, results(out)) == []
    assert not list(out.rglob("*.partial")), "a half-written file was left"
    assert records(out)[-1]["reason"] == "finished"


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "train"
    finish(start(folder, out), killed=False)
    steps = records(out, "train")
    assert len(steps) >= 12 and len(logged(out)) == len(steps) + 3
    assert any(step["batch"] % 2 for step in steps), "no epoch ends within an accumulated step"
    payload = newest(out)
    assert differences(payload["model"], payload["training"]["ema"]) != []
    started = time.monotonic()
    finish(start(folder, out.with_name("again")), killed=False)
    found = results(out)
    assert_same(out.with_name("again"), found)
    return {**found, "seconds": time.monotonic() - started}


def without_seconds(reference: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reference.items() if name != "seconds"}


def test_killed_twice_and_once_while_writing_a_checkpoint(
    folder: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "train"
    finish(start(folder, out, Death("write", 2, 0.6)), killed=True)
    assert [p.name for p in (out / "checkpoints").glob(".*.partial")], "it did not die while writing"
    before = len(records(out, "train"))
    finish(start(folder, out, Death("step", before + 3)), killed=True)
    assert len(records(out, "train")) > before
    finish(start(folder, out), killed=False)
    repeated = len(records(out, "train")) - len([1 for kind, _ in reference["logged"] if kind == "train"])
    assert repeated >= 1, "the second death lost no step"
    assert_same(out, without_seconds(reference))


def test_the_pruned_loss_is_resumed_within_its_warm_up(folder: Path, tmp_path: Path) -> None:
    settings = "loss.method=pruned", "loss.prune_range=2", "loss.simple_warmup=0.8"
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finish(start(folder, whole, None, settings), killed=False)
    finish(start(folder, out, Death("step", 5), settings), killed=True)
    finish(start(folder, out, None, settings), killed=False)
    assert len(records(out, "start")) == 2
    assert_same(out, results(whole))


def draw(trial: int) -> tuple[Death | None, float]:
    """A point to die at within the process, or None and the moment, as a fraction of a whole run, to be killed at."""
    random_ = random.Random(trial)
    moment = random_.uniform(0.05, 0.9)
    if trial % 2:
        return None, moment
    point = random_.choice(["write", "write", "fsync", "replace", "prune"])
    return Death(point, random_.randint(1, 6), random_.random()), moment


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_run_that_is_killed_again_and_again(folder: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Each process gets a few steps further, or only as far as its next checkpoint."""
    out = tmp_path / "train"
    random_ = random.Random(99)
    for _ in range(8):
        death = Death(random_.choice(["write", "replace", "prune", "fsync"]), random_.randint(2, 3), random_.random())
        process = start(folder, out, death)
        process.join(90)
        if process.exitcode == 0:
            break
        finish(process, killed=True)
    finish(start(folder, out), killed=False)
    assert len(records(out, "start")) >= 5
    assert_same(out, without_seconds(reference))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_20_of_20_kills_at_random_moments(folder: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    deaths = 0
    for trial in range(20):
        out = tmp_path / f"{trial}"
        death, moment = draw(trial)
        process = start(folder, out, death)
        if death is None:
            while True:
                process.join(moment * reference["seconds"])
                if process.exitcode is None:
                    break
                finish(process, killed=False)  # quicker than the reference: it was over before
                moment *= 0.7
                out = tmp_path / f"{trial}-{moment}"
                process = start(folder, out)
            process.kill()
        finish(process, killed=True)
        deaths += 1
        finish(start(folder, out), killed=False)
        assert_same(out, without_seconds(reference))
    assert deaths == 20
