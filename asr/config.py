"""The experiment's configuration: one dataclass tree, strict YAML, dotted overrides.

Every dataclass stands beside the class that it configures. Types, literals and ``--help`` come from jsonargparse, which
reads plain dataclasses and their docstrings as they are; OmegaConf knows no ``Literal``, and tyro reads no YAML
differences. Unknown keys are looked for here, before it, so that the nearest valid names can be told.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from asr.data.loader import DataConfig
from asr.data.tokenizer import TokenizerConfig
from asr.decoding.normalise import ScoringConfig
from asr.decoding.search import DecodingConfig
from asr.errors import UserError
from asr.export.config import ExportConfig
from asr.models.presets import PRESETS
from asr.models.transducer import LossConfig, ModelConfig
from asr.training.optim import OptimConfig
from asr.training.trainer_config import AverageConfig, MemoryConfig, ParallelConfig, TrainingConfig
from losses import LOSSES
from losses.api import check_combination
from losses.memory import parse_limit


@dataclass
class Experiment:
    """Everything that decides a run.

    Args:
        name: shown in reports.
        seed: weights, order of batches, dropout and augmentation.
        data: features, augmentation, batches.
        tokenizer: kind and size.
        model: architecture.
        loss: objective.
        optim: optimizer and schedule.
        training: length of the run, checkpoints, precision.
        parallel: how training is spread over processes.
        memory: what a step keeps.
        average: which checkpoints become the model that decodes.
        decoding: search.
        scoring: what is done to texts before they are compared.
        export: files for devices.
    """

    name: str = "experiment"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, LossConfig):  # the parser's own object, before the parts are made
            return
        if self.loss.ctc_weight > 0 and not self.model.ctc:
            raise UserError(f"loss.ctc_weight={self.loss.ctc_weight} needs a CTC head; set model.ctc=true")
        if self.loss.ctc_targets == "characters" and self.tokenizer.kind in ("word", "word_end"):
            raise UserError(
                f"loss.ctc_targets=characters: tokens of tokenizer.kind={self.tokenizer.kind} are whole words, whose "
                "characters are no tokens; set loss.ctc_targets=tokens, or use bpe, unigram, byte_bpe or char"
            )
        if self.loss.ctc_weight < 0:
            raise UserError(f"loss.ctc_weight={self.loss.ctc_weight} must be at least 0")
        if self.loss.method not in LOSSES:
            raise UserError(f"loss.method={self.loss.method!r} is unknown; valid: {', '.join(LOSSES)}")
        for name in ("shaping_from", "simple_loss_scale", "simple_warmup"):
            if not 0 <= getattr(self.loss, name) <= 1:
                raise UserError(f"loss.{name}={getattr(self.loss, name)} is not from 0 to 1")
        try:
            if self.loss.memory_limit is not None:
                parse_limit(self.loss.memory_limit)
            check_combination(self.loss.method, self.loss.topology, self.loss.options())
        except ValueError as err:  # begins with the name of the option
            raise UserError(f"loss.{err}") from None


def dotted_keys(cls: type = Experiment, prefix: str = "") -> list[str]:
    """Every valid dotted key below a configuration dataclass, branches included."""
    keys = []
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        key = prefix + entry.name
        keys.append(key)
        if dataclasses.is_dataclass(hints[entry.name]):
            keys += dotted_keys(hints[entry.name], key + ".")
    return keys


def _may_be_null() -> set[str]:
    """The keys whose default says "none"."""
    return {key for key, value in _leaves(to_dict(Experiment())) if value is None}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nearest(key: str, valid: list[str]) -> str:
    # a wrong branch with the right last name ("lr" for "optim.lr") is as common as a slip of a letter
    last = key.rsplit(".", 1)[-1]
    names = [v for v in valid if v.rsplit(".", 1)[-1] == last]
    names += [v for v in difflib.get_close_matches(key, valid, n=3, cutoff=0.5) if v not in names]
    return ", ".join(names[:3]) if names else ", ".join(v for v in valid if "." not in v)


def _nested_form(key: str) -> str:
    first, *rest = key.split(".")
    return first + ": " + "".join(f"{{{name}: " for name in rest) + "..." + "}" * len(rest)


def _check_keys(tree: dict[str, Any], source: str) -> None:
    valid = dotted_keys()
    branches = {key.rsplit(".", 1)[0] for key in valid if "." in key}

    def visit(node: Any, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if "." in str(name) and key in valid:
                raise UserError(f"{key} in {source} is written with a dot; in files write {_nested_form(key)}")
            if key not in valid:
                raise UserError(f"unknown key {key!r} in {source}; nearest valid: {_nearest(key, valid)}")
            if key in branches:
                if not isinstance(value, dict):
                    message = f"{key} in {source} is a group of settings, not the value {value!r}; set {key}.NAME"
                    raise UserError(message)
                visit(value, key + ".")
            elif value is None and key not in _may_be_null():
                raise UserError(f"{key} in {source} has no value; give it one, or leave it out for the default")

    visit(tree, "")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"configuration {path} cannot be read: {err}") from None
    except yaml.YAMLError as err:
        raise UserError(f"configuration {path} is not valid YAML: {' '.join(str(err).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path} holds {type(tree).__name__}, expected settings as 'name: value'")
    return tree


def parse_override(text: str) -> dict[str, Any]:
    """'a.b=c' to {'a': {'b': c}}; c is read as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"override {text!r} is not of the form key.name=value")
    try:
        node: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value is not valid YAML") from None
    for name in reversed(key.strip().split(".")):
        node = {name: node}
    return node


