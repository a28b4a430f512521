"""``asr average``: the weights that decode, chosen on validation cuts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = (
    "Averages checkpoints in several ways, scores each on validation cuts, and writes the best one as average.pt."
    " Without --last, --ema and --best, the settings of the training say which ways."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-dir", type=Path, required=True, metavar="DIR", help="output folder of a training")
    add("--valid-cuts", type=Path, required=True, metavar="FILE", help="cut manifest to choose on; not the test set")
    add("--last", type=int, nargs="*", metavar="N", help="for each N the mean of the N newest checkpoints")
    add("--ema", action=argparse.BooleanOptionalAction, help="the moving average of the weights, if there is one")
    add("--best", action=argparse.BooleanOptionalAction, help="the weights that were best during training")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda where there is one")
    add("--nproc", type=int, default=1, metavar="N", help="processes, each of which decodes its share")


def run(args: argparse.Namespace) -> int:
    from asr.data.manifests import load_cuts
    from asr.device import resolve_device
    from asr.errors import UserError
    from asr.training.averaging import AverageConfig, average
    from asr.training.ranks import LONG_S, one_speaks, rank_device, started

    if args.last and min(args.last) < 1:
        raise UserError(f"--last {min(args.last)} is too few; an average takes at least 1 checkpoint")
    given = {name: value for name in ("last", "ema", "best") if (value := getattr(args, name)) is not None}
    config = AverageConfig(**given) if given else None
    device = resolve_device(args.device)
    with started(device, LONG_S) as ranks, one_speaks(ranks):
        if not args.train_dir.is_dir():
            raise UserError(f"--train-dir {args.train_dir} is not a folder; pass the --out-dir of a training")
        cuts = load_cuts(args.valid_cuts)
        path, _ = average(args.train_dir, cuts, config, device=rank_device(device, ranks), ranks=ranks)
    if ranks.first:
        print(path)
    return 0


if __name__ == "__main__":  # torchrun -m asr.cli.average
    from asr.cli.main import main

    sys.exit(main(["average", *sys.argv[1:]]))
