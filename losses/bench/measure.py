"""One method on one case, in a process of its own: correctness, peak memory, time. Prints one JSON object.

Started by losses/bench/run.py, which writes the float64 reference first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import LOSSES, TransducerLossOptions, transducer_loss
from losses.bench import peers
from losses.bench.cases import Case, load, make
from losses.bench.peers import AM_ONLY_SCALE, LM_ONLY_SCALE, PRUNE_RANGE
from losses.bench.reference import pruned_reference, reference_path
from losses.bench.yardstick import yardstick_loss

PRODUCTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
LOSS_TOLERANCE = {"bf16": 1e-5, "fp32": 1e-6}  # of a pruned loss and of its simple loss
OTHER_LOAD = 0.05  # share of all processors that others may take during a sample
OTHER_LOAD_ERROR = f"other processes took over {OTHER_LOAD:.0%} in every sample; pass --allow-load to keep them"
LEAST_SAMPLE_S = 0.5  # shorter steps are repeated, since /proc/stat counts in hundredths of a second
ONCE_ATTEMPTS = 3  # steps of a case that is measured once, until one is not disturbed
THRESHOLDS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

Info = dict[str, Any]
Loss = Callable[[Case], tuple[Tensor, Info]]


def is_pruned(method: str) -> bool:
    """Whether the method takes and teaches a trivial joiner too."""
    return method.endswith("pruned")


def loss_function(method: str, products: str, threshold: float) -> Loss:
    """Case -> summed loss, and what the method says of it. A pruned method's simple loss is added."""
    if method in peers.PEERS:
        return peers.loss_function(method, products)
    options: Info = {"occupancy_threshold": threshold}
    if is_pruned(method):
        options |= {"prune_range": PRUNE_RANGE, "lm_only_scale": LM_ONLY_SCALE, "am_only_scale": AM_ONLY_SCALE}

    def ours(case: Case) -> tuple[Tensor, Info]:
        with torch.autocast(case.enc.device.type, torch.bfloat16, enabled=products == "bf16"):
            arguments = case.enc, case.pred, case.weight, None, case.targets, case.enc_lens, case.target_lens
            keywords: Info = {"method": method, "reduction": "sum", "options": TransducerLossOptions(**options)}
            if not is_pruned(method):
                found = transducer_loss(*arguments, **keywords)
                return found.loss, found.info
            assert case.am is not None and case.lm is not None
            found = transducer_loss(*arguments, simple=(case.am, case.lm), **keywords)
            assert found.simple_loss is not None
            parts = {"pruned": float(found.loss.detach()), "simple": float(found.simple_loss.detach())}
            return found.loss + found.simple_loss, {**found.info, **parts}

    def yardstick(case: Case) -> tuple[Tensor, Info]:
        enc, pred, weight = case.sources
        total = yardstick_loss(enc, pred, weight, case.targets, case.enc_lens, case.target_lens).sum()
        return total, {"kept_cells": case.padded_cells}

    return yardstick if method == "yardstick" else ours


def step(case: Case, loss: Loss) -> tuple[float, Info]:
    """Forward and backward from joiner inputs to all gradients, left in .grad; the loss and the method's info."""
    for x in case.sources:
        x.grad = None
        x.requires_grad_()
    total, info = loss(case)
    total.backward()
    return float(total.detach()), info


def _memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors that share no memory."""
    return sum(x.numel() * x.itemsize for x in tensors)


class Peak(NamedTuple):
    """One step: growth of resident memory in bytes, loss, the method's info, seconds, other load."""

    size: int
    loss: float
    info: Info
    seconds: float
    load: float


def peak_of(case: Case, loss: Loss) -> Peak:
    """A step, its size the largest growth of resident memory, without the gradients that the step leaves.

    One step on the tiny case comes before, so that what is compiled and kept for all steps is not counted.
    """
    step(make("tiny", simple=case.am is not None), loss)
    for x in case.sources:
        x.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    watch = Watch()
    total, info = step(case, loss)
    seconds, load = watch.read()
    left = tensor_bytes([x.grad for x in case.sources if x.grad is not None])
    return Peak(_memory("VmHWM") - before - left, total, info, seconds, load)


