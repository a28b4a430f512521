"""The ``asr`` command: finds the subcommand, a module with ``HELP``, ``add_arguments`` and ``run``, and calls it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from asr.cli.guard import Parser, end_of_process, guarded, nearest, stopped_by_sigterm
from asr.errors import UserError

# name -> one line for `asr --help`. A module is imported only when its name is asked for: torch takes seconds to load.
COMMANDS = {
    "train": "train a model from cut manifests and a configuration",
    "lr-range": "suggest a learning rate: a short training in which it grows",
    "average": "average the weights of several checkpoints into one",
    "checkpoint": "turn the checkpoint folder of several processes into one file",
    "decode": "decode a cut manifest with a checkpoint and score it",
    "score": "score again what was decoded, after other changes to the texts",
    "latency": "show word errors and delays at several chunk sizes",
    "export": "write files that device runtimes load",
    "verify": "run exported files in their runtime and compare them with the model",
    "transcribe": "print the text of audio files",
    "show-data": "write a page of cuts as training hears them, augmentation included",
    "doctor": "show versions, devices and optional parts, and how to install what is missing",
    "presets": "show the model presets with their exact numbers of parameters",
}


def _usage() -> str:
    lines = ["usage: asr COMMAND [options]", "", "A speech transducer toolkit.", "", "commands:"]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    lines += ["", "`asr COMMAND --help` shows the options of a command, `asr --version` the version."]
    lines += ["`python -m recipes CORPUS` runs a whole recipe, from the download to the word error rate."]
    return "\n".join(lines)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name = argv[0]
    if name == "--version":
        from asr import environment

        own = environment.own_distribution()
        print(environment.distribution_version(own) if own else "not installed, run from a checkout")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}{nearest(name, COMMANDS)} (asr --help lists the commands)")
    module = importlib.import_module(f"asr.cli.{name.replace('-', '_')}")
    parser = Parser(prog=f"asr {name}", description=module.HELP)
    module.add_arguments(parser)
    args: argparse.Namespace = parser.parse_args(list(argv[1:]))
    if getattr(args, "nproc", 1) != 1:
        return _on_processes(name, args, argv[1:])
    return int(module.run(args) or 0)


def _on_processes(name: str, args: argparse.Namespace, words: Sequence[str]) -> int:
    from asr.device import resolve_device
    from asr.training.launch import check_processes, run_processes

    check_processes(args.nproc, resolve_device(args.device))
    # torchrun takes it for an abbreviation of its own
    each = [w for before, w in zip(["", *words], words, strict=False) if "--nproc" not in (before, w.split("=")[0])]
    with stopped_by_sigterm():
        return run_processes(args.nproc, 0, name, *each)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``asr`` command line and returns its exit code."""
    if argv is None:
        return end_of_process(guarded(lambda: _run(sys.argv[1:])))
    return guarded(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
