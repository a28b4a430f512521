"""From checkpoints to the one model that decodes, chosen on validation cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr import checkpoint
from asr.data.loader import eval_loader
from asr.errors import UserError
from asr.models.transducer import Transducer
from asr.training.trainer_config import AverageConfig
from asr.training.validation import Validation, validate


@dataclass
class Candidate:
    """A set of weights and its validation score."""

    name: str
    validation: Validation


def _candidates(
    train_dir: Path, config: AverageConfig, say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = []
    for path in checkpoint.step_checkpoints(train_dir / "checkpoints"):
        try:
            checkpoint.read(path)
            paths.append(path)
        except checkpoint.CheckpointError as err:
            say(f"warning: {err}; left out of the average")
    if not paths:
        raise UserError(f"no whole checkpoint in {train_dir / 'checkpoints'}; run the train stage first")
    for count in sorted({min(n, len(paths)) for n in config.last}):
        payload = checkpoint.read(paths[-1])
        payload["model"] = checkpoint.average_weights(checkpoint.read(p)["model"] for p in paths[-count:])
        yield f"last-{count}", payload
    if config.ema:
        payload = checkpoint.read(paths[-1])
        if payload.get("training", {}).get("ema") is not None:
            payload["model"] = payload["training"]["ema"]
            yield "ema", payload
    if config.best and (train_dir / "best.pt").is_file():
        try:
            payload = checkpoint.read(train_dir / "best.pt")
        except checkpoint.CheckpointError as err:
            say(f"warning: {err}; no candidate")
        else:
            yield "best", payload


def average(
    train_dir: Path,
    valid_cuts: Any,
    config: AverageConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
) -> tuple[Path, list[Candidate]]:
    """Scores every candidate on ``valid_cuts`` and writes the best as ``average.pt``.

    Args:
        train_dir: the training folder, with checkpoints/ in it.
        valid_cuts: lhotse cuts that training did not see; never the test cuts.
        config: candidates; None takes the configuration in the newest checkpoint.
        device: where validation runs.
        say: prints a line.

    Returns:
        Path of average.pt, and the candidates with their scores, best first.

    Raises:
        UserError: no whole checkpoint, or no candidate is asked for.
    """
    newest = checkpoint.newest_good(train_dir / "checkpoints", say)
    if newest is None:
        raise UserError(f"no whole checkpoint in {train_dir / 'checkpoints'}; run the train stage first")
    experiment = checkpoint.experiment_of(checkpoint.read(newest), str(newest))
    device = torch.device(device)
    scored: list[tuple[Candidate, dict[str, Any]]] = []
    for name, payload in _candidates(train_dir, config or experiment.average, say):
        tokenizer = checkpoint.tokenizer_of(payload)
        model = Transducer(experiment.model, payload["vocab_size"])
        weights: dict[str, Tensor] = payload["model"]
        checkpoint.load_weights(model, weights, name)
        model.to(device)
        limit_s = experiment.decoding.batch_duration_s
        batches = eval_loader(valid_cuts, tokenizer, experiment.data, max_duration_s=limit_s)
        validation = validate(model, batches, tokenizer, experiment, device)
        say(
            f"  {name}: {validation.errors} errors in {validation.words} words, loss {validation.loss:.4f} a token"
            " on the validation cuts"
        )
        scored.append((Candidate(name, validation), payload))
    if not scored:
        raise UserError("average.last is empty and neither average.ema nor average.best gives a candidate; ask for one")
    scored.sort(key=lambda pair: pair[0].validation.rank)
    chosen, payload = scored[0]
    payload.pop("training", None)
    payload["averaged"] = chosen.name
    path = train_dir / "average.pt"
    checkpoint.atomic_save(payload, path)
    say(f"  chosen: {chosen.name}, written to {path}")
    return path, [candidate for candidate, _ in scored]
