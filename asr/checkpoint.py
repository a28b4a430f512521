"""Checkpoints: they carry weights, configuration and tokenizer, are written atomically and checked when read.

One process writes a file: what ``torch.save`` writes, with plain containers and tensors only, so that
``weights_only=True`` loads it. Several write a folder, see `asr.checkpoint_folder`. All else takes either.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr import checkpoint_folder
from asr.atomic import cause_on_disk, partial_name, write_whole
from asr.config import Experiment, dump, from_dict
from asr.data.tokenizer import Tokenizer
from asr.errors import CheckpointError
from asr.models.transducer import Transducer, build_model

FORMAT_VERSION = 1
KEYS = {"config", "tokenizer", "vocab_size", "step", "epoch", "model"}


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
    try:
        write_whole(path, lambda file: torch.save(payload, file))
    except RuntimeError as err:
        raise cause_on_disk(err) from None


def make_payload(
    model_state: dict[str, Tensor],
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    step: int,
    epoch: int,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a checkpoint: a tree of dicts, with tensors and plain values.

    ``training`` holds what only a resumed run needs: "optimizer", by name of the parameter, "ema" and "progress".
    """
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


def read(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint, with whole tensors on the CPU.

    Raises:
        CheckpointError: missing, truncated, corrupt (any record's or file's checksum), not ours, or of another format
            version; a checkpoint of the same folder that is whole is named.
    """
    path = Path(path)
    try:
        return _read(path)
    except CheckpointError as err:
        raise CheckpointError(f"{err}{_neighbour(path)}") from None


def outline(path: Path) -> dict[str, Any]:
    """As `read`; but of a folder only what is not tensors, and their shapes: `checkpoint_folder.fill` reads them."""
    return _checked(checkpoint_folder.outline(path), path) if path.is_dir() else read(path)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _checked(checkpoint_folder.read(path), path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as err:
        raise CheckpointError(f"checkpoint {path} cannot be read: {err.strerror or err}") from None
    except Exception as err:  # zipfile, pickle and torch each raise their own
        reason = " ".join(str(err).split())[:160]
        raise CheckpointError(f"checkpoint {path} is corrupt or no checkpoint ({reason})") from None
    return _checked(payload, path)


def _checked(payload: Any, path: Path) -> dict[str, Any]:
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


def verify(path: Path) -> None:
    """Every check of `read`, without the tensors of a folder in memory.

    Raises:
        CheckpointError: see `read`.
    """
    try:
        _verify(path)
    except CheckpointError as err:
        raise CheckpointError(f"{err}{_neighbour(path)}") from None


def _verify(path: Path) -> None:
    if path.is_dir():
        checkpoint_folder.verify(path)
        outline(path)
    else:
        _read(path)


def is_good(path: Path) -> bool:
    """Whether the checkpoint passes `verify`."""
    try:
        _verify(path)
    except CheckpointError:
        return False
    return True


def _neighbour(path: Path) -> str:
    """Names the newest other checkpoint of the folder that is whole, for the end of an error message."""
    others = {*path.parent.glob("*.pt"), *step_checkpoints(path.parent)}
    for other in sorted(others, key=_written_at, reverse=True):
        if other.name != path.name and is_good(other):
            return f"; {other} is whole, use that one"
    return ""


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # pruned meanwhile
        return 0


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
    payload = read(path)
    experiment = experiment_of(payload, str(path))
    if overrides:
        experiment.decoding = dataclasses.replace(experiment.decoding, **overrides)
    model = build_model(experiment, payload["vocab_size"])
    load_weights(model, payload["model"], f"checkpoint {path}")
    model.to(device).eval()
    return Loaded(
        model, tokenizer_of(payload), experiment, payload["step"], payload["epoch"], payload["format_version"]
    )


def step_name(step: int, suffix: str = ".pt") -> str:
    """Name of a step's checkpoint, of a folder with suffix ""; names sort like steps."""
    return f"step-{step:08d}{suffix}"


def step_checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.suffix == ".pt" or not path.suffix and path.is_dir()]
    # a step has two when the run went on with another number of processes before the next one
    return sorted(found, key=lambda path: (path.stem, _written_at(path)))


def newest_good(folder: Path, say: Any = print) -> Path | None:
    """The newest step checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(step_checkpoints(folder)):
        try:
            _verify(path)
        except CheckpointError as err:
            say(f"warning: {err}; trying the one before it")
            continue
        return path
    return None


def set_aside(path: Path) -> Path:
    """Renames a checkpoint to NAME.old, in the place of an earlier one of that name; the new path."""
    old = path.with_name(path.name + ".old")
    if old.is_dir():
        shutil.rmtree(old)
    return path.replace(old)


def set_aside_later(folder: Path, step: int) -> list[Path]:
    """Renames checkpoints of later steps, which another run wrote or which are damaged, to step-*.old.

    Left in place they would be taken for this run's newest: kept instead of its own, averaged and resumed from.
    """
    return [set_aside(path) for path in step_checkpoints(folder) if path.stem > step_name(step, "")]


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest step checkpoints, and what a killed writer left."""
    remove_partials(folder)
    paths = step_checkpoints(folder)
    kept = list({path.stem: path for path in paths}.values())[-keep_last:]
    for path in paths:
        if path not in kept:
            path.replace(partial_name(path))  # gone at once, also a folder
    remove_partials(folder)


def remove_partials(folder: Path) -> None:
    """Removes what is half-written or half-removed."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
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
