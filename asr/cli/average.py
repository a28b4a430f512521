"""``asr average``: the weights that decode, chosen on validation cuts."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Averages checkpoints in several ways, scores each on validation cuts, and writes the best one as average.pt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-dir", type=Path, required=True, metavar="DIR", help="output folder of a training")
    add("--valid-cuts", type=Path, required=True, metavar="FILE", help="cut manifest to choose on; not the test set")
    text = "for each N the mean of the N newest checkpoints (default: average.last of the training)"
    add("--last", type=int, nargs="+", metavar="N", help=text)
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda where there is one")


def run(args: argparse.Namespace) -> int:
    from asr.data.manifests import load_cuts
    from asr.device import resolve_device
    from asr.errors import UserError
    from asr.training.averaging import AverageConfig, average

    if not args.train_dir.is_dir():
        raise UserError(f"--train-dir {args.train_dir} is not a folder; pass the --out-dir of a training")
    if args.last and min(args.last) < 1:
        raise UserError(f"--last {min(args.last)} is too few; an average takes at least 1 checkpoint")
    config = AverageConfig(last=args.last) if args.last else None
    path, _ = average(args.train_dir, load_cuts(args.valid_cuts), config, device=resolve_device(args.device))
    print(path)
    return 0
