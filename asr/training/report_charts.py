"""Charts of the training report: HTML and inline SVG that need no library and no network.

Lines live in an SVG whose view box is stretched to the width of the page; labels are HTML placed in percent, so that
text keeps its size on a phone. The numbers under the lines travel in a `data-chart` attribute for the tooltips.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Side of the square view box that is stretched to the plot area.
_SIDE = 1000
_COLOURS = 6


@dataclass
class Series:
    """One line. `colour` is 0..5 of the page's palette; `faint` draws the raw values behind a smoothed line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dots: bool = False
    dashed: bool = False


@dataclass
class Chart:
    """Axes and what lies on them.

    `marks` are (x, text) of events, drawn as red ticks at the upper edge. With `at_peaks` lines that are not dashed
    carry their name at their greatest value instead of in the legend, and the tooltip leaves out those near zero.
    """

    title: str
    series: list[Series]
    x_label: str = "step"
    unit: str = ""
    log_y: bool = False
    zero: bool = False
    y_max: float | None = None
    note: str = ""
    marks: list[tuple[float, str]] = field(default_factory=list)
    wide: bool = False
    at_peaks: bool = False


def text(value: object) -> str:
    """`value` escaped for text and for attribute values."""
    return html.escape(str(value), quote=True)


def short(value: float) -> str:
    """A number for people: four significant digits, thousands separated, very small and large ones with an exponent."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def thin(x: Sequence[float], y: Sequence[float], limit: int) -> tuple[list[float], list[float]]:
    """At most `limit` points of a long line, with the least and the greatest of each stretch, so that spikes stay.

    Non-finite values are kept (one a stretch), because a gap in the line is what shows them.
    """
    n = len(x)
    if n <= limit:
        return list(x), list(y)
    stretches = max(limit // 3, 1)
    keep: set[int] = {0, n - 1}
    for i in range(stretches):
        span = range(i * n // stretches, (i + 1) * n // stretches)
        finite = [k for k in span if math.isfinite(y[k])]
        if finite:
            keep.add(min(finite, key=lambda k: y[k]))
            keep.add(max(finite, key=lambda k: y[k]))
        if len(finite) < len(span):
            keep.add(next(k for k in span if not math.isfinite(y[k])))
    order = sorted(keep)[:limit]
    return [x[k] for k in order], [y[k] for k in order]


def smooth(y: Sequence[float], span: int) -> list[float]:
    """Exponential moving average over about `span` values, corrected at the start; passes over non-finite values."""
    decay = 1 - 1 / max(span, 1)
    total = weight = 0.0
    out = []
    for value in y:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight if weight else math.nan)
    return out


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) from within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or fewer where they would crowd."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(ticks) <= 6:
            break
    every = math.ceil(len(ticks) / 6)
    return ticks[::every] if len(ticks) > 1 else linear_ticks(low, high, 4)


class _Scale:
    """Maps a value to 0..1 of the axis."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.log = log
        if not high > low:
            margin = abs(low) * 0.1 or 1.0
            low, high = (low / 1.1, high * 1.1) if log else (low - margin, high + margin)
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def line_chart(chart: Chart, points: int) -> str:
    """A figure with lines of at most `points` points each; a short sentence when there is nothing to draw."""
    pairs = [(x, y) for s in chart.series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    if chart.log_y:
        pairs = [(x, y) for x, y in pairs if y > 0]
    if not pairs:
        return _figure(chart, '<p class="empty">No values were recorded.</p>', "")
    x_values = [x for s in chart.series for x in s.x]
    x_scale = _Scale(min(x_values), max(x_values)) if len(set(x_values)) > 1 else _Scale(x_values[0], x_values[0])
    y_scale = _y_scale(chart, [y for _, y in pairs])
    shapes, data = [], []
    for series in chart.series:
        x, y = thin(series.x, series.y, points)
        shapes.append(_path(series, x, y, x_scale, y_scale))
        if not series.faint:
            data.append({"name": series.name, "c": series.colour, "x": _digits(x), "y": _digits(y), "u": chart.unit})
    for x_mark, label in chart.marks[:200]:
        left = round(100 * x_scale(x_mark), 2)
        if 0 <= left <= 100:
            shapes.append(f'<path class="mark" d="M{left * 10:g} 0V70"><title>{text(label)}</title></path>')
    frame = {"x": chart.x_label, "lo": x_scale.low, "hi": x_scale.high, "yl": y_scale.low, "yh": y_scale.high,
             "log": int(chart.log_y), "least": 0.005 if chart.at_peaks else None, "s": data}  # fmt: skip
    return _figure(chart, _plot(shapes, x_scale, y_scale, chart), json.dumps(frame, separators=(",", ":")))


def _y_scale(chart: Chart, values: list[float]) -> _Scale:
    low, high = min(values), max(values)
    if chart.log_y:
        return _Scale(low / 1.08, high * 1.08, log=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = 0.0 if chart.zero and low >= 0 else low - margin
    return _Scale(low, chart.y_max if chart.y_max is not None else high + margin)


def _digits(values: Sequence[float]) -> list[float | int | None]:
    """Five significant digits; None where there is no number (JSON knows no NaN)."""
    out: list[float | int | None] = []
    for value in values:
        if not math.isfinite(value):
            out.append(None)
        else:
            out.append(int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.5g}"))
    return out


def _path(series: Series, x: list[float], y: list[float], x_scale: _Scale, y_scale: _Scale) -> str:
    """One SVG path, lifted where a value is missing. A point of its own is a stroke of no length with a round cap."""
    runs: list[list[str]] = [[]]
    for xi, yi in zip(x, y, strict=True):
        if not math.isfinite(yi) or (y_scale.log and yi <= 0):
            runs.append([])
            continue
        runs[-1].append(f"{_SIDE * x_scale(xi):.4g} {_SIDE * (1 - min(y_scale(yi), 1.0)):.4g}")
    lines = "".join("M" + "L".join(run) for run in runs if len(run) > 1)
    every = runs if series.dots else [run for run in runs if len(run) == 1]
    dots = "".join(f"M{point}h0" for run in every for point in run)
    kind = f"s{series.colour % _COLOURS}" + (" faint" if series.faint else "") + (" dashed" if series.dashed else "")
    out = f'<path class="line {kind}" d="{lines}"/>' if lines else ""
    return out + (f'<path class="dot {kind}" d="{dots}"/>' if dots else "")


def _plot(shapes: list[str], x_scale: _Scale, y_scale: _Scale, chart: Chart) -> str:
    grid, labels = [], []
    for tick in y_scale.ticks():
        at = y_scale(tick)
        if -0.001 <= at <= 1.001:
            grid.append(f'<path class="grid" d="M0 {_SIDE * (1 - at):.4g}H{_SIDE}"/>')
            name = text(short(tick) + chart.unit)
            labels.append(f'<span class="yt" style="bottom:{100 * at:.2f}%">{name}</span>')
    for tick in x_scale.ticks():
        at = x_scale(tick)
        if -0.001 <= at <= 1.001 and (chart.x_label != "step" or tick == int(tick)):
            labels.append(f'<span class="xt" style="left:{100 * at:.2f}%">{text(short(tick))}</span>')
    for series in chart.series if chart.at_peaks else []:
        if series.y and not series.dashed:
            y, x = max(zip(series.y, series.x, strict=True))
            place = f"left:{100 * x_scale(x):.2f}%;bottom:{100 * y_scale(y):.2f}%"
            labels.append(f'<span class="peak s{series.colour % _COLOURS}" style="{place}">{text(series.name)}</span>')
    svg = (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" aria-label="{text(chart.title)}">'
        + "".join(grid) + "".join(shapes) + "</svg>"
    )  # fmt: skip
    return f'<div class="plot"><div class="area">{svg}{"".join(labels)}</div></div>'


def _figure(chart: Chart, body: str, data: str) -> str:
    named = [s for s in chart.series if not s.faint and (s.dashed or not chart.at_peaks)]
    legend = "".join(f'<span class="key s{s.colour % _COLOURS}">{text(s.name)}</span>' for s in named)
    note = f'<p class="note">{text(chart.note)}</p>' if chart.note else ""
    attribute = f' data-chart="{text(data)}"' if data else ""
    wide = " wide" if chart.wide else ""
    return (
        f'<figure class="card chart{wide}"{attribute}><figcaption><h3>{text(chart.title)}</h3><div class="legend">'
        f'{legend}</div></figcaption>{body}<div class="xl">{text(chart.x_label)}</div>{note}</figure>'
    )


def histogram(title: str, values: Sequence[float], x_label: str, note: str = "", bins: int = 40) -> str:
    """Counts of `values` in equal bins from zero, or from the least value where all lie far from zero."""
    finite = sorted(v for v in values if math.isfinite(v))
    chart = Chart(title, [], x_label=x_label, note=note)
    if not finite:
        return _figure(chart, '<p class="empty">No values were recorded.</p>', "")
    low, high = finite[0], finite[-1]
    low = 0.0 if 0 <= low < 0.5 * high or high == low else low
    bins = min(bins, max(8, 2 * math.isqrt(len(finite))))
    width = next((t for t in linear_ticks(0.0, high - low, bins) if t > 0), 1.0)
    first = math.floor(low / width)
    counts = [0] * (math.floor(high / width) - first + 1)
    for value in finite:
        counts[math.floor(value / width) - first] += 1
    x_scale = _Scale(first * width, (first + len(counts)) * width)
    y_scale = _Scale(0.0, max(counts) * 1.06)
    bar = _SIDE / len(counts)
    shapes = [
        f'<rect class="bar" x="{i * bar + 0.08 * bar:.4g}" y="{_SIDE * (1 - y_scale(c)):.5g}" width="{0.84 * bar:.4g}"'
        f' height="{_SIDE * y_scale(c):.5g}"/>'
        for i, c in enumerate(counts)
        if c
    ]
    centres = [(first + i + 0.5) * width for i in range(len(counts))]
    frame = {"x": x_label, "lo": x_scale.low, "hi": x_scale.high, "yl": 0, "yh": y_scale.high, "log": 0, "w": width,
             "s": [{"name": "cuts", "c": 0, "x": _digits(centres), "y": counts, "u": ""}]}  # fmt: skip
    return _figure(chart, _plot(shapes, x_scale, y_scale, chart), json.dumps(frame, separators=(",", ":")))
