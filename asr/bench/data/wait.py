"""Trains for some steps on noise at the pace of speech, features computed on the fly with the default augmentation, and
prints the part of the steps' time that was spent waiting for batches: one JSON object."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from lhotse import CutSet

from asr.bench.data.corpus import write_corpus
from asr.bench.processes import word_tokenizer
from asr.config import load_experiment
from asr.device import resolve_device
from asr.training.trainer import TrainData, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-s", type=float, default=100.0, help="audio seconds in a batch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = write_corpus(folder, max(50, int(args.steps * args.batch_s / 12)), 12.0)
        settings = [
            f"model.preset={args.preset}",
            "tokenizer.kind=word",
            "data.features.storage=on_the_fly",
            f"data.num_workers={args.workers}",
            f"data.max_duration_s={args.batch_s}",
            f"training={{max_steps: {args.steps}, log_every_steps: 5, tensorboard: false}}",
        ]
        data = TrainData(CutSet.from_cuts(cuts), CutSet.from_cuts(cuts[:2]), word_tokenizer())
        train(load_experiment(None, settings), data, folder / "train", device=resolve_device(args.device))
        lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    # the first ones start workers and compile
    steps = [line for line in lines if line["kind"] == "train" and line["step"] > args.steps // 4]
    waits = [line["data_wait_fraction"] for line in steps]
    result = {"preset": args.preset, "steps": args.steps, "workers": args.workers, "threads": torch.get_num_threads()}
    result |= {"data_wait_percent": round(100 * statistics.mean(waits), 3), "largest": round(100 * max(waits), 3)}
    print(json.dumps({**result, "audio_s_per_s": round(statistics.median(line["audio_s_per_s"] for line in steps))}))
    return 0
