"""``asr transcribe``: print the text of audio files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = (
    "Print the text of audio files: any sample rate, any number of channels. Exit code 3: some files could not be read;"
    " they are named on stderr. 2: none could."
)
SOME_FAILED = 3
ALL_FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from asr.decoding import SEARCHES

    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="audio files (wav, flac, ogg, mp3, ...)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, e.g. EXP/train/average.pt")
    parser.add_argument("--search", choices=list(SEARCHES), help="the checkpoint's own if not given")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda if there is one"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. decoding.beam=8; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    from asr.decoding.load import load_for_decoding
    from asr.decoding.transcribe import transcribe_files
    from asr.device import resolve_device

    device = resolve_device(args.device)
    loaded = load_for_decoding(args.checkpoint, device, args.search, args.set)
    failed = 0
    for found in transcribe_files(loaded.model, loaded.tokenizer, args.files, loaded.config, device):
        if found.error is None:
            print(f"{found.path}: {found.text}", flush=True)
        else:
            failed += 1
            print(f"error: {found.path}: {found.error}", file=sys.stderr, flush=True)
    if failed == 0:
        return 0
    return ALL_FAILED if failed == len(args.files) else SOME_FAILED
