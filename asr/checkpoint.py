"""Checkpoints: one file that carries weights, configuration and tokenizer, written atomically and checked when read.

The file is what ``torch.save`` writes, with plain containers and tensors only, so that ``weights_only=True`` loads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.config import Experiment, dump, from_dict
from asr.data.tokenizer import Tokenizer
from asr.errors import UserError
from asr.models.transducer import Transducer, build_model

FORMAT_VERSION = 1
KEYS = {"config", "tokenizer", "vocab_size", "step", "epoch", "model"}


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or belongs to another model or version."""


@dataclass
class Loaded:
    """A model ready for use, and what came with it."""

    model: Transducer
    tokenizer: Tokenizer
    config: Experiment
    step: int
    epoch: int
    format_version: int


def atomic_save(payload: dict[str, Any], path: Path) -> None:
    """Writes beside the target, syncs, renames: a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the disk is full or not writable; the old file is untouched and nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as err:
        partial.unlink(missing_ok=True)
        if isinstance(err, RuntimeError) and isinstance(err.__context__, OSError):
            raise err.__context__ from None  # torch's writer wraps ENOSPC; the cause says more
        raise


def make_payload(
    model_state: dict[str, Tensor],
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    step: int,
    epoch: int,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a checkpoint file; ``training`` holds what only a resumed run needs."""
    payload: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "config": dump(experiment),
        "tokenizer": json.dumps(tokenizer.to_state()),
        "vocab_size": tokenizer.vocab_size,
        "step": step,
        "epoch": epoch,
        "model": model_state,
    }
    if training is not None:
        payload["training"] = training
    return payload


def read(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The checked content of a checkpoint file.

    Raises:
        CheckpointError: missing, truncated, corrupt (any record's CRC-32), not ours, or of another format version; a
            file of the same folder that is whole is named.
    """
    path = Path(path)
    try:
        return _read(path, map_location)
    except CheckpointError as err:
        raise CheckpointError(f"{err}{_neighbour(path)}") from None


def _read(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
        payload = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as err:
        raise CheckpointError(f"checkpoint {path} cannot be read: {err.strerror or err}") from None
    except Exception as err:  # zipfile, pickle and torch each raise their own
        reason = " ".join(str(err).split())[:160]
        raise CheckpointError(f"checkpoint {path} is corrupt or no checkpoint ({reason})") from None
    if not isinstance(payload, dict) or "format_version" not in payload:
        raise CheckpointError(f"{path} is a torch file but no checkpoint of this toolkit")
    if payload["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {payload['format_version']}, this program reads {FORMAT_VERSION};"
            " use the version of the toolkit that wrote it"
        )
    if missing := KEYS - payload.keys():
        raise CheckpointError(f"{path} is no checkpoint of this toolkit: it lacks {min(missing)}")
    return payload


def is_good(path: Path) -> bool:
    """Whether the file passes every check of :func:`read`."""
    try:
        _read(path, "cpu")
    except CheckpointError:
        return False
    return True


def _neighbour(path: Path) -> str:
    """Names the newest other file of the folder that is whole, for the end of an error message."""
    for other in sorted(path.parent.glob("*.pt"), key=lambda p: p.stat().st_mtime, reverse=True):
        if other.name != path.name and is_good(other):
            return f"; {other} is whole, use that one"
    return ""


def experiment_of(payload: dict[str, Any], source: str) -> Experiment:
    """The configuration that a checkpoint carries."""
    import yaml

    return from_dict(yaml.safe_load(payload["config"]), source)


def tokenizer_of(payload: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a checkpoint carries."""
    return Tokenizer.from_state(json.loads(payload["tokenizer"]))


def check_weights(model: Transducer, weights: dict[str, Tensor], source: str) -> None:
    """Whether whole weights are those of a model, whose own may be shared out over processes.

    Raises:
        CheckpointError: names or shapes differ: the checkpoint is of another model.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        first = names[0]
        if all(n.startswith("joiner.simple.") and (n in expected) != (n in found) for n in names):
            there, here = ("without", "has") if first in expected else ("with", "has not")
            raise CheckpointError(
                f"{source} is of a model {there} the trivial joiner of loss.method=pruned, which the configured model"
                f" {here}; keep the loss.method of that training, or begin a training of its own (--resume none)"
            )
        raise CheckpointError(
            f"{source} is of another model: {len(names)} tensors differ, first {first}: {found.get(first, 'absent')}"
            f" there, {expected.get(first, 'absent')} in the configured model; use the configuration of that training"
        )


def load_weights(model: Transducer, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into a model.

    Raises:
        CheckpointError: as `check_weights`.
    """
    check_weights(model, weights, source)
    model.load_state_dict(weights)


def load(path: Path | str, device: str | torch.device = "cpu", overrides: dict[str, Any] | None = None) -> Loaded:
    """Model (eval mode), tokenizer and configuration of a checkpoint.

    Args:
        path: a file written by training or averaging.
        device: where the weights go.
        overrides: fields of ``config.decoding`` to replace.

    Raises:
        CheckpointError: see :func:`read` and :func:`load_weights`.
    """
    path = Path(path)
    payload = read(path, "cpu")
    experiment = experiment_of(payload, str(path))
    if overrides:
        experiment.decoding = dataclasses.replace(experiment.decoding, **overrides)
    model = build_model(experiment, payload["vocab_size"])
    load_weights(model, payload["model"], f"checkpoint {path}")
    model.to(device).eval()
    return Loaded(
        model, tokenizer_of(payload), experiment, payload["step"], payload["epoch"], payload["format_version"]
    )


def step_name(step: int) -> str:
    """File name of a step's checkpoint; names sort like steps."""
    return f"step-{step:08d}.pt"


def step_checkpoints(folder: Path) -> list[Path]:
    """step-*.pt of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def newest_good(folder: Path, say: Any = print) -> Path | None:
    """The newest step checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(step_checkpoints(folder)):
        try:
            read(path)
        except CheckpointError as err:
            say(f"warning: {err}; trying the one before it")
            continue
        return path
    return None


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Renames checkpoints of later steps, which another run wrote or which are damaged, to step-*.pt.old.

    Left in place they would be taken for this run's newest: kept instead of its own, averaged and resumed from.
    """
    moved = []
    for path in step_checkpoints(folder):
        if path.name > step_name(step):
            moved.append(path.replace(path.with_name(path.name + ".old")))
    return moved


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest step checkpoints, and what a killed writer left."""
    for path in step_checkpoints(folder)[:-keep_last]:
        path.unlink()
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def running_averages(states: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Arithmetic means of the weights of the first checkpoint, the first two, and so on, summed in float64."""
    total: dict[str, Tensor] = {}
    for count, state in enumerate(states, 1):
        for name, value in state.items():
            if count == 1:
                total[name] = value.double() if value.is_floating_point() else value.clone()
            elif value.is_floating_point():
                total[name] += value
        yield {n: (v / count).float() if v.is_floating_point() else v for n, v in total.items()}
