"""Delays and errors of a set at several chunks: of a model with known emissions, and by the command of a real one."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from asr import checkpoint
from asr.cli.main import main
from asr.config import Experiment, load_experiment
from asr.data.features import num_feature_frames
from asr.data.tokenizer import Tokenizer
from asr.decoding.compute_time import chunk_compute_ms
from asr.decoding.decode_streams import decode_in_streams
from asr.decoding.latency import (
    ChunkLatency,
    LatencyReport,
    LatencyRun,
    label_checkpoints,
    measure_latency,
    parse_chunks,
)
from asr.decoding.latency_report import latency_figure, latency_table, latency_to_dict
from asr.decoding.score import ErrorCounts, score
from asr.decoding.search import DecodingConfig
from asr.decoding.token_delays import Spread
from asr.errors import UserError
from tests.asr.decoding.corpus import SYMBOLS, bursts, config, tokenizer, write_cuts
from tests.asr.decoding.scripted import ScriptedTransducer
from tests.asr.decoding.test_real_model import SETTINGS, make_model

A, B, C = 1, 2, 3
# by feature frames of the utterances of `cuts`: 0.3 s, 1.13 s and 0.72 s
SCRIPT = {67: [(A, 2), (B, 5)], 163: [(A, 4), (C, 10), (C, 16)], 131: [(B, 8)]}


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    """In the order of SCRIPT; tests choose what the references are."""
    written = list(write_cuts(tmp_path_factory.mktemp("audio"), ["ab", "c", "acc", "", "UNKNOWN"]))
    return CutSet.from_cuts(written[i] for i in (0, 2, 1))


def texts(cuts: CutSet, by_id: dict[str, str]) -> CutSet:
    return CutSet.from_cuts(
        replace(cut, supervisions=[replace(cut.supervisions[0], text=by_id[cut.id])]) for cut in cuts
    )


def decodings(*chunks: object) -> list[DecodingConfig]:
    return [DecodingConfig(chunk_ms=chunk) for chunk in chunks]


def frames_of(cuts: CutSet) -> list[int]:
    return [num_feature_frames(cut.num_samples, config().data.features) for cut in cuts]


def test_a_model_with_known_emissions(cuts):
    assert len(set(frames_of(cuts))) == 3
    model = ScriptedTransducer(dict(zip(frames_of(cuts), SCRIPT.values(), strict=True)), later={4: 2, 8: 1})
    named = texts(cuts, dict(zip([cut.id for cut in cuts], ["ab", "acc", "c"], strict=True)))
    rows, references = measure_latency(model, tokenizer(), named, config(), decodings(160, 320, "full"))
    assert {name: one.frames for name, one in references.items() if name != "utt-1"} == {
        cuts[0].id: [2, 5],
        cuts[1].id: [4, 10, 16],
    }
    assert [row.chunk_ms for row in rows] == [160, 320, "full"]
    for row in rows:
        assert (row.counts.errors, row.counts.ref_length) == (1, 3)
        assert row.emission.count == row.perceived.count == 5
        assert row.compute_ms == 0.0
    assert [row.emission.mean for row in rows] == [80.0, 40.0, 0.0]
    assert [row.emission.p90 for row in rows] == [80.0, 40.0, 0.0]
    ends = [1000 * cut.duration for cut in cuts]
    # at 160 ms the tokens come in frames 4, 7 | 6, 12, 18 of chunks that end at 320 | 320, 640, 800, and 37.5 ms
    waits = [min(357.5, ends[0]) - 80, min(357.5, ends[0]) - 200]
    waits += [min(357.5, ends[1]) - 160, min(677.5, ends[1]) - 400, min(837.5, ends[1]) - 640]
    assert rows[0].perceived.mean == pytest.approx(np.mean(waits))
    assert rows[0].perceived.p90 == pytest.approx(np.quantile(waits, 0.9))
    assert rows[2].perceived.mean == pytest.approx((2 * ends[0] - 40 * (2 + 5) + 3 * ends[1] - 40 * (4 + 10 + 16)) / 5)
    # of all three: what is heard in the third is wrong, but it is a text
    assert [row.first_partial.count for row in rows] == [3, 3, 3]


def test_a_model_that_emits_early_is_measured_by_the_first(cuts):
    script = dict(zip(frames_of(cuts), SCRIPT.values(), strict=True))
    named = texts(cuts, dict(zip([cut.id for cut in cuts], ["ab", "acc", "b"], strict=True)))
    plain, early = ScriptedTransducer(script), ScriptedTransducer(script, later={0: -1, 4: -1})
    _, references = measure_latency(plain, tokenizer(), named, config(), decodings(160))
    [row], same = measure_latency(early, tokenizer(), named, config(), decodings(160), references=references)
    assert same is references and (row.emission.mean, row.emission.count) == (-40.0, 6)
    [own], _ = measure_latency(early, tokenizer(), named, config(), decodings(160))
    assert own.emission.mean == 0.0


def test_references_that_cannot_be_aligned(cuts):
    model = ScriptedTransducer(dict(zip(frames_of(cuts), SCRIPT.values(), strict=True)))
    some = texts(cuts, dict(zip([cut.id for cut in cuts], ["ab", "UNKNOWN", ""], strict=True)))
    [row], references = measure_latency(model, tokenizer(), some, config(), decodings(160))
    assert set(references) == {cuts[0].id} and row.emission.count == 2
    assert (row.counts.errors, row.counts.ref_length) == (2, 2)  # scored all the same
    none = texts(cuts, dict.fromkeys((cut.id for cut in cuts), "UNKNOWN"))
    with pytest.raises(UserError, match="no reference can be aligned"):
        measure_latency(model, tokenizer(), none, config(), decodings(160))


@pytest.mark.parametrize("chunk_ms", [160, "full"])
def test_computing_is_measured(chunk_ms, monkeypatch):
    model, experiment = make_model(blank_bias=1.0), load_experiment(None, SETTINGS)
    decoding = DecodingConfig(chunk_ms=chunk_ms)
    sounds = [bursts(8000, seed=0), bursts(1000, seed=1)]  # the second is shorter than a chunk
    assert 0 < chunk_compute_ms(model, tokenizer(), experiment, decoding, sounds) < 5000
    # a clock that counts its readings: 1 s from each to the next
    readings = iter(range(10**6))
    monkeypatch.setattr("asr.decoding.compute_time.time.perf_counter", lambda: float(next(readings)))
    assert chunk_compute_ms(model, tokenizer(), experiment, decoding, sounds) == 1000.0


def test_the_first_time_does_not_count(monkeypatch):
    readings = iter([0.0, 100.0, 200.0, 201.0])
    monkeypatch.setattr("asr.decoding.compute_time.time.perf_counter", lambda: next(readings))
    experiment, sounds = load_experiment(None, SETTINGS), [bursts(4000, seed=0)]
    assert chunk_compute_ms(make_model(), tokenizer(), experiment, DecodingConfig(), sounds) == 1000.0


def test_computing_is_a_part_of_the_first_partial_time_only(cuts, monkeypatch):
    monkeypatch.setattr("asr.decoding.latency.chunk_compute_ms", lambda *_: 7.0)
    model = ScriptedTransducer(dict(zip(frames_of(cuts), SCRIPT.values(), strict=True)))
    named = texts(cuts, dict(zip([cut.id for cut in cuts], ["ab", "acc", "b"], strict=True)))
    [free], _ = measure_latency(model, tokenizer(), named, config(), decodings(160))
    [row], _ = measure_latency(model, tokenizer(), named, config(), decodings(160), recordings=[bursts(100, seed=0)])
    assert (free.compute_ms, row.compute_ms) == (0.0, 7.0)
    assert row.first_partial.mean == pytest.approx(free.first_partial.mean + 7.0)
    assert row.first_partial.p90 == pytest.approx(free.first_partial.p90 + 7.0)
    assert (row.emission, row.perceived) == (free.emission, free.perceived)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two models and of one with another tokenizer, recordings and their manifest."""
    folder = tmp_path_factory.mktemp("exp")
    (folder / "audio").mkdir()
    write_cuts(folder / "audio", ["ab c", "b", "", "a a a", "cab"]).to_file(folder / "cuts_test.jsonl.gz")
    write_cuts(folder / "audio", [""]).to_file(folder / "cuts_silent.jsonl.gz")
    experiment = load_experiment(None, SETTINGS)
    other = Tokenizer("char", [*SYMBOLS[:-2], "d", SYMBOLS[-1]])
    for name, bias, words in [("one", 0.5, tokenizer()), ("two", 1.0, tokenizer()), ("other", 0.5, other)]:
        payload = checkpoint.make_payload(make_model(blank_bias=bias).state_dict(), experiment, words, step=1, epoch=1)
        checkpoint.atomic_save(payload, folder / name / "train" / "average.pt")
    return folder


