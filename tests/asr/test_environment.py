"""What the doctor finds: broken optional parts do not take it with them, and the self-test sees a wrong loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import losses
from asr import environment
from asr.environment import OptionalPart, probe, probe_all, self_test

MODULES = {
    "part_good": "",
    "part_raising": "raise OSError('libsomething.so.12: cannot open shared object file')",
    "part_crashing": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "part_leaving": "import sys; sys.exit(3)",
    "part_hanging": "import time; time.sleep(60)",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, OptionalPart]:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = [*MODULES, "part_absent"]
    return {name: OptionalPart(name, name, f"import {name}", "nothing", f"pip install {name}") for name in names}


def test_a_part_that_imports_is_ok(parts: dict[str, OptionalPart]) -> None:
    assert probe(parts["part_good"], 60).state == "ok"


def test_a_part_that_is_absent_is_missing(parts: dict[str, OptionalPart]) -> None:
    assert probe(parts["part_absent"], 60).state == "missing"


@pytest.mark.parametrize(
    ("name", "limit_s", "detail"),
    [
        ("part_raising", 60, "OSError: libsomething.so.12: cannot open shared object file"),
        ("part_crashing", 60, "its import kills the interpreter (SIGSEGV)"),
        ("part_leaving", 60, "exit code 3"),
        ("part_hanging", 1, "its import did not end within 1 s"),
    ],
)
def test_a_part_that_fails_says_why(parts: dict[str, OptionalPart], name: str, limit_s: float, detail: str) -> None:
    found = probe(parts[name], limit_s)
    assert (found.state, found.detail) == ("broken", detail)


def test_probe_all_keeps_the_order(parts: dict[str, OptionalPart]) -> None:
    wanted = [parts["part_crashing"], parts["part_absent"], parts["part_good"]]
    assert [(s.part, s.state) for s in probe_all(wanted)] == list(zip(wanted, ["broken", "missing", "ok"], strict=True))


def test_the_present_working_folder_is_not_a_part(
    tmp_path: Path, parts: dict[str, OptionalPart], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "part_good.py").write_text("raise OSError('the wrong one')")
    monkeypatch.chdir(folder)
    assert probe(parts["part_good"], 60).state == "ok"


def test_self_test_passes() -> None:
    assert [(c.name, c.ok) for c in self_test()] == [("transducer loss", True), ("features", True), ("scoring", True)]


def test_self_test_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.transducer_loss

    def wrong(enc: torch.Tensor, *args: object, **options: object) -> losses.TransducerLossOutput:
        out = right(enc, *args, **options)  # type: ignore[arg-type]
        return out._replace(loss=out.loss + 1e-6 * (enc - enc.detach()).sum())  # the same value, another gradient

    monkeypatch.setattr(losses, "transducer_loss", wrong)
    check = self_test()[0]
    assert not check.ok and "differs by 1.0e-06" in check.detail


def test_cpu_says_what_is_known() -> None:
    found = environment.cpu()
    assert found["model"] and found["cores"] >= 1
    assert found.get("memory_gib", 1) > 0
    assert environment.precision("cpu")["auto"] in ("bf16", "fp32")


def test_version_of_an_absent_distribution_is_empty() -> None:
    assert environment.distribution_version("there-is-no-such-distribution") == ""
