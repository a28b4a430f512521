"""A checkpoint made ready to decode: on its device, with the settings of this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr import checkpoint
from asr.config import Experiment, from_dict, parse_override, to_dict
from asr.decoding import SEARCHES
from asr.errors import UserError

# The rest of a configuration describes how the weights came about. Changing it now would be silently without effect.
CHANGEABLE = ("decoding", "scoring", "data", "export")


def load_for_decoding(
    path: Path, device: str = "cpu", search: str | None = None, overrides: Sequence[str] = ()
) -> checkpoint.Loaded:
    """Load a checkpoint and change its decoding settings.

    Args:
        path: checkpoint file.
        device: a name that ``asr.device.resolve_device`` gave.
        search: a name of ``SEARCHES``; None keeps the checkpoint's.
        overrides: ``decoding.name=value``, or of another of ``CHANGEABLE``.

    Raises:
        UserError: no such checkpoint or search; a setting that is unknown, of the wrong type or not changeable.
    """
    if search is not None and search not in SEARCHES:
        raise UserError(f"unknown search {search!r}; choose one of {', '.join(SEARCHES)}")
    loaded = checkpoint.load(path, device)
    loaded.config = override(loaded.config, [f"decoding.search={search}", *overrides] if search else overrides)
    return loaded


def experiment_dir(checkpoint: Path) -> Path:
    """Where results go unless told otherwise: EXP for a checkpoint in EXP/train, else the folder of the checkpoint."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "train" else folder


def override(config: Experiment, overrides: Sequence[str]) -> Experiment:
    """A configuration with ``a.b=c`` applied to those of its parts that are ``CHANGEABLE``."""
    tree = to_dict(config)
    for text in overrides:
        change = parse_override(text)
        root = next(iter(change))
        if root not in CHANGEABLE:
            raise UserError(
                f"{text!r}: a trained model decodes with the {root!r} settings that it was trained with;"
                f" only {', '.join(f'{name}.*' for name in CHANGEABLE)} can be set here"
            )
        _merge_into(tree, change)
    return from_dict(tree, "--set " + " ".join(overrides) if overrides else "the checkpoint's configuration")


def _merge_into(tree: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge_into(tree[key], value)
        else:
            tree[key] = value
