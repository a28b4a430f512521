"""How many times real time recordings are decoded, from the files on: whole utterances, and many streams at once.

Reading, features, encoder and greedy search, in turns, each so many times. The weights are random, and find as many
tokens as speech has. One JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from asr.bench.streaming.model import model_of
from asr.data.features import load_samples
from asr.data.manifests import load_cuts
from asr.decoding.decode import Decoded, decode_cuts
from asr.decoding.decode_streams import decode_in_streams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--cuts", type=Path, required=True, help="manifest of recordings at 16 kHz")
    parser.add_argument("--preset", default="s")
    parser.add_argument("--chunk-ms", type=int, default=320)
    parser.add_argument("--left-context-ms", type=int, default=5120)
    parser.add_argument("--streams", type=int, default=16, help="streams at once")
    parser.add_argument("--workers", type=int, default=1, help="processes that read and compute features of utterances")
    parser.add_argument("--batch-s", type=float, default=100.0, help="audio seconds in a batch of utterances")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are printed")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    cuts = load_cuts(args.cuts).drop_features()
    settings = [f"data.num_workers={args.workers}", f"decoding.batch_duration_s={args.batch_s}"]
    model, tokenizer, whole = model_of(args.preset, settings, [load_samples(cut) for cut in list(cuts)[:20]])
    chunks: dict[str, Any] = {"chunk_ms": args.chunk_ms, "left_context_ms": args.left_context_ms}
    streaming = replace(whole, decoding=replace(whole.decoding, **chunks))
    ways: dict[str, Callable[[], list[Decoded]]] = {
        "whole": lambda: decode_cuts(model, tokenizer, cuts, whole),
        "streams": lambda: decode_in_streams(model, tokenizer, cuts, streaming, streams=args.streams),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, int] = {}
    for number in range(1 + args.repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            results = way()
            if number:  # the first also compiles kernels
                seconds[name].append(time.perf_counter() - begin)
            found[name] = sum(len(one.hypothesis.tokens) for one in results)
    audio_s = sum(cut.duration for cut in cuts)
    rates = {name: audio_s / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["whole"], seconds["streams"], strict=True))
    result = {
        "preset": args.preset,
        "audio_s": round(audio_s, 1),
        "utterances": len(cuts),
        "times_real_time": {name: round(rate, 1) for name, rate in rates.items()},
        "range": {
            name: [round(audio_s / max(values), 1), round(audio_s / min(values), 1)] for name, values in seconds.items()
        },
        "streams_per_whole": round(ratio, 3),
        "tokens_per_s": {name: round(count / audio_s, 2) for name, count in found.items()},
        "streams": args.streams,
        "chunk_ms": args.chunk_ms,
        "left_context_ms": args.left_context_ms,
    }
    print(json.dumps(result))
    return 0
