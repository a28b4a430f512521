"""Memory above the loaded model, and time, that `asr transcribe` takes for one file of hours. One JSON object; exit
status 1 above the limit.

The file is written for it: the given recordings again and again, or bursts of noise at the pace of syllables. Without
a checkpoint the model has random weights and finds three words a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
import torch

from asr.bench.streaming.model import model_of, noise
from asr.data.audio import SAMPLE_RATE_HZ, read_audio, resample
from asr.decoding.load import load_for_decoding
from asr.decoding.transcribe import streaming_settings, transcribe_files
from asr.decoding.transcript_files import FORMATS, TranscriptFiles
from asr.errors import UserError
from asr.training.memory import peak_bytes_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--rate-hz", type=int, default=44100, help="of the file")
    parser.add_argument("--audio", type=Path, nargs="+", default=[], help="recordings of which the file is made")
    parser.add_argument("--checkpoint", type=Path, help="instead of random weights")
    parser.add_argument("--preset", default="m", help="of the model with random weights")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. decoding.chunk_ms=640")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--limit-mb", type=float, default=300.0, help="memory above the model, in 10^6 bytes")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when it took more memory than the limit."""
    if not args.hours > 0:
        raise UserError(f"--hours {args.hours} must be above 0")
    torch.set_num_threads(args.threads)
    sounds = [read_audio(path) for path in args.audio] or [noise(20.0, seed) for seed in range(10)]
    if args.checkpoint:
        loaded = load_for_decoding(args.checkpoint, overrides=args.set)
        model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
    else:
        model, tokenizer, config = model_of(args.preset, args.set, sounds[:1])
    config = streaming_settings(config, must=False, search_given=False)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "long.wav"
        write_long(path, sounds, args.hours * 3600, args.rate_hz)
        files = TranscriptFiles(Path(name) / "out", list(FORMATS), [path])
        found = []

        def work() -> None:
            for transcript in transcribe_files(model, tokenizer, [path], config):
                files.write(transcript)
                found.append(transcript)

        begin = time.monotonic()
        above = peak_bytes_of(torch.device("cpu"), work)
        seconds = time.monotonic() - begin
    (transcript,) = found
    result = {
        "hours": round(transcript.duration_s / 3600, 3),
        "rate_hz": args.rate_hz,
        "model": str(args.checkpoint or args.preset),
        "chunk_ms": config.decoding.chunk_ms,
        "search": config.decoding.search,
        "threads": args.threads,
        "segments": len(transcript.segments),
        "longest_segment_s": round(max((one.end_s - one.start_s for one in transcript.segments), default=0.0), 2),
        "words": len(transcript.words),
        "seconds": round(seconds, 1),
        "times_real_time": round(transcript.duration_s / seconds, 1),
        "above_model_mb": round(above / 1e6, 1),
    }
    print(json.dumps(result))
    return int(above > 1e6 * args.limit_mb)


def write_long(path: Path, sounds: Sequence[np.ndarray], duration_s: float, rate_hz: int) -> None:
    """A wav file of the sounds, float32 [N] at 16 kHz, again and again with half a second of silence between them."""
    silence = np.zeros(rate_hz // 2, dtype=np.float32)
    pieces = [np.concatenate([resample(sound, SAMPLE_RATE_HZ, rate_hz), silence]) for sound in sounds]
    left = round(duration_s * rate_hz)
    with soundfile.SoundFile(str(path), "w", rate_hz, 1, "PCM_16", format="WAV") as file:
        for piece in cycle(pieces):
            file.write(piece[:left])
            left -= min(left, len(piece))
            if not left:
                break
