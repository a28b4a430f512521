from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from asr.errors import UserError
from recipes.corpora import Prepared, fsdd
from recipes.corpora.audio import energy_db
from tests.recipes.corpora.makers import make_fsdd


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fsdd(tmp_path_factory.mktemp("free-spoken-digit-dataset"))


@pytest.fixture(scope="module", autouse=True)
def small() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdd, "NUM_TEST", 60)
        patch.setattr(fsdd, "NUM_TEST_HELD_OUT", 40)
        patch.setattr(fsdd, "NUM_VALID", 20)
        yield


def run(corpus: Path, data: Path, *, seed: int = 0, num_train: int = 40, held_out: str | None = None) -> Prepared:
    return fsdd.prepare(
        corpus, data, seed=seed, options=fsdd.Options(num_train_strings=num_train, held_out_speaker=held_out)
    )


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return run(corpus, tmp_path_factory.mktemp("data"))


def indices(prepared: Prepared, split: str) -> set[int]:
    return {int(stem.split("_")[2]) for cut in prepared.load(split) for stem in cut.recordings}


def test_splits_use_their_own_recordings(prepared: Prepared) -> None:
    assert prepared.counts == {"train": 40, "valid": 20, "test": 60}
    assert indices(prepared, "test") == {0, 1, 2, 3, 4}
    assert indices(prepared, "valid") == {5, 6, 7}
    assert indices(prepared, "train") == {8, 9}


def test_strings_have_one_speaker_and_the_right_words(prepared: Prepared) -> None:
    for split, lengths in (("test", range(3, 8)), ("valid", range(3, 8)), ("train", range(1, 9))):
        for cut in prepared.load(split):
            supervision = cut.supervisions[0]
            assert supervision.text.split() == [fsdd.DIGITS[int(stem[0])] for stem in cut.recordings]
            assert {stem.split("_")[1] for stem in cut.recordings} == {supervision.speaker}
            assert len(cut.recordings) in lengths


def test_test_strings_are_balanced(prepared: Prepared) -> None:
    cuts = list(prepared.load("test"))
    assert set(Counter(cut.supervisions[0].speaker for cut in cuts).values()) == {20}
    uses = Counter(stem for cut in cuts for stem in cut.recordings)
    assert len(uses) == 150
    for speaker in ("ann", "bob", "cy"):
        counts = [count for stem, count in uses.items() if f"_{speaker}_" in stem]
        assert max(counts) - min(counts) <= 1


def test_default_list_is_large_enough() -> None:
    pool = {name: [f"{d}_{name}_{i}" for d in range(10) for i in range(5)] for name in "abcdef"}
    for seed in range(5):
        strings = fsdd.draw_strings("test", pool, 600, fsdd._TEST_LENGTHS, np.random.default_rng([seed, 0]))
        assert sum(len(string.recordings) for string in strings) >= 2500
        assert all(0.05 <= pause <= 0.4 for string in strings for pause in string.pauses_s[1:-1])


def test_list_of_test_strings(prepared: Prepared) -> None:
    data = (prepared.data_dir / "test_strings.tsv").read_bytes()
    assert hashlib.sha256(data).hexdigest() == prepared.checksums["test_strings.tsv"]
    assert any(prepared.checksums["test_strings.tsv"] in line for line in prepared.summary())
    header, *rows = [line.split("\t") for line in data.decode().splitlines()]
    assert header == ["id", "speaker", "words", "recordings", "pauses_s"]
    cuts = {cut.id: cut for cut in prepared.load("test")}
    assert [row[0] for row in rows] == list(cuts)
    for name, speaker, words, recordings, pauses in rows:
        assert (speaker, words) == (cuts[name].supervisions[0].speaker, cuts[name].supervisions[0].text)
        assert recordings.split() == cuts[name].recordings
        assert len(pauses.split()) == len(words.split()) + 1


def test_test_and_valid_do_not_depend_on_the_number_of_train_strings(
    corpus: Path, prepared: Prepared, tmp_path: Path
) -> None:
    more = run(corpus, tmp_path / "a", num_train=41)
    for name in ("test", "valid", "test_strings.tsv"):
        assert more.checksums[name] == prepared.checksums[name]
    assert more.checksums["train"] != prepared.checksums["train"]
    other = run(corpus, tmp_path / "b", seed=1)
    assert other.checksums["test_strings.tsv"] != prepared.checksums["test_strings.tsv"]


