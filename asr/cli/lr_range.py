"""``asr lr-range``: a short training with a growing learning rate, which suggests one."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from asr.cli.guard import stopped_by_sigterm

HELP = (
    "Trains from new weights with a learning rate that grows from step to step (Smith 2017), draws the loss, and"
    " suggests optim.lr. Leaves no checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="settings, YAML; repeatable")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, like optim.name=scaled_adam")
    add("--train-cuts", type=Path, required=True, metavar="FILE", help="lhotse cut manifest to train on")
    add("--out-dir", type=Path, required=True, metavar="DIR", help="receives lr_range.json and lr_range.png")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; without it, one is learnt and not kept")
    text = "feature statistics, JSON; without them, they are computed from the training cuts"
    add("--feature-stats", type=Path, metavar="FILE", help=text)
    add("--steps", type=int, default=200, metavar="N", help="optimizer steps from the first to the last rate")
    add("--first", type=float, default=1e-6, metavar="LR", help="learning rate of the first step")
    add("--last", type=float, default=1.0, metavar="LR", help="learning rate of the last step")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda where there is one")


def run(args: argparse.Namespace) -> int:
    with stopped_by_sigterm():
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from asr.config import load_experiment

    experiment = load_experiment(args.config, args.set)  # first: a misspelled key must not wait for the data

    from asr.data.features import FeatureStats, compute_stats
    from asr.data.manifests import load_cuts
    from asr.data.tokenizer import Tokenizer
    from asr.device import resolve_device
    from asr.training.lr_range import RangeConfig, measure_range, range_text, write_range
    from asr.training.train_data import learn_tokenizer, load_train_data

    config = RangeConfig(args.steps, args.first, args.last)
    device = resolve_device(args.device)
    experiment.parallel.check(1, experiment.memory.offload)
    cuts = load_cuts(args.train_cuts)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    load = args.tokenizer is not None
    tokenizer = Tokenizer.load(args.tokenizer) if load else learn_tokenizer(cuts, experiment.tokenizer)
    stats = compute_stats(cuts) if args.feature_stats is None else FeatureStats.load(args.feature_stats)
    data = load_train_data(experiment, args.train_cuts, None, tokenizer, stats, args.out_dir, note=False)
    curve = measure_range(experiment, data, args.out_dir, config, device)
    write_range(args.out_dir, curve, experiment, shlex.join(sys.argv))
    print(f"{range_text(curve)}; {args.out_dir / 'lr_range.png'}")
    return 0
