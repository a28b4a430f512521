"""A worker that is killed comes back, and the benchmark that kills workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from asr.bench.__main__ import main
from asr.bench.kills import children
from asr.checkpoint import step_checkpoints
from asr.training.launch import torchrun
from tests.asr.training.runs import SETTINGS, newest
from tests.distributed.processes import ALL_BATCHES


def command(data: Path, out: Path, *settings: str) -> list[str]:
    words = ["--out-dir", str(out), "--device", "cpu", "--train-cuts", str(data / "cuts_train.jsonl.gz")]
    words += ["--valid-cuts", str(data / "cuts_valid.jsonl.gz")]
    return torchrun(2, 1, "train", *words, *(f"--set={setting}" for setting in (*SETTINGS, *ALL_BATCHES, *settings)))


@pytest.mark.slow
def test_torchrun_trains_and_a_killed_worker_comes_back(data: Path, tmp_path: Path) -> None:
    """SIGKILL to one worker: all start anew from the newest checkpoint, and end with what a run in peace ends with.

    Also where the command says --resume none, which is where the run began and not where it goes on.
    """
    limits = ["parallel.zero=3", "training.max_epochs=6", "training.checkpoint_every_steps=1", "training.keep_last=3"]
    peace = subprocess.run(command(data, tmp_path / "peace", *limits), capture_output=True, text=True, timeout=300)
    assert peace.returncode == 0, peace.stderr[-3000:]
    assert re.search(r"finished at step \d+; report", peace.stdout) and peace.stdout.count("finished at step") == 1
    anew = [*command(data, tmp_path / "killed", *limits), "--resume", "none"]
    process = subprocess.Popen(anew, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(step_checkpoints(tmp_path / "killed" / "checkpoints")) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "resumed from" in output
    assert "was ended by SIGKILL; all start anew at the newest checkpoint (1 of 1 times)" in output
    left, right = newest(tmp_path / "peace"), newest(tmp_path / "killed")
    assert left["step"] == right["step"]
    assert all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"])


@pytest.mark.slow
def test_a_trial_ends_in_equal_weights() -> None:
    words = [sys.executable, "-m", "asr.bench", "kills", "--trials", "2", "--zero", "1", "--seed", "5"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    *trials, summary = map(json.loads, done.stdout.splitlines())
    assert [t["equal"] for t in trials] == [True, True] and summary["equal"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kils"], "unknown benchmark kils; did you mean kills?"),
        (["kills", "--nproc", "1"], "--nproc 1 at least 2"),
        (["kills", "--zero", "4"], "invalid choice: 4"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words]) == 2
    assert message in capsys.readouterr().err
