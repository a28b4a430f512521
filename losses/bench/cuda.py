"""``python -m losses.bench.cuda``: time and memory of the losses on a CUDA device, from joiner inputs to all gradients.

A line for each case, dtype of the products and method: milliseconds of a step (median, by CUDA events), memory above
inputs and gradients, largest gradient error relative to the largest entry against a float64 run of the method
"samplewise" on the first utterances, and what peers take where they import. A method whose gradients are off is not
timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from losses import LOSSES
from losses.bench import peers
from losses.bench.cases import CHECKED, Case, Name, make
from losses.bench.measure import PRODUCTS, TOLERANCE, errors, loss_function, step, tensor_bytes

COLUMNS = ("case", "products", "method", "ms", "peak_mib", "error")


def on_device(case: Case) -> Case:
    """The case in the memory of the device."""
    moved: dict[str, Any] = {
        field.name: value.cuda() for field in fields(case) if isinstance(value := getattr(case, field.name), Tensor)
    }
    return replace(case, **moved)


def error_of(case: Case, method: str, products: str, threshold: float) -> float:
    """Largest gradient error on the first utterances, relative to each tensor's largest entry."""
    first = case.first(CHECKED)
    exact = first.to(torch.float64)
    step(exact, loss_function("samplewise", "fp32", 0.0))
    step(first, loss_function(method, products, threshold))
    return max(errors(first, [x.grad for x in exact.sources if x.grad is not None]))


def measure(case: Case, method: str, products: str, threshold: float, samples: int) -> dict[str, Any]:
    """The row of the table, or its part up to what failed."""
    row: dict[str, Any] = {"case": case.name, "products": products, "method": method}
    try:
        if method != "pruned":  # whose value depends on its bounds; tests compare those
            row["error"] = error_of(case, method, products, threshold)
            if not row["error"] <= (peers.TOLERANCE if method in peers.PEERS else TOLERANCE)[products]:
                return {**row, "failed": "gradients are off"}
        times, loss = [], loss_function(method, products, threshold)
        for number in range(samples + 1):
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step(case, loss)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        kept = 2 * tensor_bytes(case.sources)
        row |= {"ms": statistics.median(times[1:]), "peak_mib": (torch.cuda.max_memory_allocated() - kept) / 2**20}
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except (RuntimeError, ValueError) as error:
        row["failed"] = str(error).splitlines()[0]
    finally:
        for x in case.sources:
            x.grad = None
            x.requires_grad_(False)  # what is cut from it is a leaf again
        gc.collect()
        torch.cuda.empty_cache()
    return row


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m losses.bench.cuda", description="Losses on CUDA.")
    parser.add_argument("--case", default="M,L,XL,real,headline", help="as of python -m losses.bench; with commas")
    parser.add_argument("--method", default=",".join(LOSSES), help="with commas")
    parser.add_argument("--products", default="bf16,fp32", help="bf16, fp32 or both")
    parser.add_argument("--threshold", type=float, default=1e-6, help="occupancy up to which cells are left out")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help=f"also, where they import: {', '.join(peers.PEERS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    given = parser.parse_args(arguments)
    for name, choices in (("method", tuple(LOSSES)), ("products", tuple(PRODUCTS))):
        if unknown := [x for x in getattr(given, name).split(",") if x not in choices]:
            parser.error(f"--{name} {unknown[0]} does not exist; choose from: {', '.join(choices)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device that torch can use", file=sys.stderr)
        return 2
    names = given.case.split(",")
    for name in names:
        try:
            Name(name)
        except ValueError as error:
            parser.error(str(error))
    others = [name for name in peers.available() if not name.endswith("-pruned")] if given.peers else []
    if not given.json:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print("  ".join(f"{name:>10}" for name in COLUMNS))
    for name in names:
        for method in (*given.method.split(","), *others):
            case = on_device(make(name, simple=method == "pruned"))
            for products in given.products.split(","):
                row = measure(case, method, products, given.threshold, given.samples)
                print(json.dumps(row) if given.json else _line(row), flush=True)
            del case
    return 0


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['case']:>10}", f"{row['products']:>10}", f"{row['method']:>10}"]
    cells += [f"{row['ms']:10.2f}" if "ms" in row else " " * 10]
    cells += [f"{row['peak_mib']:10.1f}" if "peak_mib" in row else " " * 10]
    cells += [f"{row['error']:10.1e}" if "error" in row else " " * 10]
    return "  ".join([*cells, row.get("failed", "")]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
