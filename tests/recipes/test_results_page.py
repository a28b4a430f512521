from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from asr.config import load_experiment
from asr.export.report import write_report
from asr.export.verify import PrecisionReport, Report
from recipes.results_page import _exports, _html, _markdown

MANIFEST = {
    "target": "onnx",
    "chunk_ms": 320,
    "parameters": 10,
    "vocab_size": 4,
    "checkpoint": "average.pt",
    "checkpoint_sha256": "0" * 64,
    "versions": {},
}


def proof(precision: str, reason: str, errors: float) -> PrecisionReport:
    return PrecisionReport(
        precision, not reason, reason, "onnx", "1", 2_500_000, 9, "", errors, 1.25, {}, [], [],
        0.1, 1.0, 2.0, 3.0, 4.0, 7.5, 8.25, 0.01,
    )  # fmt: skip


def test_exported_files_are_listed_with_what_their_runtimes_said(tmp_path: Path) -> None:
    experiment = load_experiment(None, ["export.targets=[onnx]", "export.chunk_ms=[320,640,full]"])
    recipe = cast(Any, SimpleNamespace(experiment=experiment, path=lambda name: tmp_path / name))
    assert len(_exports(recipe).rows) == 1
    found = [proof("fp32", "", 1.25), proof("int8", "errors rise <by> 3|4", 4.25)]
    write_report(Report("", MANIFEST, 10.0, 1, precisions=found), tmp_path / "verify" / "onnx-320ms")
    write_report(Report("", MANIFEST, 10.0, 1, precisions=found), tmp_path / "verify" / "of-an-earlier-run")
    old = tmp_path / "verify" / "onnx-640ms" / "verify.json"
    old.parent.mkdir()
    old.write_text(json.dumps({"precisions": [{"precision": "fp32", "rate": 1.0}]}))
    table = _exports(recipe)
    assert table.rows[0][5] == "WER, %"
    assert table.rows[1:] == [
        ["onnx-320ms", "fp32", "2.50", "7.50", "8.25", "1.25", "1.25", "holds"],
        ["onnx-320ms", "int8", "2.50", "7.50", "8.25", "4.25", "1.25", "fails: errors rise <by> 3|4"],
    ]
    about = ["preset xs", "egs/a/run.sh --set 'b=<c>'"]
    text, page = _markdown("a", about, [table]), _html("a", about, [table], [Path("train/report.html")])
    assert "| onnx-320ms | fp32      | 2.50 |" in text and "    egs/a/run.sh --set 'b=<c>'" in text
    assert r"fails: errors rise <by> 3\|4 |" in text
    assert "<td class=l>onnx-320ms</td><td class=l>fp32</td><td>2.50</td>" in page
    assert "errors rise &lt;by&gt; 3|4" in page and 'href="train/report.html"' in page
