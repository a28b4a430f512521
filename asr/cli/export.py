"""``asr export``: files for devices."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Write the files of a target from a checkpoint: encoder, predictor and joiner in the form that a device runtime"
    " loads unchanged. `asr verify` proves them on recordings."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from asr.export import TARGETS

    targets = "; ".join(f"{name}: {target.about}" for name, target in TARGETS.items())
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="e.g. EXP/train/average.pt")
    add("--target", required=True, help=targets)
    add("--out", type=Path, required=True, help="folder to write: new, empty, or an earlier export")
    add("--chunk-ms", default=None, metavar="MS", help="what the files hear at a time: multiple of 40, or full")
    add("--left-context-ms", type=int, default=None, metavar="MS", help="how far a chunk hears back")
    add("--precision", default="fp32", metavar="LIST", help="fp32, int8, or both with a comma")
    add("--cuts", type=Path, help="recordings with texts on which int8 is chosen, e.g. EXP/data/cuts_valid.jsonl.gz")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. export.max_wer_increase=0.5; repeatable")


def run(args: argparse.Namespace) -> int:
    from asr.decoding.decode import read_cuts
    from asr.decoding.load import load_for_decoding
    from asr.export import find_target
    from asr.export.export import export
    from asr.export.spec import read_spec

    find_target(args.target)
    loaded = load_for_decoding(args.checkpoint, "cpu", overrides=args.set)
    development = read_cuts(args.cuts) if args.cuts else None
    spec = read_spec(loaded.config.export, args.chunk_ms, args.left_context_ms, args.precision, development)
    manifest = export(loaded, args.checkpoint, args.target, args.out, spec)
    for precision, files in manifest.files.items():
        sizes = (f"{name} {(args.out / name).stat().st_size / 1e6:.2f} MB" for name in files.values())
        print(f"{precision}: {', '.join(sizes)}")
    print(f"{args.out}; now prove it: asr verify {args.out} --checkpoint {args.checkpoint} --cuts CUTS")
    return 0
