"""A training run in a process of its own that can be made to die at a given point, as by SIGKILL from outside."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from asr import checkpoint
from asr.training.metrics import MetricsWriter
from asr.training.trainer import train
from tests.asr.training.runs import experiment, read_data

# everything that draws random numbers, and epochs that end within an accumulated step
SETTINGS = [
    "data.num_workers=2",
    "data.max_duration_s=1.7",
    "model.ctc=true",
    "loss.ctc_weight=0.3",
    "training.max_epochs=3",
    "training.accumulation=2",
    "training.chunk_ms=[full, 160, 320]",
    "training.checkpoint_every_steps=2",
    "training.keep_last=2",
]


@dataclass(frozen=True)
class Death:
    """Where a process kills itself.

    Args:
        point: "step": after the metrics of a step were written; "write": within a checkpoint file; "fsync", "replace",
            "prune": before that call, in a save.
        number: the step; or the how-manieth call in this process.
        fraction: for "write", how much of the file is written first.
    """

    point: str
    number: int
    fraction: float = 0.0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _arm(death: Death) -> None:
    if death.point == "step":
        real_write = MetricsWriter.write

        def write(self: MetricsWriter, kind: str, **values: Any) -> None:
            real_write(self, kind, **values)
            if kind == "train" and values["step"] == death.number:
                _die()

        MetricsWriter.write = write  # type: ignore[method-assign]
        return
    owner, name = {
        "write": (torch, "save"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "prune": (checkpoint, "prune"),
    }[death.point]
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == death.number:
            if death.point == "write":
                payload, file = args
                whole = io.BytesIO()
                real(payload, whole)
                file.write(whole.getvalue()[: int(death.fraction * whole.tell())])
                file.flush()
            _die()
        return real(*args, **kwargs)

    setattr(owner, name, call)


def run(folder: Path, out: Path, death: Death | None, settings: tuple[str, ...]) -> None:
    """Trains on the data in ``folder`` and writes to ``out``; goes on from what is there."""
    os.setsid()  # the data workers stay in this group: whoever is left in it was left behind
    log = open(out.with_name(out.name + ".log"), "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)
    if death is not None:
        _arm(death)
    train(experiment(*SETTINGS, *settings), read_data(folder), out, resume="auto", command="asr train")


def start(folder: Path, out: Path, death: Death | None = None, settings: tuple[str, ...] = ()) -> BaseProcess:
    """The run in a new process; they are forked from a process that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(folder, out, death, settings))
    process.start()
    return process


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found
