"""Training that begins with the weights of another one, and parts of a model that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asr import checkpoint
from asr.cli.guard import nearest
from asr.config import Experiment
from asr.data.tokenizer import Tokenizer
from asr.errors import UserError
from asr.models.transducer import build_model


def begin_file(path: Path) -> Path:
    """The checkpoint that is meant: of a folder of training or of an experiment, its average.pt where there is one."""
    inside = (path / "average.pt", path / "train" / "average.pt") if path.is_dir() else ()
    return next((file for file in inside if file.is_file()), path)


def begin_with(
    model: nn.Module, path: Path, experiment: Experiment, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Copies the weights of a checkpoint into a new model, and says what it has no weights for.

    With another tokenizer, a token's row of each table goes to the token of the same symbol; new symbols keep the rows
    that the model was made with. Feature statistics come with the encoder that knows them.

    Args:
        model: of the experiment and the tokenizer, not yet shared out.
        path: of any checkpoint.
        experiment: of the new training.
        tokenizer: of the new training.
        say: takes a line for the log.

    Raises:
        CheckpointError: it cannot be read.
        UserError: a tensor has another size there, for another reason than the number of tokens.
    """
    found = checkpoint.read(path)
    theirs, weights = checkpoint.tokenizer_of(found), found["model"]
    same_tokens = tokenizer.to_state() == theirs.to_state()
    by_token = set() if same_tokens else _token_tables(experiment)
    rows = {symbol: row for row, symbol in enumerate(theirs.symbols)}
    pairs = [(row, rows[symbol]) for row, symbol in enumerate(tokenizer.symbols) if symbol in rows]
    new = []
    own = model.state_dict()
    for name, value in own.items():
        given = weights.get(name)
        if given is None:
            new.append(name)
        elif name in by_token:
            _copy_rows(value, given, pairs)
        elif given.shape != value.shape:
            raise UserError(
                f"training.init_from={path}: {name} is {tuple(given.shape)} there and {tuple(value.shape)} in the "
                "configured model; use the model settings of that checkpoint"
            )
        else:
            value.copy_(given)
    say(f"begins with the weights of {path}, step {found['step']}")
    if not same_tokens:
        say(f"another tokenizer: {len(pairs)} of {tokenizer.vocab_size} tokens are known by their symbols")
    if new:
        say(f"new in this model: {', '.join(sorted({name.rsplit('.', 1)[0] for name in new}))}")
    if left := weights.keys() - own.keys():
        say(f"left behind: {', '.join(sorted({name.rsplit('.', 1)[0] for name in left}))}")


def _token_tables(experiment: Experiment) -> set[str]:
    """Names of the tensors with a row for each token: those that grow with the vocabulary."""
    with torch.device("meta"):
        small, large = (build_model(experiment, count).state_dict() for count in (7, 8))
    return {name for name, value in small.items() if value.shape != large[name].shape}


@torch.no_grad()
def _copy_rows(value: Tensor, given: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    here, there = (torch.tensor(column, device=value.device) for column in zip(*pairs, strict=True))
    value[here] = given.to(value)[there]


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Leaves parts of a model as they are; names as in ``training.precision_overrides``, like encoder.blocks.0.

    Raises:
        UserError: there is no such part, or nothing is left to train.
    """
    for name in names:
        chosen = [p for full, p in model.named_parameters() if full == name or full.startswith(f"{name}.")]
        if not chosen:
            parts = ", ".join(part for part, _ in model.named_children())
            names_of_all = [full for full, _ in model.named_modules() if full]
            raise UserError(
                f"training.freeze has {name!r}, which is no part of the model{nearest(name, names_of_all)}; its parts: "
                f"{parts}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"training.freeze={list(names)} leaves nothing to train")
