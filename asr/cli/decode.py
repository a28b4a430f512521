"""``asr decode``: decode a cut manifest with a checkpoint and score it."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

HELP = "Decode a cut manifest with a checkpoint, write the result files and print the word error rate."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from asr.decoding import SEARCHES

    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, e.g. EXP/train/average.pt")
    parser.add_argument("--cuts", type=Path, required=True, help="cut manifest, e.g. EXP/data/cuts_test.jsonl.gz")
    parser.add_argument("--search", choices=list(SEARCHES), help="the checkpoint's own if not given")
    parser.add_argument(
        "--out-dir",
        type=Path,
        help="folder for recogs, errs and wer-summary files; EXP/decode/SEARCH if not given, with the chunk if any",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda if there is one"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. decoding.beam=8; repeatable"
    )
    parser.add_argument(
        "--emissions", type=int, default=0, metavar="N", help="plot the emission posteriors of the N worst utterances"
    )
    parser.add_argument(
        "--streams", type=int, metavar="N", help="hear the audio in N streams at once; needs decoding.chunk_ms in ms"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, each of which decodes its share")


def run(args: argparse.Namespace) -> int:
    from asr.decoding.decode import context_name, decode_and_score, decode_cuts, read_cuts
    from asr.decoding.decode_streams import decode_in_streams
    from asr.decoding.emission import worst_cuts, write_emissions
    from asr.decoding.load import experiment_dir, load_for_decoding
    from asr.device import resolve_device
    from asr.training.ranks import LONG_S, one_speaks, rank_device, started

    device = resolve_device(args.device)
    with started(device, LONG_S) as ranks, one_speaks(ranks):
        device = rank_device(device, ranks)
        cuts = read_cuts(args.cuts)
        loaded = load_for_decoding(args.checkpoint, device, args.search, args.set)
        config = loaded.config
        search = config.decoding.search + context_name(config.decoding)
        out_dir = args.out_dir or experiment_dir(args.checkpoint) / "decode" / search
        name = set_name(args.cuts)
        decode = decode_cuts if args.streams is None else partial(decode_in_streams, streams=args.streams)
        report = decode_and_score(loaded.model, loaded.tokenizer, cuts, config, device, out_dir, name, ranks, decode)
    if not ranks.first:
        return 0
    if args.emissions > 0:
        chosen = worst_cuts(cuts, report.results, args.emissions, config.training.errors_in)
        write_emissions(out_dir, name, loaded.model, loaded.tokenizer, chosen, config, device)
    heard = f"{search}, {args.streams} streams" if args.streams else search
    print(f"{heard}: {report.speed_line}")
    print(f"results in {out_dir}")
    for line in reversed(report.score.lines):
        print(line)
    return 0


def set_name(cuts: Path) -> str:
    """``test`` for cuts_test.jsonl.gz."""
    return cuts.name.split(".")[0].removeprefix("cuts_") or "test"


if __name__ == "__main__":  # torchrun -m asr.cli.decode
    from asr.cli.main import main

    sys.exit(main(["decode", *sys.argv[1:]]))
