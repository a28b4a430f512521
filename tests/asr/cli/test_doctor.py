"""`asr doctor`: its text, its JSON, its exit code. What it finds is tested in tests/asr/test_environment.py."""

from __future__ import annotations

import json

import pytest

from asr import environment
from asr.cli import doctor
from asr.cli.main import main
from asr.environment import Check, OptionalPart, PartState

PART = OptionalPart("k2", "k2", "import k2", "comparisons", "pip install k2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child processes: one part of each state."""
    states = [PartState(PART, "ok", "1.2"), PartState(PART, "missing"), PartState(PART, "broken", "1.3", "SIGSEGV")]
    monkeypatch.setattr(environment, "probe_all", lambda parts: states)


def test_text_is_aligned_and_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert all(line[21] == " " and line[22] != " " for line in rows)
    assert "  k2                  ok       1.2        comparisons" in out
    assert "  k2                  missing             comparisons" in out
    assert "  k2                  broken              comparisons  [SIGSEGV]" in out
    assert out.count("pip install k2") == 2
    assert "training.precision=auto means" in out
    assert out.endswith("Everything that is needed works.\n")


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["packages"]["torch"]
    assert [p["state"] for p in found["optional"]] == ["ok", "missing", "broken"]
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["auto"] in ("bf16", "fp32")
    assert {c["name"] for c in found["self_test"]} == {"transducer loss", "features", "scoring"}


def test_a_failed_self_test_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "self_test", lambda: [Check("transducer loss", False, "differs by 1.0")])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED   differs by 1.0" in out and "does not work" in out


def test_a_missing_required_package_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "REQUIRED", (*environment.REQUIRED, "there-is-no-such-package"))
    assert main(["doctor"]) == 1
    assert "missing: pip install there-is-no-such-package" in capsys.readouterr().out


def test_cuda_devices_are_listed() -> None:
    found = doctor.collect()
    found["cuda"] = [{"name": "GPU", "memory_gib": 80.0, "capability": "9.0", "auto": "bf16", "native_bf16": True}]
    assert "  cuda:0              GPU, 80.0 GiB, compute capability 9.0, auto means bf16" in doctor.lines(found)
