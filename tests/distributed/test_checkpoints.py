"""Checkpoints of several processes: resharded to the bit, written beside the training, damage noticed, a full disk
survived."""

from __future__ import annotations

import errno
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from asr import checkpoint, checkpoint_folder
from asr.bench.kills import children
from asr.checkpoint import step_checkpoints
from asr.cli.main import main
from asr.errors import CheckpointError
from asr.training.faults import BadBatches, Termination
from asr.training.launch import torchrun
from asr.training.parallel import whole
from asr.training.ranks import Ranks
from asr.training.sharded_checkpoint import FolderWriter
from asr.training.trainer import find_resume
from tests.asr.training.runs import SETTINGS, differences, experiment, make_trainer, read_data, records
from tests.distributed.processes import runs, together

COMMON = ["data.max_duration_s=1.3", "training.ema_decay=0.5", "training.checkpoint_every_steps=1"]
LIMITS = ["training.max_steps=2", "training.max_epochs=1"]
# how 4 processes share out the model, then 2, then one, then 2 again
WAYS = {
    "zero0": (0, 3, 0, 2),
    "zero1": (1, 2, 0, 1),
    "zero2": (2, 1, 0, 0),
    "zero3": (3, 0, 0, 3),
    "hsdp": (3, 1, 0, 3),
}


def settings_of(way: str, turn: int) -> list[str]:
    replicas = ["parallel.replicas=2"] if way == "hsdp" and turn == 0 else []
    return [*COMMON, *LIMITS, f"parallel.zero={WAYS[way][turn]}", *replicas]


def state_in(path: Path) -> dict[str, Any]:
    """Everything but the configuration, which says how processes share."""
    return {name: value for name, value in checkpoint.read(path).items() if name != "config"}


def checkpoints(out: Path) -> list[Path]:
    return step_checkpoints(out / "checkpoints")


