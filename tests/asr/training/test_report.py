"""The training report: what it shows, what it survives, and that text from outside stays text."""

from __future__ import annotations

import gzip
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from asr.decoding.normalise import ScoringConfig
from asr.decoding.results import write_results
from asr.decoding.score import Transcribed
from asr.training.report import MAX_BYTES, ReportExtra, write_report
from asr.training.report_charts import (
    Chart,
    Series,
    histogram,
    line_chart,
    linear_ticks,
    log_ticks,
    short,
    smooth,
    thin,
)
from asr.training.report_data import read_durations, read_metrics

EVIL = '<script>document.title="pwned"</script>'


def train_record(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "epoch": step // 100, "batch": step % 100, "time_s": 0.5 * step, "loss": loss,
        "transducer_loss": loss, "ctc_loss": None, "lr": 1e-3, "grad_norm": 2.0, "batch_seconds": 0.4, "batch_size": 8,
        "audio_s_per_s": 300.0, "data_wait_fraction": 0.02,
    } | more  # fmt: skip


def valid_record(step: int, wer: float | None = 0.1) -> dict[str, Any]:
    return {"kind": "valid", "step": step, "epoch": 0, "time_s": 0.5 * step, "loss": 2.0, "wer": wer, "errors": 10,
            "words": 100}  # fmt: skip


START = {"kind": "start", "command": "asr train --config a.yaml", "parameters": 2_043_921, "device": "cpu",
         "torch": "2.13.0"}  # fmt: skip
END = {"kind": "end", "step": 300, "reason": "max_epochs reached", "time_s": 150.0}


