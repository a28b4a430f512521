"""``asr show-data``: a page of cuts as training hears them."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Write one HTML file with some cuts of a manifest, before and after augmentation, as training with the same"
    " settings, seed and epoch hears them: spectrograms, sound, text, tokens, lengths and what was drawn. It opens"
    " offline."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cuts", type=Path, required=True, metavar="FILE", help="cut manifest, with features or without")
    add("--out", type=Path, required=True, metavar="FILE", help="the page, such as page.html")
    add("--num", type=int, default=10, metavar="N", help="cuts to show, drawn by seed and epoch (default: 10)")
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="settings, YAML; repeatable")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeatable")
    add("--seed", type=int, metavar="N", help="the same as --set seed=N")
    add("--epoch", type=int, default=0, metavar="E", help="of the training, from 0")
    text = "tokenizer.json; without it, one is learnt from the texts of the manifest, as by `asr train`"
    add("--tokenizer", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    from asr.atomic import write_whole
    from asr.config import load_experiment
    from asr.data.loader import transcript
    from asr.data.packed_cuts import PackedCuts
    from asr.data.show import choose_cuts, show_cut
    from asr.data.tokenizer import Tokenizer
    from asr.errors import UserError
    from asr.training.data_page import DataPage, data_page

    for name, least in (("num", 1), ("epoch", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} is too few; pass at least {least}")
    seeds = [] if args.seed is None else [f"seed={args.seed}"]
    experiment = load_experiment(args.config, [*args.set, *seeds])
    cuts = PackedCuts.open(args.cuts)
    if args.tokenizer is None:
        tokenizer = Tokenizer.train(map(transcript, cuts), experiment.tokenizer)
    else:
        tokenizer = Tokenizer.load(args.tokenizer)
    config, seed, epoch = experiment.data, experiment.seed, args.epoch
    chosen = choose_cuts(cuts, config, args.num, seed=seed, epoch=epoch)
    shown = [show_cut(cut, tokenizer, config, seed=seed, epoch=epoch) for cut in chosen]
    stored = chosen[0].features is not None
    page = data_page(DataPage(str(args.cuts), shown, len(cuts), seed, epoch, stored))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, lambda file: file.write(page.encode()))
    print(f"{len(shown)} of {len(cuts)} cuts in {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0
