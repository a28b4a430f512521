"""What a training report shows, read from the files of an experiment.

Every reader here accepts what a killed run leaves behind: a missing file gives an empty result, a line that was cut in
the middle is counted and passed over. Nothing is imported that is not needed to read text, so that a report can also be
written for an experiment of another machine.
"""

from __future__ import annotations

import ast
import gzip
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr.decoding.score import Transcribed, WorstUtterance, rate_name, worst_utterances


@dataclass
class Metrics:
    """The records of `metrics.jsonl` that count, after resumes have been resolved.

    `time_s` is what the steps that count took; work that was lost and repeated is not in it.
    """

    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    bad_batches: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    resumed_at: list[int] = field(default_factory=list)
    time_s: float = 0.0
    unreadable_lines: int = 0


@dataclass(frozen=True)
class WerLine:
    """Result of one search on one set. `wer` and `interval` (low, high) are fractions; NaN where there is no rate.

    With `errors_in` "characters" all are of characters. `texts` says what was done to them before.
    """

    search: str
    test_set: str
    setting: str
    line: str
    wer: float
    errors: int
    words: int
    insertions: int
    deletions: int
    substitutions: int
    interval: tuple[float, float]
    errors_in: str = "words"
    texts: str = "as they are"


def number(value: Any) -> float:
    """`value` as a float; NaN where there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file in which a resumed run may repeat steps.

    A run that was killed at step 150 and continues from the checkpoint of step 100 writes steps 101 to 150 a second
    time. The later record wins, and what the lost part had written beyond the point of return is dropped, even when
    the new part has not come that far yet.
    """
    metrics = Metrics()
    session, session_has_steps, last_train = 0, False, -1
    kept: list[tuple[int, dict[str, Any]]] = []
    for record in _json_lines(path, metrics):
        kind = record.get("kind")
        if kind == "start":
            session, session_has_steps, last_train = session + 1, False, -1
            metrics.starts.append(record)
            metrics.end = None
            continue
        if kind == "end":
            metrics.end = record
            continue
        step = record.get("step")
        if kind not in ("train", "valid", "bad_batch") or not isinstance(step, int):
            continue
        returned = kind == "train" and step <= last_train  # went back although no start record says so
        if returned:
            session, session_has_steps = session + 1, False
        if not session_has_steps:
            if kept:
                metrics.resumed_at.append(step)
            kept = [(s, r) for s, r in kept if s == session or r["step"] < step]
            session_has_steps = True
        if kind == "train":
            last_train = step
        kept.append((session, record))
    last = [*(record for _, record in kept), metrics.end or {}]
    metrics.time_s = max((t for r in last if math.isfinite(t := number(r.get("time_s")))), default=0.0)
    for kind, target in (("train", metrics.train), ("valid", metrics.valid)):
        target.extend({r["step"]: r for _, r in kept if r["kind"] == kind}.values())
    metrics.bad_batches.extend(r for _, r in kept if r["kind"] == "bad_batch")
    return metrics


def _json_lines(path: Path, metrics: Metrics) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                metrics.unreadable_lines += 1


def read_durations(exp_dir: Path) -> list[float]:
    """Durations in seconds of the training cuts, read from the manifest without loading any audio."""
    for path in (exp_dir / "data" / "cuts_train.jsonl.gz", exp_dir / "data" / "features" / "cuts_train.jsonl.gz"):
        if path.is_file():
            try:
                return list(_durations(path))
            except (OSError, EOFError, ValueError):  # a manifest that is being written or was cut
                continue
    return []


def _durations(path: Path) -> Iterator[float]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            cut = json.loads(line)
            if "duration" in cut:
                yield float(cut["duration"])
            elif cut.get("tracks"):
                yield max(float(t.get("offset", 0)) + float(t["cut"]["duration"]) for t in cut["tracks"])


def read_wer_lines(decode_dir: Path) -> list[WerLine]:
    """The results that `asr.decoding.results.write_results` left in decode/<search>/score-*.json; test sets first."""
    found = []
    for path in sorted(decode_dir.glob("*/score-*.json")):
        try:
            found.append(_wer_line(path))
        except (OSError, ValueError, KeyError, TypeError):  # being written, cut short, or of another form
            continue
    return sorted(found, key=lambda w: (w.test_set != "test", w.test_set, w.wer, w.search))


def _wer_line(path: Path) -> WerLine:
    score = json.loads(path.read_text(encoding="utf-8"))
    errors_in = "characters" if score.get("errors_in") == "characters" else "words"
    words, interval = score[errors_in], score[f"{rate_name(errors_in).lower()}_95_percent_interval"]
    return WerLine(
        search=path.parent.name,
        test_set=path.stem.removeprefix("score-"),
        setting=str(score["setting"]),
        line=str(score["line"]),
        wer=number(words["rate"]),
        errors=int(words["errors"]),
        words=int(words["ref_length"]),
        insertions=int(words["insertions"]),
        deletions=int(words["deletions"]),
        substitutions=int(words["substitutions"]),
        interval=(number(interval["low"]), number(interval["high"])),
        errors_in=errors_in,
        texts=str(score.get("texts", WerLine.texts)),
    )


def read_worst(decode_dir: Path, search: str, test_set: str, count: int = 10) -> list[WorstUtterance]:
    """The utterances with most errors in a recogs file of icefall's form, worst first; words may be characters."""
    path = decode_dir / search / f"recogs-{test_set}.txt"
    if not path.is_file():
        return []
    texts: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"(.*?):\t(ref|hyp)=(.*)", line)
        words = _words(match[3]) if match else None
        if match and words is not None:
            texts.setdefault(match[1], {})[match[2]] = " ".join(words)
    results = [Transcribed(cut_id, t["ref"], t["hyp"]) for cut_id, t in texts.items() if len(t) == 2]
    return worst_utterances(results, count)


def _words(text: str) -> list[str] | None:
    """The list of words behind `ref=`; None where the line was cut."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(word) for word in value] if isinstance(value, list) else None
