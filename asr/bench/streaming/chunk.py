"""Time that one chunk of one stream takes on one thread: features, encoder, search and the partial result.

Samples arrive in pieces of one chunk. A partial result follows the end of its chunk by 37.5 ms of further audio, which
features need, and by this time. One JSON object.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from asr.bench.streaming.model import model_of, noise
from asr.decoding.compute_time import chunk_times
from asr.decoding.token_delays import LOOKAHEAD_MS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="m")
    parser.add_argument("--chunk-ms", type=int, default=320)
    parser.add_argument("--left-context-ms", type=int, default=5120)
    parser.add_argument("--audio-s", type=float, default=120.0, help="length of the stream")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    torch.set_num_threads(args.threads)
    samples = noise(args.audio_s, 0)
    settings = [f"decoding.chunk_ms={args.chunk_ms}", f"decoding.left_context_ms={args.left_context_ms}"]
    model, tokenizer, experiment = model_of(args.preset, settings, [samples[: 16000 * 20]])
    times = chunk_times(model, tokenizer, experiment, samples, endpoints=True)
    late = 1e3 * np.array(times[5:])  # the first chunks also ready kernels
    percentiles = {f"{name}_ms": round(float(np.percentile(late, q)), 2) for name, q in (("median", 50), ("p95", 95))}
    result = {
        "preset": args.preset,
        "chunk_ms": args.chunk_ms,
        "left_context_ms": args.left_context_ms,
        "threads": args.threads,
        "chunks": len(late),
        **percentiles,
        "largest_ms": round(float(late.max()), 2),
        "partial_result_after_chunk_p95_ms": round(LOOKAHEAD_MS + percentiles["p95_ms"], 2),
    }
    print(json.dumps(result))
    return 0
