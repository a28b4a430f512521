"""`--nproc` of a recipe: the train stage under torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asr.errors import UserError
from recipes import cli, launch
from recipes.engine import StageStopped
from recipes.stages import make_recipe
from tests.integration.tiny import write_config, write_corpus

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, *words: str) -> list[str]:
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    where = ["--corpus-dir", str(folder / "corpus"), "--exp-dir", str(folder / "exp"), "--device", "cpu"]
    config = ["--config", str(write_config(folder / "tiny.yaml")), "--num-recombined", "0"]
    return [sys.executable, "-m", "recipes", "yesno", *where, *config, "--nproc", "2", *words]


def events(folder: Path) -> list[dict]:
    lines = (folder / "exp" / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_all_stages_and_a_stop_between(tmp_path: Path) -> None:
    """SIGTERM saves and stops with exit code 0; the same command goes on there and runs to the end."""
    words = command(tmp_path, "--set", "parallel.zero=3", "--set", "training.max_epochs=6")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "exp" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped: SIGTERM, saved in" in output, output[-3000:]
    stopped_at = [e for e in events(tmp_path) if e["kind"] == "end"][-1]
    assert stopped_at["reason"] == "terminated" and stopped_at["step"] > 0
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout and "%WER" in done.stdout
    assert f"results in {tmp_path / 'exp' / 'decode' / 'greedy'}" in done.stdout  # as `asr decode` says
    steps = [e["step"] for e in events(tmp_path) if e["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))


def test_processes_that_fail_are_one_line(tmp_path: Path) -> None:
    """A damaged tokenizer: the reason, once and without another try, and an error of the stage; no more."""
    words = command(tmp_path, "--stop-stage", "tokenizer")
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    (tmp_path / "exp" / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    words = command(tmp_path, "--stage", "train", "--stop-stage", "train")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "training on 2 processes ended with 2; the reason is printed above" in done.stderr
    assert "tokenizer.json" in done.stderr and done.stderr.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "--nproc 0 is too few; pass at least 1"),
        (["--nproc", "3", "--set", "parallel={zero: 2, replicas: 2}"], "replicas=2 does not divide the 3 processes"),
    ],
)
def test_wrong_numbers_are_refused(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert cli.main(["yesno", "--exp-dir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_processes_were_told_to_stop_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that do not come by way of the recipe: the processes end well, but before the end of training."""
    args = cli.make_parser("yesno").parse_args(["--exp-dir", str(tmp_path), "--device", "cpu", "--nproc", "2"])
    recipe, _ = make_recipe("yesno", args, "command", None)

    def processes(reason: str) -> None:
        def ends(*_: object, **__: object) -> int:
            (tmp_path / "train" / "metrics.jsonl").write_text(json.dumps({"kind": "end", "reason": reason}) + "\n")
            return 0

        monkeypatch.setattr(launch, "run_processes", ends)

    processes("finished")
    launch.train_on_processes(recipe)
    processes("terminated")
    with pytest.raises(StageStopped, match="told to stop, saved in .*checkpoints"):
        launch.train_on_processes(recipe)


def test_the_number_of_processes_changes_no_stage(tmp_path: Path) -> None:
    """A run goes on with another number: nothing is out of date."""

    def hashes(*words: str) -> dict[str, str]:
        args = cli.make_parser("yesno").parse_args(["--exp-dir", str(tmp_path), *words])
        return make_recipe("yesno", args, "command", None)[1].hashes

    assert hashes() == hashes("--nproc", "2") == hashes("--set", "parallel.zero=3")
    with pytest.raises(UserError, match="does not divide"):
        hashes("--nproc", "3", "--set", "parallel={zero: 3, replicas: 2}")