def test_held_out_speaker(corpus: Path, tmp_path: Path) -> None:
    held = run(corpus, tmp_path, held_out="bob")
    assert held.counts["test"] == 40
    assert {cut.supervisions[0].speaker for cut in held.load("test")} == {"bob"}
    assert indices(held, "test") == set(range(10))
    for split, allowed in (("train", {8, 9}), ("valid", {5, 6, 7})):
        assert {cut.supervisions[0].speaker for cut in held.load(split)} == {"ann", "cy"}
        assert indices(held, split) == allowed
    with pytest.raises(UserError, match="held_out_speaker='dan' is not in the corpus; its speakers are ann, bob, cy"):
        run(corpus, tmp_path / "x", held_out="dan")


def test_audio_has_no_digital_silence_and_the_planned_length(corpus: Path, prepared: Prepared) -> None:
    rows = [line.split("\t") for line in (prepared.data_dir / "test_strings.tsv").read_text().splitlines()[1:]]
    cuts = {cut.id: cut for cut in prepared.load("test")}
    for name, _, _, recordings, pauses in rows[:20]:
        samples = cuts[name].load_audio()[0]
        assert energy_db(samples).min() > -75
        assert np.abs(samples).max() < 0.99
        silence = sum(float(pause) for pause in pauses.split())
        joints = 2 * len(recordings.split())
        speech = cuts[name].duration - silence + 0.005 * joints
        assert 0.15 * len(recordings.split()) - 0.01 < speech < 0.3 * len(recordings.split()) + 0.01


def test_bad_recordings_and_names(tmp_path: Path) -> None:
    corpus = make_fsdd(tmp_path / "fsdd", speakers=("ann",))
    (corpus / "recordings" / "3_ann_9.wav").write_bytes(b"RIFF....WAVE")
    (corpus / "recordings" / "hello.wav").write_bytes(b"")
    prepared = run(corpus / "recordings", tmp_path / "data")
    assert {Path(row.file).name for row in prepared.bad_rows} == {"3_ann_9.wav", "hello.wav"}
    assert prepared.num_rows == 101
    assert any("99 usable recordings" in note for note in prepared.notes)
    assert not any("3_ann_9" in cut.recordings for cut in prepared.load("train"))


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no wav files of fsdd in .*recordings.* named like 7_jackson_32.wav"):
        run(tmp_path, tmp_path / "data")
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "song.wav").touch()
    with pytest.raises(UserError, match="none of the 1 wav files"):
        run(tmp_path, tmp_path / "data")
    few = make_fsdd(tmp_path / "few", speakers=("ann",), num_indices=6)
    with pytest.raises(UserError, match="no readable recordings for train"):
        run(few, tmp_path / "data")
    with pytest.raises(UserError, match="num_train_strings=0"):
        fsdd.Options(num_train_strings=0)


def test_download_checks_the_number_of_recordings(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "master.tar.gz", "w:gz") as tar:
        tar.add(corpus, arcname="free-spoken-digit-dataset-master")
    monkeypatch.setattr(fsdd, "URL", (tmp_path / "master.tar.gz").as_uri())
    with pytest.raises(UserError, match="holds 300 recordings, not 3000"):
        fsdd.download(tmp_path / "dest", fsdd.Options())
    monkeypatch.setattr(fsdd, "NUM_RECORDINGS", 300)
    folder = fsdd.download(tmp_path / "dest", fsdd.Options())
    assert folder == tmp_path / "dest" / "free-spoken-digit-dataset"
    assert run(folder, tmp_path / "data").counts["test"] == 60


def test_real_recordings(corpus_dir: Path, tmp_path: Path) -> None:
    folder = corpus_dir / "free-spoken-digit-dataset"
    prepared = run(folder, tmp_path, num_train=60)
    assert prepared.bad_rows == []
    assert prepared.counts == {"train": 60, "valid": 20, "test": 60}
    assert {cut.supervisions[0].speaker for cut in prepared.load("test")} == set(
        "george jackson lucas nicolas theo yweweler".split()
    )
