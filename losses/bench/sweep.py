"""How time and memory grow: along one of T, U, V, B around case M, and of "fused" with the number of lattice cells."""

from __future__ import annotations

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


def linearity(run: Run) -> list[Result]:
    """Time of "fused" against lattice cells with a line through it, and its memory at two vocabulary sizes.

    peak_mb leaves out inputs and gradients, so that of the weight too.
    """
    run.title(AXIS_COLUMNS)
    batch, _, _, size = SHAPES["M"]
    lengths = run.chosen.lengths or LINEAR
    summaries = []
    for products in run.chosen.products:
        rows = [run.measure(f"{batch}x{t}x{u}x{size}-full", "fused", products) for t, u in lengths]
        for result in rows:
            run.show({**result, "sweep": "cells"}, AXIS_COLUMNS)
        good = [r for r in rows if r.get("median_ms") is not None]
        if len(good) > 2:
            slope, intercept, r2 = fit([r["cells"] for r in good], [r["median_ms"] for r in good])
            summaries.append({
                "case": "linearity", "method": "fused", "products": products, "threads": run.chosen.threads,
                "cells_range": [good[0]["cells"], good[-1]["cells"]], "r2": round(r2, 5),
                "us_per_cell": round(1000 * slope, 4), "intercept_ms": round(intercept, 2),
            })  # fmt: skip
        if run.chosen.out:
            title = f"fused: time and memory against lattice cells, {run.chosen.threads} threads"
            plots.lines(rows, "cells", run.chosen.out / f"linearity_{products}.png", title, logarithmic=False)
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
