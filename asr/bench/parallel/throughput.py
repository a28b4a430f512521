"""Steps of the trainer itself on random features, on several processes, for each ZeRO stage and loss: audio seconds a
second, memory, and on CUDA how much of the time that processes send lies under computing. One JSON object each.

On one machine of 8 GPUs: python -m asr.bench parallel throughput --device cuda --nproc 8 --preset l"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from asr.bench.processes import together
from asr.errors import UserError
from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches
from asr.training.memory import peak_bytes
from asr.training.ranks import Ranks
from losses import LOSSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="l")
    parser.add_argument("--nproc", type=int, default=2, metavar="N")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--zero", default="0,2,3", help="stages, with commas between")
    parser.add_argument("--methods", default=",".join(LOSSES), help="losses, with commas between")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--audio-s", type=float, default=200.0, help="audio seconds in the batch of a process")
    parser.add_argument("--utterance-s", type=float, default=12.0)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    zeros, methods = args.zero.split(","), args.methods.split(",")
    if unknown := [m for m in methods if m not in LOSSES]:
        raise UserError(f"--methods {unknown[0]} is no loss; there are {', '.join(LOSSES)}")
    if unknown := [z for z in zeros if z not in ("0", "1", "2", "3")]:
        raise UserError(f"--zero {unknown[0]} is no stage; there are 0, 1, 2, 3")
    for zero in zeros:
        for method in methods:
            together(args.nproc, args.device, _measure, vars(args), int(zero), method)
    return 0


def _measure(ranks: Ranks, device: str, args: dict[str, Any], zero: int, method: str) -> None:
    cuda = device.startswith("cuda")
    with tempfile.TemporaryDirectory() as name:
        settings = [f"loss.method={method}", f"parallel.zero={zero}"]
        trainer = make_trainer(args["preset"], args["precision"], 500, Path(name), settings, device, ranks)
        trainer.model.train()
        batch = random_batch(args["audio_s"], args["utterance_s"], 3.0, 500, 80)
        bad = BadBatches(Path(name), 0, 0, lambda **_: None, print)

        def step() -> float:
            begin = time.perf_counter()
            trainer.step([batch], bad)
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        for _ in range(3):
            step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step_s = statistics.median(step() for _ in range(args["steps"]))
        peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes() or 0
        hidden = _overlap(step) if cuda else None
    rows = ranks.rows([step_s, peak])
    if ranks.first:
        slowest_s = max(row[0] for row in rows)
        result = {key: args[key] for key in ("preset", "nproc", "device", "precision", "audio_s")}
        speed = ranks.size * sum(batch.durations_s) / slowest_s
        result |= {"zero": zero, "method": method, "step_ms": 1e3 * slowest_s, "audio_s_per_s": speed}
        print(json.dumps({**result, "peak_mb": max(row[1] for row in rows) / 1e6, "overlap": hidden}), flush=True)


def _overlap(step: Any) -> float | None:
    """Fraction of the time of NCCL's kernels in which others run too; None without any."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
    kernels = [e for e in profiler.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    sending = [(e.time_range.start, e.time_range.end) for e in kernels if e.name.startswith("nccl")]
    computing = _union([(e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith("nccl")])
    total = sum(end - start for start, end in _union(sending))
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in _union(sending) for b in computing)
    return both / total if total else None


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged
