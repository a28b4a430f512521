"""`asr decode --nproc`: the files that one process writes, and errors as one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asr.errors import UserError
from asr.training.launch import check_processes
from tests.asr.training.runs import read_data, run, write_data

SETTINGS = ["decoding.batch_duration_s=1.3", "training.max_steps=2", "training.max_epochs=1"]


@pytest.fixture(scope="module")
def words(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A decoding of the training cuts, in seven batches."""
    result = run(read_data(data), tmp_path_factory.mktemp("run"), *SETTINGS)
    command = [sys.executable, "-m", "asr.cli.main", "decode", "--device", "cpu"]
    return [*command, "--checkpoint", str(result.checkpoint), "--cuts", str(data / "cuts_train.jsonl.gz")]


def call(words: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words, *more], capture_output=True, text=True, timeout=200)


def test_files_are_those_of_one_process(words: list[str], tmp_path: Path) -> None:
    outputs = {}
    for nproc in (1, 2):
        done = call(words, "--out-dir", str(tmp_path / str(nproc)), "--emissions", "1", "--nproc", str(nproc))
        assert done.returncode == 0, done.stderr
        outputs[nproc] = done.stdout.splitlines()
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) >= 6
    for left, right in zip(one, two, strict=True):
        assert left.read_bytes() == right.read_bytes(), left.name
    # but for the speed, and the folder
    assert len(outputs[1]) == len(outputs[2]) == 5 and outputs[1][2:] == outputs[2][2:]
    assert outputs[2][0].startswith("greedy: 11 utterances")


@pytest.mark.slow
def test_the_average_is_that_of_one_process(data: Path, tmp_path: Path) -> None:
    run(read_data(data), tmp_path, *SETTINGS, "training.checkpoint_every_steps=1")
    words = [sys.executable, "-m", "asr.cli.main", "average", "--device", "cpu", "--train-dir", str(tmp_path)]
    words += ["--valid-cuts", str(data / "cuts_train.jsonl.gz"), "--no-ema", "--last", "1", "2"]
    said, chosen = {}, {}
    for nproc in (1, 2):
        done = call(words, "--nproc", str(nproc))
        assert done.returncode == 0, done.stderr
        said[nproc], chosen[nproc] = done.stdout, (tmp_path / "average.pt").read_bytes()
    assert said[1] == said[2] and chosen[1] == chosen[2]
    names = [line.split(":")[0].strip() for line in said[2].splitlines()]
    assert names[:4] == ["last-1", "last-2", "best", "chosen"]
    done = call(words, "--nproc", "2", "--no-best", "--last")
    assert done.returncode == 2 and "average.last is empty" in done.stderr and done.stderr.count("\n") == 1


def test_an_error_of_all_is_one_line(words: list[str], tmp_path: Path) -> None:
    done = call(words, "--out-dir", str(tmp_path), "--nproc", "2", "--set", "decoding.beem=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "beem" in done.stderr


def test_an_error_of_one_ends_all(words: list[str], tmp_path: Path) -> None:
    """The last cut of the file of features is cut short: the process that has it says so, the other waits in vain."""
    write_data(tmp_path)
    features = max(
        (cut.features for cut in read_data(tmp_path).train_cuts), key=lambda f: int(f.storage_key.split(":")[0])
    )
    path = Path(features.storage_path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4)
    words = [*words[:-1], str(tmp_path / "cuts_train.jsonl.gz")]
    done = call(words, "--out-dir", str(tmp_path / "out"), "--nproc", "2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "end too early" in done.stderr


@pytest.mark.parametrize(("nproc", "message"), [("0", "--nproc 0 is too few; pass at least 1"), ("two", "invalid int")])
def test_wrong_numbers_are_refused(nproc: str, message: str, words: list[str]) -> None:
    done = call(words, "--nproc", nproc)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_devices_have_to_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(2, "cuda")
    check_processes(1, "cuda:1")
    check_processes(3, "cpu")
    with pytest.raises(UserError, match="--nproc 2 on the one --device cuda:1; pass --device cuda"):
        check_processes(2, "cuda:1")
    with pytest.raises(UserError, match="--nproc 3 is more than the 2 CUDA devices .* pass --nproc 2"):
        check_processes(3, "cuda")
