from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.recipes.yesno import prepare_yesno

from asr.errors import UserError
from recipes.corpora import CORPORA, Prepared, yesno
from recipes.corpora.audio import energy_db, read_recording
from recipes.corpora.recombine import find_words
from tests.recipes.corpora.makers import TONE_HZ, make_yesno


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_yesno(tmp_path_factory.mktemp("waves_yesno"))


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data")
    return yesno.prepare(corpus, data, seed=0, options=yesno.Options(num_recombined=30))


def stems(cuts: CutSet) -> set[str]:
    return {cut.id for cut in cuts if not cut.id.startswith("recombined")}


def test_split_is_that_of_lhotse(corpus: Path, prepared: Prepared) -> None:
    reference = prepare_yesno(corpus)
    assert stems(prepared.load("test")) == {recording.id for recording in reference["test"]["recordings"]}
    training_half = stems(prepared.load("train")) | stems(prepared.load("valid"))
    assert training_half == {recording.id for recording in reference["train"]["recordings"]}
    assert prepared.counts == {"train": 24 + 30, "valid": 6, "test": 30}
    texts = {supervision.id: supervision.text for supervision in reference["test"]["supervisions"]}
    assert {cut.id: cut.supervisions[0].text for cut in prepared.load("test")} == texts


def test_layout_on_disk(prepared: Prepared) -> None:
    assert (prepared.data_dir / "bad_rows.txt").read_text() == ""
    for split in ("train", "valid", "test"):
        assert prepared.cuts[split] == prepared.data_dir / f"cuts_{split}.jsonl.gz"
        for cut in prepared.load(split):
            info = soundfile.info(cut.recording.sources[0].source)
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert info.frames == cut.num_samples == cut.load_audio().shape[1]
            assert len(cut.supervisions) == 1 and cut.supervisions[0].speaker == "yesno"


def test_recombined_recordings_say_their_transcripts(corpus: Path, prepared: Prepared) -> None:
    training = {path.stem for path in yesno.split_recordings(list(corpus.glob("*.wav")))["train"]}
    made = [cut for cut in prepared.load("train") if cut.id.startswith("recombined")]
    assert len({cut.supervisions[0].text for cut in made}) > 10  # one in three has a single word, so texts recur
    for cut in made:
        words = cut.supervisions[0].text.split()
        assert 1 <= len(words) <= 10
        for word, source in zip(words, cut.sources, strict=True):
            stem, position = source.split(":")
            assert stem in training
            assert yesno.WORD_OF[stem.split("_")[int(position)]] == word
        samples = cut.load_audio()[0]
        found = find_words(samples, len(words))
        assert found is not None
        for word, start, end in zip(words, found.cuts[:-1], found.cuts[1:], strict=True):
            power = np.abs(np.fft.rfft(samples[start:end]))
            frequency = power.argmax() * 16000 / (end - start)
            assert frequency == pytest.approx(TONE_HZ["1" if word == "YES" else "0"], rel=0.02)
        # the noise floor of the recordings is in every pause: nothing is digitally silent
        assert energy_db(samples).min() > -70


def test_same_seed_same_bytes_and_other_seed_other_recombination(
    corpus: Path, prepared: Prepared, tmp_path: Path
) -> None:
    options = yesno.Options(num_recombined=30)
    again = yesno.prepare(corpus, tmp_path / "a", seed=0, options=options, num_jobs=1)
    assert again.checksums == prepared.checksums
    other = yesno.prepare(corpus, tmp_path / "b", seed=1, options=options)
    assert other.checksums["train"] != prepared.checksums["train"]
    assert {k: v for k, v in other.checksums.items() if k != "train"} == {
        k: v for k, v in prepared.checksums.items() if k != "train"
    }