def command(folder: Path, *words: str) -> list[str]:
    options = ["--cuts", str(folder / "cuts_test.jsonl.gz"), "--device", "cpu"]
    return ["latency", "--checkpoint", str(folder / "one" / "train" / "average.pt"), *options, *words]


def test_the_command(folder, capsys):
    second = ["--checkpoint", str(folder / "two" / "train" / "average.pt"), "--label", "plain", "--label", "a|b"]
    assert main(command(folder, *second, "--chunks", "full,160", "--left-context-ms", "640")) == 0
    out = folder / "one" / "latency"
    shown = capsys.readouterr().out
    assert shown.startswith((out / "latency.md").read_text()) and str(out) in shown.splitlines()[-1]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and len({len(row) for row in rows}) == 1
    assert [row.split()[1] for row in rows[2:]] == ["plain", "plain", "a\\|b", "a\\|b"]
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    described = json.loads((out / "latency.json").read_text())
    assert described["utterances"] == 5 and described["aligned_utterances"] == 4
    assert described["aligned_by"] == "plain" and described["left_context_ms"] == 640
    # words are those of streams
    for run, name in zip(described["runs"], ["one", "two"], strict=True):
        loaded = checkpoint.load(folder / name / "train" / "average.pt", "cpu")
        settings = DecodingConfig(chunk_ms=160, left_context_ms=640)
        cuts = CutSet.from_file(folder / "cuts_test.jsonl.gz").to_eager()
        streamed = decode_in_streams(
            loaded.model, loaded.tokenizer, cuts, replace(loaded.config, decoding=settings), streams=3
        )
        by_chunk = {row["chunk_ms"]: row for row in run["chunks"]}
        assert list(by_chunk) == [160, "full"]
        assert by_chunk[160]["words"]["substitutions"] == score(streamed).words.substitutions
        assert by_chunk[160]["wer"] == pytest.approx(score(streamed).words.rate)
        first, sooner = by_chunk[160]["first_partial_ms"], by_chunk[160]["first_partial_algorithmic_ms"]
        assert first["mean"] - sooner["mean"] == pytest.approx(by_chunk[160]["compute_ms"])


