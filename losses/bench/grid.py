"""The grid of Braun et al. (2022, "Neural transducer training: reduced memory consumption with sample-wise
computation"): for utterances of 10, 20 and 40 s, the largest batch within a memory limit, and the time per utterance.

The limit, LIMIT_MB, is 6 GiB (6 * 2^30 bytes). Everything of the step counts: inputs, their gradients, and the peak
above both. It is measured at three small batches; a straight line through those, memory = intercept + batch * slope,
gives a batch, and a real step at that batch must take 97 to 100% of the limit, or another batch is tried; the largest
that was measured within the limit counts. Time per utterance is of a batch of at most TIMED_BATCH, since steps of
thousands of utterances take minutes.
"""

from __future__ import annotations

import math
import sys

from losses.bench import plots
from losses.bench.run import Result, Run, checked_of, too_large
from losses.bench.sweep import fit

LIMIT_MB = 6 * 1024.0
# seconds of speech -> T at 40 ms a frame, U
DURATIONS = {10: (250, 25), 20: (500, 50), 40: (1000, 100)}
VOCAB_SIZE = 1024
METHODS = ("batched", "samplewise", "fused")
# Batches for the line. Tiled methods fill buffers of a fixed size first, and grow by inputs and gradients afterwards.
SMALL_BATCHES = {"batched": (2, 3, 4)}
TILED_BATCHES = (16, 32, 64)
TIMED_BATCH = 16
ATTEMPTS = 4
FULL, AIM = 0.97, 0.985  # shares of the limit: large enough, and what is aimed at
COLUMNS = (
    "case", "method", "products", "threads", "largest_batch", "total_mb", "ms_per_utterance", "timed_batch",
    "intercept_mb", "mb_per_utterance",
)  # fmt: skip


def name_of(batch: int, sizes: tuple[int, int, int]) -> str:
    """A case of so many full utterances."""
    return "x".join(map(str, (batch, *sizes))) + "-full"


def largest(run: Run, method: str, products: str, sizes: tuple[int, int, int], limit_mb: float) -> Result:
    """The largest batch whose measured step stays within the limit: batch, its memory, the line, batches tried."""
    small = SMALL_BATCHES.get(method, TILED_BATCHES)
    points = []
    for batch in small:
        found = run.child(name_of(batch, sizes), method, products, "--unchecked", samples=0)
        if "error" in found:
            return {"error": found["error"]}
        points.append(found["total_mb"])
    slope, intercept, _ = fit([float(b) for b in small], points)
    line = {"intercept_mb": round(intercept, 1), "mb_per_utterance": round(slope, 3), "line_at": list(small)}
    batch = max(1, int((AIM * limit_mb - intercept) / slope))
    tried: list[tuple[int, float]] = []
    while len(tried) < ATTEMPTS and batch not in [b for b, _ in tried]:
        if too_large(name_of(batch, sizes), method, None):
            return {**line, "error": f"a batch of {batch} has more logits than are tried"}
        found = run.child(name_of(batch, sizes), method, products, "--unchecked", samples=0)
        if "error" in found:
            return {**line, "tried": tried, "error": found["error"]}
        total = found["total_mb"]
        tried.append((batch, total))
        if FULL * limit_mb <= total <= limit_mb or batch <= small[-1]:
            break
        # a line through the largest of the small batches and this one
        batch = max(1, batch + math.floor((AIM * limit_mb - total) / (total - points[-1]) * (batch - small[-1])))
    within = [(b, total) for b, total in tried if total <= limit_mb]
    if not within:
        return {**line, "tried": tried, "error": f"no batch was found within {limit_mb:g} MiB"}
    batch, total = max(within)
    return {**line, "largest_batch": batch, "total_mb": total, "tried": tried}


def grid(run: Run, durations: dict[int, tuple[int, int]] | None = None, limit_mb: float = LIMIT_MB) -> list[Result]:
    """A row for each duration, method and products; a plot with --out.

    All batches are found first, which takes an hour or more and which other load does not disturb; times come last.
    """
    rows = []
    for seconds, (frames, tokens) in (durations or DURATIONS).items():
        sizes = frames, tokens, VOCAB_SIZE
        for products in run.chosen.products:
            for method in (m for m in METHODS if m in run.chosen.method):
                row: Result = {
                    "case": f"{seconds} s", "method": method, "products": products, "threads": run.chosen.threads,
                    "limit_mb": limit_mb, "T": frames, "U": tokens, "V": VOCAB_SIZE,
                }  # fmt: skip
                checked = run.check(name_of(TIMED_BATCH, sizes), method, products)
                if "error" in checked:
                    row["error"] = checked["error"]
                else:
                    row |= {**largest(run, method, products, sizes, limit_mb), **checked_of(checked)}
                rows.append(row)
                print(_found(row), file=sys.stderr, flush=True)
    run.title(COLUMNS)
    for row in rows:
        if "error" not in row:
            row |= _time(run, row)
        run.show(row, COLUMNS)
    if run.chosen.out:
        panels = (
            ("largest_batch", f"largest batch in {limit_mb / 1024:g} GiB"),
            ("ms_per_utterance", "ms an utterance"),
        )
        title = f"V={VOCAB_SIZE}, J=512, {run.chosen.threads} threads"
        plots.bars(rows, run.chosen.out / "grid.png", panels, title)
    return rows


def _found(row: Result) -> str:
    """A line about a batch that was found, or not."""
    found = row.get("error") or f"largest batch {row['largest_batch']}, tried (batch, MiB) {row['tried']}"
    return f"{row['case']} {row['method']} {row['products']}: {found}"


def _time(run: Run, row: Result) -> Result:
    """Time per utterance of a row's method."""
    batch = min(TIMED_BATCH, row["largest_batch"])
    case = name_of(batch, (row["T"], row["U"], row["V"]))
    timed = run.child(case, row["method"], row["products"], "--unchecked")
    median = timed.get("median_ms")
    found: Result = {key: timed[key] for key in ("error", "other_load", "torch", "cpu") if key in timed}
    return {**found, "timed_batch": batch, "ms_per_utterance": median and round(median / batch, 2)}
