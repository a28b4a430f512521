"""``python -m recipes <corpus>``: the options of a recipe, and what is printed around its stages."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr.cli.guard import Parser, end_of_process, guarded, log_to_stdout, nearest
from asr.errors import UserError
from recipes import STAGES
from recipes.corpora import CORPORA
from recipes.engine import StageStopped
from recipes.sounds import SOUNDS

ROOT = Path(__file__).resolve().parent.parent
# Options that choose what happens this time only; they are left out of the command that continues a run.
_ONE_TIME = {"--stage": 1, "--stop-stage": 1, "--dry-run": 0, "--force": 0}


def _usage() -> str:
    lines = ["usage: python -m recipes CORPUS [options]", "", f"Runs a recipe: {', '.join(STAGES)}.", "", "corpora:"]
    for name, corpus in CORPORA.items():
        lines.append(f"  {name:<13}{(corpus.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join([*lines, "", "`python -m recipes CORPUS --help` shows the options of a recipe."])


def _in_checkout(corpus: str) -> bool:
    return (ROOT / "egs" / corpus / "run.sh").is_file()


def default_exp_dir(corpus: str) -> Path:
    """``egs/<corpus>/exp`` beside the sources of a checkout, else ``exp/<corpus>`` in the current folder."""
    return ROOT / "egs" / corpus / "exp" if _in_checkout(corpus) else Path("exp") / corpus


def default_download_dir(corpus: str) -> Path:
    """``egs/<corpus>/data`` in a checkout, else ``data/<corpus>``: experiments share it."""
    return ROOT / "egs" / corpus / "data" if _in_checkout(corpus) else Path("data") / corpus


def default_config(corpus: str) -> Path | None:
    """The recipe's own configuration: of the checkout, else the copy inside the installed package."""
    places = (ROOT / "egs", Path(__file__).parent / "egs")
    return next((path for place in places if (path := place / corpus / "conf" / "train.yaml").is_file()), None)


def _option_help(options: type) -> dict[str, str]:
    """``name: text`` paragraphs in the docstring of an options class."""
    found: dict[str, str] = {}
    name = ""
    for line in (options.__doc__ or "").splitlines():
        match = re.match(r"\s*(\w+):\s+(.*)", line)
        if match and match[1] in {entry.name for entry in dataclasses.fields(options)}:
            name, found[match[1]] = match[1], match[2]
        elif not line.strip():
            name = ""
        elif name:
            found[name] += " " + line.strip()
    return found


def add_corpus_options(parser: argparse.ArgumentParser, options: type) -> None:
    """One option for each field of the dataclass ``options``: ``held_out_speaker`` is ``--held-out-speaker``."""
    group = parser.add_argument_group("options of this corpus")
    hints, texts = typing.get_type_hints(options), _option_help(options)
    for entry in dataclasses.fields(options):
        flag = "--" + entry.name.replace("_", "-")
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        text = texts.get(entry.name, " ").rstrip(".").replace("%", "%%")
        common: dict[str, Any] = {"dest": f"corpus_{entry.name}", "default": default, "help": text}
        hint = hints[entry.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(hint) is typing.Literal:
            group.add_argument(flag, choices=typing.get_args(hint), **common)
        elif typing.get_origin(hint) in (list, tuple):
            group.add_argument(flag, nargs="+", type=typing.get_args(hint)[0], metavar="VALUE", **common)
        else:
            metavar = {int: "N", float: "X"}.get(hint, "NAME")
            group.add_argument(flag, type=hint, metavar=metavar, **common)


def make_parser(corpus: str) -> Parser:
    """The options of one recipe."""
    parser = Parser(
        prog=f"python -m recipes {corpus}",
        description=f"Runs the {corpus} recipe. Stages: "
        + ", ".join(f"{number} {name}" for number, name in enumerate(STAGES))
        + ". Stages whose settings and inputs have not changed are passed over.",
    )
    add = parser.add_argument
    add("--stage", default="0", metavar="STAGE", help="first stage, a number or a name")
    add("--stop-stage", default="report", metavar="STAGE", help="last stage, a number or a name")
    add(
        "--dry-run",
        action="store_true",
        help="print which stages would run, why, and what they take, and do nothing",
    )
    add("--force", action="store_true", help="run the chosen stages even if they are up to date")
    add("--exp-dir", type=Path, default=default_exp_dir(corpus), metavar="DIR", help="where everything is written")
    add("--corpus-dir", type=Path, metavar="DIR", help="the unpacked corpus: nothing is downloaded then")
    add("--download-dir", type=Path, default=default_download_dir(corpus), metavar="DIR", help="where downloads go")
    for name, sounds in SOUNDS.items():
        add(f"--with-{name}", nargs="?", const="", metavar="DIR", help=sounds.help)
    add("--seed", type=int, metavar="N", help="seed of the training (weights, batches, dropout); see --data-seed")
    text = "seed of prepared data (made strings, test list, stored augmentation); --seed leaves it alone, so that all "
    text += "trainings are tested on one list"
    add("--data-seed", type=int, default=0, metavar="N", help=text)
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda where there is one")
    text = "processes that train and decode together, each on its own batches; parallel.zero (--set) says what they "
    text += "share out"
    add("--nproc", type=int, default=1, metavar="N", help=text)
    text = (
        "machines that train together, with --nproc processes each and one --exp-dir that all of them share; the same "
    )
    text += "command is started on each of them, with its own --node-rank"
    add("--nodes", type=int, default=1, metavar="M", help=text)
    text = "number of this machine; 0 runs all stages, the others only take part in training, when 0 comes to it"
    add("--node-rank", type=int, default=0, metavar="R", help=text)
    text = "machine 0 as the others reach it, and a free port there"
    add("--master", default="", metavar="HOST:PORT", help=text)
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="more settings, YAML; repeatable")
    text = "one setting, like optim.lr=0.001; repeatable (`asr train --help-keys` lists all)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--init-from", metavar="FILE", help="begin with the weights of a checkpoint, or of average.pt in a folder")
    text = "what the test sets are decoded in: ms, or full for whole utterances, with commas between; each has results "
    text += "of its own, and the last line is that of the first (default: decoding.chunk_ms"
    more = CORPORA[corpus].Options().decode_chunks
    text += f", and {','.join(map(str, more))} of a model that training.chunk_ms lets hear chunks)" if more else ")"
    add("--decode-chunks", metavar="LIST", help=text)
    add("--strict", action="store_true", help="stop at the first list of bad rows instead of leaving them out")
    add("--num-jobs", type=int, default=2, metavar="N", help="processes that prepare audio and features")
    text = "compute features on the workers of this Dask scheduler instead, like tcp://host:8786; they need this "
    text += "package and all folders under the same names (pip install 'transducer-asr[dask]')"
    add("--dask", metavar="ADDRESS", help=text)
    add_corpus_options(parser, CORPORA[corpus].Options)
    return parser


