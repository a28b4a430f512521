"""``asr verify``: exported files in their runtime against the model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = (
    "Run the files of `asr export` in their real runtime, in a child process, and compare features, encoder output,"
    " tokens, times and errors with the model on recordings. Exit code 1 if they part."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="that `asr export` wrote")
    add("--checkpoint", type=Path, required=True, help="that was exported")
    add("--cuts", type=Path, required=True, help="recordings with texts, e.g. EXP/data/cuts_test.jsonl.gz")
    add("--threads", type=int, default=1, help="of the runtime")
    add("--python", default=sys.executable, help="interpreter with the runtime, if it lives in another environment")
    add("--out", type=Path, help="folder for verify.json and verify.html; the export's own if not given")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. export.max_wer_increase=0.5; repeatable")


def run(args: argparse.Namespace) -> int:
    from asr.decoding.decode import read_cuts
    from asr.decoding.load import load_for_decoding
    from asr.export.report import summary, write_report
    from asr.export.verify import verify

    cuts = read_cuts(args.cuts)
    loaded = load_for_decoding(args.checkpoint, "cpu", overrides=args.set)
    report = verify(
        loaded,
        args.checkpoint,
        args.folder,
        cuts,
        max_wer_increase=loaded.config.export.max_wer_increase,
        threads=args.threads,
        python=args.python,
    )
    out = args.out or args.folder
    write_report(report, out)
    print(summary(report))
    print(f"report: {out / 'verify.html'}")
    return 0 if report.ok else 1
