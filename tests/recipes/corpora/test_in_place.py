"""LibriSpeech and AISHELL in their official layouts: cuts name the files where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from lhotse import CutSet
from lhotse.recipes.librispeech import prepare_librispeech

from asr.errors import UserError
from recipes.corpora import Prepared, aishell, librispeech
from tests.recipes.corpora.makers import make_aishell, make_librispeech, write_16khz

HUNDRED = librispeech.Options(subset="100h")


def texts(cuts: CutSet) -> dict[str, tuple[str, str]]:
    return {cut.id: (cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in cuts}


@pytest.fixture
def english(tmp_path: Path) -> Path:
    return make_librispeech(tmp_path / "en", HUNDRED.archives)


@pytest.fixture
def mandarin(tmp_path: Path) -> Path:
    return make_aishell(tmp_path / "zh")


def prepare_english(folder: Path, data: Path, options: librispeech.Options = HUNDRED) -> Prepared:
    return librispeech.prepare(folder, data, seed=0, options=options)


def test_librispeech_is_that_of_lhotse(english: Path, tmp_path: Path) -> None:
    prepared = prepare_english(english, tmp_path / "data")
    assert prepared.counts == {"train": 4, "valid": 8, "test-clean": 4, "test-other": 4} and not prepared.bad_rows
    reference = prepare_librispeech(english / "LibriSpeech")
    sets = {"train": ["train-clean-100"], "valid": ["dev-clean", "dev-other"], "test-other": ["test-other"]}
    for split, parts in sets.items():
        cuts = prepared.load(split)
        supervisions = {s.id: (s.text, s.speaker) for part in parts for s in reference[part]["supervisions"]}
        assert texts(cuts) == supervisions
        lengths = {r.id: r.num_samples for part in parts for r in reference[part]["recordings"]}
        assert {cut.id: cut.num_samples for cut in cuts} == lengths
        assert all(cut.load_audio().shape == (1, cut.num_samples) for cut in cuts)
    assert not list((tmp_path / "data" / "audio").rglob("*.*")), "nothing is copied"


def test_checksums_are_of_samples_and_texts(english: Path, tmp_path: Path) -> None:
    before = prepare_english(english, tmp_path / "a").checksums
    moved = Path(shutil.copytree(english, tmp_path / "elsewhere"))
    assert prepare_english(moved / "LibriSpeech", tmp_path / "b").checksums == before
    write_16khz(moved / "LibriSpeech/test-other/41/77/41-77-0000.flac", seed=5)
    after = prepare_english(moved, tmp_path / "c").checksums
    assert {split for split in after if after[split] != before[split]} == {"test-other"}


def test_rows_that_cannot_be_used(english: Path, tmp_path: Path) -> None:
    chapter = english / "LibriSpeech/train-clean-100/1/77"
    (chapter / "1-77-0000.flac").unlink()
    write_16khz(chapter / "1-77-0002.flac", rate_hz=8000)
    (chapter / "1-77-0003.flac").write_text("no audio")
    write_16khz(chapter / "1-77-0004.flac")
    with open(chapter / "1-77.trans.txt", "a", encoding="utf-8") as file:
        write_16khz(chapter / "1-77-0009.flac")
        file.write("1-77-0002 A\n1-77-0003 B\n1-77-0004\nnotes of mine\n\n")
    prepared = prepare_english(english, tmp_path / "data")
    assert prepared.counts["train"] == 3 and prepared.num_rows == 4 * 5 + 5
    said = {row.line: row.reason for row in prepared.bad_rows}
    assert said.pop(0) == "no .trans.txt beside it has a line for it"
    assert "there is no such file" in said[1] and "at 8000 Hz, not one at 16000" in said[3]
    assert "not readable as audio" in said[4] and said[5] == "1-77-0004 has no text"
    assert said[6] == "notes is not SPEAKER-CHAPTER-NUMBER" and len(said) == 5


def test_wrong_folders_of_librispeech(english: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train-clean-360, train-other-500; .* a smaller --subset"):
        prepare_english(english, tmp_path / "data", librispeech.Options(subset="960h"))
    with pytest.raises(UserError, match="no folders of LibriSpeech in .*: train-clean-5, dev-clean-2, test-clean are"):
        prepare_english(tmp_path, tmp_path / "data", librispeech.Options())
    with pytest.raises(UserError, match="subset='10h' is none of mini, 100h, 960h"):
        librispeech.Options(subset="10h")  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()


def test_aishell_texts_have_no_spaces(mandarin: Path, tmp_path: Path) -> None:
    options = aishell.Options()
    prepared = aishell.prepare(mandarin, tmp_path / "data", seed=0, options=options)
    assert prepared.counts == {"train": 2, "valid": 2, "test": 2}
    assert [(row.line, row.reason) for row in prepared.bad_rows] == [(1, "BAC009S0900W0001 has no recording in wav/")]
    assert texts(prepared.load("valid")) == {
        "BAC009S0001W0000": ("今天天气B好", "S0001"),
        "BAC009S0001W0001": ("今天天气B好", "S0001"),
    }
    assert options.scores_characters
    write_16khz(mandarin / "data_aishell/wav/dev/S0001/BAC009S0001W0009.wav")
    again = aishell.prepare(mandarin / "data_aishell", tmp_path / "data", seed=0, options=options)
    assert again.counts == prepared.counts and "has no text of it" in again.bad_rows[0].reason
    with pytest.raises(UserError, match=r"no transcript/aishell_transcript_v0.8.txt of AISHELL in"):
        aishell.prepare(tmp_path, tmp_path / "other", seed=0, options=options)


def test_real_recordings_in_both_layouts(corpus_dir: Path, tmp_path: Path) -> None:
    prepared = librispeech.prepare(corpus_dir, tmp_path / "en", seed=0, options=librispeech.Options())
    assert prepared.counts == {"train": 1, "valid": 1, "test-clean": 5} and not prepared.bad_rows
    prepared = aishell.prepare(corpus_dir, tmp_path / "zh", seed=0, options=aishell.Options())
    assert prepared.counts == {"train": 240, "valid": 20, "test": 40} and not prepared.bad_rows
