"""The measurements of memory, at tiny size; their bounds hold for large models and are not asked for here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from asr.bench.__main__ import main
from asr.bench.parallel.shares import KINDS, SHARED


def bench(*words: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "asr.bench", "parallel", *words], capture_output=True, text=True, timeout=280
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_shares_of_two_processes() -> None:
    _, (one, *many) = bench("shares", "--preset", "xs", "--nproc", "2", "--zero", "0,3")
    assert one["nproc"] == 1 and one["optimizer_bytes"] == pytest.approx(2 * one["parameters_bytes"], rel=0.01)
    for case in many:
        for kind in KINDS:
            expected = 0.5 if kind in SHARED[case["zero"]] else 1.0
            assert case[f"{kind}_ratio"] == pytest.approx(expected, rel=0.05), (case["zero"], kind)
        assert case["peak_bytes"] >= case["resident_bytes"] > case["anonymous_bytes"] > 2**26


def test_checkpointing_by_mode() -> None:
    words = ["--presets", "xs", "--audio-s", "8", "--utterance-s", "4", "--steps", "1"]
    _, found = bench("checkpointing", *words)
    assert [result["checkpointing"] for result in found] == ["none", "selective", "full"]
    assert all(result["equal"] and result["step_ms"] > 0 for result in found)
    assert 1 == found[0]["less"] < found[1]["less"] < found[2]["less"]


@pytest.mark.slow
def test_offload_frees_memory_and_keeps_to_a_limit() -> None:
    status, (plain, mapped, bounded, bounded_mapped, summary) = bench("offload", "--preset", "m", "--steps", "2")
    assert status == 0 and summary["within"], summary
    assert plain["weights"] == mapped["weights"] == bounded_mapped["weights"] != bounded["weights"]
    assert mapped["freed"] >= 0.9 and "out of memory" in bounded["error"] and bounded_mapped["error"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shares", "--zero", "4"], "--zero 4 must be of 0, 1, 2, 3"),
        (["shares", "--nproc", "two"], "--nproc two and --zero"),
        (["checkpointing", "--presets", "tiny"], "--presets tiny is no preset"),
        (["offload", "--steps", "0"], "--steps 0 must be at least 1"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parallel", *words]) == 2
    assert message in capsys.readouterr().err