def write_metrics(train_dir: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    train_dir.mkdir(parents=True, exist_ok=True)
    path = train_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def write_durations(exp_dir: Path, cuts: list[dict[str, Any]]) -> None:
    (exp_dir / "data").mkdir(parents=True, exist_ok=True)
    with gzip.open(exp_dir / "data" / "cuts_train.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(c) + "\n" for c in cuts)


@pytest.fixture
def exp_dir(tmp_path: Path) -> Path:
    """An experiment that has all its parts."""
    records = [START, *(train_record(s, 10 / s) for s in range(1, 301)), valid_record(100), valid_record(300, 0.05)]
    reason = f"loss is not finite {EVIL}"
    records.append({"kind": "bad_batch", "step": 200, "reason": reason, "cut_ids": ["utt-1", EVIL]})
    write_metrics(tmp_path / "train", [*records, END])
    config = f"name: demo\nseed: 7\ncomment: '{EVIL}'\ndecoding:\n  search: beam\n"
    (tmp_path / "train" / "config.yaml").write_text(config)
    write_durations(tmp_path, [{"id": str(i), "duration": 1 + i / 10} for i in range(30)])
    texts = [Transcribed("utt-a", "one two three", "one too three four"), Transcribed("utt-b", "five six", "six"),
             Transcribed(EVIL, f"{EVIL} x", "x"), Transcribed("utt-c", "seven", "seven")]  # fmt: skip
    write_results(tmp_path / "decode" / "greedy", "test", "max_symbols_per_frame=1", texts[:2])
    write_results(tmp_path / "decode" / "beam", "test", "beam=4", texts)
    series = [{"symbol": "<blk>", "posterior": [1.0, 0.2, 1.0]}, {"symbol": "▁one", "posterior": [0.0, 0.8, 0.0]}]
    emissions = {"utterances": [{"cut_id": "utt-a", "text": "one", "frame_shift_s": 0.04, "series": series}]}
    (tmp_path / "decode" / "greedy" / "emissions-test.json").write_text(json.dumps(emissions))
    return tmp_path


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of style and script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.words.append(data)

    def charts(self) -> dict[str, dict[str, Any]]:
        found = {}
        for tag, attrs in self.elements:
            if tag == "figure" and attrs.get("data-chart"):
                chart = json.loads(attrs["data-chart"] or "")
                found["+".join(s["name"] for s in chart["s"])] = chart
        return found


def page_of(exp_dir: Path, **extra: Any) -> Page:
    path = write_report(exp_dir / "train", extra=ReportExtra(**extra))
    assert path == exp_dir / "train" / "report.html"
    assert path.stat().st_size <= MAX_BYTES
    return Page(path.read_text(encoding="utf-8"))


def test_shows_every_part(exp_dir: Path) -> None:
    page = page_of(exp_dir)
    for words in ("demo", "max_epochs reached", "asr train --config a.yaml", "2,043,921", "2.13.0", "utt-a", "%WER",
                  "loss is not finite", "Learning rate", "Gradient norm", "Throughput", "waiting for data", "5.00%",
                  "Durations of the training cuts", "30 cuts, 1.00 to 3.90 s", "95% interval", "beam=4"):  # fmt: skip
        assert words in page.text, words
    charts = page.charts()
    assert set(charts) >= {"training+validation", "validation", "learning rate", "gradient norm", "cuts", "<blk>+▁one"}
    loss, valid = charts["training+validation"]["s"]
    assert (valid["x"], valid["y"]) == ([100, 300], [2, 2])
    assert charts["validation"]["s"][0]["y"] == [10, 5]
    assert sum(charts["cuts"]["s"][0]["y"]) == 30


def test_tile_names_the_configured_search(exp_dir: Path) -> None:
    assert "WER on test 50.00% beam, 4 of 8 words" in page_of(exp_dir).text
    (exp_dir / "train" / "config.yaml").write_text("decoding: {search: greedy}\n")
    assert "WER on test 60.00% greedy, 3 of 5 words" in page_of(exp_dir).text


def test_results_in_characters_are_shown_as_such(tmp_path: Path) -> None:
    train_dir = tmp_path / "train"
    train_dir.mkdir()
    (train_dir / "config.yaml").write_text("training: {errors_in: characters}\ndecoding: {search: greedy}\n")
    valid = {"kind": "valid", "step": 1, "loss": 1.0, "wer": 0.5, "errors": 2, "words": 4}
    (train_dir / "metrics.jsonl").write_text(json.dumps(valid) + "\n")
    texts = [Transcribed("a", "今天天气好", "今天气号"), Transcribed("b", "你好", "你好")]
    write_results(tmp_path / "decode" / "greedy", "test", "", texts, errors_in="characters")
    page = write_report(train_dir).read_text()
    assert "CER on test" in page and "2 of 7 characters; 95% CI 0.00 to 40.00%" in page
    assert "Best validation CER" in page and "Character error rate" in page
    assert "<th>CER</th><th>Errors</th><th>Characters</th>" in page and "2 errors in 5 characters" in page
    assert "WER" not in page.split("<body>")[1]


def test_what_was_done_to_texts_stands_beside_their_rate(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text("")
    texts = [Transcribed("a", "Yes", "yes")]
    write_results(tmp_path / "decode" / "greedy", "test", "greedy", texts)
    assert "greedy greedy test 100.00%" not in (said := page_of(tmp_path).text) and "greedy test 100.00%" in said
    write_results(tmp_path / "decode" / "beam", "test", "beam=4", texts, scoring=ScoringConfig(case="lower"))
    assert "beam beam=4, texts all in lower case test 0.00%" in page_of(tmp_path).text


def test_worst_utterances_are_aligned(exp_dir: Path) -> None:
    page = page_of(exp_dir)
    kinds = [a["class"] for t, a in page.elements if t == "div" and (a.get("class") or "").startswith("w ")]
    assert sorted(kinds) == ["w del"] * 2 + ["w ins"] + ["w sub"]
    assert "ref hyp one one two too three three ∗ four" in page.text


def test_text_from_outside_stays_text(exp_dir: Path) -> None:
    page = page_of(exp_dir, title=EVIL)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.text.count(EVIL) >= 5  # heading, bad batch (reason, id), config, worst utterance


def test_nothing_is_loaded_from_outside(exp_dir: Path) -> None:
    page = page_of(exp_dir)
    for tag, attrs in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    policy = next(a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy.split("script-src")[1]


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    page = page_of(tmp_path)
    assert "nothing trained yet" in page.text and "No values were recorded." in page.text


def test_empty_files_give_a_page(tmp_path: Path) -> None:
    write_metrics(tmp_path / "train", [])
    (tmp_path / "train" / "config.yaml").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cuts_train.jsonl.gz").write_bytes(b"")
    (tmp_path / "decode" / "greedy").mkdir(parents=True)
    (tmp_path / "decode" / "greedy" / "score-test.json").write_text("{")
    (tmp_path / "decode" / "greedy" / "recogs-test.txt").write_text("a:\tref=['x'")
    (tmp_path / "decode" / "greedy" / "emissions-test.json").write_text('{"utterances": [')
    assert "nothing trained yet" in page_of(tmp_path).text


def test_a_line_cut_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    tail = '{"kind": "train", "step": 3, "lo'
    path = write_metrics(tmp_path / "train", [START, train_record(1), train_record(2)], tail)
    metrics = read_metrics(path)
    assert [r["step"] for r in metrics.train] == [1, 2] and metrics.unreadable_lines == 1
    assert "1 line of metrics.jsonl could not be read" in page_of(tmp_path).text


def test_bytes_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "train", [train_record(1)])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n" + json.dumps(train_record(2)).encode() + b"\n[1]\n")
    metrics = read_metrics(path)
    assert [r["step"] for r in metrics.train] == [1, 2] and metrics.unreadable_lines == 2


def test_non_finite_losses_leave_a_gap(tmp_path: Path) -> None:
    losses = [3.0, math.nan, 2.0, math.inf, 1.5]
    write_metrics(tmp_path / "train", [train_record(i + 1, x) for i, x in enumerate(losses)])
    page = page_of(tmp_path)
    loss = page.charts()["training+validation"]["s"][0]
    assert loss["y"] == [3, None, 2, None, 1.5]
    assert "2 steps with a bad batch or a loss that is not finite" in page.text


def test_only_non_finite_values(tmp_path: Path) -> None:
    write_metrics(tmp_path / "train", [train_record(1, math.nan, grad_norm=math.nan, lr=0.0), valid_record(1, None)])
    assert "No values were recorded." in page_of(tmp_path).text


@pytest.mark.parametrize("announced", [True, False])
def test_after_a_resume_the_later_record_wins(tmp_path: Path, announced: bool) -> None:
    first = [START, *(train_record(s, 1.0) for s in range(1, 151)), valid_record(120, 0.9)]
    first.append({"kind": "bad_batch", "step": 140, "reason": "lost", "cut_ids": []})
    second = [START] if announced else []
    second += [train_record(s, 2.0, time_s=0.4 * s) for s in range(101, 131)]
    metrics = read_metrics(write_metrics(tmp_path / "train", first + second))
    assert [r["step"] for r in metrics.train] == list(range(1, 131))
    assert {r["loss"] for r in metrics.train[100:]} == {2.0}
    assert metrics.valid == [] and metrics.bad_batches == []
    assert metrics.resumed_at == [101]
    assert metrics.time_s == pytest.approx(0.4 * 130)


def test_a_resume_that_begins_with_a_bad_batch_keeps_it(tmp_path: Path) -> None:
    bad = {"kind": "bad_batch", "step": 101, "reason": "loss", "cut_ids": ["a"]}
    lost = [START, *(train_record(s) for s in range(1, 101)), bad, train_record(101)]
    metrics = read_metrics(write_metrics(tmp_path / "train", [*lost, START, bad, train_record(101), train_record(102)]))
    assert metrics.bad_batches == [bad] and [r["step"] for r in metrics.train] == list(range(1, 103))


def test_an_end_counts_only_for_the_last_run(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "train", [START, train_record(1), END, START, train_record(2)])
    assert read_metrics(path).end is None


@pytest.mark.parametrize(("column", "name"), [("simple_loss", "simple"), ("ctc_loss", "CTC")])
def test_parts_of_the_loss_are_drawn_where_there_are_any(tmp_path: Path, column: str, name: str) -> None:
    title = "Parts of the training loss"
    for records in ([train_record(s) for s in (1, 2)], [train_record(s, **{column: 2.5}) for s in (1, 2)]):
        write_metrics(tmp_path / "train", [START, *records, END])
        write_report(tmp_path / "train")
        page = Page((tmp_path / "train" / "report.html").read_text())
        expected = records[0].get(column) is not None
        assert (title in page.text) == (f"transducer+{name}" in page.charts()) == expected


def test_a_long_run_stays_below_the_limit(tmp_path: Path) -> None:
    draw = random.Random(0)
    noisy = ("grad_norm", "ctc_loss", "lr", "audio_s_per_s", "data_wait_fraction")
    records = [train_record(s, draw.random(), **{k: draw.random() for k in noisy}) for s in range(1, 20_001)]
    records[12_344]["grad_norm"] = 1e6
    bad = [{"kind": "bad_batch", "step": s, "reason": "r" * 5000, "cut_ids": ["i" * 500] * 500} for s in range(1, 200)]
    write_metrics(tmp_path / "train", [START | {"command": "x " * 100_000}, *records, *bad])
    (tmp_path / "train" / "config.yaml").write_text("a: b\n" * 100_000)
    (tmp_path / "train" / "plot.png").write_bytes(b"\x89PNG" + b"\0" * 3_000_000)
    long = [Transcribed("u" * 5000 + str(i), "w" * 5000 + " w" * 400, "v " * 500) for i in range(12)]
    write_results(tmp_path / "decode" / "greedy", "test", "", long)
    page = page_of(tmp_path)
    assert "Left out, because it has 3,000 kB" in page.text
    assert page.charts()["gradient norm"]["yh"] >= 1e6  # the spike is still on the page


def test_the_report_is_replaced_in_one_step(exp_dir: Path) -> None:
    old = write_report(exp_dir / "train")
    before = old.stat().st_ino
    write_report(exp_dir / "train")
    assert old.stat().st_ino != before
    assert [p.name for p in (exp_dir / "train").glob("report*")] == ["report.html"]


def test_pictures_are_embedded(exp_dir: Path) -> None:
    (exp_dir / "decode" / "greedy" / "emission_posteriors.png").write_bytes(b"\x89PNG\r\n")
    (exp_dir / "decode" / "greedy" / "emissions-test-1.png").write_bytes(b"\x89PNG\r\n")  # drawn from the JSON file
    page = page_of(exp_dir)
    assert [a["src"] for t, a in page.elements if t == "img"] == ["data:image/png;base64,iVBORw0K"]
    assert "Emission posteriors (greedy)" in page.text


def test_durations_of_mixed_cuts(tmp_path: Path) -> None:
    mixed = {"id": "m", "tracks": [{"cut": {"duration": 2.0}}, {"cut": {"duration": 3.0}, "offset": 1.5}]}
    write_durations(tmp_path, [{"id": "a", "duration": 1.25}, mixed])
    assert read_durations(tmp_path) == [1.25, 4.5]


def test_thin_keeps_ends_spikes_and_gaps() -> None:
    y = [math.sin(i / 50) for i in range(10_000)]
    y[5_000], y[7_777] = 99.0, math.nan
    x, kept = thin(list(range(10_000)), y, 600)
    assert len(x) <= 600 and x == sorted(x) and x[0] == 0 and x[-1] == 9_999
    assert 99.0 in kept and any(math.isnan(v) for v in kept)
    assert thin([1, 2], [3, 4], 600) == ([1, 2], [3, 4])


def test_smooth_is_unbiased_at_the_start_and_passes_over_gaps() -> None:
    assert smooth([2.0, math.nan, 2.0, 2.0], 10) == pytest.approx([2.0] * 4)
    assert math.isnan(smooth([math.nan, 1.0], 10)[0])


def test_ticks_are_round_and_few() -> None:
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(0.3, 120) == pytest.approx([0.3, 1, 3, 10, 30, 100])
    for low, high in [(1e-9, 1e9), (0.99, 1.01), (5, 7), (1e-3, 1)]:
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and all(low * 0.99 <= t <= high * 1.01 for t in ticks)


NUMBERS = [(0, "0"), (1234567, "1,234,567"), (0.00012345, "0.0001234"), (3e-7, "3e-7"), (12.3456, "12.35"),
           (math.nan, "–"), (2.5e8, "2.5e8")]  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), NUMBERS)
def test_short(value: float, shown: str) -> None:
    assert short(value) == shown


VALUES = [[2.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1e6], [-3.0, 5.0], [0.1 * i for i in range(99)]]


@pytest.mark.parametrize("values", VALUES)
def test_histogram_counts_every_value(values: list[float]) -> None:
    page = Page(histogram("t", values, "seconds"))
    assert sum(page.charts()["cuts"]["s"][0]["y"]) == len(values)


@pytest.mark.parametrize("y", [[1.0], [0.0, 0.0], [5.0, 5.0, 5.0], [-1.0, 1.0]])
def test_line_chart_of_flat_and_single_values(y: list[float]) -> None:
    page = Page(line_chart(Chart("t", [Series("a", list(range(len(y))), y)]), 100))
    path = next(a["d"] or "" for t, a in page.elements if t == "path" and "s0" in (a.get("class") or ""))
    assert "nan" not in path and "inf" not in path
