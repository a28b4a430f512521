"""``asr checkpoint convert``: one file of a checkpoint that several processes wrote."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = (
    "Writes the checkpoint folder of several processes as one file, bit for bit the same: `convert FROM TO.pt`."
    " Training goes on from either, and either decodes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=["convert"], help="what to do")
    add("source", type=Path, metavar="FROM", help="folder, e.g. EXP/train/checkpoints/step-00001000")
    add("target", type=Path, metavar="TO.pt", help="file to write; it must not exist")
    add("--weights-only", action="store_true", help="leave out what only a resumed training needs: a quarter remains")


def run(args: argparse.Namespace) -> int:
    from asr import checkpoint
    from asr.errors import UserError

    source, target = args.source, args.target
    if source.is_file():
        raise UserError(f"{source} is a file already; pass the folder of a checkpoint, or copy the file")
    if target.suffix != ".pt":
        raise UserError(f"{target} must end in .pt, by which checkpoint files are found")
    if target.exists():
        raise UserError(f"{target} exists; choose another name, or remove it first")
    folder = target.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{folder} is not a folder that can be written to; make it, or choose another")
    payload = checkpoint.read(source)
    if args.weights_only:
        payload.pop("training", None)
    checkpoint.atomic_save(payload, target)
    print(target)
    return 0
