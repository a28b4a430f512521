"""``asr transcribe``: print the text of audio files or of a microphone, and write it in the forms that others read."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

HELP = (
    "Print the text of audio files: any sample rate, any number of channels, any length, any format that libsndfile"
    " reads, or ffmpeg where it is installed. Exit code 3: some files could not be read; they are named on stderr. 2:"
    " none could."
)
SOME_FAILED = 3
ALL_FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from asr.decoding import SEARCHES

    parser.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="audio files; of a folder, all audio files in and below it"
    )
    parser.add_argument("--mic", action="store_true", help="listen to the microphone; Ctrl-C ends")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, e.g. EXP/train/average.pt")
    parser.add_argument("--stream", action="store_true", help="print segments as they come, on a terminal every word")
    parser.add_argument("--out-dir", type=Path, help="folder for files of each input in each --format")
    parser.add_argument(
        "--format", metavar="NAME,...", help="with --out-dir: txt, json, srt, vtt, ctm, with commas; txt if not given"
    )
    parser.add_argument(
        "--search", choices=list(SEARCHES), help="the checkpoint's own if not given; of a stream greedy"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, or auto: cuda if there is one"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. decoding.beam=8, or decoding.chunk_ms=640 to decode as a stream of such chunks; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    from asr.data.audio import read_pieces
    from asr.data.audio_files import find_audio
    from asr.data.microphone import import_sounddevice, microphone_reader, set_by_ctrl_c
    from asr.decoding.load import load_for_decoding
    from asr.decoding.playing import AT_ONCE
    from asr.decoding.terminal import LiveText, Progress
    from asr.decoding.transcribe import streaming_settings, transcribe_files
    from asr.decoding.transcript_files import TranscriptFiles, parse_formats
    from asr.device import resolve_device
    from asr.errors import UserError

    if args.mic and args.files:
        raise UserError(f"--mic listens to the microphone; leave out {args.files[0]}, or --mic")
    if not args.mic and not args.files:
        raise UserError("the following arguments are required: FILE, or --mic")
    if args.format and not args.out_dir:
        raise UserError(f"--format {args.format} needs --out-dir, the folder of the files")
    if args.mic:
        import_sounddevice()
    paths = [Path("microphone")] if args.mic else find_audio(args.files)
    formats = parse_formats(args.format or "txt")
    device = resolve_device(args.device)
    loaded = load_for_decoding(args.checkpoint, device, args.search, args.set)
    live = args.stream or args.mic
    config = streaming_settings(loaded.config, must=live, search_given=args.search is not None)
    files = TranscriptFiles(args.out_dir, formats, paths) if args.out_dir else None
    progress = Progress(sys.stderr, [] if live else paths)
    listener = LiveText(sys.stdout, named=not args.mic) if live else progress
    at_once = 1 if live else AT_ONCE
    failed = 0
    with ExitStack() as stack:
        read = microphone_reader(stack.enter_context(set_by_ctrl_c())) if args.mic else read_pieces
        for found in transcribe_files(
            loaded.model, loaded.tokenizer, paths, config, device, listener=listener, read=read, at_once=at_once
        ):
            progress.finished(found)
            if found.error is not None:
                failed += 1
                print(f"error: {found.path}: {found.error}", file=sys.stderr, flush=True)
            elif not live:
                print(f"{found.path}: {found.text}", flush=True)
            if files:
                files.write(found)
    return 0 if failed == 0 else ALL_FAILED if failed == len(paths) else SOME_FAILED