@pytest.fixture(scope="module")
def written(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 4 processes, one a way, with two checkpoints each."""
    out = tmp_path_factory.mktemp("written")
    together(4, runs, {way: settings_of(way, 0) for way in WAYS}, data, out)
    return out


def _rewrite(ranks: Ranks, paths: dict[str, Path], out: Path, data: Path, turn: int) -> None:
    for way, path in paths.items():
        trainer = make_trainer(experiment(*settings_of(way, turn)), read_data(data), out / way, ranks)
        trainer.resume(path)
        trainer.save()
        trainer._saved()


def test_4_processes_then_2_then_1_then_2(written: Path, data: Path, tmp_path: Path) -> None:
    """Each number reads what the last one wrote, and writes it; weights, optimizer and average stay to the bit."""
    paths = {way: checkpoints(written / way)[-1] for way in WAYS}
    want = {way: state_in(path) for way, path in paths.items()}
    for way, path in paths.items():
        assert path.is_dir() and len(list(path.glob("*.distcp"))) == 4
        assert want[way]["step"] == 2 and differences(want[way]["model"], want[way]["training"]["ema"]) != []
        state = want[way]["training"]["optimizer"]
        assert state.keys() == {n for n in want[way]["model"] if not n.startswith("encoder.feature_")}
        assert all(entry.keys() == {"exp_avg", "exp_avg_sq", "step"} for entry in state.values())
        assert all(entry["step"] == 2 and bool(entry["exp_avg"].any()) for entry in state.values())
    for turn, size in enumerate((2, 1, 2), 1):
        out = tmp_path / f"{turn}"
        together(size, _rewrite, paths, out, data, turn)
        paths = {way: checkpoints(out / way)[-1] for way in WAYS}
        for way, path in paths.items():
            assert path.is_dir() == (size > 1)
            assert differences(state_in(path), want[way]) == [], (way, size)


def test_no_process_writes_what_another_has(written: Path) -> None:
    """Each of four writes about a quarter of the whole."""
    for way in WAYS:
        sizes = [path.stat().st_size for path in checkpoints(written / way)[-1].glob("*.distcp")]
        assert len(sizes) == 4 and max(sizes) < 0.4 * sum(sizes), way


# -- damage -----------------------------------------------------------------------------------------------------------


def _flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / "checkpoint.json").unlink(), "checkpoint.json: No such file"),
    "torn manifest": (lambda p: os.truncate(p / "checkpoint.json", 900), "checkpoint.json is not what was written"),
    "changed manifest": (lambda p: _flip(p / "checkpoint.json", 0.3), "checkpoint.json (does not match|is not what)"),
    "no shares": (lambda p: (p / "__3_0.distcp").unlink(), "__3_0.distcp: No such file"),
    "torn shares": (lambda p: os.truncate(p / "__1_0.distcp", 1000), r"__1_0.distcp has 1000 bytes of \d+"),
    "changed shares": (lambda p: _flip(p / "__2_0.distcp", 0.5), "__2_0.distcp does not match its checksum"),
    "changed metadata": (lambda p: _flip(p / ".metadata", 0.5), ".metadata does not match its checksum"),
    "nothing": (lambda p: [x.unlink() for x in p.iterdir()], "checkpoint.json: No such file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_and_the_one_before_used(written: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(written / "zero3", tmp_path / "out")
    before, newest = checkpoints(tmp_path / "out")
    damage, message = DAMAGES[name]
    damage(newest)
    said: list[str] = []
    assert find_resume("auto", tmp_path / "out", said.append) == before
    assert len(said) == 1 and re.search(f"{newest} is corrupt .*{message}.*trying the one before it", said[0])
    with pytest.raises(CheckpointError, match=f"{message}.*{before} is whole, use that one"):
        checkpoint.load(newest)


def test_a_flipped_bit_anywhere_is_noticed(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    shutil.copytree(checkpoints(written / "zero1")[-1], path)
    for file in sorted(path.iterdir()):
        for where in [number / 23 for number in range(23)]:
            _flip(file, where)
            # between the values of a JSON file a bit may make no difference
            assert not checkpoint.is_good(path) or file.name == "checkpoint.json", (file, where)
            _flip(file, where)
    assert checkpoint.is_good(path)


def test_code_in_the_metadata_does_not_run(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    shutil.copytree(checkpoints(written / "zero0")[-1], path)
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    content, files = checkpoint_folder.read_manifest(path)
    files[".metadata"] = checkpoint_folder.fingerprint(path / ".metadata")
    checkpoint_folder.write_manifest(path, content, files)
    checkpoint_folder.verify(path)
    with pytest.raises(CheckpointError, match="refers to posix.mkdir"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_both_forms_in_one_folder(written: Path, tmp_path: Path) -> None:
    """Of a step that was written by several and by one, the later is the newest, and the other goes with the old."""
    out = tmp_path / "out"
    shutil.copytree(written / "zero2", out)
    one, two = checkpoints(out)
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    (out / "checkpoints" / ".step-00000003.partial" / "__0_0.distcp").write_bytes(b"half")
    file = two.with_suffix(".pt")
    checkpoint.atomic_save(checkpoint.read(two), file)
    assert checkpoints(out) == [one, two, file] and checkpoint.newest_good(out / "checkpoints") == file
    os.utime(two)
    assert checkpoints(out) == [one, file, two]
    checkpoint.prune(out / "checkpoints", 2)
    assert sorted((out / "checkpoints").iterdir()) == [one, two]
    for _ in range(2):  # a second time over what the first left
        shutil.copytree(one, out / "checkpoints" / "step-00000009")
        assert [p.name for p in checkpoint.set_aside_later(out / "checkpoints", 2)] == ["step-00000009.old"]
    assert checkpoints(out) == [one, two]


# -- one file ---------------------------------------------------------------------------------------------------------


def test_convert(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints(written / "hsdp")[-1]
    for name, words in (("whole.pt", []), ("weights.pt", ["--weights-only"])):
        assert main(["checkpoint", "convert", str(source), str(tmp_path / name), *words]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
    want, weights = checkpoint.read(source), torch.load(tmp_path / "weights.pt", weights_only=True)
    assert differences(torch.load(tmp_path / "whole.pt", weights_only=True), want) == []
    assert "training" not in weights and differences(weights["model"], want["model"]) == []
    left, right = checkpoint.load(source).model, checkpoint.load(tmp_path / "weights.pt").model
    assert differences(left.state_dict(), right.state_dict()) == []
    torn = tmp_path / "step-00000002"
    shutil.copytree(source, torn)
    (torn / "__1_0.distcp").unlink()
    for words, message in (
        ([tmp_path / "none", tmp_path / "a.pt"], "none does not exist; .* is whole, use that one"),
        ([torn, tmp_path / "a.pt"], "is corrupt or no checkpoint .__1_0.distcp: No such file"),
        ([tmp_path / "whole.pt", tmp_path / "a.pt"], "whole.pt is a file already"),
        ([source, tmp_path / "whole.pt"], "whole.pt exists; choose another name"),
        ([source, tmp_path / "none" / "a.pt"], "none is not a folder that can be written to"),
        ([source, tmp_path / "a.ckpt"], "a.ckpt must end in .pt"),
    ):
        assert main(["checkpoint", "convert", *map(str, words)]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "weights.pt", "whole.pt"]


# -- beside the training ----------------------------------------------------------------------------------------------


def _save_beside_steps(ranks: Ranks, data: Path, out: Path, zero: int) -> None:
    trainer = make_trainer(experiment(*COMMON, f"parallel.zero={zero}"), read_data(data), out, ranks)
    trainer.model.train()
    bad = BadBatches(out / "bad", 0, 0, lambda **_: None, print)
    steps = trainer.batches_of_epoch()
    for batches, own in islice(steps, 2):
        trainer.step(batches, bad, own)
    assert trainer.ema is not None
    then = whole({"model": trainer.model.state_dict(), "ema": trainer.ema.weights})
    then = {part: {name: value.clone() for name, value in tensors.items()} for part, tensors in then.items()}
    go = threading.Event()
    real = FolderWriter.write_data

    def held(self: FolderWriter, *arguments: Any) -> Any:
        assert go.wait(60)
        return real(self, *arguments)

    FolderWriter.write_data = held  # type: ignore[method-assign]
    path = trainer.save()
    for batches, own in islice(steps, 3):
        trainer.step(batches, bad, own)
    assert trainer.progress.step == 5 and not path.exists() and trainer.saver is not None
    trainer.saver.poll()  # nothing has happened yet
    ranks.wait()
    go.set()
    trainer._saved()
    assert path.is_dir()
    if ranks.first:
        found = checkpoint.read(path)
        assert differences(then, {"model": found["model"], "ema": found["training"]["ema"]}) == []
        assert found["step"] == found["training"]["progress"]["step"] == 2
        now = whole(trainer.model.state_dict()) if zero < 2 else None
        assert now is None or differences(now, then["model"]) != []


@pytest.mark.parametrize("zero", [1, 3])
def test_training_goes_on_while_a_checkpoint_is_written(zero: int, data: Path, tmp_path: Path) -> None:
    """It holds the numbers of the moment of the save."""
    together(2, _save_beside_steps, data, tmp_path, zero)


def _full_disk(ranks: Ranks, data: Path, out: Path, full_at: list[int]) -> None:
    """The second process cannot write files of more than 2 KB at some checkpoints, the first not best.pt."""
    settings = [*COMMON, "parallel.zero=3", "training.max_steps=4", "training.keep_last=9"]
    trainer = make_trainer(experiment(*settings), read_data(data), out, ranks)
    said: list[str] = []
    trainer.line.say = said.append  # type: ignore[method-assign]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, saves = trainer.save, []

    def limited() -> Path:
        if trainer.saver is not None:
            trainer.saver.wait()
        saves.append(trainer.progress.step)
        full = ranks.rank == 1 and trainer.progress.step in full_at
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else limits[0], limits[1]))
        return save()

    def no_room(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.save = limited  # type: ignore[method-assign]
    trainer._save_best = no_room  # type: ignore[method-assign]
    error = None
    try:
        trainer.run(Termination())
    except OSError as caught:
        error = caught
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error is not None) == (4 in full_at), error
    errors = [line for line in said if line.startswith("error:")]
    assert trainer.progress.best_errors == math.inf  # best.pt is of nothing
    best = [line for line in errors if "best.pt is not written: No space left on device; training goes on" in line]
    errors = [line for line in errors if line not in best]
    if ranks.first:
        assert len(best) == 1
        # at the limit of steps the last checkpoint is written, and again its progress
        assert [re.findall(r"step-0+(\d)", line) for line in errors] == [[str(step)] for step in full_at]
        assert all("is not written: File too large; training goes on" in line for line in errors)
        assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("full_at", "kept"), [([2], [1, 3, 4]), ([3, 4], [1, 2])])
def test_a_full_disk_of_one_process_loses_nothing(
    full_at: list[int], kept: list[int], data: Path, tmp_path: Path
) -> None:
    together(2, _full_disk, data, tmp_path, full_at)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoints" / f"step-{step:08d}" for step in kept]
    assert all(checkpoint.is_good(path) for path in checkpoints(tmp_path))
    assert records(tmp_path, "end")[-1]["reason"] == ("failed" if 4 in full_at else "finished")


def _close_at_a_checkpoint(ranks: Ranks, data: Path, out: Path) -> None:
    """The last step of the epoch has a checkpoint, and its end another: of the same tensors, with later progress."""
    trainer = make_trainer(experiment(*COMMON, "training.max_epochs=1"), read_data(data), out, ranks)
    begun: list[Path] = []
    real = FolderWriter.__init__

    def counted(self: FolderWriter, path: Path, *arguments: Any) -> None:
        begun.append(path)
        real(self, path, *arguments)

    FolderWriter.__init__ = counted  # type: ignore[method-assign]
    result = trainer.run(Termination())
    assert result.reason == "finished" and len(begun) == len(set(begun)) == result.step
    again = make_trainer(experiment(*COMMON, "training.max_epochs=1"), read_data(data), out / "again", ranks)
    assert result.checkpoint is not None
    again.resume(result.checkpoint)
    own_clock = {"time_s": trainer.progress.time_s}  # the first process's was written
    assert vars(again.progress) | own_clock == vars(trainer.progress) and again._finished()
    same = make_trainer(experiment(*COMMON, "training.max_epochs=1"), read_data(data), out, ranks)
    same.resume(result.checkpoint)
    same.save()
    same._saved()
    assert len(begun) == result.step and vars(same.progress) == vars(again.progress)


def test_the_end_of_an_epoch_writes_no_tensors_twice(data: Path, tmp_path: Path) -> None:
    together(2, _close_at_a_checkpoint, data, tmp_path)
    assert checkpoint.is_good(checkpoints(tmp_path)[-1])


def test_sigterm_saves_within_30_s_on_all_processes(data: Path, tmp_path: Path) -> None:
    words = ["--out-dir", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--train-cuts", str(data / "cuts_train.jsonl.gz"), "--valid-cuts", str(data / "cuts_valid.jsonl.gz")]
    settings = [*SETTINGS, "data.max_duration_s=1.3", "parallel.zero=3", "training.max_epochs=1000"]
    process = subprocess.Popen(
        torchrun(2, 0, "train", *words, *(f"--set={setting}" for setting in settings)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "out"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    begin = time.monotonic()
    for worker in children(process.pid):
        os.kill(worker, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - begin
    print(f"SIGTERM to the end of both processes: {seconds:.2f} s")
    assert process.returncode == 0 and seconds < 30, output[-3000:]
    step = records(tmp_path / "out", "end")[-1]["step"]
    newest = checkpoints(tmp_path / "out")[-1]
    assert f"SIGTERM: saved {newest}" in output and checkpoint.read(newest)["step"] == step
