"""What users get wrong, over the whole toolkit: exit code 2, one line that starts with ``error:``, nothing lost.

Every row of ``CASES`` is one command line on an experiment that was run to its end before, sometimes with a damage done
first. ``expected`` are parts of the one error line: what is wrong, and what to do about it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import recipes.cli
from asr.cli.main import main as asr_main
from tests.integration.bad_runs import CASES, RECIPE, Case
from tests.integration.damages import World, last_step
from tests.integration.tiny import write_config, write_corpus


def _main(words: list[str]) -> int:
    return asr_main(words[1:]) if words[0] == "asr" else recipes.cli.main(words[1:])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a configuration, and an experiment that was run to its end."""
    root = tmp_path_factory.mktemp("finished")
    write_corpus(root / "corpus")
    config = write_config(root / "tiny.yaml")
    words = ["yesno", "--exp-dir", str(root / "exp"), "--corpus-dir", str(root / "corpus"), "--num-recombined", "0"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recipes.cli, "default_config", lambda corpus: config)
        assert recipes.cli.main([*words, "--num-jobs", "1"]) == 0
    return root


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("corpus", "exp"):
        shutil.copytree(finished / name, tmp_path / name)
    config = write_config(tmp_path / "tiny.yaml")
    monkeypatch.setattr(recipes.cli, "default_config", lambda corpus: config)
    return World(tmp_path, tmp_path / "exp", tmp_path / "corpus", config, monkeypatch)


def _snapshot(exp: Path) -> dict[str, str]:
    """Hash of every result. Markers are not results: a stage that starts again takes its own away first."""
    files = (path for path in exp.rglob("*") if path.is_file() and ".done" not in path.parts)
    return {str(path.relative_to(exp)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_bad_run_is_told_in_one_line_and_loses_nothing(
    case: Case, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "tmp": world.tmp,
        "exp": world.exp,
        "corpus": world.corpus,
        "config": world.config,
        "valid": world.exp / "data" / "features" / "cuts_valid.jsonl.gz",
        "best": world.exp / "train" / "best.pt",
        "step": last_step(world.exp),
    }
    if case.damage is not None:
        case.damage(world)
    before = _snapshot(world.exp)
    capsys.readouterr()

    code = _main(shlex.split(case.command.format_map(names)))

    world.monkeypatch.undo()
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, captured.err
    assert code == 2, errors
    for part in case.expected:
        assert part.format_map(names).lower() in errors[0].lower()
    assert "Traceback" not in captured.err + captured.out
    after = _snapshot(world.exp)
    lost = [name for name in before if before[name] not in (after.get(name), after.get(_set_aside(name)))]
    assert [name for name in lost if not name.startswith(case.may_change)] == []
    assert [name for name in after if name.endswith((".partial", ".tmp"))] == []


def _set_aside(name: str) -> str:
    return re.sub(r"^(train|decode)/", r"\1.old-1/", name)


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)


def test_after_a_full_disk_the_same_command_goes_on(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(RECIPE.format(exp=world.exp, corpus=world.corpus) + " --stage train")
    with pytest.MonkeyPatch.context() as full:
        real = torch.save
        saved: list[Path] = []

        def save(payload: Any, file: Any) -> None:
            if saved:
                raise OSError(errno.ENOSPC, "No space left on device")
            saved.append(Path(file.name))
            real(payload, file)

        full.setattr(torch, "save", save)
        assert _main([*words, "--force"]) == 2
    good = list((world.exp / "train" / "checkpoints").glob("step-*.pt"))
    assert len(good) == 1
    capsys.readouterr()
    assert _main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("%WER ")
    with open(world.exp / "train" / "metrics.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    begin = max(number for number, record in enumerate(records) if record["kind"] == "start")
    assert next(record["step"] for record in records[begin:] if record["kind"] == "train") == 3