def continuing_command(corpus: str, argv: Sequence[str]) -> str:
    """What to type to go on with this run: the same options, less those that chose stages."""
    script = ROOT / "egs" / corpus / "run.sh"
    words = ["python", "-m", "recipes", corpus]
    if script.is_file():
        near = os.path.relpath(script)
        words = [str(script) if near.startswith("..") else near]
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.partition("=")
        if name not in _ONE_TIME:
            words.append(word)
        elif not has_value:
            del rest[: _ONE_TIME[name]]
    return shlex.join(words)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name = argv[0]
    if name not in CORPORA:
        valid = f"valid corpora: {', '.join(CORPORA)}"
        problem = "the name of a corpus comes first, not" if name.startswith("-") else "unknown corpus"
        raise UserError(f"{problem} {name}; {valid}{nearest(name, CORPORA)}")
    args = make_parser(name).parse_args(list(argv[1:]))
    if args.num_jobs < 1:
        raise UserError(f"--num-jobs {args.num_jobs} is too few; pass at least 1")
    # Only now: these import torch, and a misspelled option should not have to wait for it.
    from recipes.estimates import estimates, totals
    from recipes.launch import take_part
    from recipes.stages import make_recipe, print_result

    log_to_stdout()
    recipe, pipeline = make_recipe(name, args, continuing_command(name, argv[1:]), default_config(name))
    if args.corpus_dir is None and recipe.corpus_dir is not None:
        print(f"corpus: {recipe.corpus_dir}, as in the earlier run (--corpus-dir)", flush=True)
    selected = pipeline.select(args.stage, args.stop_stage)
    if args.dry_run:
        plan = pipeline.plan(selected, force=args.force)
        named = {pipeline.stages[number].name: status for number, status in zip(selected, plan, strict=True)}
        found, audio = estimates(recipe, pipeline, named)
        for number, (stage, status) in zip(selected, named.items(), strict=True):
            print(f"stage {number} {stage}: {'would run: ' * status.must_run}{status.reason}")
            if stage in found:
                print(f"    {found[stage].line}")
        if found:
            print(audio, *totals(found.values()), sep="\n")
        return 0
    try:
        if recipe.nodes.rank:
            take_part(recipe, pipeline, selected)
            return 0
        pipeline.execute(recipe, selected, force=args.force)
    except StageStopped as stopped:
        print(stopped, flush=True)
        return 0
    if pipeline.stages[selected[-1]].name in ("score", "verify", "report"):
        print_result(recipe)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m recipes`` with ``argv`` (default: the process's) and returns the exit code."""
    if argv is None:
        return end_of_process(guarded(lambda: _run(sys.argv[1:])))
    return guarded(lambda: _run(argv))