def characters(experiment: Experiment) -> Experiment:
    return replace(experiment, training=replace(experiment.training, errors_in="characters"))


def test_texts_without_spaces_are_counted_in_characters(cuts, tmp_path):
    """Of 你好, 你吗吗 and 吗 the model hears all but the last, as 好."""
    words = Tokenizer("char", ["<blk>", "你", "好", "吗"])
    script = {67: [(1, 2), (2, 5)], 163: [(1, 4), (3, 10), (3, 16)], 131: [(2, 8)]}
    model = ScriptedTransducer(dict(zip(frames_of(cuts), script.values(), strict=True)))
    named = texts(cuts, dict(zip([cut.id for cut in cuts], ["你好", "你吗吗", "吗"], strict=True)))
    [row], _ = measure_latency(model, words, named, characters(config()), decodings(160))
    assert row.counts == ErrorCounts(0, 0, 1, 6)
    shown = LatencyReport([LatencyRun("one", Path("one.pt"), [row])], 3, 3, 6, 5120, "characters")
    table = latency_table(shown)
    assert "CER" in table and "WER" not in table and str(row.counts) in table
    described = latency_to_dict(shown, "cpu")
    assert described["errors_in"] == "characters"
    chunk = described["runs"][0]["chunks"][0]
    assert chunk["cer"] == pytest.approx(1 / 6) and chunk["characters"]["substitutions"] == 1
    assert "wer" not in chunk and "words" not in chunk
    assert latency_figure(shown).axes[0].get_ylabel() == "CER, %"


