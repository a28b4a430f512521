"""`report.html`: one page that shows a training run to people, offline, in at most 2 MB.

The page holds its style, its script and its charts; a content security policy forbids everything else, so that no
transcript and no file name can load or run anything.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from asr.decoding.score import WorstUtterance
from asr.training import report_sections as sections
from asr.training.report_data import Metrics, WerLine, read_durations, read_metrics, read_wer_lines, read_worst

MAX_BYTES = 2_000_000
_IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
# Points of each line and bytes of pictures, tried in turn until the page is small enough.
_LEVELS = ((1200, 900_000), (600, 500_000), (200, 200_000), (60, 0))
_LONGEST_CONFIG = 60_000


@dataclass
class ReportExtra:
    """What the caller knows better than the files of the experiment; every part is optional.

    Args:
        title: heading of the page; the experiment's name from config.yaml, or its folder, when empty.
        worst: utterances to show instead of those read from the recogs files.
        durations_s: durations of the training cuts in seconds, instead of those of the manifest.
        figures: pictures (PNG, SVG, JPEG) with their captions, shown after the curves.
    """

    title: str = ""
    worst: Sequence[WorstUtterance] | None = None
    durations_s: Sequence[float] | None = None
    figures: Sequence[tuple[Path, str]] = ()


@dataclass
class ReportContent:
    """All that the page is made of."""

    title: str
    metrics: Metrics
    wers: list[WerLine]
    worst: list[WorstUtterance]
    worst_search: str
    worst_in: str
    durations_s: list[float]
    emissions: list[dict[str, Any]]
    figures: list[tuple[Path, str]]
    config_text: str
    config: dict[str, Any] = field(default_factory=dict)


def write_report(train_dir: Path, *, extra: ReportExtra | None = None) -> Path:
    """Write `report.html` into `train_dir` from what the experiment has on disk so far, and return its path.

    Read are metrics.jsonl and config.yaml of `train_dir`, and of the experiment around it the manifest of the training
    cuts and decode/<search>/ (score and recogs files, emissions*.json, pictures). Each may be missing or cut short. The
    file replaces an older one in one step and has at most 2 MB: long runs are shown with fewer points, and pictures
    are left out, with a note, where there is no room.
    """
    content = _collect(Path(train_dir), extra or ReportExtra())
    for points, picture_bytes in _LEVELS:
        page = _render(content, points, picture_bytes).encode("utf-8")
        if len(page) <= MAX_BYTES:
            break
    else:
        raise AssertionError(f"the smallest report has {len(page)} bytes; a part of it has no limit")
    target = Path(train_dir) / "report.html"
    temporary = target.with_suffix(".html.tmp")
    temporary.write_bytes(page)
    os.replace(temporary, target)
    return target


def _collect(train_dir: Path, extra: ReportExtra) -> ReportContent:
    exp_dir = train_dir.resolve().parent
    decode_dir = exp_dir / "decode"
    config_path = train_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    try:
        config = yaml.safe_load(config_text) if len(config_text) <= _LONGEST_CONFIG else None
    except yaml.YAMLError:  # shown as it is
        config = None
    config = config if isinstance(config, dict) else {}
    wers = read_wer_lines(decode_dir)
    shown = sections.chosen(wers, config)
    worst = read_worst(decode_dir, shown.search, shown.test_set) if shown else []
    return ReportContent(
        title=extra.title or str(config.get("name") or exp_dir.name),
        metrics=read_metrics(train_dir / "metrics.jsonl"),
        wers=wers,
        worst=list(extra.worst)[:10] if extra.worst is not None else worst,
        worst_search=f"{shown.search} on {shown.test_set}" if shown and extra.worst is None else "",
        worst_in=shown.errors_in if shown and extra.worst is None else "words",
        durations_s=list(extra.durations_s) if extra.durations_s is not None else read_durations(exp_dir),
        emissions=sections.read_emissions(exp_dir, shown.search if shown else ""),
        figures=[*extra.figures, *((path, _caption(path)) for path in _pictures(train_dir, decode_dir))],
        config_text=config_text[:_LONGEST_CONFIG],
        config=config,
    )


def _pictures(train_dir: Path, decode_dir: Path) -> list[Path]:
    folders = [train_dir, *(sorted(p for p in decode_dir.iterdir() if p.is_dir()) if decode_dir.is_dir() else [])]
    # what emissions*.json holds is drawn from there
    return [p for folder in folders for p in sorted(folder.glob("*"))
            if p.suffix in _IMAGE_TYPES and p.is_file() and not p.name.startswith("emissions-")]  # fmt: skip


def _caption(path: Path) -> str:
    return re.sub(r"[-_]+", " ", path.stem).strip().capitalize() + f" ({path.parent.name})"


def _render(content: ReportContent, points: int, picture_bytes: int) -> str:
    unit = sections.errors_in(content.config)
    parts = [
        ("results", "Results", sections.wer_table(content.wers)),
        ("curves", "Training", sections.curves(content.metrics, content.durations_s, points, unit)),
        ("emissions", "Emission posteriors", sections.emission_charts(content.emissions, points)),
        ("figures", "Figures", _figures(content.figures, picture_bytes)),
        ("worst", "Worst utterances", sections.worst_utterances(content.worst, content.worst_search, content.worst_in)),
        ("bad", "Bad batches", sections.bad_batches(content.metrics)),
        ("run", "Run", sections.run(content.metrics, content.config_text, content.config)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in parts)
    body = "".join(f'<section><h2 id="{key}">{name}</h2>{inner}</section>' for key, name, inner in parts)
    header = sections.header(content.title, content.metrics, links)
    tiles = sections.tiles(content.metrics, content.wers, content.durations_s, content.config)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = f"{content.title} · training report"
    return fill_template(title, f"{header}<main>{tiles}{body}<footer>Written {sections.text(written)}.</footer></main>")


def fill_template(title: str, body: str, *, plays: bool = False) -> str:
    """A page in the style of the report, with nothing outside of it.

    Args:
        title: text.
        body: HTML.
        plays: whether it may hold players with their sound.
    """
    package = files("asr.training")
    script = package.joinpath("report_script.js").read_text(encoding="utf-8")
    template = string.Template(package.joinpath("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=sections.text(title),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        plays="; media-src data:" if plays else "",
        script=script,
        body=body,
    )


def _figures(figures: Sequence[tuple[Path, str]], room: int) -> str:
    out = []
    for path, caption in figures:
        data = path.read_bytes() if path.is_file() else b""
        size = math.ceil(len(data) / 3) * 4
        if not data or path.suffix not in _IMAGE_TYPES:
            continue
        if size > room:
            said = f"Left out, because it has {len(data) / 1000:,.0f} kB; it lies in {path}."
            inner = f'<p class="note">{sections.text(said)}</p>'
        else:
            room -= size
            source = f"data:{_IMAGE_TYPES[path.suffix]};base64,{base64.b64encode(data).decode('ascii')}"
            inner = f'<img alt="{sections.text(caption)}" src="{source}">'
        out.append(f'<figure class="card figure gapless"><h3>{sections.text(caption)}</h3>{inner}</figure>')
    return "".join(out[:20])
