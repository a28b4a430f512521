"""From checkpoints to the one model that decodes, chosen on validation cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from asr import checkpoint
from asr.data.loader import eval_loader
from asr.data.manifests import check_cuts
from asr.errors import CheckpointError, UserError
from asr.models.transducer import build_model
from asr.training.ranks import Ranks
from asr.training.trainer_config import AverageConfig
from asr.training.validation import Validation, validate


@dataclass
class Candidate:
    """A set of weights and its validation score."""

    name: str
    validation: Validation


def _whole(train_dir: Path, say: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The step checkpoints that are whole, newest first; each is read when it is asked for."""
    for path in reversed(checkpoint.step_checkpoints(train_dir / "checkpoints")):
        try:
            yield path, checkpoint.read(path)
        except CheckpointError as err:
            say(f"warning: {err}; left out of the average")


def _candidates(
    newest: dict[str, Any],
    older: Iterator[tuple[Path, dict[str, Any]]],
    best_path: Path,
    config: AverageConfig,
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each candidate; each checkpoint is read once, one is in memory at a time."""
    ema = (newest.pop("training", None) or {}).get("ema")
    count = 0
    states = chain([newest["model"]], map(lambda read: read[1]["model"], older))
    wanted = max(config.last, default=0)
    for count, mean in enumerate(islice(checkpoint.running_averages(states), wanted), 1):
        if count in config.last:
            yield f"last-{count}", {**newest, "model": mean}
    if config.last and count not in config.last:  # fewer checkpoints than were asked for
        yield f"last-{count}", {**newest, "model": mean}
    if config.ema and ema is not None:
        yield "ema", {**newest, "model": ema}
    if config.best and best_path.is_file():
        try:
            best = checkpoint.read(best_path)
        except CheckpointError as err:
            say(f"warning: {err}; no candidate")
        else:
            yield "best", best


def average(
    train_dir: Path,
    valid_cuts: Any,
    config: AverageConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> tuple[Path, list[Candidate]]:
    """Scores every candidate on ``valid_cuts`` and writes the best as ``average.pt``.

    Args:
        train_dir: the training folder, with checkpoints/ in it.
        valid_cuts: lhotse cuts that training did not see; never the test cuts.
        config: candidates; None takes the configuration in the newest checkpoint.
        device: where validation runs.
        say: prints a line.
        ranks: of several processes each decodes its share of the cuts; all call this, and the first writes and speaks.

    Returns:
        Path of average.pt, and the candidates with their scores, best first.

    Raises:
        UserError: no whole checkpoint, or no candidate is asked for.
    """
    device, ranks = torch.device(device), ranks or Ranks()
    say = say if ranks.first else lambda _: None
    whole = _whole(train_dir, say)
    path, newest = next(whole, (None, {}))
    if path is None:
        raise UserError(f"no whole checkpoint in {train_dir / 'checkpoints'}; run the train stage first")
    experiment = checkpoint.experiment_of(newest, str(path))
    limit_s = experiment.decoding.batch_duration_s
    # as training does: a text that the tokenizer cannot spell has no loss
    good, bad = check_cuts(valid_cuts, checkpoint.tokenizer_of(newest), experiment.data.features, check_audio=False)
    if bad:
        say(f"  left out {len(bad)} of {len(bad) + len(good)} validation cuts, the first: {bad[0].reason}")
    if not len(good):
        raise UserError(f"no validation cut can be used; the first: {bad[0].reason}")
    scored: list[Candidate] = []
    chosen: dict[str, Any] = {}
    for name, payload in _candidates(newest, whole, train_dir / "best.pt", config or experiment.average, say):
        tokenizer = checkpoint.tokenizer_of(payload)
        model = build_model(experiment, payload["vocab_size"])
        checkpoint.load_weights(model, payload["model"], name)
        model.to(device)
        batches = eval_loader(
            good, tokenizer, experiment.data, max_duration_s=limit_s, rank=ranks.rank, size=ranks.size
        )
        validation = validate(model, batches, tokenizer, experiment, device, ranks=ranks)
        say(
            f"  {name}: {validation.errors} errors in {validation.words} {experiment.training.errors_in},"
            f" loss {validation.loss:.4f} a token"
            f" on {f'{len(good)} of {len(good) + len(bad)}' if bad else 'the'} validation cuts"
        )
        if not scored or validation.rank < min(candidate.validation.rank for candidate in scored):
            chosen = {**payload, "averaged": name}
        scored.append(Candidate(name, validation))
    if not scored:
        raise UserError("average.last is empty and neither average.ema nor average.best gives a candidate; ask for one")
    scored.sort(key=lambda candidate: candidate.validation.rank)
    out = train_dir / "average.pt"
    if ranks.first:
        checkpoint.atomic_save(chosen, out)
    say(f"  chosen: {chosen['averaged']}, written to {out}")
    return out, scored
