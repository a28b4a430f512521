"""``asr latency``: errors and delays of a model at several chunk sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Decode a cut manifest at several chunk sizes, and print errors, how late tokens come and how soon there is a"
    " first text. Several checkpoints are drawn in one plot, with delays from the alignment of the first."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, action="append", required=True, help="e.g. EXP/train/average.pt; repeatable"
    )
    parser.add_argument(
        "--label", action="append", default=[], help="name of a checkpoint in the reports, one for each; repeatable"
    )
    parser.add_argument("--cuts", type=Path, required=True, help="cut manifest, e.g. EXP/data/cuts_test.jsonl.gz")
    parser.add_argument("--chunks", default="160,320,640,1280,full", metavar="LIST", help="in ms, with commas between")
    parser.add_argument("--left-context-ms", type=int, default=5120, metavar="MS", help="how far a chunk hears back")
    parser.add_argument(
        "--out-dir", type=Path, help="folder for latency.json, .md and .png; EXP/latency of the first if not given"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda if there is one"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. data.num_workers=0; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    from asr.decoding.decode import read_cuts
    from asr.decoding.latency import measure_checkpoints, parse_chunks
    from asr.decoding.latency_report import latency_notes, latency_table, write_latency
    from asr.decoding.load import experiment_dir
    from asr.device import resolve_device

    device = resolve_device(args.device)
    chunks = parse_chunks(args.chunks)
    cuts = read_cuts(args.cuts)
    out_dir = args.out_dir or experiment_dir(args.checkpoint[0]) / "latency"
    report = measure_checkpoints(args.checkpoint, args.label, cuts, chunks, args.left_context_ms, device, args.set)
    print(f"{latency_table(report)}\n\n{latency_notes(report)}\n")
    write_latency(out_dir, report, device)
    print(f"results in {out_dir}: latency.json, latency.md, latency.png")
    return 0
