from __future__ import annotations

import json
import re

import pytest

from asr.cli.main import main
from asr.decoding.results import marked_errors, read_decoded, write_decoded, write_results
from asr.decoding.score import NO_WORD, Transcribed

RESULTS = [
    Transcribed("utt-2", "ONE TWO THREE", "ONE THREE THREE"),
    Transcribed("utt-1", "FOUR FIVE SIX SEVEN", "FOUR SIX SEVEN EIGHT"),
    Transcribed("utt-3", "ONE", ""),
]

RECOGS = """\
utt-1:\tref=['FOUR', 'FIVE', 'SIX', 'SEVEN']
utt-1:\thyp=['FOUR', 'SIX', 'SEVEN', 'EIGHT']
utt-2:\tref=['ONE', 'TWO', 'THREE']
utt-2:\thyp=['ONE', 'THREE', 'THREE']
utt-3:\tref=['ONE']
utt-3:\thyp=[]
"""

ERRS = """\
%WER = 50.00
Errors: 1 insertions, 2 deletions, 1 substitutions, over 8 reference words (5 correct)
Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, PER-WORD STATS:

PER-UTT DETAILS: corr or (ref->hyp)  \n\
utt-1:\tFOUR (FIVE->*) SIX SEVEN (*->EIGHT)
utt-2:\tONE (TWO->THREE) THREE
utt-3:\t(ONE->*)

SUBSTITUTIONS: count ref -> hyp
1   TWO -> THREE

DELETIONS: count ref
1   ONE
1   FIVE

INSERTIONS: count hyp
1   EIGHT

PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp
TWO   0 1 1 0
THREE   1 1 1 2
ONE   1 1 2 1
FIVE   0 1 1 0
EIGHT   0 1 0 1
SIX   1 0 1 1
SEVEN   1 0 1 1
FOUR   1 0 1 1
"""


def test_files_have_icefalls_form(tmp_path):
    out_dir = tmp_path / "decode" / "greedy"
    found = write_results(out_dir, "test", "greedy", RESULTS)
    assert found.wer_line == "%WER 50.00% [4 / 8, 1 ins, 2 del, 1 sub ]"
    assert (out_dir / "recogs-test.txt").read_text() == RECOGS
    assert (out_dir / "errs-test.txt").read_text() == ERRS
    summary = (out_dir / "wer-summary-test.txt").read_text()
    assert summary.startswith(f"settings\tWER\ngreedy\t50.0\n\n{found.wer_line}\n95% confidence interval of the WER [")
    described = json.loads((out_dir / "score-test.json").read_text())
    assert described["words"]["deletions"] == 2
    assert described["line"] == found.wer_line
    assert described["wer_95_percent_interval"]["low"] <= 0.5 <= described["wer_95_percent_interval"]["high"]


def test_texts_without_spaces_are_scored_in_characters(tmp_path):
    texts = [Transcribed("a", "今天天气好", "今天气号"), Transcribed("b", "你好", "你好")]
    found = write_results(tmp_path, "test", "greedy", texts, errors_in="characters")
    assert found.lines == (found.cer_line, found.interval_line, found.wer_line)
    assert found.cer_line == "%CER 28.57% [2 / 7, 0 ins, 1 del, 1 sub ]"
    # of two utterances a draw has none, one or both of the first: its rate is 0, 2 / 7 or 2 / 5
    assert (found.interval.low, found.interval.high) == (0.0, 0.4)
    assert found.interval_line.startswith("95% confidence interval of the CER [0.00%, 40.00%] (")
    lines = (tmp_path / "wer-summary-test.txt").read_text().splitlines()
    assert lines == ["settings\tCER", "greedy\t28.57", "", *found.lines, "texts compared as they are"]
    described = json.loads((tmp_path / "score-test.json").read_text())
    assert described["line"] == described["cer_line"] == found.cer_line
    assert described["cer_95_percent_interval"]["high"] == 0.4 and "wer_95_percent_interval" not in described
    assert "a:\tref=['今', '天', '天', '气', '好']" in (tmp_path / "recogs-test.txt").read_text()
    errs = (tmp_path / "errs-test.txt").read_text()
    assert errs.startswith("%CER = 28.57\n") and "over 7 reference characters (5 correct)" in errs
    assert "a:\t今 天 (天->*) 气 (好->号)" in errs


