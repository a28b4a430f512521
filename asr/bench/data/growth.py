"""Memory of the main process and of the loader's workers over one epoch of so many small batches, features computed
on the fly with the default augmentation. Writes the series and a plot, and prints one JSON object: growth in 10^6 bytes
per 1,000 batches, by least squares over the last three quarters. Exit status 1 above the limit."""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from asr.bench.data.corpus import write_corpus
from asr.bench.processes import word_tokenizer
from asr.config import load_experiment
from asr.data.loader import train_loader
from asr.data.packed_cuts import PackedCuts

EVERY = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--batches", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("growth"), help="name of OUT.json and OUT.png")
    parser.add_argument("--limit-mb", type=float, default=1.0, help="per 1,000 batches")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when memory grew by more than the limit."""
    with tempfile.TemporaryDirectory() as name:
        cuts = PackedCuts(write_corpus(Path(name), args.batches, 1.0))
        settings = ["data.features.storage=on_the_fly", f"data.num_workers={args.workers}", "data.max_duration_s=1.5"]
        # a batch is one utterance
        settings += ["data.augment.speed_factors=[0.9]", "data.num_buckets=1"]
        config = load_experiment(None, settings).data
        loader = train_loader(cuts, word_tokenizer(), config, seed=0, epoch=0)
        gc.collect()
        series: list[tuple[int, float, float]] = []
        begin = time.perf_counter()
        for number, _ in enumerate(loader, 1):
            if number % EVERY == 0:
                series.append((number, _anonymous_mb([os.getpid()]), _anonymous_mb(_children())))
        seconds = time.perf_counter() - begin
    numbers, main, workers = (np.array(column) for column in zip(*series, strict=True))
    late = numbers >= numbers[-1] / 4
    growth = {
        f"{name}_mb_per_1000_batches": round(1000 * float(np.polyfit(numbers[late], values[late], 1)[0]), 4)
        for name, values in (("main", main), ("workers", workers), ("all", main + workers))
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(series) + "\n", encoding="utf-8")
    _draw(args.out.with_suffix(".png"), numbers, main, workers)
    print(json.dumps({"batches": len(loader), "workers": args.workers, **growth, "seconds": round(seconds, 1)}))
    return int(growth["all_mb_per_1000_batches"] > args.limit_mb)


def _children() -> list[int]:
    """Processes that this one has started: Linux."""
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def _anonymous_mb(pids: list[int]) -> float:
    """Memory that is theirs alone, without files: what a forked worker has not written is its parent's."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:")))
    return total * 1024 / 1e6


def _draw(path: Path, numbers: np.ndarray, main: np.ndarray, workers: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(numbers, main, label="main process")
    axes.plot(numbers, workers, label="workers, together")
    axes.set(xlabel="batches", ylabel="memory of their own, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
