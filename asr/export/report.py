"""verify.json and verify.html: sizes, speed, memory, errors and differences of an export."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asr.atomic import write_whole
from asr.decoding.score import ErrorUnit, errors_name, rate_name
from asr.export.verify import PrecisionReport, Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 } td { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #1a7f37 } .bad { color: #b42318 } code { background: #f4f4f4; padding: 0 .2rem }
"""


def rows(one: PrecisionReport, audio_s: float, errors_in: ErrorUnit = "words") -> list[tuple[str, str]]:
    """What a report says of one precision, by name."""
    errors = errors_name(errors_in)
    found = [
        ("runtime", f"{one.runtime} {one.runtime_version}"),
        ("size", f"{one.bytes / 1e6:.2f} MB"),
        (errors, one.errors),
        (f"{errors} of PyTorch", f"{one.eager_error_percent:.2f}%"),
        *((f"same tokens and times: {name}", value) for name, value in one.same_tokens.items()),
        *(
            (
                f"largest difference: {tensor.name}",
                f"{tensor.largest:.2g} of {tensor.scale:.2g} (frame {tensor.frame} of {tensor.utterance})",
            )
            for tensor in one.tensors
        ),
        ("loading", f"{one.cold_start_s:.2f} s"),
        ("one step, median and 95th percentile", f"{one.step_ms_median:.1f} and {one.step_ms_p95:.1f} ms"),
        ("real time factor", f"{one.real_time_factor:.4f} over {audio_s:.0f} s of audio"),
        ("memory above the runtime, after loading", f"{one.loaded_mib - one.runtime_mib:.0f} MiB"),
        ("memory above the runtime, at most, one stream", f"{one.alone_mib - one.runtime_mib:.0f} MiB"),
        ("memory above the runtime, at most, all trials", f"{one.peak_mib - one.runtime_mib:.0f} MiB"),
    ]
    return found


def _rows_of(report: Report, one: PrecisionReport) -> list[tuple[str, str]]:
    return rows(one, report.seconds_of_audio, report.errors_in)


def summary(report: Report) -> str:
    """Text for a terminal, without a line end at its end."""
    lines = []
    for one in report.precisions:
        lines.append(f"{one.precision}: {'holds' if one.ok else 'FAILS: ' + one.reason}")
        lines += [f"  {name}: {value}" for name, value in _rows_of(report, one)]
    return "\n".join(lines)


def write_report(report: Report, folder: Path) -> None:
    """Writes verify.json and verify.html into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_described(report), indent=1) + "\n"
    write_whole(folder / "verify.json", lambda file: file.write(text.encode()))
    page = _page(report)
    write_whole(folder / "verify.html", lambda file: file.write(page.encode()))


def _described(report: Report) -> dict[str, Any]:
    """For JSON: errors and their rates go by the name of what is counted."""
    rate = rate_name(report.errors_in).lower()
    names = {"errors": report.errors_in, "error_percent": f"{rate}_percent"}
    names["eager_error_percent"] = f"eager_{rate}_percent"
    described = asdict(report)
    described["precisions"] = [
        {names.get(name, name): value for name, value in one.items()} for one in described["precisions"]
    ]
    return {**described, "ok": report.ok}


def _page(report: Report) -> str:
    manifest = report.manifest
    title = f"{manifest['target']}, {manifest['chunk_ms']}{'' if manifest['chunk_ms'] == 'full' else ' ms'}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>Export: {html.escape(title)}</h1>",
        f"<p>{manifest['parameters']:,} parameters, {manifest['vocab_size']} tokens, from "
        f"<code>{html.escape(Path(manifest['checkpoint']).name)}</code> "
        f"(sha256 {manifest['checkpoint_sha256'][:12]}); {report.threads} thread of the runtime.</p>",
    ]
    names = list(dict.fromkeys(name for one in report.precisions for name, _ in _rows_of(report, one)))
    parts.append("<table><tr><th></th>" + "".join(f"<th>{one.precision}</th>" for one in report.precisions))
    verdicts = (
        f"<td class={'ok' if one.ok else 'bad'}>{'holds' if one.ok else 'fails'}</td>" for one in report.precisions
    )
    parts.append("<tr><th>verdict</th>" + "".join(verdicts))
    values = [dict(_rows_of(report, one)) for one in report.precisions]
    for name in names:
        cells = "".join(f"<td>{html.escape(value.get(name, ''))}</td>" for value in values)
        parts.append(f"<tr><th>{html.escape(name)}</th>{cells}")
    parts.append("</table>")
    for one in report.precisions:
        if not one.ok:
            parts.append(f"<h2 class=bad>{one.precision}: {html.escape(one.reason)}</h2><ul>")
            parts += [f"<li>{html.escape(text)}" for text in one.differences]
            parts.append("</ul>")
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    parts.append(f"<p>Written with {html.escape(versions)}.</p></html>")
    return "\n".join(parts)
