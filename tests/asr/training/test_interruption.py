"""A training run that is stopped, resumed, or resumed from what is not its own."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asr.training.trainer as trainer_module
from asr import checkpoint
from asr.checkpoint import step_checkpoints
from asr.cli.main import main
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import CheckpointError
from asr.training import report
from asr.training.trainer import TrainData, Trainer
from tests.asr.data.speech import WORDS
from tests.asr.training.runs import (
    CLOCK,
    SETTINGS,
    TOKENIZER,
    differences,
    experiment,
    make_trainer,
    newest,
    read_data,
    records,
    run,
    state_of,
)

ROOT = Path(__file__).resolve().parents[3]


# -- SIGTERM ----------------------------------------------------------------------------------------------------------


def after_step(*numbers: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = Trainer.step

        def step(self: Trainer, *args: Any) -> Any:
            record = real(self, *args)
            if self.progress.step in numbers:
                os.kill(os.getpid(), signal.SIGTERM)
            return record

        monkeypatch.setattr(Trainer, "step", step)

    return patch


def in_call(owner: Any, name: str, call: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Twice within the n-th call of a function: the second must not do more than the first."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), []

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    return patch


LAST = 6  # steps of an epoch; asserted below

MOMENTS = {
    "first step": after_step(1),
    "step that also saves": after_step(2),
    "last step of the epoch": after_step(LAST),
    "first step of the second epoch": after_step(LAST + 1),
    "last step of the run": after_step(2 * LAST),
    "saving": in_call(checkpoint, "atomic_save", 2),
    "planning the second epoch": in_call(trainer_module, "train_loader", 2),
    "first validation": in_call(trainer_module, "validate", 1),
    "last validation": in_call(trainer_module, "validate", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_saves_and_the_resumed_run_is_the_same_to_the_bit(
    moment: str, data: TrainData, finished: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        MOMENTS[moment](monkeypatch)
        handler = signal.getsignal(signal.SIGTERM)
        result = run(data, tmp_path)
        assert signal.getsignal(signal.SIGTERM) == handler
    assert result.reason == "terminated" and records(tmp_path, "end")[-1]["reason"] == "terminated"
    assert result.checkpoint == step_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest(tmp_path)["step"] == result.step
    assert run(data, tmp_path).reason == "finished"
    assert records(finished, "train")[-1]["step"] == 2 * LAST
    for out in (tmp_path, finished):
        assert not list(out.rglob("*.partial"))
    assert differences(state_of(finished), state_of(tmp_path)) == []
    assert differences(torch.load(finished / "best.pt"), torch.load(tmp_path / "best.pt")) == []
    assert losses(tmp_path) == losses(finished)


def losses(out: Path) -> list[Any]:
    """All that does not depend on the clock."""
    kept = (r for r in records(out) if r["kind"] in ("train", "valid"))
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in kept]


def test_sigterm_at_the_step_limit_leaves_the_validation_to_the_resumed_run(data: TrainData, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        after_step(3)(monkeypatch)
        assert run(data, tmp_path, "training.max_steps=3").reason == "terminated"
    assert records(tmp_path, "valid") == [] and not (tmp_path / "best.pt").exists()
    result = run(data, tmp_path, "training.max_steps=3")
    assert (result.reason, result.step) == ("finished", 3)
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3]
    assert len(records(tmp_path, "valid")) == 1 and (tmp_path / "best.pt").is_file()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_first_and_a_second_one_is_obeyed_at_once(times: int, data: TrainData, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        real = Trainer.step

        def step(self: Trainer, *args: Any) -> Any:
            record = real(self, *args)
            for _ in range(times if self.progress.step == 3 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return record

        monkeypatch.setattr(Trainer, "step", step)
        # a shell lets what it starts in the background ignore Ctrl-C, the tests too
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
    assert (tmp_path / "report.html").is_file()
    assert newest(tmp_path)["step"] == {1: 3, 2: 2}[times]  # every second step is saved
    assert run(data, tmp_path).reason == "finished"


def command(folder: Path, out: Path, *settings: str) -> list[str]:
    files = ["--train-cuts", folder / "cuts_train.jsonl.gz", "--valid-cuts", folder / "cuts_valid.jsonl.gz"]
    sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [sys.executable, "-m", "asr.cli.main", "train", *map(str, files), "--out-dir", str(out), *sets]


def test_sigterm_to_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(folder, out, "training.max_epochs=100000", "data.num_workers=1")
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            deadline = time.monotonic() + 120
            while not ((out / "metrics.jsonl").is_file() and records(out, "train")):
                assert child.poll() is None and time.monotonic() < deadline, child.stdout.read()
                time.sleep(0.1)
            child.send_signal(signal.SIGTERM)
            printed, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, printed
    step = newest(out)["step"]
    assert f"terminated at step {step}" in printed and "--resume auto" in printed and "Traceback" not in printed
    assert records(out, "end")[-1]["reason"] == "terminated"
    data = TrainData(read_data(folder).train_cuts, read_data(folder).valid_cuts, Tokenizer.load(out / "tokenizer.json"))
    result = run(data, out, f"training.max_steps={step + 2}")
    assert (result.reason, result.step) == ("finished", step + 2)
    assert [r["step"] for r in records(out, "train")] == list(range(1, step + 3))


BEFORE = {
    "reading the manifest": "asr.data.manifests.load_cuts",
    "feature statistics": "asr.data.features.compute_stats",
    "reading and checking the cuts": "asr.training.train_data.load_train_data",
    "building the model": "asr.training.parallel.make_optimizer",
    "within what guards against damaged checkpoints": "torch.load",
}


@pytest.mark.parametrize("moment", BEFORE)
def test_sigterm_before_the_loop_is_no_error(
    moment: str, folder: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as monkeypatch:
        owner, name = BEFORE[moment].rsplit(".", 1)
        in_call(importlib.import_module(owner), name)(monkeypatch)
        assert main(command(folder, copied)[3:]) == 0
    assert signal.getsignal(signal.SIGTERM) == handler
    captured = capsys.readouterr()
    assert captured.out.startswith("SIGTERM: ") and captured.out.count("\n") == 1 and captured.err == ""
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("steps", [LAST, 2 * LAST])
def test_sigterm_while_the_report_is_written_lets_it_be_finished(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    words = command(folder, tmp_path, f"training.max_epochs={steps // LAST}")[3:]
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_call(report, "_render")(monkeypatch)
        assert main(words) == 0
    assert f"terminated at step {steps}; report: " in capsys.readouterr().out
    assert records(tmp_path, "end")[-1]["reason"] == "finished" and newest(tmp_path)["step"] == steps
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(words) == 0
    assert f"finished at step {steps}; report: " in capsys.readouterr().out


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_a_finished_run_does_nothing_more(data: TrainData, copied: Path) -> None:
    files = [*step_checkpoints(copied / "checkpoints"), copied / "best.pt"]
    before = {path: path.read_bytes() for path in files}
    lines = records(copied)
    result = run(data, copied)
    assert (result.reason, result.step) == ("finished", 2 * LAST)
    assert [r["kind"] for r in records(copied)[len(lines) :]] == ["start", "end"]
    assert {path: path.read_bytes() for path in files} == before
    assert step_checkpoints(copied / "checkpoints") == files[:-1]


def test_a_finished_run_goes_on_when_it_may_take_longer(data: TrainData, copied: Path) -> None:
    result = run(data, copied, "training.max_epochs=3")
    assert (result.step, result.epoch) == (3 * LAST, 3)
    assert [r["step"] for r in records(copied, "train")] == list(range(1, 3 * LAST + 1))


def test_a_checkpoint_of_another_model_is_refused(data: TrainData, copied: Path) -> None:
    before = sorted(copied.rglob("*"))
    with pytest.raises(CheckpointError, match="of another model.*joiner"):
        run(data, copied, "model.joiner.dim=8")
    assert sorted(copied.rglob("*")) == before and len(records(copied, "start")) == 1


def test_another_loss_goes_on_but_one_with_other_weights_is_refused(
    data: TrainData, copied: Path, tmp_path: Path
) -> None:
    before = sorted(copied.rglob("*"))
    with pytest.raises(
        CheckpointError, match="without the trivial joiner of loss.method=pruned, .*has; keep"
    ) as caught:
        run(data, copied, "loss.method=pruned")
    assert "\n" not in str(caught.value) and sorted(copied.rglob("*")) == before
    assert run(data, copied, "loss.method=batched", "training.max_epochs=3").step == 3 * LAST
    pruned = tmp_path / "pruned"
    run(data, pruned, "loss.method=pruned", "training.max_steps=2")
    with pytest.raises(CheckpointError, match="with the trivial joiner of loss.method=pruned, .*has not; keep"):
        run(data, pruned, "loss.method=fused")
    assert run(data, pruned, "loss.method=pruned", "training.max_steps=3").step == 3


def test_a_checkpoint_of_another_tokenizer_is_refused(data: TrainData, copied: Path) -> None:
    other = Tokenizer.train([" ".join(word[::-1] for word in WORDS)], TokenizerConfig("word"))
    assert other.vocab_size == TOKENIZER.vocab_size
    with pytest.raises(CheckpointError, match="another tokenizer"):
        run(TrainData(data.train_cuts, data.valid_cuts, other), copied)


def test_an_average_is_no_place_to_resume_from(data: TrainData, copied: Path) -> None:
    with pytest.raises(CheckpointError, match="weights only"):
        run(data, copied, resume=str(copied / "best.pt"))


def test_auto_passes_over_a_damaged_checkpoint(data: TrainData, finished: Path, copied: Path) -> None:
    files = step_checkpoints(copied / "checkpoints")
    os.truncate(files[-1], 3000)
    run(data, copied, "training.keep_last=1")
    assert differences(state_of(finished), state_of(copied)) != []  # keep_last is in the configuration
    old, new = state_of(finished), state_of(copied)
    assert differences(old["model"], new["model"]) == [] and differences(old["training"], new["training"]) == []
    assert [p.name for p in step_checkpoints(copied / "checkpoints")] == [files[-1].name]


def test_auto_does_not_begin_anew_over_damaged_checkpoints(data: TrainData, copied: Path) -> None:
    files = step_checkpoints(copied / "checkpoints")
    for path in files:
        os.truncate(path, 3000)
    with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged.*--resume none"):
        run(data, copied)
    assert step_checkpoints(copied / "checkpoints") == files


@pytest.mark.parametrize("start", ["none", "step-00000004.pt"])
def test_going_back_sets_later_checkpoints_aside(data: TrainData, copied: Path, start: str) -> None:
    checkpoints = copied / "checkpoints"
    later = [p.name for p in step_checkpoints(checkpoints) if p.name > start or start == "none"]
    resume = start if start == "none" else str(checkpoints / start)
    with pytest.MonkeyPatch.context() as monkeypatch:
        after_step(3 if start == "none" else 5)(monkeypatch)
        assert run(data, copied, "training.keep_last=2", "optim.lr=0.003", resume=resume).reason == "terminated"
    assert [name for name in later if (checkpoints / f"{name}.old").is_file()] == later
    assert (copied / "best.pt").is_file() == (start != "none")
    assert (copied / "best.pt.old").is_file() == (start == "none")
    step = 3 if start == "none" else 5
    assert step_checkpoints(checkpoints)[-1].name == f"step-{step:08d}.pt"
    assert trainer_module.find_resume("auto", copied, lambda text: None) == checkpoints / f"step-{step:08d}.pt"


def test_an_average_that_is_turned_on_later_starts_from_the_weights(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.ema_decay=0")
    path = step_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest(tmp_path)["training"]["ema"] is None
    trainer = make_trainer(experiment(), data, tmp_path / "out")
    trainer.resume(path)
    assert differences(trainer.ema.weights, newest(tmp_path)["model"]) == []


def test_the_configuration_decides_the_optimizer_after_a_resume(
    data: TrainData, finished: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment("optim.weight_decay=0.25", "optim.betas=[0.5, 0.6]"), data, tmp_path)
    trainer.resume(step_checkpoints(finished / "checkpoints")[-1])
    decayed, plain = trainer.parallel.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    assert tuple(decayed["betas"]) == tuple(plain["betas"]) == (0.5, 0.6)
    assert float(trainer.parallel.optimizer.state_dict()["state"][0]["step"]) == 2 * LAST
