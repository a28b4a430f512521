"""Training on CUDA: the steps of the CPU, every precision, memory that runs out, and checkpoints that change device."""

from __future__ import annotations

import socket
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from asr.checkpoint import step_checkpoints
from asr.training.benchmark import make_trainer as preset_trainer
from asr.training.benchmark import random_batch
from asr.training.faults import BadBatches, Termination
from asr.training.pieces import is_out_of_memory
from asr.training.ranks import started
from asr.training.trainer import Trainer
from losses import LOSSES
from tests.asr.training.runs import NO_DROPOUT, experiment, make_trainer, newest, read_data, records
from tests.distributed.test_equal import largest_difference

SGD = [*NO_DROPOUT, "data.max_duration_s=1.3", "training.accumulation=2"]


def sgd(trainer: Trainer) -> None:
    trainer.parallel.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.05)
    trainer.experiment.optim.lr = 0.05
    trainer.model.train()


def steps(data: Path, out: Path, device: str, *settings: str, count: int = 3) -> tuple[list[Any], dict[str, Any]]:
    trainer = make_trainer(experiment(*SGD, *settings), read_data(data), out, device=device)
    sgd(trainer)
    bad = BadBatches(out / "bad", 0, 0, lambda **_: None, print)
    found = [trainer.step(b, bad, own) for b, own in islice(trainer.batches_of_epoch(), count)]
    return found, {name: x.cpu() for name, x in trainer.parallel.weights().items()}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        *((f"loss.method={method}", 1e-5) for method in LOSSES),
        ("memory.checkpointing=full", 1e-5),
        ("memory.checkpointing=selective", 1e-5),
        ("training.normalize=utterances", 1e-5),
        ("training.precision=bf16", 2e-3),
        ("training.precision=fp16", 1e-3),
    ],
)
def test_steps_are_those_of_the_cpu(settings: str, tolerance: float, folder: Path, tmp_path: Path) -> None:
    here, weights = steps(folder, tmp_path / "cpu", "cpu", settings.replace("precision=", "log_every_steps=1 #"))
    there, others = steps(folder, tmp_path / "cuda", "cuda", settings)
    assert largest_difference(weights, others) < tolerance
    for one, other in zip(here, there, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=max(1e-4, tolerance))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
@pytest.mark.parametrize("method", list(LOSSES))
def test_a_preset_learns_a_batch(method: str, precision: str, tmp_path: Path) -> None:
    """The whole step at the sizes of preset s: 30 steps on one batch bring the loss well down."""
    settings = [f"loss.method={method}", "optim.warmup_steps=1", "optim.lr=1e-3", *NO_DROPOUT]
    trainer = preset_trainer("s", precision, 100, tmp_path, settings, "cuda")
    trainer.model.train()
    batch, bad = random_batch(40, 4, 3.0, 100, 80), BadBatches(tmp_path, 0, 0, lambda **_: None, print)
    losses = [trainer.step([batch], bad)["loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_run_starts_on_one_device_and_ends_on_another(folder: Path, tmp_path: Path) -> None:
    # as tests/distributed/test_equal.py has them, and for the same reasons
    settings = [*NO_DROPOUT, "data.max_duration_s=1.3", "training.ema_decay=0.5", "optim.eps=1e-2"]
    settings += ["optim.schedule=constant", "training.max_epochs=3", "training.accumulation=4"]

    def run(name: str, device: str, most: int) -> None:
        config = experiment(*settings, f"training.max_steps={most}")
        trainer = make_trainer(config, read_data(folder), tmp_path / name, device=device)
        if most == 6 and name != "cpu":
            trainer.resume(step_checkpoints(tmp_path / name / "checkpoints")[-1])
        trainer.run(Termination())

    run("cpu", "cpu", 6)
    for first, then in (("cpu", "cuda"), ("cuda", "cpu")):
        name = f"{first}-{then}"
        run(name, first, 3)
        run(name, then, 6)
        assert largest_difference(newest(tmp_path / "cpu")["model"], newest(tmp_path / name)["model"]) < 1e-4
        want, got = records(tmp_path / "cpu", "train"), records(tmp_path / name, "train")
        assert [x["batch_seconds"] for x in got] == pytest.approx([x["batch_seconds"] for x in want])


def test_memory_that_runs_out_is_met_with_smaller_pieces(tmp_path: Path) -> None:
    """The device gives out less than the batch needs: the step is tried again in pieces, and equals the whole one."""
    batch = random_batch(400, 10, 3.0, 500, 80)
    settings = [*NO_DROPOUT, "loss.method=batched", "optim.clip_grad_norm=0"]
    weights, peaks = [], []
    for part in (False, True):
        out = tmp_path / str(part)
        trainer = preset_trainer("s", "fp32", 500, out, settings, "cuda")
        sgd(trainer)
        said: list[str] = []
        trainer.stepper.say = said.append
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if part:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(0.6 * peaks[0] / total)
        try:
            record = trainer.step([batch], BadBatches(out / "bad", 0, 0, lambda **_: None, print))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert bool(said) == part and record["loss"] > 0
        weights.append({name: x.cpu() for name, x in trainer.parallel.weights().items()})
        peaks.append(torch.cuda.max_memory_reserved())
        del trainer
    assert largest_difference(*weights) < 1e-5


def test_the_error_is_known() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, device="cuda")
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_memory_limit_is_kept(share: float, tmp_path: Path) -> None:
    batch = random_batch(300, 10, 3.0, 500, 80)
    settings = [*NO_DROPOUT, "data.max_duration_s=300"]

    def peak(*more: str) -> float:
        out = tmp_path / f"{share}-{len(more)}"
        trainer = preset_trainer("s", "bf16", 500, out, [*settings, *more], "cuda", longest_s=11.0)
        trainer.model.train()
        bad = BadBatches(tmp_path / "bad", 0, 0, lambda **_: None, print)
        trainer.step([batch], bad)
        torch.cuda.reset_peak_memory_stats()
        trainer.step([batch], bad)
        return torch.cuda.max_memory_allocated()

    free = peak()
    limit = int(share * free)
    assert peak(f"memory.limit={limit}B") <= limit


@pytest.mark.parametrize("settings", [["parallel.zero=0"], ["parallel.zero=2"], ["parallel.zero=3"]])
def test_a_group_of_one_process_over_nccl(
    settings: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several processes run, with the messages of one: NCCL, its objects and its barriers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    with started("cuda", 60.0) as ranks:
        config = experiment(*NO_DROPOUT, *settings, "training.max_steps=3")
        trainer = make_trainer(config, read_data(folder), tmp_path, ranks, "cuda")
        trainer.run(Termination())
    assert len(records(tmp_path, "train")) == 3
