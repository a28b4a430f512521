"""The last stage: report.html and report.md of an experiment folder, tables of what the stages found and took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from asr.data.packed_cuts import PackedCuts
from asr.decoding.latency_report import aligned_table
from asr.decoding.score import rate_name
from recipes import STAGES
from recipes.decoding import decodings, read_score
from recipes.engine import DONE_DIR, write_atomic

if TYPE_CHECKING:
    from recipes.stages import Recipe

PAGE, TEXT = "report.html", "report.md"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "h1{font-size:1.5em}h2{font-size:1.1em;margin-top:1.6em}code{overflow-wrap:anywhere}"
    "table{border-collapse:collapse}th,td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "th.l,td.l{text-align:left}"
)


class Table(NamedTuple):
    """The first row names the columns; the first ``left`` columns hold words, the others numbers."""

    title: str
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""


def run_report(recipe: Recipe) -> None:
    """Writes both files; what a stage has not left, or not in this form, is left out."""
    found = [table for table in (_audio(recipe), _rates(recipe), _exports(recipe), _stages(recipe)) if table.rows[1:]]
    about = _about(recipe)
    write_atomic(recipe.path(TEXT), _markdown(recipe.experiment.name, about, found))
    write_atomic(recipe.path(PAGE), _html(recipe.experiment.name, about, found, _links(recipe)))


def _about(recipe: Recipe) -> list[str]:
    """What was trained, on what, and by which command."""
    experiment = recipe.experiment
    with open(recipe.path("train/metrics.jsonl"), encoding="utf-8") as file:
        start = json.loads(file.readline())
    vocab_size = len(recipe.path("tokenizer/tokens.txt").read_text(encoding="utf-8").splitlines())
    return [
        f"preset {experiment.model.preset}, {start['parameters'] / 1e6:.1f}M parameters, {vocab_size} tokens "
        f"({experiment.tokenizer.kind}), loss {experiment.loss.method}, seed {experiment.seed}",
        f"{start['machine']}; device {start['device']}, processes {start['processes']}, threads "
        f"{start['threads']}, {start['precision']}, torch {start['torch']}",
        recipe.command,
    ]


def _audio(recipe: Recipe) -> Table:
    rows = [["set", "utterances", "hours"]]
    for split in recipe.options.splits:
        durations_s = PackedCuts.open(recipe.path(f"data/cuts_{split}.jsonl.gz")).durations_s
        rows.append([split, f"{len(durations_s):,}", f"{durations_s.sum() / 3600:.2f}"])
    return Table("Audio", rows)


def _rates(recipe: Recipe) -> Table:
    rows = [["set", "search", "chunk, ms", "error rate", "95% confidence"]]
    compared = set()
    for folder, decoding in decodings(recipe.experiment, recipe.chunks).items():
        for name in recipe.options.tests:
            found = read_score(recipe, folder, name)
            interval: Any = next((value for key, value in found.items() if key.endswith("interval")), {})
            bounds = [interval.get(side) for side in ("low", "high")]
            said = " to ".join("inf" if bound is None else f"{bound:.2%}" for bound in bounds)
            rows.append([name, decoding.search, str(decoding.chunk_ms), found["line"], said])
            compared.add(found.get("texts", "as they are"))
    return Table("Error rates", rows, left=2, note=f"Texts compared {'; '.join(sorted(compared))}.")


def _exports(recipe: Recipe) -> Table:
    rate = rate_name(recipe.experiment.training.errors_in)
    key = f"{rate.lower()}_percent"
    rows = [["export", "precision", "MB", "ms a chunk, median", "95%", f"{rate}, %", "PyTorch's, %", "verdict"]]
    for name in recipe.experiment.export.folders:
        path = recipe.path(f"verify/{name}/verify.json")
        for one in json.loads(path.read_text(encoding="utf-8"))["precisions"] if path.is_file() else []:
            if key not in one:  # of an earlier version
                continue
            numbers = [one["bytes"] / 1e6, one["step_ms_median"], one["step_ms_p95"]]
            rates = [one[key], one[f"eager_{key}"]]
            verdict = "holds" if one["ok"] else f"fails: {one['reason']}"
            rows.append([name, one["precision"], *(f"{x:.2f}" for x in (*numbers, *rates)), verdict])
    return Table("Exported files, in their runtimes", rows, left=2)


def _stages(recipe: Recipe) -> Table:
    rows = [["stage", "seconds", "audio, s", "finished"]]
    markers = (recipe.path(f"{DONE_DIR}/{name}.json") for name in STAGES)
    for marker in (json.loads(path.read_text(encoding="utf-8")) for path in markers if path.is_file()):
        audio = marker.get("audio_s")
        heard = "" if audio is None else f"{audio:.0f}"
        rows.append([marker["stage"], f"{marker['seconds']:.1f}", heard, str(marker.get("finished", ""))])
    note = "The last run of each; of a training that was interrupted, the part since it went on."
    return Table("Stages", rows, note=note)


def _links(recipe: Recipe) -> list[Path]:
    wanted = ["train/report.html", "data/preflight.html", "decode/wer-by-chunk.txt"]
    wanted += [f"decode/{folder}/errs-{name}.txt" for folder in decodings(recipe.experiment, recipe.chunks)
               for name in recipe.options.tests]  # fmt: skip
    wanted += [f"verify/{name}/verify.html" for name in recipe.experiment.export.folders]
    return [Path(name) for name in wanted if recipe.path(name).is_file()]


def _markdown(name: str, about: Sequence[str], tables: Sequence[Table]) -> str:
    *lines, command = about
    parts = [f"# {name}", "\n".join(f"{line}  " for line in lines), f"    {command}"]
    for table in tables:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in table.rows]
        parts += [f"## {table.title}", aligned_table(rows, rows[0][: table.left])]
        parts += [table.note] if table.note else []
    return "\n\n".join(parts) + "\n"


def _html(name: str, about: Sequence[str], tables: Sequence[Table], links: Sequence[Path]) -> str:
    *lines, command = about
    title = f"{escape(name)}: results"
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<p>{escape(line)}</p>" for line in lines),
        f"<p><code>{escape(command)}</code></p>",
    ]
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2><table>")
        for number, row in enumerate(table.rows):
            kind = "td" if number else "th"
            cells = (f"<{kind}{' class=l' * (i < table.left)}>{escape(cell)}</{kind}>" for i, cell in enumerate(row))
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</table>" + (f"<p>{escape(table.note)}</p>" if table.note else ""))
    parts.append("<h2>Files</h2><ul>")
    parts += [f'<li><a href="{escape(path.as_posix())}">{escape(path.as_posix())}</a></li>' for path in links]
    return "\n".join([*parts, "</ul></body></html>\n"])
