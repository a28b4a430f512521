"""The files of ``asr latency``: a table, the same for programs, and errors drawn against delays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from asr.decoding.fonts import drawable, families
from asr.decoding.latency import ChunkLatency, LatencyReport
from asr.decoding.score import rate_name
from asr.decoding.token_delays import Spread

COLUMNS = ["tokens", "emission", "perceived", "first text", "compute"]
LEFT = ("model", "WER", "CER")
"""Columns of words, which begin at the left; numbers end at the right."""


def latency_table(report: LatencyReport) -> str:
    """A Markdown table, aligned so that it can be read as it is; without a line end at its end."""
    rows = [["model", "chunk", rate_name(report.errors_in), *COLUMNS]]
    for run in report.runs:
        for one in run.rows:
            emission = _times(one.emission.mean, one.emission.median, one.emission.p90)
            perceived = _times(one.perceived.mean, one.perceived.median, one.perceived.p90)
            first = _times(one.first_partial.mean, one.first_partial.median, one.first_partial.p90)
            cells = [run.label.replace("|", "\\|"), str(one.chunk_ms), str(one.counts), str(one.emission.count)]
            rows.append([*cells, emission, perceived, first, f"{one.compute_ms:.1f}"])
    return aligned_table(rows, LEFT)


def aligned_table(rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A Markdown table whose columns stand below each other; without a line end at its end.

    Args:
        rows: of equal length; the first holds the names of the columns.
        left: columns that begin at the left; the others end at the right.
    """
    names = rows[0]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    rules = [
        "-" * width if name in left else "-" * (width - 1) + ":" for name, width in zip(names, widths, strict=True)
    ]
    lines = []
    for row in (names, rules, *rows[1:]):
        columns = zip(names, row, widths, strict=True)
        cells = [cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(*values: float) -> str:
    return " / ".join(f"{value:.0f}" if math.isfinite(value) else "-" for value in values)


def latency_notes(report: LatencyReport) -> str:
    """What the columns of the table mean, one to a line."""
    aligned = f"{report.aligned} of {report.utterances} utterances, {report.aligned_tokens} tokens"
    lines = [
        "Times in ms, as mean / median / 90th percentile; left context "
        f"{report.left_context_ms} ms. The time of a reference token is that on the best alignment of "
        f"{report.runs[0].label} with full context ({aligned}).",
        "",
        "- tokens: recognised right at this chunk; emission and perceived go over them.",
        "- emission: time of a token in the stream minus that of the reference token.",
        "- perceived: when the audio is there that the token waits for (the end of its chunk and 37.5 ms, but no later "
        "than the end of the recording) minus the time of the reference token.",
        "- first text: from the first reference token to the first partial result with text, computing included.",
        "- compute: median time for a chunk of one stream; full: for an utterance.",
    ]
    return "\n".join(lines)


def latency_to_dict(report: LatencyReport, device: str) -> dict[str, Any]:
    """For JSON: times in ms, rates as fractions; what does not exist is null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def spread(found: Spread) -> dict[str, Any]:
        return {name: number(value) for name, value in asdict(found).items()}

    def described(row: ChunkLatency) -> dict[str, Any]:
        return {
            "chunk_ms": row.chunk_ms,
            rate_name(report.errors_in).lower(): number(row.counts.rate),
            report.errors_in: asdict(row.counts),
            "right_tokens": row.emission.count,
            "emission_delay_ms": spread(row.emission),
            "perceived_delay_ms": spread(row.perceived),
            "first_partial_ms": spread(row.first_partial),
            "first_partial_algorithmic_ms": spread(row.first_partial.later(-row.compute_ms)),
            "compute_ms": row.compute_ms,
        }

    return {
        "errors_in": report.errors_in,
        "utterances": report.utterances,
        "aligned_utterances": report.aligned,
        "aligned_tokens": report.aligned_tokens,
        "aligned_by": report.runs[0].label,
        "left_context_ms": report.left_context_ms,
        "computed_on": {"device": device, "threads": torch.get_num_threads()},
        "runs": [
            {"label": run.label, "checkpoint": str(run.checkpoint), "chunks": [described(row) for row in run.rows]}
            for run in report.runs
        ],
    }


def latency_figure(report: LatencyReport) -> Figure:
    """Errors against the mean emission delay, and against the mean perceived delay; a line for each checkpoint.

    Drawn through matplotlib's objects, as ``emission_figure``.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("emission", "perceived"), strict=True):
        for i, run in enumerate(report.runs):
            points = [(getattr(row, name).mean, 100 * row.counts.rate, row.chunk_ms) for row in run.rows]
            points = [point for point in points if all(math.isfinite(value) for value in point[:2])]
            colour = f"C{i % 10}"
            x, y = [point[0] for point in points], [point[1] for point in points]
            axes.plot(x, y, color=colour, marker="o", markersize=4)
            for delay_ms, rate, chunk_ms in points:
                style = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": "small", "color": colour}
                axes.annotate(str(chunk_ms), (delay_ms, rate), **style)
        axes.set_xlabel(f"mean {name} delay, ms")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    if all(value > 0 for line in panels[1].get_lines() for value in line.get_xdata()):
        panels[1].set_xscale("log")  # a whole utterance takes many times longer than a chunk
        panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].xaxis.set_major_formatter("{x:g}")
        panels[1].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(f"{rate_name(report.errors_in)}, %")
    # parse_math: a dollar sign in a label must not start mathematical text
    labels = [drawable(run.label) for run in report.runs]
    legend = panels[1].legend(panels[1].get_lines(), labels, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_fontfamily(families())
    return figure


def write_latency(out_dir: Path, report: LatencyReport, device: str = "cpu") -> None:
    """Writes ``latency.json``, ``latency.md`` and ``latency.png``.

    Raises:
        OSError: a file cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    described = json.dumps(latency_to_dict(report, device), indent=2, ensure_ascii=False)
    (out_dir / "latency.json").write_text(described + "\n", encoding="utf-8")
    (out_dir / "latency.md").write_text(f"{latency_table(report)}\n\n{latency_notes(report)}\n", encoding="utf-8")
    latency_figure(report).savefig(out_dir / "latency.png", dpi=120)
