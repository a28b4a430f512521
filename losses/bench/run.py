"""Runs methods on cases, each in a process of its own, and shows what they took."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from losses.bench.cases import CHECKED, Name, tensors_path
from losses.bench.peers import PRUNE_RANGE
from losses.bench.reference import reference_path, write_reference

COLUMNS = ("case", "method", "products", "threads", "median_ms", "min_ms", "max_ms", "peak_mb", "kept_cells", "cells")
LARGEST_LOGITS = 16 * 2**30  # bytes of float32 logits beyond which full logits are not tried
TILED = ("fused", "samplewise", "pruned")  # methods that never make the logits of a whole batch
HEAVY = 2**29  # logits beyond which a float64 run of the whole batch takes too long: CHECKED utterances stand for it

Result = dict[str, Any]


class ExactRunError(RuntimeError):
    """The float64 run of a case failed."""


def bars(result: Result) -> str:
    """Gradient error against threshold, both on a logarithmic scale."""
    lines = [f"{result['case']} {result['method']} {result['products']}: largest gradient error by occupancy threshold"]
    for threshold, error in result["error_by_threshold"].items():
        length = max(0, round(5 * (math.log10(max(error, 1e-9)) + 9)))
        lines.append(f"{threshold:>8} {error:>8.1e} {'#' * length}")
    return "\n".join(lines)


def heading(columns: tuple[str, ...] = COLUMNS) -> str:
    """First line of the table."""
    return "".join(_cell(c, c) for c in columns)


def _cell(column: str, value: object) -> str:
    return f"{'' if value is None else value!s:>{20 if column in ('case', 'method') else max(12, len(column) + 2)}}"


def row(result: Result, columns: tuple[str, ...] = COLUMNS) -> str:
    """A line of the table; without columns, all that the result says."""
    if "error_by_threshold" in result:
        return bars(result)
    if not columns:
        return ", ".join(f"{key} {value}" for key, value in result.items())
    line = "".join(_cell(c, result.get(c)) for c in columns)
    if "error" in result:
        line += f"  error: {result['error']}"
    if "other_load" in result:
        line += f"  (other load {result['other_load']:.0%})"
    return line


class Run:
    """One run: what was chosen, a folder for references and trained tensors, and the results so far.

    Results are shown as they come and, with --out, kept in results.jsonl.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen, self.folder = chosen, folder
        self.results: list[Result] = []
        self.failed = False

    def show(self, result: Result, columns: tuple[str, ...] = COLUMNS) -> Result:
        """Prints a result and keeps it."""
        self.failed |= "error" in result
        self.results.append(result)
        print(json.dumps(result) if self.chosen.json else row(result, columns), flush=True)
        if self.chosen.out:
            with (self.chosen.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        return result

    def title(self, columns: tuple[str, ...] = COLUMNS) -> None:
        """Prints the first line of a table, unless lines are JSON."""
        if not self.chosen.json:
            print(heading(columns), flush=True)

    def prepare(self, case: str) -> None:
        """Trains a trained case and writes the float64 reference, once a run."""
        if reference_path(self.folder, case).exists():
            return
        # in a process of its own, so that its memory is given back
        arguments = case, self.chosen.threshold, self.chosen.vocab_size, self.folder
        process = get_context("spawn").Process(target=write_reference, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise ExactRunError(f"the float64 run of case {case} ended with {process.exitcode}")

    def child(self, case: str, method: str, products: str, *flags: str, samples: int | None = None) -> Result:
        """The measurement of one method in a process of its own."""
        found = self._child(case, method, products, flags, samples)
        if isinstance(found, str):
            return {"case": case, "method": method, "products": products, "error": found}
        return found

    def in_turns(self, rows: list[Result]) -> None:
        """Puts times into rows of one method without an error, all taken in one process, one step after another."""
        rows = [r for r in rows if "error" not in r]
        if not rows:
            return
        names = ",".join(r["case"] for r in rows)
        found = self._child(names, rows[0]["method"], rows[0]["products"], ("--in-turns",), None)
        for i, result in enumerate(rows):
            result.update({"error": found} if isinstance(found, str) else found[i])

    def _child(self, case: str, method: str, products: str, flags: Sequence[str], samples: int | None) -> Any:
        """What losses.bench.measure says, or, as text, why it ended."""
        chosen = self.chosen
        command = [sys.executable, "-m", "losses.bench.measure", "--case", case, "--method", method, *flags]
        command += ["--products", products, "--threads", str(chosen.threads), "--folder", str(self.folder)]
        command += ["--samples", str(chosen.samples if samples is None else samples)]
        command += ["--threshold", str(chosen.threshold)]
        command += ["--vocab-size", str(chosen.vocab_size)] if chosen.vocab_size else []
        command += ["--allow-load"] if chosen.allow_load else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"exit {done.returncode}: {last}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    def measure(self, case: str, method: str, products: str, samples: int | None = None) -> Result:
        """One row. Of a heavy case the first utterances are checked; "headline" is measured in one step.

        samples: other than chosen; 0 takes no time.
        """
        flags = ["--error-by-threshold"] if self.chosen.error_by_threshold else []
        if not heavy(case, self.chosen.vocab_size):
            self.prepare(case)
            return self.child(case, method, products, *flags, samples=samples)
        if too_large(case, method, self.chosen.vocab_size):
            wrong = f"makes logits of over {LARGEST_LOGITS / 2**30:.0f} GiB; of use here: {', '.join(TILED)}"
            return {"case": case, "method": method, "products": products, "error": wrong}
        once = ["--once"] if Name(case).base == "headline" else []
        checked = self.check(case, method, products)
        if "error" in checked or flags:
            return {**checked, "case": case}
        found = self.child(case, method, products, "--unchecked", *once, samples=samples)
        return {**found, **checked_of(checked)}

    def check(self, case: str, method: str, products: str) -> Result:
        """The method on the first utterances of a case, not timed."""
        first = case.removesuffix("-first") + "-first"
        self.prepare(first)
        flags = ["--error-by-threshold"] if self.chosen.error_by_threshold else []
        return self.child(first, method, products, *flags, samples=0)


def checked_of(checked: Result) -> Result:
    """What a check of the first utterances says of the whole case."""
    found = {name: value for name, value in checked.items() if name.endswith(("_error", "_errors"))}
    return {**found, "checked_on": f"first {CHECKED} utterances"}


def logits(case: str, vocab_size: int | None) -> int:
    """B * T * (U+1) * V of a case."""
    if Name(case).base == "real":
        return 10_000 * 100 * (vocab_size or 500)
    batch, frames, tokens, size = Name(case).sizes
    return batch * frames * (tokens + 1) * (vocab_size or size)


def heavy(case: str, vocab_size: int | None) -> bool:
    """Whether CHECKED utterances stand for the batch in the check; never for a trained case, small by nature."""
    parts = Name(case)
    if parts.first or parts.trained or parts.base == "real":
        return False
    return logits(case, vocab_size) > HEAVY and parts.sizes[0] > CHECKED


def too_large(case: str, method: str, vocab_size: int | None) -> bool:
    """Whether the method would make more float32 logits than LARGEST_LOGITS."""
    if method in TILED:
        return False
    count = logits(case, vocab_size)
    if method.endswith("-pruned"):
        count = count * PRUNE_RANGE // (Name(case).sizes[2] + 1)
    return 4 * count > LARGEST_LOGITS


def pairs(chosen: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, products) in the order of the table; the yardstick, a float32 loss, once, whatever the products."""
    found = []
    for products in chosen.products:
        for method in chosen.method:
            if method != "yardstick":
                found.append((method, products))
            elif products == "fp32" or "fp32" not in chosen.products:
                found.append((method, "fp32"))
    return found


def table(run: Run) -> None:
    """Every chosen method on every chosen case."""
    run.title()
    for case in run.chosen.case:
        for method, products in pairs(run.chosen):
            run.show(run.measure(case, method, products))
        for path in (reference_path(run.folder, case), tensors_path(run.folder, case)):
            path.unlink(missing_ok=True)
