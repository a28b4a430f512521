"""What can be wrong with files, disks and networks before a command runs: damages for the table of bad runs."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.models.transducer import TransducerLosses
from asr.training.step import Stepper

STEP = "train/checkpoints/step-*.pt"


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


def last_step(exp: Path) -> Path:
    return sorted(exp.glob(STEP))[-1]


def write(name: str, text: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        path = world.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return damage


def cut_short(name: str) -> Callable[[World], Any]:
    """Truncates a file of the experiment to half of its size."""

    def damage(world: World) -> None:
        path = world.exp / name
        os.truncate(path, path.stat().st_size // 2)

    return damage


def damage_all_checkpoints(world: World) -> None:
    for path in world.exp.glob(STEP):
        os.truncate(path, 1000)


def flip_a_byte(name: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        content = bytearray((world.exp / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (world.exp / name).write_bytes(content)

    return damage


def overwrite(name: str, text: str) -> Callable[[World], Any]:
    return lambda world: (world.exp / name).write_text(text, encoding="utf-8")


def remove(*names: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        for name in names:
            path = world.exp / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def rename_in_manifest(name: str, old: str, new: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        with gzip.open(world.exp / name, "rt", encoding="utf-8") as file:
            text = file.read()
        assert old in text
        with gzip.open(world.exp / name, "wt", encoding="utf-8") as file:
            file.write(text.replace(old, new))

    return damage


def empty_manifest(name: str) -> Callable[[World], Any]:
    def damage(world: World) -> None:
        with gzip.open(world.exp / name, "wt"):
            pass

    return damage


def spoil_recordings(count: int, text: str = "this is no audio") -> Callable[[World], Any]:
    def damage(world: World) -> None:
        for path in world.recordings()[:count]:
            path.write_text(text)

    return damage


def truncate_a_recording(world: World) -> None:
    path = world.recordings()[0]
    os.truncate(path, path.stat().st_size // 2)


def failing(error: OSError, when: Callable[[str], bool]) -> Callable[[World], Any]:
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


def disk_fills_while_saving(world: World) -> None:
    def save(payload: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    world.monkeypatch.setattr(torch, "save", save)


def no_network(world: World) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    world.monkeypatch.setattr(urllib.request, "urlopen", refuse)


def rename_recordings(world: World) -> None:
    for number, path in enumerate(world.recordings()):
        path.rename(path.with_name(f"{number}_jackson_{number % 5}.wav"))


def other_torch_file(world: World) -> None:
    torch.save({"weights": torch.zeros(3)}, world.tmp / "other.pt")


def newer_format(world: World) -> None:
    payload = torch.load(world.exp / "train" / "best.pt", weights_only=True)
    torch.save({**payload, "format_version": 99}, world.tmp / "newer.pt")


def loss_without_end(world: World) -> None:
    nothing = torch.tensor(float("nan"), requires_grad=True)
    world.monkeypatch.setattr(Stepper, "_forward", lambda *args: TransducerLosses(nothing, nothing, None, None))


def other_words(world: World) -> None:
    Tokenizer.train(["HELLO WORLD"], TokenizerConfig(kind="word")).save(world.tmp / "words.json")


def nan_audio(world: World) -> None:
    soundfile.write(world.tmp / "nan.wav", np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")


def empty_folder(world: World) -> None:
    (world.tmp / "none").mkdir()
