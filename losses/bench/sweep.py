"""How time and memory grow: along one of T, U, V, B around case M, and of "fused" with the number of lattice cells."""

from __future__ import annotations

import torch

from losses.bench import plots
from losses.bench.cases import SHAPES
from losses.bench.run import Result, Run, pairs

AXES = ("B", "T", "U", "V")
# around M, which is (8, 250, 50, 500)
VALUES = {
    "B": (2, 4, 8, 16, 32),
    "T": (63, 125, 250, 500, 1000),
    "U": (12, 25, 50, 100, 200),
    "V": (125, 250, 500, 1000, 2000, 4000),
}
# T and U of batches of M's size, all lengths full, whose cells span a factor of 16
LINEAR = ((125, 24), (180, 35), (250, 49), (330, 66), (420, 83), (500, 99))
# Batches of M's T and U, lengths in 50-100%, whose cells span the same factor.
BATCHES = (2, 4, 8, 16, 32)
VOCABULARIES = (500, 16_000)
AXIS_COLUMNS = ("case", "method", "products", "median_ms", "min_ms", "max_ms", "peak_mb", "kept_cells", "cells")


def case_of(axis: str, value: int) -> str:
    """M with one size changed, lengths in 50-100%."""
    sizes = list(SHAPES["M"])
    sizes[AXES.index(axis)] = value
    return "x".join(map(str, sizes))


def sweep(run: Run, axis: str) -> list[Result]:
    """Rows of all chosen methods along an axis, with its value under its name; a plot with --out."""
    run.title(AXIS_COLUMNS)
    values = run.chosen.values or VALUES[axis]
    found = []
    for value in values:
        for method, products in pairs(run.chosen):
            result = run.measure(case_of(axis, value), method, products)
            found.append(run.show({**result, "sweep": axis, axis: value}, AXIS_COLUMNS))
    if run.chosen.out:
        title = f"T, U, V, B = 250, 50, 500, 8, but {axis}; {run.chosen.threads} threads"
        plots.lines(found, axis, run.chosen.out / f"sweep_{axis}.png", title)
    return found


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept and R^2 (1 where y does not vary)."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    intercept = mean_y - slope * mean_x
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return slope, intercept, 1 - left / total if total else 1.0


def fit_two(x: list[float], z: list[float], y: list[float]) -> float:
    """R^2 of least squares y = a + b * x + c * z."""
    rows = torch.tensor([x, z, [1.0] * len(x)], dtype=torch.float64).T / torch.tensor([max(x), max(z), 1.0])
    wanted = torch.tensor(y, dtype=torch.float64)
    left = wanted - rows @ torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution[:, 0]
    return 1 - float(left.square().sum() / (wanted - wanted.mean()).square().sum())


def linearity(run: Run) -> list[Result]:
    """Time of "fused" against lattice cells with a line through it, and its memory at two vocabulary sizes.

    Cells grow with the batch, and with T and U at the same batch. As T and U grow, a smaller share of the cells has a
    gradient, hence a second fit by both cells and those that have one. peak_mb leaves out inputs and gradients, so that
    of the weight too.
    """
    run.title(AXIS_COLUMNS)
    batch, _, _, size = SHAPES["M"]
    families = {
        "batches": [case_of("B", b) for b in run.chosen.batches or BATCHES],
        "lengths": [f"{batch}x{t}x{u}x{size}-full" for t, u in run.chosen.lengths or LINEAR],
    }
    summaries = []
    for products in run.chosen.products:
        for name, cases in families.items():
            rows = [run.measure(case, "fused", products, samples=0) for case in cases]
            run.in_turns(rows)
            for result in rows:
                run.show({**result, "sweep": "cells"}, AXIS_COLUMNS)
            summaries += _line(run, name, products, rows)
            if run.chosen.out:
                title = f"fused: time and memory against lattice cells, {run.chosen.threads} threads"
                path = run.chosen.out / f"linearity_{name}_{products}.png"
                plots.lines(rows, "cells", path, title, logarithmic=False)
        peaks = {}
        for vocab_size in run.chosen.values or VOCABULARIES:
            result = run.measure(case_of("V", vocab_size), "fused", products)
            run.show({**result, "sweep": "V", "V": vocab_size}, AXIS_COLUMNS)
            peaks[vocab_size] = result.get("peak_mb")
        summaries.append({
            "case": "vocabulary", "method": "fused", "products": products, "threads": run.chosen.threads,
            "peak_mb_by_vocab_size": peaks,
        })  # fmt: skip
    for summary in summaries:
        run.show(summary, ())
    return summaries


def _line(run: Run, name: str, products: str, rows: list[Result]) -> list[Result]:
    """The line through the times of a family of cases, where at least three were measured."""
    good = [r for r in rows if r.get("median_ms") is not None]
    if len(good) < 3:
        return []
    cells, kept, times = ([r[key] for r in good] for key in ("cells", "kept_cells", "median_ms"))
    slope, intercept, r2 = fit(cells, times)
    return [{
        "case": f"linearity by {name}", "method": "fused", "products": products, "threads": run.chosen.threads,
        "cells_range": [min(cells), max(cells)], "r2": round(r2, 5), "us_per_cell": round(1000 * slope, 4),
        "intercept_ms": round(intercept, 2), "r2_by_cells_and_kept_cells": round(fit_two(cells, kept, times), 5),
    }]  # fmt: skip