def errors(case: Case, gradients: list[Tensor]) -> list[float]:
    """Largest error of each gradient relative to the largest entry of the float64 one."""
    return [
        float((x.grad.double() - y).abs().max() / y.abs().max()) if x.grad is not None else float("inf")
        for x, y in zip(case.sources, gradients, strict=True)
    ]


class Watch:
    """Seconds since it was made, and the share of all processors that other processes took meanwhile."""

    def __init__(self) -> None:
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """(busy seconds of all processors, of this process, wall clock)."""
        counts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        user, nice, system, _, _, irq, softirq, steal, *_ = counts
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(seconds, other load)."""
        busy, own, wall = (b - a for a, b in zip(self.before, self._read(), strict=True))
        return wall, max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def sample(case: Case, loss: Loss) -> tuple[list[float], float]:
    """Seconds of consecutive steps, and the share of the processors that other processes took meanwhile."""
    times: list[float] = []
    watch = Watch()
    while sum(times) < LEAST_SAMPLE_S:
        start = time.perf_counter()
        step(case, loss)
        times.append(time.perf_counter() - start)
    return times, watch.read()[1]


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


def summary(times: Sequence[float]) -> Info:
    """Median, least and largest of seconds, in ms."""
    chosen = (("median_ms", statistics.median), ("min_ms", min), ("max_ms", max))
    return {name: round(choose(times) * 1000, 1) for name, choose in chosen}


def in_turns(arguments: argparse.Namespace) -> list[Info]:
    """Times of several cases, one step of each after another, so that a machine whose speed drifts is as fast for all.

    Rounds under other load are thrown away. Nothing is checked.
    """
    torch.set_num_threads(arguments.threads)
    method, products = arguments.method, arguments.products
    loss = loss_function(method, products, arguments.threshold)
    cases = [
        load(name, arguments.folder, arguments.vocab_size, is_pruned(method)) for name in arguments.case.split(",")
    ]
    rounds: list[list[float]] = []
    for attempt in range(1 + (1 if arguments.allow_load else 4) * arguments.samples):
        watch, times = Watch(), []
        for case in cases:
            start = time.perf_counter()
            step(case, loss)
            times.append(time.perf_counter() - start)
        quiet = arguments.allow_load or watch.read()[1] <= OTHER_LOAD
        if attempt and quiet:  # the first round warms up
            rounds.append(times)
        if len(rounds) == arguments.samples:
            break
    if not rounds:
        return [{"error": OTHER_LOAD_ERROR} for _ in cases]
    return [summary(times) for times in zip(*rounds, strict=True)]


def threshold_errors(arguments: argparse.Namespace) -> Info:
    """Largest gradient error of the method at each of several occupancy thresholds."""
    torch.set_num_threads(arguments.threads)
    case = load(arguments.case, arguments.folder, arguments.vocab_size)
    exact = torch.load(reference_path(arguments.folder, arguments.case))["gradients"]
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


def complaint(arguments: argparse.Namespace, case: Case, total: float, info: Info, result: Info) -> str | None:
    """Compares the step's gradients, and a pruned method's losses, with float64; puts errors into the result.

    What is wrong, or None.
    """
    peer, products = arguments.method in peers.PEERS, arguments.products
    losses: dict[str, float] = {}
    if is_pruned(arguments.method):
        scales = LM_ONLY_SCALE, AM_ONLY_SCALE
        exact = pruned_reference(case, info["bounds"], int(info["prune_range"]), *scales)
        losses = {f"{name} loss": abs(info[name] / exact[name] - 1) for name in ("pruned", "simple")}
    else:
        exact = torch.load(reference_path(arguments.folder, arguments.case))
        result["loss_error"] = float(f"{abs(total / exact['loss'] - 1):.2g}")
        if arguments.method == "fused" and result["kept_cells"] is None:
            result["kept_cells"] = exact["kept_cells"]
    found = errors(case, exact["gradients"])
    result["gradient_errors"] = [float(f"{x:.2g}") for x in found]
    limit = (peers.TOLERANCE if peer else TOLERANCE)[products]
    if not max(found) <= limit:
        return f"a gradient is off by {max(found):.1e} of its largest entry, more than {limit:g}; not timed"
    for name, error in losses.items():
        result[f"{name} error".replace(" ", "_")] = float(f"{error:.2g}")
        limit = peers.TOLERANCE[products] if peer else LOSS_TOLERANCE[products]
        if not error <= limit:
            return f"the {name} is off by {error:.1e} of its size, more than {limit:g}; not timed"
    return None


def kept_cells(method: str, case: Case, info: Info) -> int | None:
    """Cells whose gradient was computed: what the method says, else what such a method computes; None: unknown."""
    if "kept_cells" in info:
        return int(info["kept_cells"])
    if method in LOSSES:
        return None if method in ("fused", "pruned") else case.cells
    return case.padded_cells


def once(case: Case, loss: Loss, peak: Peak, allow_load: bool) -> tuple[list[float], float]:
    """Seconds of the step whose memory was measured; where that was under load, of another step."""
    found = [(peak.seconds, peak.load)]
    while found[-1][1] > OTHER_LOAD and not allow_load and len(found) < ONCE_ATTEMPTS:
        watch = Watch()
        step(case, loss)
        found.append(watch.read())
    seconds, load = found[-1]
    return ([seconds] if allow_load or load <= OTHER_LOAD else []), load


def measure(arguments: argparse.Namespace) -> Info:
    """The JSON object of one method on one case; "error" instead of times when the gradients are wrong.

    --samples 0 checks and does not time. --once times the step whose memory is measured, and no other. --unchecked:
    another case, that stands for this one, has been checked.
    """
    torch.set_num_threads(arguments.threads)
    method = arguments.method
    case = load(arguments.case, arguments.folder, arguments.vocab_size, is_pruned(method))
    loss = loss_function(method, arguments.products, arguments.threshold)
    peak = peak_of(case, loss)
    inputs = tensor_bytes(case.sources)
    result: Info = {
        "case": arguments.case,
        "method": method,
        "backend": "numba" if method in LOSSES else peers.PEERS.get(method, "torch"),
        "products": arguments.products,
        "threads": arguments.threads,
        "median_ms": None,
        "min_ms": None,
        "max_ms": None,
        "peak_mb": round(peak.size / 2**20, 1),
        "loss": peak.loss,
        "kept_cells": kept_cells(method, case, peak.info),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cells": case.cells,
        # B, T, U, V and J
        "shape": [*case.enc.shape[:2], case.targets.shape[1], *case.weight.shape],
        "threshold": arguments.threshold,
        # inputs, their gradients and the peak above both
        "total_mb": round((peak.size + 2 * inputs) / 2**20, 1),
    }
    if not arguments.unchecked:
        wrong = complaint(arguments, case, peak.loss, peak.info, result)
        if wrong:
            return {**result, "error": wrong}
    if not arguments.samples:
        return result
    if arguments.once:
        times, others = once(case, loss, peak, arguments.allow_load)
    else:
        times, others = timed(case, loss, arguments.samples, arguments.allow_load)
    if not times:
        return {**result, "error": OTHER_LOAD_ERROR}
    result |= summary(times)
    result["cells_per_s"] = round(case.cells / statistics.median(times))
    if others > OTHER_LOAD:
        result["other_load"] = round(others, 2)
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
    found.add_argument("--folder", type=Path, required=True)
    for name in ("--allow-load", "--error-by-threshold", "--once", "--unchecked", "--in-turns"):
        found.add_argument(name, action="store_true")
    return found


if __name__ == "__main__":
    given = parser().parse_args()
    chosen = in_turns if given.in_turns else threshold_errors if given.error_by_threshold else measure
    print(json.dumps(chosen(given)), flush=True)
