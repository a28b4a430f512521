"""The benchmark that kills workers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from asr.bench.__main__ import main


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
