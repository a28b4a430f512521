"""The files that others read: valid, and with the times and words of the segments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from asr.decoding.search import Hypothesis
from asr.decoding.subtitles import cues, srt, vtt
from asr.decoding.transcript import Segment, Transcript
from asr.decoding.transcript_files import TranscriptFiles, parse_formats, unique_names
from asr.decoding.words import Word
from asr.errors import UserError


def segment(text: str, start_s: float = 0.0, word_s: float = 0.5, pause_s: float = 0.1) -> Segment:
    """Words one after another."""
    step = word_s + pause_s
    words = [Word(w, start_s + i * step, start_s + i * step + word_s, 0.5) for i, w in enumerate(text.split())]
    end_s = words[-1].end_s if words else start_s
    return Segment(start_s, end_s, Hypothesis([1], [0], -1.0, [0.25, 1.0]), text, words)


LONG = Transcript(
    Path("talks/a talk.wav"),
    [segment("one <b> two --> three & four", 1.0), segment("five", 3599.9), segment("six", 363600.0)],
    363700.0,
)


def test_srt() -> None:
    assert srt(LONG) == (
        "1\n00:00:01,000 --> 00:00:06,100\none <b> two -> three & four\n\n"
        "2\n00:59:59,900 --> 01:00:01,400\nfive\n\n"
        "3\n101:00:00,000 --> 101:00:01,500\nsix\n"
    )
    assert srt(Transcript(Path("a"))) == ""


def test_vtt() -> None:
    assert vtt(LONG).startswith(
        "WEBVTT\n\n00:00:01.000 --> 00:00:06.100\none &lt;b&gt; two --&gt; three &amp; four\n\n00:59:59.900"
    )
    assert vtt(Transcript(Path("a"))) == "WEBVTT\n"


def test_cues_are_short_enough_and_do_not_overlap() -> None:
    text = " ".join(f"word{i}" * (1 + i % 3) for i in range(60))
    long_word = "x" * 100
    parts = [segment(text, 2.0, 0.2, 0.0), segment(long_word, 14.5), segment("a b", 15.0, 0.1, 3.0)]
    found = cues(parts)
    assert " ".join(line for cue in found[:-4] for line in cue.lines) == text
    for cue in found:
        assert 1 <= len(cue.lines) <= 2 and all(0 < len(line) <= 42 for line in cue.lines)
        assert cue.start_s < cue.end_s <= cue.start_s + 8.5
    for one, other in zip(found, found[1:], strict=False):
        assert one.end_s <= other.start_s
    assert "".join(line for cue in found[-4:-2] for line in cue.lines) == long_word
    assert [cue.lines for cue in found[-2:]] == [["a"], ["b"]]  # apart by a pause
    # cut at the time of a word
    assert all(any(cue.start_s == pytest.approx(word.start_s) for word in parts[0].words) for cue in found[:4])


def test_every_format_is_written(tmp_path: Path) -> None:
    paths = [tmp_path / "x.wav", LONG.path, tmp_path / "y.wav"]
    files = TranscriptFiles(tmp_path / "out" / "deep", parse_formats("txt, json,srt,VTT,ctm"), paths)
    files.write(Transcript(paths[0], error="broken"))
    files.write(LONG)
    files.write(Transcript(paths[2], [], 2.0))
    out = tmp_path / "out" / "deep"
    names = {f"{stem}.{kind}" for stem in ("a talk", "y") for kind in ("txt", "json", "srt", "vtt", "ctm")}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "a talk.txt").read_text() == "one <b> two --> three & four\nfive\nsix\n"
    assert (out / "a talk.ctm").read_text().splitlines()[:2] == [
        "a_talk 1 1.00 0.50 one 0.5000",
        "a_talk 1 1.60 0.50 <b> 0.5000",
    ]
    found = json.loads((out / "a talk.json").read_text())
    assert found["file"] == "talks/a talk.wav" and found["duration_s"] == 363700.0 and found["text"] == LONG.text
    assert found["segments"][1] == {
        "start_s": 3599.9,
        "end_s": 3600.4,
        "text": "five",
        "confidence": 0.5,
        "words": [{"text": "five", "start_s": 3599.9, "end_s": 3600.4, "confidence": 0.5}],
    }
    assert (out / "y.txt").read_text() == "" and json.loads((out / "y.json").read_text())["segments"] == []


def test_no_two_files_have_one_name() -> None:
    paths = [Path(p) for p in ("a/x.wav", "b/x.wav", "c/x.wav", "d/X.wav", "x.flac", "y.wav", "x-2.wav", "x.wav.mp3")]
    names = unique_names(paths)
    assert names[:2] == ["x", "x.wav"] and names[5] == "y"
    assert len({name.casefold() for name in names}) == len(paths)


def test_wrong_formats_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format docx; valid: txt, json, srt, vtt, ctm"):
        parse_formats("txt,docx")
    with pytest.raises(UserError, match="no format"):
        parse_formats(" ,")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"--out-dir {tmp_path / 'file' / 'out'} cannot be written")):
        TranscriptFiles(tmp_path / "file" / "out", ["txt"], [])
