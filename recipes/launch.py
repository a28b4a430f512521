"""Stages on several processes: `asr train`, `average` and `decode` under torchrun, from the same files."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from asr.cli.guard import stopped_by_sigterm
from asr.config import dump
from asr.errors import Terminated, UserError
from asr.training.launch import Nodes, run_processes
from recipes.engine import Pipeline, StageStopped, write_atomic

if TYPE_CHECKING:
    from asr.decoding.search import DecodingConfig
    from recipes.stages import Recipe

SETTINGS_FILE = "train/settings.yaml"
RESTARTS = 3  # after the loss of a process


def train_words(recipe: Recipe) -> list[str]:
    """What `asr train` is told."""
    files = {
        "--config": recipe.path(SETTINGS_FILE),
        "--train-cuts": recipe.path("data/features/cuts_train.jsonl.gz"),
        "--valid-cuts": recipe.path("data/features/cuts_valid.jsonl.gz"),
        "--tokenizer": recipe.path("tokenizer/tokenizer.json"),
        "--feature-stats": recipe.path("data/features/stats.json"),
        "--out-dir": recipe.path("train"),
    }
    words = [word for name, path in files.items() for word in (name, str(path))]
    return [*words, "--device", recipe.device]


def train_on_processes(recipe: Recipe) -> None:
    """Trains; goes on from the newest checkpoint of the folder if there is one.

    Raises:
        StageStopped: SIGTERM, also on another machine, with the state saved.
        KeyboardInterrupt: Ctrl-C, with the state saved.
        UserError: the processes failed; what they printed says why.
    """
    recipe.path("train").mkdir(parents=True, exist_ok=True)
    write_atomic(recipe.path(SETTINGS_FILE), dump(recipe.experiment))
    saved = f"saved in {recipe.path('train/checkpoints')}"
    try:
        _train(recipe)
    except Terminated:
        raise StageStopped(f"SIGTERM, {saved}") from None
    lines = recipe.path("train/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if json.loads(lines[-1]).get("reason") != "finished":
        raise StageStopped(f"a process was told to stop, {saved}")


def take_part(recipe: Recipe, pipeline: Pipeline, selected: range) -> None:
    """On another machine than the first: trains with it when it comes to that, if it does.

    Raises:
        StageStopped, KeyboardInterrupt, UserError: as on one machine; or the settings are not those of the first.
    """
    train = pipeline.index("train")
    if train not in selected:
        print(f"machine {recipe.nodes.rank} takes part in training only, which is not among these stages", flush=True)
        return
    print(f"machine {recipe.nodes.rank} waits for training on machine 0 at {recipe.nodes.master}", flush=True)
    until_train = range(selected.start, train + 1)
    with stopped_by_sigterm():
        while not _listens(recipe.nodes):
            if not any(status.must_run for status in pipeline.plan(until_train)):
                print("training has finished already", flush=True)
                return
            time.sleep(1.0)
        try:
            settings = recipe.path(SETTINGS_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            settings = ""
        if settings != dump(recipe.experiment):
            raise UserError(
                f"{recipe.path(SETTINGS_FILE)} of machine 0 has other settings than this command; pass the same "
                "options on all machines, and an --exp-dir that they share"
            )
        try:
            _train(recipe)
        except Terminated:
            raise StageStopped("SIGTERM: told the other machines to save and stop") from None


def _train(recipe: Recipe) -> None:
    words = train_words(recipe)
    if code := run_processes(recipe.num_processes, RESTARTS, "train", *words, nodes=recipe.nodes):
        number = recipe.num_processes * recipe.nodes.count
        raise UserError(f"training on {number} processes ended with {code}; the reason is printed above")


def _listens(nodes: Nodes) -> bool:
    try:
        with socket.create_connection(nodes.place, timeout=5.0):
            return True
    except OSError:
        return False


def average_on_processes(recipe: Recipe) -> None:
    """Chooses the weights that decode, each process with its share of the validation cuts.

    Raises:
        UserError: the processes failed; what they printed says why.
    """
    config = recipe.experiment.average
    cuts = recipe.path("data/features/cuts_valid.jsonl.gz")
    words = ["--train-dir", str(recipe.path("train")), "--valid-cuts", str(cuts), "--device", recipe.device]
    words += ["--ema" if config.ema else "--no-ema", "--best" if config.best else "--no-best"]
    _decoding(recipe, "average", *words, "--last", *map(str, config.last))


def decode_on_processes(recipe: Recipe, name: str, out: Path, decoding: DecodingConfig, emission_plots: int) -> None:
    """Decodes a test set with one search into a folder, each process its share.

    Raises:
        UserError: the processes failed; what they printed says why.
    """
    files = {
        "--checkpoint": recipe.path("train/average.pt"),
        "--cuts": recipe.path(f"data/features/cuts_{name}.jsonl.gz"),
        "--out-dir": out,
    }
    words = [word for option, path in files.items() for word in (option, str(path))]
    words += ["--device", recipe.device, "--emissions", str(emission_plots)]
    settings = dataclasses.asdict(decoding)
    _decoding(recipe, "decode", *words, *(f"--set=decoding.{name}={value}" for name, value in settings.items()))


def _decoding(recipe: Recipe, command: str, *words: str) -> None:
    with stopped_by_sigterm():
        code = run_processes(recipe.num_processes, 0, command, *words)
    if code:
        raise UserError(f"decoding on {recipe.num_processes} processes ended with {code}; the reason is printed above")
