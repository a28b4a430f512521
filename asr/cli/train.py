"""``asr train``: trains a model from cut manifests and a configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr.cli.guard import stopped_by_sigterm

HELP = (
    "Trains a model from cut manifests with features and a configuration; SIGTERM saves and stops, --resume goes on."
    " Several processes: torchrun --nproc-per-node N -m asr.cli.train [the same options]."
)


class _HelpKeys(argparse.Action):
    """Prints every configuration key with its meaning, type and default, and stops."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from asr.config import keys_help

        print(keys_help(), end="")
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="settings, YAML; repeatable")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, like optim.lr=0.001; repeatable")
    add("--help-keys", action=_HelpKeys, nargs=0, help="list every KEY with its meaning, type and default")
    add("--train-cuts", type=Path, required=True, metavar="FILE", help="lhotse cut manifest to train on")
    add("--valid-cuts", type=Path, required=True, metavar="FILE", help="lhotse cut manifest to judge weights on")
    add("--out-dir", type=Path, required=True, metavar="DIR", help="receives checkpoints, metrics and report.html")
    text = "tokenizer.json; without it, one is learnt from the training texts and kept in the output folder"
    add("--tokenizer", type=Path, metavar="FILE", help=text)
    text = "feature statistics, JSON; without them, they are computed from the training cuts"
    add("--feature-stats", type=Path, metavar="FILE", help=text)
    text = "auto: go on from the newest checkpoint of the output folder; none: start anew; else a checkpoint"
    add("--resume", default="auto", metavar="auto|none|FILE", help=text)
    add("--init-from", metavar="FILE", help="begin with the weights of a checkpoint, or of average.pt in a folder")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda where there is one")
    add("--seed", type=int, metavar="N", help="the same as --set seed=N")
    add("--strict", action="store_true", help="stop if there are bad rows instead of leaving them out")


def run(args: argparse.Namespace) -> int:
    with stopped_by_sigterm():  # loading and preparing may take minutes
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from asr.config import load_experiment
    from asr.training.fine_tuning import begin_file

    overrides = list(args.set)
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.init_from is not None:
        overrides.append(f"training.init_from={begin_file(Path(args.init_from))}")
    if args.strict:
        overrides.append("data.strict=true")
    experiment = load_experiment(args.config, overrides)  # first: a misspelled key must not wait for the data

    from asr.data.features import FeatureStats, compute_stats
    from asr.data.manifests import load_cuts
    from asr.data.tokenizer import Tokenizer
    from asr.device import resolve_device
    from asr.errors import UserError
    from asr.training.ranks import one_speaks, rank_device, started
    from asr.training.train_data import learn_tokenizer, load_train_data
    from asr.training.trainer import train

    device = resolve_device(args.device)
    with started(device, experiment.parallel.timeout_s) as ranks, one_speaks(ranks):
        device = rank_device(device, ranks)
        experiment.parallel.check(ranks.size, experiment.memory.offload)
        kept = args.out_dir / "tokenizer.json"
        path = args.tokenizer or (kept if kept.is_file() else None)
        cuts = load_cuts(args.train_cuts)
        # what is wrong with these must not wait for a tokenizer to be learnt
        load_cuts(args.valid_cuts)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out_dir, os.W_OK | os.X_OK):
            raise UserError(
                f"--out-dir {args.out_dir} cannot be written to; allow it with chmod, or choose another folder"
            )

        def learn() -> Tokenizer:
            tokenizer = learn_tokenizer(cuts, experiment.tokenizer) if path is None else Tokenizer.load(path)
            tokenizer.save(kept)
            return tokenizer

        tokenizer = ranks.from_first(learn)
        stats = compute_stats(cuts) if args.feature_stats is None else FeatureStats.load(args.feature_stats)
        data = load_train_data(experiment, args.train_cuts, args.valid_cuts, tokenizer, stats, args.out_dir)
        result = train(experiment, data, args.out_dir, resume=args.resume, device=device, ranks=ranks)
        if ranks.first:
            print(f"{result.reason} at step {result.step}; report: {args.out_dir / 'report.html'}", flush=True)
    return 0


if __name__ == "__main__":  # torchrun -m asr.cli.train
    from asr.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
