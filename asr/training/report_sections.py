"""The sections of the training report as HTML. Every text from outside goes through `text`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from asr.decoding.score import WorstUtterance, rate_name
from asr.training.report_charts import Chart, Series, histogram, line_chart, short, smooth, text
from asr.training.report_data import Metrics, WerLine, number

__all__ = ["bad_batches", "chosen", "curves", "emission_charts", "header", "read_emissions", "run", "text", "tile",
           "tiles", "wer_table", "worst_utterances"]  # fmt: skip

_MOST_WORDS = 300
_LONGEST_WORD = 60
_MOST_BAD = 50


def chosen(wers: Sequence[WerLine], config: dict[str, Any]) -> WerLine | None:
    """The result that stands for the run: of the configured search on the test set, else the best one."""
    decoding = config.get("decoding")
    name = decoding.get("search") if isinstance(decoding, dict) else None
    return next((w for w in wers if w.search == name), wers[0] if wers else None)


def errors_in(config: dict[str, Any]) -> str:
    """What validation counts: "words", or "characters"."""
    training = config.get("training")
    found = training.get("errors_in") if isinstance(training, dict) else None
    return "characters" if found == "characters" else "words"


def duration(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `4.2 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"


def header(title: str, metrics: Metrics, links: str) -> str:
    state, kind = _state(metrics)
    start = metrics.starts[-1] if metrics.starts else {}
    last = (metrics.train or metrics.valid or [{}])[-1]
    facts = [f"step {last['step']:,}"] if last else []
    facts += [f"epoch {last['epoch'] + 1}"] if isinstance(last.get("epoch"), int) else []
    facts += [str(start["device"])] if start.get("device") else []
    if metrics.resumed_at:
        at = ", ".join(f"{s:,}" for s in metrics.resumed_at[:5]) + (" …" if len(metrics.resumed_at) > 5 else "")
        facts.append(f"continued at step {at}")
    return (
        f'<header><div><div class="eyebrow">Training report</div><div class="headline"><h1>{text(title)}</h1>'
        f'<span class="pill {kind}">{text(state)}</span><button id="theme" type="button">Light / dark</button></div>'
        f'<p class="lead">{text(" · ".join(facts))}</p><nav>{links}</nav></div></header>'
    )


def _state(metrics: Metrics) -> tuple[str, str]:
    if metrics.end is not None:
        reason = str(metrics.end.get("reason") or "finished")
        early = re.search("sig|stop|terminat|interrupt|abort|bad|finite|error|fail|full", reason.lower())
        return reason[:80], "warn" if early else "good"
    return ("running, or stopped without a last record", "warn") if metrics.train else ("nothing trained yet", "bad")


def tiles(metrics: Metrics, wers: list[WerLine], durations_s: Sequence[float], config: dict[str, Any]) -> str:
    out = []
    best = chosen(wers, config)
    if best:
        counts = f"{best.errors:,} of {best.words:,} {best.errors_in}"
        more = f"{best.search}, {counts}; 95% CI {_interval(best)}"
        out.append(tile(f"{rate_name(best.errors_in)} on {best.test_set}", _percent(best.wer), more, main=True))
    valid = [(number(r.get("wer")), r) for r in metrics.valid if math.isfinite(number(r.get("wer")))]
    if valid:
        wer, record = min(valid, key=lambda pair: pair[0])
        out.append(
            tile(f"Best validation {rate_name(errors_in(config))}", _percent(wer), f"at step {record['step']:,}")
        )
    losses = [(number(r.get("loss")), r) for r in metrics.valid if math.isfinite(number(r.get("loss")))]
    if losses:
        loss, record = min(losses, key=lambda pair: pair[0])
        out.append(tile("Best validation loss", short(loss), f"at step {record['step']:,}"))
    if metrics.starts and math.isfinite(number(metrics.starts[-1].get("parameters"))):
        count = number(metrics.starts[-1]["parameters"])
        value = f"{count / 1e6:.3g} <small>M</small>" if count >= 1e6 else f"{count / 1e3:.3g} <small>k</small>"
        out.append(tile("Parameters", value, f"{int(count):,}", raw=True))
    if metrics.time_s > 0:
        times = len(metrics.resumed_at)
        more = "in one go" if times == 0 else "continued once" if times == 1 else f"continued {times} times"
        out.append(tile("Training time", duration(metrics.time_s), more))
    speeds = [v for r in metrics.train if math.isfinite(v := number(r.get("audio_s_per_s")))]
    if speeds:
        speed = f"{short(median(speeds))} <small>audio s/s</small>"
        out.append(tile("Throughput", speed, "median of steps", raw=True))
    if durations_s:
        hours = sum(durations_s) / 3600
        value = f"{hours:.3g} <small>h</small>" if hours >= 1 else f"{60 * hours:.3g} <small>min</small>"
        out.append(tile("Training audio", value, f"{len(durations_s):,} cuts", raw=True))
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def tile(name: str, value: str, more: str, main: bool = False, raw: bool = False) -> str:
    """A number with its name above and a word more below; with ``raw`` the value is HTML."""
    shown = value if raw else text(value)
    return (
        f'<div class="card tile{" main" if main else ""}"><div class="name">{text(name)}</div>'
        f'<div class="value">{shown}</div><div class="more">{text(more)}</div></div>'
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}%" if math.isfinite(rate) else "–"


def _interval(line: WerLine) -> str:
    low, high = line.interval
    return f"{100 * low:.2f} to {100 * high:.2f}%" if math.isfinite(low) and math.isfinite(high) else "–"


def wer_table(wers: Sequence[WerLine]) -> str:
    if not wers:
        return ""
    ends = [v for w in wers for v in (w.wer, *w.interval) if math.isfinite(v)]
    top = 1.05 * max(ends, default=0.0) or 1.0
    rows = []
    for w in wers[:50]:
        counts = "".join(f"<td>{c:,}</td>" for c in (w.errors, w.words, w.insertions, w.deletions, w.substitutions))
        said = [w.setting[:200]] if w.setting and w.setting != w.search else []
        said += [f"texts {w.texts[:200]}"] if w.texts != WerLine.texts else []
        setting = f'<div class="more">{text(", ".join(said))}</div>' if said else ""
        rows.append(
            f'<tr><td class="t">{text(w.search)}{setting}</td><td class="t">{text(w.test_set)}</td>'
            f'<td class="big">{_percent(w.wer)}</td>{counts}<td>{_interval(w)}</td><td>{_range_bar(w, top)}</td></tr>'
        )
    lines = "\n".join(f"{w.search}, {w.test_set}: {w.line[:300]}" for w in wers[:50])
    units = {w.errors_in for w in wers[:50]}
    rate, counted = (rate_name(*units), next(iter(units)).capitalize()) if len(units) == 1 else ("Rate", "Of")
    names = f"<th>Errors</th><th>{counted}</th><th>Ins</th><th>Del</th><th>Sub</th><th>95% interval</th><th></th>"
    return (
        '<div class="card scroll"><table><thead><tr><th class="t">Search</th><th class="t">Set</th>'
        f"<th>{rate}</th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<pre class="gapless">{text(lines)}</pre>'
    )


def _range_bar(line: WerLine, top: float) -> str:
    """The interval as a bar and the rate as a tick, on a common scale from 0 to `top`."""
    low, high = line.interval
    if not all(map(math.isfinite, (line.wer, low, high))):
        return ""
    return (
        f'<span class="range"><i style="left:{100 * low / top:.2f}%;width:{100 * (high - low) / top:.2f}%"></i>'
        f'<b style="left:{100 * line.wer / top:.2f}%"></b></span>'
    )


def curves(metrics: Metrics, durations_s: Sequence[float], points: int, unit: str = "words") -> str:
    """Charts of the whole run, and the durations of what it trained on."""
    charts = [_loss_chart(metrics)]
    wers = [r for r in metrics.valid if r.get("wer") is not None]
    if wers:
        percent = [100 * v for v in _column(wers, "wer")]
        series = Series("validation", _column(wers, "step"), percent, 1, dots=len(wers) <= 60)
        charts.append(Chart(f"{unit.capitalize().removesuffix('s')} error rate", [series], unit="%", zero=True))
    charts.append(Chart("Learning rate", [_series(metrics.train, "lr", "learning rate", 2)], zero=True))
    norm = _series(metrics.train, "grad_norm", "gradient norm", 3)
    charts.append(Chart("Gradient norm", _with_smooth(norm), log_y=_wide_range(norm.y)))
    others = [("simple_loss", "simple", 2), ("ctc_loss", "CTC", 4)]
    present = [other for other in others if any(r.get(other[0]) is not None for r in metrics.train)]
    if present:
        named = [("transducer_loss", "transducer", 0), *present]
        parts = [series for column in named for series in _with_smooth(_series(metrics.train, *column))]
        charts.append(Chart("Parts of the training loss", parts, log_y=_wide_range([v for s in parts for v in s.y])))
    speed = _series(metrics.train, "audio_s_per_s", "audio seconds per second", 0)
    charts.append(Chart("Throughput", _with_smooth(speed), zero=True))
    wait = _series(metrics.train, "data_wait_fraction", "waiting for data", 4)
    wait.y = [100 * v for v in wait.y]
    charts.append(Chart("Time spent waiting for data", _with_smooth(wait), unit="%", zero=True))
    drawn = "".join(line_chart(chart, points) for chart in charts)
    note = ""
    if durations_s:
        low, middle, high = min(durations_s), median(durations_s), max(durations_s)
        note = f"{len(durations_s):,} cuts, {low:.2f} to {high:.2f} s, median {middle:.2f} s"
    drawn += histogram("Durations of the training cuts", durations_s, "seconds", note)
    cut = metrics.unreadable_lines
    said = f'<p class="note">{cut} line{"s" * (cut != 1)} of metrics.jsonl could not be read and were passed over.</p>'
    return f'<div class="charts">{drawn}</div>{said if cut else ""}'


def _loss_chart(metrics: Metrics) -> Chart:
    train = _series(metrics.train, "loss", "training", 0)
    valid = _series(metrics.valid, "loss", "validation", 1)
    valid.dots = len(valid.x) <= 60
    lost = [x for x, y in zip(train.x, train.y, strict=True) if not math.isfinite(y)]
    events = {x: f"step {x:g}: loss is not finite" for x in lost}
    events |= {float(r["step"]): f"step {r['step']}: {r.get('reason')}"[:200] for r in metrics.bad_batches}
    marks = sorted(events.items())
    note = f"Red ticks: {len(marks)} steps with a bad batch or a loss that is not finite." if marks else ""
    every = [*train.y, *valid.y]
    return Chart("Loss", [*_with_smooth(train), valid], log_y=_wide_range(every), marks=marks, note=note)


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number(r.get(key)) for r in records]


def _series(records: Sequence[dict[str, Any]], key: str, name: str, colour: int) -> Series:
    return Series(name, _column(records, "step"), _column(records, key), colour)


def _with_smooth(raw: Series) -> list[Series]:
    """A long noisy line as faint values behind their moving average; a short one as it is."""
    if len(raw.x) < 40:
        return [raw]
    span = max(5, len(raw.x) // 40)
    faint = Series(raw.name, raw.x, raw.y, raw.colour, faint=True)
    return [faint, Series(raw.name, raw.x, smooth(raw.y, span), raw.colour)]


def _wide_range(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: all values positive, the largest over 20 times the least."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)


def read_emissions(exp_dir: Path, search: str = "") -> list[dict[str, Any]]:
    """Utterances of decode/<search>/emissions*.json, or of any search when this one has none; at most six.

    Form: {"utterances": [{"cut_id": str, "text": str, "frame_shift_s": float, "series": [{"symbol": str, "posterior":
    [float, one a frame]}]}]}.
    """
    for pattern in (f"decode/{search}/emissions*.json", "decode/*/emissions*.json"):
        found: list[Any] = []
        for path in sorted(exp_dir.glob(pattern)):
            try:
                found += json.loads(path.read_text(encoding="utf-8"))["utterances"]
            except (OSError, ValueError, KeyError, TypeError):  # cut short, or of another form
                continue
        if usable := [u for u in found if isinstance(u, dict) and u.get("series")]:
            return usable[:6]
    return []


def emission_charts(utterances: Sequence[dict[str, Any]], points: int) -> str:
    """Probability of each symbol at each frame: sharp peaks are words that greedy search keeps."""
    out = []
    for utterance in utterances:
        shift_s = number(utterance.get("frame_shift_s", 0.04))
        series = [_emission(entry, i, shift_s) for i, entry in enumerate(utterance["series"][:_MOST_WORDS])]
        title = str(utterance.get("text") or utterance.get("cut_id", ""))[:120]
        note = str(utterance.get("cut_id", ""))[:200]
        chart = Chart(title, series, x_label="seconds", zero=True, y_max=1.12, note=note, wide=True, at_peaks=True)
        out.append(line_chart(chart, points))
    lead = (
        "When the model wants to emit each token of the reference, against blank (dashed). A token whose probability "
        "is spread over frames stays below blank in all of them, and greedy search deletes it."
    )
    return f'<p class="lead">{lead}</p><div class="charts gapless">{"".join(out)}</div>' if out else ""


def _emission(entry: dict[str, Any], i: int, shift_s: float) -> Series:
    """One symbol over time; of a token only the frames around its emission, for it is zero elsewhere."""
    y = [number(v) for v in entry.get("posterior", [])]
    symbol = str(entry.get("symbol"))[:_LONGEST_WORD]
    if symbol in ("<blk>", "blank"):
        return Series(symbol, [shift_s * k for k in range(len(y))], y, 5, dashed=True)
    high = [k for k, v in enumerate(y) if v >= 0.002]
    span = range(max(high[0] - 1, 0), min(high[-1] + 2, len(y))) if high else range(0)
    return Series(symbol, [shift_s * k for k in span], [y[k] for k in span], (i - 1) % 5)


def worst_utterances(worst: Sequence[WorstUtterance], search: str = "", unit: str = "words") -> str:
    if not worst:
        return ""
    legend = "".join(
        f'<span class="swatch {kind}">{name}</span>'
        for kind, name in (("sub", "substituted"), ("del", "deleted"), ("ins", "inserted"))
    )
    said = f"Search: {text(search)}. " if search else ""
    shown = "".join(_utterance(one, unit) for one in worst)
    return f'<p class="lead">{said}{legend}</p><div class="gapless">{shown}</div>'


def _utterance(utterance: WorstUtterance, unit: str) -> str:
    cells = ['<div class="side"><span>ref</span><span>hyp</span></div>']
    for ref, hyp in utterance.pairs[:_MOST_WORDS]:
        kind = "" if ref == hyp else " ins" if not ref else " del" if not hyp else " sub"
        cells.append(f'<div class="w{kind}">{_word(ref, "r")}{_word(hyp, "h")}</div>')
    left = len(utterance.pairs) - _MOST_WORDS
    if left > 0:
        cells.append(f'<div class="side"><span>… {left:,} more</span></div>')
    rate = f" · {_percent(utterance.errors / utterance.ref_words)}" if utterance.ref_words else ""
    errors = f"{utterance.errors:,} error{'s' * (utterance.errors != 1)} in {utterance.ref_words:,} {unit}{rate}"
    return (
        f'<div class="card utt"><div class="top"><code>{text(utterance.cut_id[:200])}</code><span>{errors}</span></div>'
        f'<div class="words">{"".join(cells)}</div></div>'
    )


def _word(word: str, kind: str) -> str:
    if not word:
        return '<span class="gap">∗</span>'
    shown = word if len(word) <= _LONGEST_WORD else word[: _LONGEST_WORD - 1] + "…"
    return f'<span class="{kind}">{text(shown)}</span>'


def bad_batches(metrics: Metrics) -> str:
    if not metrics.bad_batches:
        return ""
    rows = []
    for record in metrics.bad_batches[:_MOST_BAD]:
        ids = record.get("cut_ids")
        ids = [str(i)[:100] for i in ids] if isinstance(ids, list) else []
        names = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        rows.append(
            f'<tr><td>{record["step"]:,}</td><td class="t">{text(str(record.get("reason", ""))[:200])}</td>'
            f'<td class="t ids"><code>{text(names)}</code></td></tr>'
        )
    left = len(metrics.bad_batches) - _MOST_BAD
    note = f'<p class="note">{left:,} more are in metrics.jsonl.</p>' if left > 0 else ""
    return (
        '<div class="card scroll"><table><thead><tr><th>Step</th><th class="t">Reason</th><th class="t">Utterances</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def run(metrics: Metrics, config_text: str, config: dict[str, Any]) -> str:
    """The command, what it ran on, and the configuration."""
    out = []
    start = metrics.starts[-1] if metrics.starts else {}
    if start.get("command"):
        command = start["command"]
        shown = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        out.append(
            '<div class="command"><button type="button" data-copy="1">Copy</button>'
            f'<pre class="wrap"><code>{text(shown[:4000])}</code></pre></div>'
        )
    facts = {"seed": config["seed"]} if "seed" in config else {}
    facts |= {k: v for k, v in start.items() if k not in ("kind", "command") and v is not None}
    if facts:
        shown_facts = [(str(k).replace("_", " ")[:60], _fact(v)) for k, v in list(facts.items())[:60]]
        rows = "".join(f"<dt>{text(k)}</dt><dd>{v}</dd>" for k, v in shown_facts)
        out.append(f'<dl class="card gapless">{rows}</dl>')
    if config_text:
        coloured = re.sub(r"(?m)^(\s*(?:- )?)([\w.-]+)(?=:)", r'\1<span class="k">\2</span>', text(config_text))
        out.append(f'<details class="card gapless"><summary>Configuration</summary><pre>{coloured}</pre></details>')
    return "".join(out)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10000:
        value = f"{value:,}"
    return text(str(value)[:600])