def test_what_was_decoded_is_scored_again_in_another_way(tmp_path, capsys):
    texts = [Transcribed("b", "Well, go.", "well GO"), Transcribed("a", "今天", "今天 x")]
    write_decoded(tmp_path, "test", texts)
    path = tmp_path / "decoded-test.jsonl"
    assert read_decoded(path) == texts[::-1]
    found = write_results(tmp_path, "test", "greedy", read_decoded(path))
    assert found.words.errors == 3
    settings = ["--set", "scoring.case=lower", "--set", "scoring.remove_punctuation=true"]
    assert main(["score", str(path), *settings, "--out-dir", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "texts compared all in lower case, without punctuation" in said
    assert said.splitlines()[-1] == "%WER 33.33% [1 / 3, 1 ins, 0 del, 0 sub ]"
    assert (tmp_path / "again" / "recogs-test.txt").read_text().splitlines()[2] == "b:\tref=['well', 'go']"
    assert json.loads((tmp_path / "again" / "score-test.json").read_text())["texts"].startswith("all in lower case")
    assert main(["score", str(path), "--characters"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("%CER ")


@pytest.mark.parametrize(("text", "words", "message"), [
    ('{"id": "a", "ref": "b"}\n', [], "decoded-test.jsonl:1: not a line with id, ref and hyp"),
    ('{"id": "a", "ref": "b", "hyp": "c"}\n{', [], "decoded-test.jsonl:2: not a line"),
    ('{"id": "a", "ref": "b", "hyp": null}\n', [], "decoded-test.jsonl:1: not a line with id, ref and hyp"),
    ("", [], "holds no utterances"),
    (None, [], "cannot read .*decoded-test.jsonl: No such file"),
    ("", ["--set", "model.preset=s"], r"'model.preset=s': only scoring.\* can be set here"),
    ("", ["--set", "scoring.case=title"], "scoring.case: title is not one of keep, lower, upper"),
])  # fmt: skip
def test_what_cannot_be_scored_is_told_in_one_line(tmp_path, capsys, text, words, message):
    path = tmp_path / "decoded-test.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["score", str(path), *words]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1


def test_files_of_one_name_do_not_replace_each_other(tmp_path, capsys):
    paths = [tmp_path / folder / "decoded-test.jsonl" for folder in ("greedy", "beam")]
    for path in paths:
        path.parent.mkdir()
        write_decoded(path.parent, "test", RESULTS)
    words = ["score", *map(str, paths)]
    assert main(words) == 0
    assert main([*words, "--out-dir", str(tmp_path / "out")]) == 2
    assert "has one place for" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_successive_errors_are_shown_together():
    pairs = [("A", "A"), ("B", "C"), ("D", NO_WORD), ("E", "E"), (NO_WORD, "F"), (NO_WORD, "G")]
    assert marked_errors(pairs) == "A (B D->C) E (*->F G)"
    assert marked_errors([]) == ""


def test_no_utterances_and_infinite_rates_are_written(tmp_path):
    assert write_results(tmp_path, "empty", "greedy", []).utterances == 0
    assert "over 0 reference words" in (tmp_path / "errs-empty.txt").read_text()
    write_results(tmp_path, "odd", "greedy", [Transcribed("a", "", "x")])
    described = json.loads((tmp_path / "score-odd.json").read_text())
    assert described["words"]["rate"] is None
    assert described["words"]["insertions"] == 1


def test_text_outside_ascii(tmp_path):
    write_results(tmp_path, "t", "greedy", [Transcribed("ü-1", "größer 猫", "größe 猫")])
    assert "ü-1:\t(größer->größe) 猫" in (tmp_path / "errs-t.txt").read_text(encoding="utf-8")
