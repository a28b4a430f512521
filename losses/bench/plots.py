"""PNG plots of results. matplotlib is imported when something is drawn; Figure objects, no state shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def label(result: Result) -> str:
    """Name of a line or bar."""
    return f"{result['method']} {result['products']}"


def _measured(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if "error" not in r and r.get("median_ms") is not None]


def lines(results: Sequence[Result], key: str, path: Path, title: str, logarithmic: bool = True) -> None:
    """Time and peak memory, side by side, against results[...][key], a line for each method and products."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, column, unit in zip(
        figure.subplots(1, 2), ("median_ms", "peak_mb"), ("ms a step", "MiB above inputs"), strict=True
    ):
        for name in dict.fromkeys(label(r) for r in _measured(results)):
            points = sorted((r[key], r[column]) for r in _measured(results) if label(r) == name)
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        if logarithmic and axes.lines:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def bars(results: Sequence[Result], path: Path, columns: Sequence[tuple[str, str]], title: str) -> None:
    """A panel for each (column, unit): groups of bars by results[...]["case"], a bar for each method and products."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(r["case"] for r in results))
    names = list(dict.fromkeys(label(r) for r in results))
    figure = Figure(figsize=(5 * len(columns), 4), layout="constrained")
    for axes, (column, unit) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for i, name in enumerate(names):
            chosen = [r for r in results if label(r) == name and r.get(column) is not None]
            places = [cases.index(r["case"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for r in chosen]
            axes.bar(places, [r[column] for r in chosen], 0.8 / len(names), label=name)
        axes.set_xticks(range(len(cases)), cases, fontsize=8)
        if any((r.get(column) or 0) > 0 for r in results):
            axes.set_yscale("log")
        axes.set_ylabel(unit)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
