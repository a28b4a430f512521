from __future__ import annotations

import pytest
from lhotse import CutSet, RecordingSet

from asr.cli.main import main
from asr.decoding import DecodingConfig
from asr.decoding.decode import decode_and_score, decode_cuts, read_cuts, setting_name
from asr.decoding.emission import worst_cuts, write_emissions
from asr.errors import UserError
from tests.asr.decoding.corpus import config, tokenizer, write_cuts
from tests.asr.decoding.fake import TinyTransducer

TEXTS = ["ab c", "b", "UNKNOWN WORDS", "", "a a a", "cab"]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return write_cuts(tmp_path_factory.mktemp("audio"), TEXTS)


@pytest.mark.parametrize("search", ["greedy", "modified_beam_search"])
def test_every_cut_once_whatever_the_batches(cuts, search):
    model = TinyTransducer(seed=5, blank_bias=0.5)
    together = decode_cuts(model, tokenizer(), cuts, config(search=search))
    assert [result.cut_id for result in together] == [f"utt-{i}" for i in range(6)]
    assert [result.ref for result in together] == TEXTS
    assert sum(len(result.hypothesis.tokens) for result in together) > 10
    alone = decode_cuts(model, tokenizer(), cuts, config(search=search, batch_duration_s=0.2))
    for one, other in zip(together, alone, strict=True):
        assert one.hyp == other.hyp == tokenizer().decode(one.hypothesis.tokens)
        assert one.hypothesis.frames == other.hypothesis.frames
        assert one.hypothesis.score == pytest.approx(other.hypothesis.score, abs=1e-9)


def test_model_keeps_its_mode(cuts):
    model = TinyTransducer()
    model.train()
    decode_cuts(model, tokenizer(), cuts, config())
    assert model.training


def test_files_and_report(cuts, tmp_path):
    out_dir = tmp_path / "decode" / "greedy"
    model = TinyTransducer(seed=5, blank_bias=0.5)
    report = decode_and_score(model, tokenizer(), cuts, config(), out_dir=out_dir, name="valid")
    assert {path.name for path in out_dir.iterdir()} == {
        "recogs-valid.txt",
        "errs-valid.txt",
        "wer-summary-valid.txt",
        "score-valid.json",
        "decoded-valid.jsonl",
    }
    assert report.score.words.ref_length == sum(len(text.split()) for text in TEXTS)
    assert report.audio_s == pytest.approx(sum(cut.duration for cut in cuts))
    assert "6 utterances" in report.speed_line
    without_files = decode_and_score(model, tokenizer(), cuts, config())
    assert without_files.score == report.score


def test_emissions_of_the_worst_cuts(cuts, tmp_path):
    model, setting = TinyTransducer(seed=0), config()
    results = decode_cuts(model, tokenizer(), cuts, setting)
    chosen = worst_cuts(cuts, results, 4)
    assert len(chosen) == 4
    spelt = [cut.id for cut in cuts if cut.id != "utt-2"]  # the tokenizer cannot spell that reference
    found = write_emissions(tmp_path, "test", model, tokenizer(), list(cuts), setting)
    assert [one.cut_id for one in found] == spelt
    assert len(list(tmp_path.glob("emissions-test-*.png"))) == 5
    assert (tmp_path / "emissions-test.json").stat().st_size > 100


def test_setting_names():
    assert setting_name(DecodingConfig()) == "greedy-max-symbols-1"
    assert setting_name(DecodingConfig(search="modified_beam_search", beam=8)) == "modified_beam_search-beam-8"
    chunked = DecodingConfig(chunk_ms=320, left_context_ms=640)
    assert setting_name(chunked) == "greedy-max-symbols-1-chunk-320-left-640"


def test_read_cuts(cuts, tmp_path):
    path = tmp_path / "cuts_test.jsonl.gz"
    cuts.to_file(path)
    assert [cut.id for cut in read_cuts(path)] == [cut.id for cut in cuts]


def test_manifests_that_cannot_be_used(cuts, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_cuts(tmp_path / "absent.jsonl.gz")
    (tmp_path / "text.jsonl").write_text("this is not JSON\n")
    with pytest.raises(UserError, match="text.jsonl:1: this is not a cut"):
        read_cuts(tmp_path / "text.jsonl")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(UserError, match="broken.jsonl.gz:1: the manifest cannot be read"):
        read_cuts(tmp_path / "broken.jsonl.gz")
    (tmp_path / "text.yaml").write_text("- 3\n")
    with pytest.raises(UserError, match="no readable cut manifest"):
        read_cuts(tmp_path / "text.yaml")
    RecordingSet.from_recordings(cut.recording for cut in cuts).to_file(tmp_path / "recordings.jsonl")
    with pytest.raises(UserError, match="Recording"):
        read_cuts(tmp_path / "recordings.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl holds no cuts"):
        read_cuts(tmp_path / "empty.jsonl")
    cuts.to_file(tmp_path / "wrong.jsonl")
    with open(tmp_path / "wrong.jsonl", "a") as file:
        file.write('{"type": "MonoCut", "id": "x", "colour": "red"}\n')
    with pytest.raises(UserError, match=r"wrong.jsonl:7: this is not a cut .*colour"):
        read_cuts(tmp_path / "wrong.jsonl")


@pytest.mark.parametrize("texts", [["", "  "], [None, None]])
def test_cuts_without_any_reference_word_are_refused(tmp_path, texts, capsys):
    path = tmp_path / "cuts_test.jsonl.gz"
    without = write_cuts(tmp_path, texts)
    if texts[0] is None:
        without = CutSet.from_cuts(cut.drop_supervisions() for cut in without)
    without.to_file(path)
    assert main(["decode", "--checkpoint", str(tmp_path / "absent.pt"), "--cuts", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"no reference words in {path}" in error and "asr transcribe" in error and error.count("\n") == 1


def test_some_cuts_may_lack_a_reference(tmp_path):
    path = tmp_path / "cuts_test.jsonl.gz"
    write_cuts(tmp_path, ["", "a"]).to_file(path)
    assert len(read_cuts(path)) == 2
