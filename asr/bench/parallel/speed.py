"""Time of a step in bf16 and in float32, in turns, of the trainer itself on random features. One JSON object."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="m")
    parser.add_argument("--audio-s", type=float, default=100.0, help="audio seconds in a batch")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its own choice")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    batch = random_batch(args.audio_s, 6.0, 3.0, 500, 80)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as name:
        trainers = {}
        for precision in seconds:
            trainers[precision] = make_trainer(args.preset, precision, 500, Path(name) / precision, (), args.device)
            trainers[precision].model.train()
        bad = BadBatches(Path(name), 0, 0, lambda **_: None, print)
        for number in range(2 + args.steps):
            for precision, trainer in trainers.items():
                begin = time.perf_counter()
                trainer.step([batch], bad)
                if number >= 2:
                    seconds[precision].append(time.perf_counter() - begin)
    medians = {precision: statistics.median(values) for precision, values in seconds.items()}
    result = {f"{precision}_ms": round(1e3 * value, 1) for precision, value in medians.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["fp32"], seconds["bf16"], strict=True))
    print(json.dumps({"preset": args.preset, "audio_s": args.audio_s, **result, "ratio": round(ratio, 2)}))
    return 0