def test_checkpoints_that_count_in_different_units(folder, capsys, tmp_path):
    found = checkpoint.load(folder / "one" / "train" / "average.pt", "cpu")
    payload = checkpoint.make_payload(
        found.model.state_dict(), characters(found.config), found.tokenizer, step=1, epoch=1
    )
    checkpoint.atomic_save(payload, tmp_path / "two.pt")
    assert main(command(folder, "--checkpoint", str(tmp_path / "two.pt"), "--label", "one", "--label", "two")) == 2
    assert "one counts errors in words and two in characters" in capsys.readouterr().err
    alone = ["latency", "--checkpoint", str(tmp_path / "two.pt"), "--cuts", str(folder / "cuts_test.jsonl.gz")]
    assert main([*alone, "--device", "cpu", "--chunks", "160", "--out-dir", str(tmp_path / "out")]) == 0
    assert "| CER" in capsys.readouterr().out and "CER" in (tmp_path / "out" / "latency.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunks", "160,100"], "--chunks=100 must be a multiple of 40 ms"),
        (["--chunks", "160,fast"], "'fast' is no number of milliseconds"),
        (["--chunks", ""], "is no number of milliseconds"),
        (["--left-context-ms", "100"], "--left-context-ms=100 must be a multiple of 40 ms"),
        (["--label", "a", "--label", "b"], "2 --label for 1 --checkpoint"),
        (["--set", "decoding.chunk_ms=40"], "--chunks"),
        (["--checkpoint", "TWICE"], "stands for several checkpoints"),
        (["--checkpoint", "OTHER"], "different tokenizers"),
        (["--checkpoint", "absent.pt"], "absent.pt does not exist"),
        (["--cuts", "SILENT"], "no reference words"),
    ],
)
def test_wrong_options_are_one_line(folder, capsys, words, message):
    names = {"TWICE": "one/train/average.pt", "OTHER": "other/train/average.pt", "SILENT": "cuts_silent.jsonl.gz"}
    words = [str(folder / names[word]) if word in names else word for word in words]
    assert main(command(folder, *words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_chunks_and_labels():
    assert parse_chunks("full, 640,160,640") == [160, 640, "full"]
    train, other = Path("exp/a/train/average.pt"), Path("exp/b/train/average.pt")
    assert label_checkpoints([train, other], []) == ["a", "b"]
    assert label_checkpoints([train, train.with_name("best.pt")], []) == [str(train), str(train.with_name("best.pt"))]
    with pytest.raises(UserError, match="'x' stands for several"):
        label_checkpoints([train, other], ["x", "x"])


def report() -> LatencyReport:
    """The second model recognises nothing at its smaller chunk."""
    none, some = Spread.of([]), Spread(3, 40.0, 0.0, 80.0)
    words = ErrorCounts(0, 1, 0, 4)
    good = ChunkLatency("full", words, some, some, some, 2.0)
    bad = ChunkLatency(160, ErrorCounts(0, 4, 0, 4), none, none, none.later(1.0), 1.0)
    runs = [LatencyRun("$plain$", Path("a.pt"), [replace(good, chunk_ms=160), good])]
    runs.append(LatencyRun("fast$emit", Path("b.pt"), [bad, good]))
    return LatencyReport(runs, 3, 2, 5, 5120)


def test_what_does_not_exist_is_shown_as_such():
    rows = latency_table(report()).splitlines()
    assert "- / - / -" in rows[4] and "nan" not in "".join(rows)
    described = json.loads(json.dumps(latency_to_dict(report(), "cpu"), allow_nan=False))
    assert described["runs"][1]["chunks"][0]["emission_delay_ms"]["mean"] is None
    assert described["runs"][0]["chunks"][0]["emission_delay_ms"]["p90"] == 80.0


def test_figure_draws_without_pyplot():
    import matplotlib.pyplot

    figure = latency_figure(report())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=50)
    assert picture.getvalue().startswith(b"\x89PNG")
    for axes in figure.axes:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 1]
        assert all(math.isfinite(value) for line in axes.get_lines() for value in line.get_xdata())
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["$plain$", "fast$emit"]
    assert matplotlib.pyplot.get_fignums() == []