def test_no_recombination_and_no_left_overs(corpus: Path, tmp_path: Path) -> None:
    yesno.prepare(corpus, tmp_path, seed=0, options=yesno.Options(num_recombined=3))
    again = yesno.prepare(corpus, tmp_path, seed=0, options=yesno.Options(num_recombined=0))
    assert again.counts["train"] == 24
    assert len(list((tmp_path / "audio" / "train").iterdir())) == 24
    with pytest.raises(UserError, match="num_recombined=-1"):
        yesno.Options(num_recombined=-1)


def test_bad_recordings_are_left_out(corpus: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(corpus, tmp_path / "waves_yesno"))
    splits = yesno.split_recordings(list(damaged.glob("*.wav")))
    splits["train"][0].write_bytes(splits["train"][0].read_bytes()[:5000])
    splits["test"][3].write_text("no audio")
    (damaged / "notes_1.wav").write_text("")
    # The parent folder, as the archive unpacks, is accepted too.
    prepared = yesno.prepare(tmp_path, tmp_path / "data", seed=0, options=yesno.Options(num_recombined=2))
    assert prepared.counts == {"train": 23 + 2, "valid": 6, "test": 29}
    assert prepared.num_rows == 61
    rows = [line.split("\t") for line in (tmp_path / "data" / "bad_rows.txt").read_text().splitlines()]
    assert {Path(row[0]).name: re.split(r"[(:]", row[2])[0].strip() for row in rows} == {
        splits["train"][0].name: "truncated",
        splits["test"][3].name: "not readable as audio",
        "notes_1.wav": "the name is not eight times 0 or 1, like 0_1_0_0_1_1_0_1.wav",
    }


def test_recording_without_eight_words_is_not_recombined(corpus: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(corpus, tmp_path / "waves_yesno"))
    victim = yesno.split_recordings(list(damaged.glob("*.wav")))["train"][0]
    samples, rate = soundfile.read(str(victim))
    soundfile.write(str(victim), samples[: len(samples) // 2], rate, subtype="PCM_16")
    prepared = yesno.prepare(damaged, tmp_path / "data", seed=0, options=yesno.Options(num_recombined=50))
    assert prepared.counts["train"] == 24 + 50
    sources = {
        source.split(":")[0] for cut in prepared.load("train") if cut.has_custom("sources") for source in cut.sources
    }
    assert victim.stem not in sources and len(sources) == 23
    assert any(
        f"1 of them not cut, because eight words were not found: {victim.stem}" in note for note in prepared.notes
    )


def test_wrong_folders(corpus: Path, tmp_path: Path) -> None:
    options = yesno.Options()
    with pytest.raises(UserError, match="no wav files of yesno in .* named like 0_1_0_0_1_1_0_1.wav"):
        yesno.prepare(tmp_path, tmp_path / "data", seed=0, options=options)
    incomplete = Path(shutil.copytree(corpus, tmp_path / "waves_yesno"))
    next(incomplete.glob("*.wav")).unlink()
    with pytest.raises(UserError, match="holds 59 recordings of yesno, not 60"):
        yesno.prepare(incomplete, tmp_path / "data", seed=0, options=options)
    assert not (tmp_path / "data").exists()


def test_table() -> None:
    assert list(CORPORA) == ["yesno", "fsdd", "synth", "librispeech", "aishell", "custom"]
    assert all(name == corpus.NAME for name, corpus in CORPORA.items())


def test_real_recordings(corpus_dir: Path, tmp_path: Path) -> None:
    folder = corpus_dir / "waves_yesno"
    prepared = yesno.prepare(folder, tmp_path, seed=0, options=yesno.Options(num_recombined=20))
    assert prepared.counts == {"train": 44, "valid": 6, "test": 30} and not prepared.bad_rows
    for path in yesno.split_recordings(list(folder.glob("*.wav")))["train"]:
        assert find_words(read_recording(path), 8) is not None, path
    for cut in prepared.load("train"):
        if cut.id.startswith("recombined"):
            assert energy_db(cut.load_audio()[0]).min() > -66
