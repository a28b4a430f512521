"""One method on one case, in a process of its own: correctness, peak memory, time. Prints one JSON object.

Started by `python -m losses.bench`, which writes the float64 reference first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from losses import LOSSES, TransducerLossOptions, transducer_loss
from losses.bench.cases import Case, make
from losses.bench.yardstick import yardstick_loss

PRODUCTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
OTHER_LOAD = 0.05  # share of all processors that others may take during a sample
LEAST_SAMPLE_S = 0.5  # shorter steps are repeated, since /proc/stat counts in hundredths of a second
PEERS = ("torchaudio",)
THRESHOLDS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

Loss = Callable[[Case], Tensor]


def loss_function(method: str, products: str, threshold: float) -> Loss:
    """Case -> summed loss."""
    if method == "torchaudio":
        from torchaudio.functional import rnnt_loss

        def peer(case: Case) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=products == "bf16"):
                logits = torch.tanh(case.enc[:, :, None] + case.pred[:, None]) @ case.weight.T
            lens = (x.int() for x in (case.targets, case.enc_lens, case.target_lens))
            return rnnt_loss(logits.float(), *lens, blank=0, reduction="sum")

        return peer

    def ours(case: Case) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=products == "bf16"):
            enc, pred, weight = case.sources
            if method == "yardstick":
                return yardstick_loss(enc, pred, weight, case.targets, case.enc_lens, case.target_lens).sum()
            options = TransducerLossOptions(occupancy_threshold=threshold)
            arguments = enc, pred, weight, None, case.targets, case.enc_lens, case.target_lens
            return transducer_loss(*arguments, method=method, reduction="sum", options=options).loss

    return ours


def step(case: Case, loss: Loss) -> Tensor:
    """Forward and backward from joiner inputs to all gradients, which are left in .grad."""
    for x in case.sources:
        x.grad = None
        x.requires_grad_()
    total = loss(case)
    total.backward()
    return total.detach()


def _memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_bytes(case: Case, loss: Loss) -> tuple[int, Tensor]:
    """Largest growth of resident memory during a step, without the gradients that it leaves; and the loss."""
    step(make("tiny"), loss)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    total = step(case, loss)
    left = sum(x.grad.numel() * x.grad.itemsize for x in case.sources if x.grad is not None)
    return _memory("VmHWM") - before - left, total


def errors(case: Case, gradients: list[Tensor]) -> list[float]:
    """Largest error of each gradient relative to the largest entry of the float64 one."""
    return [
        float((x.grad.double() - y).abs().max() / y.abs().max()) if x.grad is not None else float("inf")
        for x, y in zip(case.sources, gradients, strict=True)
    ]


def _processor_seconds() -> tuple[float, float, float]:
    """(busy seconds of all processors, of this process, wall clock)."""
    counts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    user, nice, system, _, _, irq, softirq, steal, *_ = counts
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, time.process_time(), time.perf_counter()


def sample(case: Case, loss: Loss) -> tuple[list[float], float]:
    """Seconds of consecutive steps, and the share of the processors that other processes took meanwhile."""
    times: list[float] = []
    before = _processor_seconds()
    while sum(times) < LEAST_SAMPLE_S:
        start = time.perf_counter()
        step(case, loss)
        times.append(time.perf_counter() - start)
    busy, own, wall = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
    return times, max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def timed(case: Case, loss: Loss, samples: int, allow_load: bool) -> tuple[list[float], float]:
    """Seconds of steps of so many samples, and the largest load among them; loaded ones are thrown away."""
    kept: list[float] = []
    loads: list[float] = []
    sample(case, loss)
    for _ in range(samples if allow_load else 4 * samples):
        times, load = sample(case, loss)
        if allow_load or load <= OTHER_LOAD:
            kept += times
            loads.append(load)
        if len(loads) == samples:
            break
    return kept, max(loads, default=1.0)


def threshold_errors(arguments: argparse.Namespace) -> dict[str, object]:
    """Largest gradient error of the method at each of several occupancy thresholds."""
    torch.set_num_threads(arguments.threads)
    case = make(arguments.case, vocab_size=arguments.vocab_size)
    exact = torch.load(arguments.reference)["gradients"]
    found = {}
    for threshold in THRESHOLDS:
        step(case, loss_function(arguments.method, arguments.products, threshold))
        found[f"{threshold:g}"] = float(f"{max(errors(case, exact)):.2g}")
    names = ("case", "method", "products")
    return {**{name: getattr(arguments, name) for name in names}, "error_by_threshold": found}


def cpu_name() -> str:
    """Model of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """The JSON object of one method on one case; "error" instead of times when the gradients are wrong."""
    torch.set_num_threads(arguments.threads)
    case = make(arguments.case, vocab_size=arguments.vocab_size)
    loss = loss_function(arguments.method, arguments.products, arguments.threshold)
    peak, total = peak_bytes(case, loss)
    exact = torch.load(arguments.reference)
    found = errors(case, exact["gradients"])
    thresholded = arguments.method == "fused"
    result: dict[str, object] = {
        "case": arguments.case,
        "method": arguments.method,
        "backend": "numba" if arguments.method in LOSSES else "torch",
        "products": arguments.products,
        "threads": arguments.threads,
        "median_ms": None,
        "min_ms": None,
        "max_ms": None,
        "peak_mb": round(peak / 2**20, 1),
        "loss": float(total),
        "kept_cells": exact["kept_cells"] if thresholded else exact["cells"],
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cells": exact["cells"],
        "gradient_errors": [float(f"{x:.2g}") for x in found],
    }
    limit = TOLERANCE[arguments.products]
    if not max(found) <= limit:
        result["error"] = f"a gradient is off by {max(found):.1e} of its largest entry, more than {limit:g}; not timed"
        return result
    times, load = timed(case, loss, arguments.samples, arguments.allow_load)
    if not times:
        result["error"] = f"other processes took over {OTHER_LOAD:.0%} in every sample; pass --allow-load to keep them"
        return result
    for name, choose in (("median_ms", statistics.median), ("min_ms", min), ("max_ms", max)):
        result[name] = round(choose(times) * 1000, 1)
    if load > OTHER_LOAD:
        result["other_load"] = round(load, 2)
    return result


def parser() -> argparse.ArgumentParser:
    """Arguments of the child process."""
    found = argparse.ArgumentParser()
    found.add_argument("--case", required=True)
    found.add_argument("--method", required=True)
    found.add_argument("--products", choices=PRODUCTS, required=True)
    found.add_argument("--threads", type=int, required=True)
    found.add_argument("--samples", type=int, required=True)
    found.add_argument("--threshold", type=float, required=True)
    found.add_argument("--vocab-size", type=int)
    found.add_argument("--reference", type=Path, required=True)
    found.add_argument("--allow-load", action="store_true")
    found.add_argument("--error-by-threshold", action="store_true")
    return found


if __name__ == "__main__":
    given = parser().parse_args()
    print(json.dumps(threshold_errors(given) if given.error_by_threshold else measure(given)), flush=True)
