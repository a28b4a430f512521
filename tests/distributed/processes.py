"""Several processes of one run, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from itertools import islice
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from asr.bench import processes
from asr.checkpoint import step_checkpoints
from asr.training.faults import BadBatches, Termination
from asr.training.ranks import Ranks
from tests.asr.training.runs import experiment, make_trainer, read_data

SGD = 0.05  # learning rate
ALL_BATCHES = ["data.max_duration_s=1.3", "data.spec_augment.prob=0"]

# A process of a test begins as a copy of one that has imported these, which takes longer than most tests themselves.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "asr.training.trainer", "tests.asr.training.runs"]
)


def together(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls function(ranks, *arguments) in so many processes on CPU; an error in one is raised here."""
    if size == 1:
        _on_cpu(Ranks(), "cpu", function, *arguments)
        return
    context = start(size, function, *arguments)
    while not context.join():
        pass


def start(size: int, function: Callable[..., None], *arguments: Any) -> torch.multiprocessing.ProcessContext:
    """Begins to call function(ranks, *arguments) in so many processes on CPU."""
    return processes.start(size, "cpu", _on_cpu, _Here(function), *arguments, start_method="forkserver")


class _Here:
    """A function that, sent to a copy of the server of copies, makes that write where this process does: the server
    itself began in some other test."""

    def __init__(self, function: Callable[..., None]):
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_to, (self.function, DupFd(1), DupFd(2))


def _write_to(function: Callable[..., None], *outputs: Any) -> Callable[..., None]:
    for number, output in enumerate(outputs, start=1):
        there = output.detach()
        os.dup2(there, number)
        os.close(there)
    return function


def _on_cpu(ranks: Ranks, device: str, function: Callable[..., None], *arguments: Any) -> None:
    if ranks.size > 1:  # else this is the process of all tests
        torch.set_num_threads(1)
    function(ranks, *arguments)


def sgd_steps(ranks: Ranks, cases: dict[str, list[str]], steps: int, data: Path, out: Path) -> None:
    """So many steps of plain SGD, which passes the gradient on as it is, for each case of settings: out / case.pt."""
    for name, settings in cases.items():
        trainer = make_trainer(experiment(*settings), read_data(data), out / name, ranks)
        trainer.parallel.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=SGD)
        trainer.experiment.optim.lr = SGD
        trainer.model.train()
        bad = BadBatches(out / "bad", 0, 0, lambda **_: None, print)
        records = [trainer.step(b, bad, own) for b, own in islice(trainer.batches_of_epoch(), steps)]
        weights = trainer.parallel.weights()
        if ranks.first:
            shares = sum(
                p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters()
            )
            torch.save({"weights": weights, "records": records, "share": shares}, out / f"{name}.pt")


def runs(ranks: Ranks, cases: dict[str, list[str]], data: Path, out: Path) -> None:
    """A run to the end, from whatever out / case holds."""
    for name, settings in cases.items():
        trainer = make_trainer(experiment(*settings), read_data(data), out / name, ranks)
        newest = step_checkpoints(out / name / "checkpoints")
        ranks.wait()  # all have looked before the first writes
        if newest:
            trainer.resume(newest[-1])
        trainer.run(Termination())
