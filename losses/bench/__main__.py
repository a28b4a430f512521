"""`python -m losses.bench`: a table of time and memory of the losses, or one JSON object a line.

Each method runs in a process of its own. Its gradients are compared with a float64 run first, and what fails is not
timed. Samples during which other processes took more than 5% of the machine are thrown away.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from losses import LOSSES
from losses.bench.cases import CASES
from losses.bench.measure import PEERS, PRODUCTS
from losses.bench.reference import write_reference

COLUMNS = ("case", "method", "products", "threads", "median_ms", "min_ms", "max_ms", "peak_mb", "kept_cells", "cells")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m losses.bench", description="Time and memory of the losses.")
    parser.add_argument("--case", default="M", help=f"of {', '.join(CASES)}; several with commas")
    parser.add_argument("--method", default="yardstick,fused", help=f"of yardstick, {', '.join(LOSSES)}; with commas")
    parser.add_argument("--products", default="bf16,fp32", help="dtype of the joiner's product: bf16, fp32 or both")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the compiled loops")
    parser.add_argument("--samples", type=int, default=5, help="samples of at least half a second each")
    parser.add_argument("--threshold", type=float, default=1e-6, help="occupancy up to which cells are left out")
    parser.add_argument("--vocab-size", type=int, help="instead of that of the case")
    parser.add_argument("--peers", action="store_true", help="also torchaudio's rnnt_loss, where it is installed")
    parser.add_argument("--allow-load", action="store_true", help="keep samples taken under other load, marked")
    parser.add_argument(
        "--error-by-threshold", action="store_true", help="instead of times: gradient error at several thresholds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    found = parser.parse_args(arguments)
    for name, choices in (("case", CASES), ("method", ("yardstick", *LOSSES)), ("products", tuple(PRODUCTS))):
        values = getattr(found, name).split(",")
        for value in values:
            if value not in choices:
                parser.error(f"--{name} {value} does not exist; choose from: {', '.join(choices)}")
        setattr(found, name, values)
    if found.peers:
        found.method += [peer for peer in PEERS if importlib.util.find_spec(peer)]
    return found


def child(case: str, method: str, products: str, reference: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """The measurement of one method in a process of its own."""
    command = [sys.executable, "-m", "losses.bench.measure", "--case", case, "--method", method]
    command += ["--products", products, "--threads", str(chosen.threads), "--samples", str(chosen.samples)]
    command += ["--threshold", str(chosen.threshold), "--reference", str(reference)]
    command += ["--vocab-size", str(chosen.vocab_size)] if chosen.vocab_size else []
    command += ["--allow-load"] if chosen.allow_load else []
    command += ["--error-by-threshold"] if chosen.error_by_threshold else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": case, "method": method, "products": products, "error": f"exit {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def bars(result: dict[str, Any]) -> str:
    """Gradient error against threshold, both on a logarithmic scale."""
    lines = [f"{result['case']} {result['method']} {result['products']}: largest gradient error by occupancy threshold"]
    for threshold, error in result["error_by_threshold"].items():
        length = max(0, round(5 * (math.log10(max(error, 1e-9)) + 9)))
        lines.append(f"{threshold:>8} {error:>8.1e} {'#' * length}")
    return "\n".join(lines)


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    if "error_by_threshold" in result:
        return bars(result)
    line = "".join(f"{'' if result.get(c) is None else result[c]!s:>12}" for c in COLUMNS)
    if "error" in result:
        line += f"  error: {result['error']}"
    if "other_load" in result:
        line += f"  (other load {result['other_load']:.0%})"
    return line


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a method was wrong or could not be measured."""
    chosen = parse(arguments)
    failed = False
    if not chosen.json:
        print("".join(f"{c:>12}" for c in COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen.case:
            reference = Path(folder) / f"{case}.pt"
            # in a process of its own, so that its memory is given back
            process = get_context("spawn").Process(
                target=write_reference, args=(case, chosen.threshold, chosen.vocab_size, reference)
            )
            process.start()
            process.join()
            if process.exitcode:
                print(f"error: the float64 run of case {case} ended with {process.exitcode}", file=sys.stderr)
                return 1
            for products in chosen.products:
                for method in chosen.method:
                    if method == "yardstick" and products != "fp32" and "fp32" in chosen.products:
                        continue  # it is a float32 loss
                    result = child(case, method, products, reference, chosen)
                    failed |= "error" in result
                    print(json.dumps(result) if chosen.json else row(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
