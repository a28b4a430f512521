"""Several processes of one run, as torchrun would start them."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from asr.config import Experiment
from asr.training.faults import BadBatches, Termination
from asr.training.metrics import ProgressLine
from asr.training.ranks import Ranks, started
from asr.training.trainer import Trainer
from tests.asr.training.runs import experiment, read_data

SGD = 0.05  # learning rate


def _child(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    with started("cpu", 60.0) as ranks:
        function(ranks, *arguments)


def together(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls function(ranks, *arguments) in so many processes; an error in one is raised here."""
    if size == 1:
        function(Ranks(), *arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_child, (size, port, function, arguments), nprocs=size)


def make(ranks: Ranks, config: Experiment, data: Path, out: Path) -> Trainer:
    """A trainer of the tiny model that says nothing."""
    trainer = Trainer(config, read_data(data), out, "cpu", "asr train", ranks)
    trainer.line = ProgressLine(io.StringIO())
    return trainer


def sgd_steps(ranks: Ranks, cases: dict[str, list[str]], steps: int, data: Path, out: Path) -> None:
    """So many steps of plain SGD, which passes the gradient on as it is, for each case of settings: out / case.pt."""
    for name, settings in cases.items():
        trainer = make(ranks, experiment(*settings), data, out / name)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=SGD)
        trainer.experiment.optim.lr = SGD
        trainer.model.train()
        bad = BadBatches(out / "bad", 0, 0, lambda **_: None, print)
        records = [trainer.step(b, bad, own) for b, own in islice(trainer._steps_of_epoch(), steps)]
        weights = trainer.parallel.weights()
        if ranks.first:
            shares = sum(
                p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters()
            )
            torch.save({"weights": weights, "records": records, "share": shares}, out / f"{name}.pt")


def runs(ranks: Ranks, cases: dict[str, list[str]], data: Path, out: Path) -> None:
    """A run to the end, from whatever out / case holds."""
    for name, settings in cases.items():
        trainer = make(ranks, experiment(*settings), data, out / name)
        newest = sorted((out / name / "checkpoints").glob("step-*.pt"))
        ranks.any(False)  # all have looked before the first writes
        if newest:
            trainer.resume(newest[-1])
        trainer.run(Termination())