def make_parser() -> ArgumentParser:
    """The parser of the whole tree."""
    parser = ArgumentParser(prog="--set", exit_on_error=False, usage="asr train --config FILE [--set KEY=VALUE ...]")
    parser.add_class_arguments(Experiment, as_group=False)
    return parser


def keys_help() -> str:
    """Every key that an override may set, with its meaning, type and default."""
    parser = make_parser()
    keys = dotted_keys()
    leaves = [key for key in keys if not any(other.startswith(key + ".") for other in keys)]
    for action in parser._actions:
        # jsonargparse also takes --KEY+ VALUE to append to a list, and a file for a group of settings
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest not in leaves:
            action.help = argparse.SUPPRESS
    return parser.format_help()


_KINDS = {
    "str": 'text ("..." makes a number text)',
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list, as in [1, 2]",
    "dict": "of the form {name: value}",
    "NoneType": "null",
}


def _in_words(error: Exception) -> str:
    """One line; what jsonargparse says of a wrong type, in words instead of classes of Python."""
    text = " ".join(str(error).split())
    found = re.match(r'Parser key "(.+?)": (.*?)\.? (?:Got|Given) value: (.*)', text)
    if found is None:
        return text
    key, expected, value = found.groups()
    if choices := re.search(r"Literal\[(.*?)\]", expected):
        return f"{key}: {value} is not one of {choices[1].replace(chr(39), '')}"
    kinds = [_KINDS.get(name, name) for name in re.findall(r"Expected a <class '(\w+)'>", expected)]
    return f"{key}: {value} is not {' or '.join(kinds)}" if kinds else text


def from_dict(tree: dict[str, Any], source: str = "the configuration") -> Experiment:
    """Typed, checked experiment of a plain tree; what is missing takes the preset's, then the default value.

    Raises:
        UserError: unknown key (with the nearest valid ones), wrong type, or a value outside its range.
    """
    _check_keys(tree, source)
    preset = (tree.get("model") or {}).get("preset", ModelConfig().preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"model.preset={preset!r} in {source} is unknown; valid: {', '.join(PRESETS)}")
    tree = _merge({"model": copy.deepcopy(PRESETS[preset])}, tree)  # the parser writes into what it is given
    parser = make_parser()
    try:
        return Experiment(**vars(parser.instantiate(parser.parse_object(tree))))
    except UserError:
        raise
    except Exception as err:  # jsonargparse raises its own, argparse's and the dataclasses' errors
        raise UserError(f"{source}: {_in_words(err)}") from None


def load_experiment(paths: Path | list[Path] | None = None, overrides: list[str] | None = None) -> Experiment:
    """Defaults, then the preset, then YAML files in order, then overrides 'a.b=c'.

    Raises:
        UserError: see :func:`from_dict`; also for files that cannot be read.
    """
    files = [] if paths is None else [paths] if isinstance(paths, (str, Path)) else paths
    tree: dict[str, Any] = {}
    for path in files:
        part = _read_yaml(Path(path))
        _check_keys(part, str(path))
        tree = _merge(tree, part)
    for text in overrides or []:
        part = parse_override(text)
        _check_keys(part, f"override {text!r}")
        tree = _merge(tree, part)
    given = list(overrides or [])
    try:
        return from_dict(tree, "the configuration")
    except UserError as error:
        said = str(error)
        # the settings that it names, by their last name at least; where there are none it may be any
        blamed = [text for text in given if re.search(rf"\b{_last_name(text)}\b", said)]
        names = blamed or [*map(str, files), *given]
        raise UserError(said.replace("the configuration", " ".join(names) or "the defaults", 1)) from None


def _last_name(override: str) -> str:
    return re.escape(override.partition("=")[0].strip().rpartition(".")[2])


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain nested dict of built-in types, JSON-able."""
    return dataclasses.asdict(experiment)


def dump(experiment: Experiment) -> str:
    """YAML of every key, in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(experiment), sort_keys=False, allow_unicode=True)
