"""What users get wrong, over the whole toolkit: exit code 2, one line that starts with ``error:``, nothing lost.

Every row of ``CASES`` is one command line on an experiment that was run to its end before, sometimes with a damage done
first. ``expected`` are parts of the one error line: what is wrong, and what to do about it.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import recipes.cli
from asr.cli.main import main as asr_main
from tests.integration.tiny import write_config, write_corpus

RECIPE = "recipes yesno --exp-dir {exp} --corpus-dir {corpus} --num-recombined 0 --num-jobs 1"
TRAIN = (
    "asr train --config {config} --train-cuts {exp}/data/features/cuts_train.jsonl.gz "
    "--valid-cuts {exp}/data/features/cuts_valid.jsonl.gz --tokenizer {exp}/tokenizer/tokenizer.json"
)
STEP = "train/checkpoints/step-*.pt"
DECODE = "asr decode --cuts {exp}/data/cuts_test.jsonl.gz --out-dir {tmp}/decoded"
TRANSCRIBE = "asr transcribe --checkpoint {exp}/train/average.pt"


@dataclass
class World:
    """Folders that a case may use and damage; they are copies for this one case."""

    tmp: Path
    exp: Path
    corpus: Path
    config: Path
    monkeypatch: pytest.MonkeyPatch

    def recordings(self) -> list[Path]:
        return sorted(self.corpus.glob("*.wav"))


@dataclass(frozen=True)
class Case:
    name: str
    command: str
    expected: tuple[str, ...]
    damage: Callable[[World], Any] | None = None
    may_change: tuple[str, ...] = field(default=())
    """Where in the experiment this command is there to write anew."""


# -- damages ----------------------------------------------------------------------------------------------------------


def _write(name: str, text: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        path = world.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return damage


def _cut_short(name: str) -> Callable[[World], Any]:
    """Truncates a file of the experiment to half of its size."""

    def damage(world: World) -> None:
        path = world.exp / name
        os.truncate(path, path.stat().st_size // 2)

    return damage


def _damage_all_checkpoints(world: World) -> None:
    for path in world.exp.glob(STEP):
        os.truncate(path, 1000)


def _flip_a_byte(name: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        content = bytearray((world.exp / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (world.exp / name).write_bytes(content)

    return damage


def _overwrite(name: str, text: str) -> Callable[[World], Any]:
    return lambda world: (world.exp / name).write_text(text, encoding="utf-8")


def _remove(*names: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        for name in names:
            path = world.exp / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _empty_manifest(name: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        with gzip.open(world.exp / name, "wt"):
            pass

    return damage


def _spoil_recordings(count: int, text: str = "this is no audio") -> Callable[[World], Any]:
    def damage(world: World) -> None:
        for path in world.recordings()[:count]:
            path.write_text(text)

    return damage


def _truncate_a_recording(world: World) -> None:
    path = world.recordings()[0]
    os.truncate(path, path.stat().st_size // 2)


def _failing(error: OSError, when: Callable[[str], bool]) -> Callable[[World], Any]:
    """Writing to a file whose name fits ``when`` fails as the operating system would fail it.

    A patched ``open`` and not a real full disk or missing permission: the first cannot be had in a test, and the second
    is nothing to the superuser that tests often run as.
    """
    import builtins

    def damage(world: World) -> None:
        real = builtins.open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
            if isinstance(name, str) and set(mode) & set("wax+") and name.startswith(str(world.tmp)) and when(name):
                raise type(error)(error.errno, error.strerror, name)
            return real(file, mode, *args, **kwargs)

        world.monkeypatch.setattr(builtins, "open", opening)
        world.monkeypatch.setattr("io.open", opening)  # what pathlib opens with

    return damage


FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def _disk_fills_while_saving(world: World) -> None:
    def save(payload: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    world.monkeypatch.setattr(torch, "save", save)


def _no_network(world: World) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    world.monkeypatch.setattr(urllib.request, "urlopen", refuse)


def _rename_recordings(world: World) -> None:
    for number, path in enumerate(world.recordings()):
        path.rename(path.with_name(f"{number}_jackson_{number % 5}.wav"))


def _other_torch_file(world: World) -> None:
    torch.save({"weights": torch.zeros(3)}, world.tmp / "other.pt")


def _newer_format(world: World) -> None:
    payload = torch.load(world.exp / "train" / "best.pt", weights_only=True)
    torch.save({**payload, "format_version": 99}, world.tmp / "newer.pt")


def _nan_audio(world: World) -> None:
    soundfile.write(world.tmp / "nan.wav", np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")


def _empty_folder(world: World) -> None:
    (world.tmp / "none").mkdir()


# -- the table --------------------------------------------------------------------------------------------------------

VALID_STAGES = "0 download, 1 prepare, 2 features, 3 tokenizer, 4 train, 5 average, 6 decode"

COMMAND_LINE = [
    Case("unknown corpus", "recipes yesnoo", ("unknown corpus yesnoo", "did you mean yesno?")),
    Case("option before the corpus", "recipes --stage 2 yesno", ("name of a corpus comes first", "yesno")),
    Case("unknown option", RECIPE + " --corpus-dri x", ("unknown option --corpus-dri", "did you mean --corpus-dir")),
    Case("abbreviated option", RECIPE + " --dry", ("unknown option --dry", "did you mean --dry-run")),
    Case("option of another corpus", RECIPE + " --held-out-speaker jackson", ("unknown option --held-out-speaker",)),
    Case("option without value", RECIPE + " --seed", ("--seed", "expected one argument")),
    Case("seed that is no number", RECIPE + " --seed one", ("--seed", "'one'")),
    Case("no processes", RECIPE + " --num-jobs 0", ("--num-jobs 0", "at least 1")),
    Case("corpus option out of range", RECIPE + " --num-recombined -1", ("num_recombined=-1 is negative",)),
    Case("stage out of range", RECIPE + " --stage 7", ("stage 7 is out of range", VALID_STAGES)),
    Case("negative stage", RECIPE + " --stop-stage -1", ("stage -1 is out of range", VALID_STAGES)),
    Case("misspelled stage", RECIPE + " --stage tokenise", ("stage tokenise is not a stage", "did you mean tokenizer")),
    Case("stages in the wrong order", RECIPE + " --stage 4 --stop-stage 2", ("--stage 4 comes after --stop-stage 2",)),
    Case("unknown device", RECIPE + " --device gpu", ("--device gpu is unknown", "cuda")),
    Case("device that is not there", RECIPE + " --device cuda:99", ("cuda:99", "use --device cpu")),
    Case("unknown command", "asr trian", ("unknown command trian", "did you mean train")),
    Case("missing required option", "asr train --out-dir {tmp}/out", ("required", "--train-cuts")),
    Case("misspelled required option", "asr decode --chekpoint x", ("--chekpoint", "did you mean --checkpoint")),
    Case("unknown search", DECODE + " --checkpoint {best} --search bema", ("--search", "'bema'", "greedy")),
    Case("no files", TRANSCRIBE, ("required", "FILE")),
]

CONFIGURATION = [
    Case("misspelled key", RECIPE + " --set optim.lrr=1", ("'optim.lrr'", "optim.lr")),
    Case("key of the wrong group", RECIPE + " --set lr=1", ("'lr'", "optim.lr")),
    Case("wrong type", RECIPE + " --set optim.lr=fast", ("optim.lr", "fast")),
    Case("value out of range", RECIPE + " --set training.max_epochs=0", ("training.max_epochs=0", "at least 1")),
    Case("not one of the choices", RECIPE + " --set tokenizer.kind=letters", ("kind", "letters", "char")),
    Case("override without value", RECIPE + " --set optim.lr", ("'optim.lr'", "key.name=value")),
    Case("group set to a value", RECIPE + " --set optim=3", ("optim", "group of settings")),
    Case("unknown preset", RECIPE + " --set model.preset=huge", ("model.preset='huge'", "xs, s, m, l, xl, xxl")),
    Case("settings that contradict", RECIPE + " --set loss.ctc_weight=0.3", ("loss.ctc_weight=0.3", "model.ctc=true")),
    Case("missing configuration", RECIPE + " --config {tmp}/none.yaml", ("none.yaml", "does not exist")),
    Case("configuration is a folder", RECIPE + " --config {tmp}", ("cannot be read",)),
    Case("broken YAML", RECIPE + " --config {tmp}/a.yaml", ("a.yaml", "not valid YAML"), _write("a.yaml", "a: [1")),
    Case("YAML without names", RECIPE + " --config {tmp}/a.yaml", ("a.yaml", "list"), _write("a.yaml", "- 1\n- 2\n")),
    Case(
        "misspelled key in YAML",
        RECIPE + " --config {tmp}/a.yaml",
        ("'data.max_duration'", "a.yaml", "data.max_duration_s"),
        _write("a.yaml", "data: {max_duration: 3}"),
    ),
    Case("setting of the training at decoding", DECODE + " --checkpoint {best} --set model.ctc=true", ("'model'",)),
]

CORPUS = [
    Case("missing corpus", RECIPE + " --corpus-dir {tmp}/none", ("{tmp}/none is not a folder", "--stage download")),
    Case("empty corpus", RECIPE + " --corpus-dir {tmp}/none", ("{tmp}/none is empty",), _empty_folder),
    Case("corpus is a file", RECIPE + " --corpus-dir {config}", ("is not a folder",)),
    Case(
        "another corpus",
        RECIPE + " --stage download --stop-stage prepare",
        ("recordings of yesno", "--stage prepare"),
        _rename_recordings,
        ("data/corpus.json",),
    ),
    Case(
        "half a corpus",
        RECIPE + " --stage download --stop-stage prepare",
        ("holds 59 recordings", "60"),
        lambda world: world.recordings()[0].unlink(),
        ("data/corpus.json",),
    ),
    Case("no network", "recipes yesno --exp-dir {tmp}/new --download-dir {tmp}/dl", ("--corpus-dir",), _no_network),
    Case(
        "truncated recording under strict",
        RECIPE + " --strict --exp-dir {tmp}/new",
        ("1 of 60 rows", "strict", "truncated", "bad_rows.txt"),
        _truncate_a_recording,
    ),
    Case(
        "strict on data that was prepared without",
        RECIPE + " --strict --stage download",
        ("1 of 60 rows", "strict"),
        _spoil_recordings(1),
        ("data/",),
    ),
    Case(
        "more than 10% bad rows",
        RECIPE + " --exp-dir {tmp}/new",
        ("7 of 60 rows", "10.0%", "bad_rows.txt", "data.max_bad_fraction"),
        _spoil_recordings(7),
    ),
    Case("only bad rows", RECIPE + " --exp-dir {tmp}/new", ("all 60 rows are bad",), _spoil_recordings(60)),
]

STAGES = [
    Case(
        "no earlier outputs",
        "recipes yesno --exp-dir {tmp}/new --stage 6 --stop-stage 6",
        ("stage 6 (decode) needs", "run that first", "--exp-dir {tmp}/new"),
    ),
    Case(
        "one earlier output gone",
        RECIPE + " --stage train --force",
        ("tokenizer.json", "stage 3 (tokenizer) makes", "--stage tokenizer --stop-stage train"),
        _remove("tokenizer/tokenizer.json"),
    ),
    Case(
        "broken tokenizer",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "tokenizer.json", "--stage train"),
        _overwrite("tokenizer/tokenizer.json", "{"),
    ),
    Case(
        "broken statistics",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "stats.json", "--stage train"),
        _overwrite("data/features/stats.json", "[]"),
    ),
    Case(
        "empty manifest",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "cuts_train.jsonl.gz", "no cuts"),
        _empty_manifest("data/features/cuts_train.jsonl.gz"),
    ),
    Case(
        "damaged manifest",
        RECIPE + " --stage features --force",
        ("stage 2 (features) failed", "cuts_train.jsonl.gz"),
        _cut_short("data/cuts_train.jsonl.gz"),
    ),
    Case(
        "too many tokens for the texts",
        RECIPE + " --stage tokenizer --set tokenizer.kind=bpe --set tokenizer.vocab_size=3000",
        ("stage 3 (tokenizer) failed", "vocab_size", "--set tokenizer.vocab_size=3000 --stage tokenizer"),
    ),
    Case(
        "all checkpoints damaged",
        RECIPE + " --stage average --force",
        ("stage 5 (average) failed", "no whole checkpoint", "train stage"),
        _damage_all_checkpoints,
    ),
    Case(
        "damaged average",
        RECIPE + " --stage decode --force",
        ("stage 6 (decode) failed", "average.pt is corrupt", "best.pt is whole"),
        _flip_a_byte("train/average.pt"),
    ),
]

FILES = [
    Case("cuts missing", TRAIN.replace("cuts_train", "cuts_trian") + " --out-dir {tmp}/out", ("cuts_trian.jsonl.gz",)),
    Case(
        "cuts that are no manifest",
        TRAIN + " --out-dir {tmp}/out --valid-cuts {config}",
        ("tiny.yaml",),
    ),
    Case(
        "empty cuts",
        TRAIN + " --out-dir {tmp}/out",
        ("cuts_train.jsonl.gz holds no cuts",),
        _empty_manifest("data/features/cuts_train.jsonl.gz"),
    ),
    Case("tokenizer missing", TRAIN + " --out-dir {tmp}/out --tokenizer {tmp}/t.json", ("{tmp}/t.json",)),
    Case(
        "resume from nothing", TRAIN + " --out-dir {tmp}/out --resume {tmp}/no.pt", ("{tmp}/no.pt does not exist",)
    ),
    Case(
        "resume from another model",
        TRAIN + " --out-dir {tmp}/out --set model.joiner.dim=32 --resume {step}",
        ("another model", "joiner"),
    ),
    Case(
        "resume from an average",
        TRAIN + " --out-dir {tmp}/out --resume {exp}/train/average.pt",
        ("average.pt", "checkpoints/"),
    ),
    Case(
        "resume from a damaged checkpoint",
        TRAIN + " --out-dir {tmp}/out --resume {step}",
        ("is corrupt", "is whole, use that one"),
        lambda world: os.truncate(last_step(world.exp), 5000),
    ),
    Case("checkpoint missing", DECODE + " --checkpoint {exp}/train/bets.pt", ("bets.pt does not exist", "is whole")),
    Case("checkpoint is text", DECODE + " --checkpoint {config}", ("tiny.yaml is corrupt or no checkpoint",)),
    Case("another torch file", DECODE + " --checkpoint {tmp}/other.pt", ("no checkpoint of this",), _other_torch_file),
    Case("newer checkpoint", DECODE + " --checkpoint {tmp}/newer.pt", ("format version 99", "reads 1"), _newer_format),
    Case("cuts to decode missing", DECODE + " --checkpoint {best} --cuts {tmp}/c.jsonl", ("does not exist",)),
    Case(
        "audio of cuts missing",
        DECODE + " --checkpoint {best}",
        ("cannot read the audio of cut",),
        lambda world: _point_cuts_nowhere(world.exp / "data" / "cuts_test.jsonl.gz"),
    ),
    Case("audio file missing", TRANSCRIBE + " {tmp}/none.wav", ("{tmp}/none.wav", "no such file")),
    Case("audio file is text", TRANSCRIBE + " {config}", ("tiny.yaml", "not readable as audio")),
    Case("audio file is empty", TRANSCRIBE + " {tmp}/e.wav", ("e.wav", "not readable as audio"), _write("e.wav", "")),
    Case("audio file is a folder", TRANSCRIBE + " {tmp}", ("folder",)),
    Case("audio that is not finite", TRANSCRIBE + " {tmp}/nan.wav", ("nan.wav", "finite"), _nan_audio),
    Case("average of nothing", "asr average --train-dir {tmp} --valid-cuts {valid}", ("no whole checkpoint",)),
    Case("average of no folder", "asr average --train-dir {tmp}/none --valid-cuts {valid}", ("{tmp}/none", "folder")),
    Case("average of none", "asr average --train-dir {exp}/train --valid-cuts {valid} --last 0", ("--last 0",)),
]

DISK = [
    Case("experiment below a file", RECIPE + " --exp-dir {config}/exp", ("tiny.yaml", "file, not a folder")),
    Case(
        "experiment that may not be written",
        RECIPE + " --exp-dir {tmp}/new",
        ("permission denied", "choose a folder that you may write"),
        _failing(DENIED, lambda name: "/new/" in name),
    ),
    Case(
        "read-only disk",
        RECIPE + " --stage tokenizer --force",
        ("stage 3 (tokenizer) failed", "read-only", "--stage tokenizer"),
        _failing(READ_ONLY, lambda name: "/tokenizer/" in name),
    ),
    Case(
        "disk full at features",
        RECIPE + " --stage features --stop-stage features --force",
        ("stage 2 (features) failed", "no space left"),
        _failing(FULL, lambda name: "/features/" in name),
    ),
    Case(
        "disk full at a checkpoint",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "no space left", "--stage train"),
        _disk_fills_while_saving,
    ),
    Case(
        "disk full at the average",
        RECIPE + " --stage average --force",
        ("stage 5 (average) failed", "no space left"),
        _disk_fills_while_saving,
    ),
    Case(
        "disk full at the results",
        RECIPE + " --stage decode --force",
        ("stage 6 (decode) failed", "no space left"),
        _failing(FULL, lambda name: "/decode/" in name),
    ),
    Case(
        "output folder is a file",
        DECODE.replace("{tmp}/decoded", "{config}") + " --checkpoint {best}",
        ("tiny.yaml",),
    ),
]

CASES = [*COMMAND_LINE, *CONFIGURATION, *CORPUS, *STAGES, *FILES, *DISK]


# -- the harness ------------------------------------------------------------------------------------------------------


def last_step(exp: Path) -> Path:
    return sorted(exp.glob(STEP))[-1]


def _point_cuts_nowhere(path: Path) -> None:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text.replace(".wav", ".gone.wav"))


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
