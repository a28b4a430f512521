"""Own recordings: Kaldi data folders, lhotse manifests, and the pre-flight report."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from asr.data.manifests import save_cuts
from asr.errors import UserError
from recipes.corpora import Prepared, custom
from recipes.corpora.base import make_cut
from tests.recipes.corpora.makers import write_16khz

ALL = custom.Options()


def write_folder(folder: Path, lines: dict[str, str], **files: str) -> Path:
    """A data folder with a second of noise for each utterance, whose text is given."""
    for number, name in enumerate(lines):
        write_16khz(folder / f"{name}.flac", 1.0, seed=number + 10 * len(folder.name))
    (folder / "wav.scp").write_text("".join(f"{name} {name}.flac\n" for name in lines), encoding="utf-8")
    (folder / "text").write_text("".join(f"{name} {text}\n" for name, text in lines.items()), encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    write_folder(
        root / "train", {f"t{i}": f"ONE TWO {'THREE ' * (i % 2)}".strip() for i in range(6)}, utt2spk="t0 ann\nt1 ann\n"
    )
    write_folder(root / "dev", {"d0": "ONE", "d1": "TWO"})
    write_folder(root / "test", {"e0": "ONE TWO", "e1": "THREE"})
    return root


def prepare(root: Path, data: Path, options: custom.Options = ALL) -> Prepared:
    return custom.prepare(root, data, seed=0, options=options)


def reasons(prepared: Prepared) -> dict[tuple[str, int], str]:
    return {(Path(row.file).name, row.line): row.reason for row in prepared.bad_rows}


def test_folders_become_cuts_of_the_same_files(own: Path, tmp_path: Path) -> None:
    prepared = prepare(own, tmp_path / "data")
    assert prepared.counts == {"train": 6, "valid": 2, "test": 2} and not prepared.bad_rows
    cuts = {cut.id: cut for cut in prepared.load("train")}
    assert cuts["t1"].supervisions[0].text == "ONE TWO THREE"
    assert [cuts[name].supervisions[0].speaker for name in ("t0", "t1", "t2")] == ["ann", "ann", "t2"]
    assert Path(cuts["t0"].recording.sources[0].source) == own / "train" / "t0.flac"
    assert not list((tmp_path / "data" / "audio").rglob("*.wav"))


def test_segments_rates_and_channels_become_files(own: Path, tmp_path: Path) -> None:
    train = own / "train"
    write_16khz(train / "t0.flac", 2.0, seed=3, rate_hz=8000, channels=2)
    (train / "segments").write_text(
        "a t0 0.5 1.25\nb t1 0.25 -1\nc t1 0 9\nd nowhere 0 1\ne t1 1 0.5\nf t1 x 2\n", encoding="utf-8"
    )
    texts = "".join(f"{name} ONE\n" for name in "abcdef")
    (train / "text").write_text(texts + "ghost TWO\n", encoding="utf-8")
    prepared = prepare(own, tmp_path / "data")
    cuts = {cut.id: cut for cut in prepared.load("train")}
    assert {name: cut.num_samples for name, cut in cuts.items()} == {"a": 12000, "b": 12000}
    whole, rate = soundfile.read(train / "t1.flac", dtype="int16")
    assert np.array_equal(soundfile.read(tmp_path / "data/audio/train/b.wav", dtype="int16")[0], whole[rate // 4 :])
    said = reasons(prepared)
    assert "it ends at 9.0 s, but the recording at 1.00 s" in said["segments", 3]
    assert said["segments", 4] == "d is of recording nowhere, which wav.scp does not have"
    assert said["segments", 5] == "e begins at 1.0 s and ends at 0.5 s"
    assert "not times in seconds" in said["segments", 6] and "ghost has no recording" in said["text", 7]
    assert len(said) == 5, "one fault of an utterance is enough"


def test_tables_of_other_editors(own: Path, tmp_path: Path) -> None:
    text = own / "train" / "text"
    lines = text.read_text(encoding="utf-8").replace("t1 ONE", "t1\tONE").replace("t2 ONE TWO", "t2")
    text.write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    prepared = prepare(own, tmp_path / "data")
    assert {cut.id for cut in prepared.load("train")} == {"t0", "t1", "t3", "t4", "t5"}
    assert reasons(prepared) == {("text", 3): "t2 has nothing behind it"}


def test_what_is_missing_is_held_out(own: Path, tmp_path: Path) -> None:
    for name in ("dev", "test"):
        shutil.rmtree(own / name)
    prepared = prepare(own, tmp_path / "data", custom.Options(held_out=0.2))
    assert prepared.counts == {"train": 4, "valid": 1, "test": 1}
    ids = [cut.id for split in ("train", "valid", "test") for cut in prepared.load(split)]
    assert len(set(ids)) == 6 and "valid: 1 of 6 training recordings, held out" in " ".join(prepared.notes)
    assert prepare(own, tmp_path / "again", custom.Options(held_out=0.2)).checksums == prepared.checksums
    (own / "train" / "t2.flac").write_text("no audio")
    write_16khz(own / "train" / "t4.flac", 1.0, seed=5, rate_hz=8000)
    prepared = prepare(own, tmp_path / "broken", custom.Options(held_out=0.2))
    assert prepared.counts == {"train": 3, "valid": 1, "test": 1}, "held out of those that can be read"
    sources = {cut.id: cut.recording.sources[0].source for split in prepared.cuts for cut in prepared.load(split)}
    assert all(Path(source).is_file() for source in sources.values())
    every = {one for split in prepared.cuts for one in (tmp_path / "broken/audio" / split).glob("*.wav")}
    assert every == {Path(sources["t4"])}, "what was written for train goes with its utterance"
    with pytest.raises(UserError, match="held_out=0.5 is not between 0 and 0.5"):
        custom.Options(held_out=0.5)


def test_half_a_data_folder_is_not_passed_over(own: Path, tmp_path: Path) -> None:
    for name, file in (("test", "text"), ("dev", "wav.scp")):
        (own / name / file).rename(own / "kept")
        with pytest.raises(UserError, match=f"own/{name} has no {file}, which a Kaldi data folder needs"):
            prepare(own, tmp_path / "data")
        (own / "kept").rename(own / name / file)
    assert not (tmp_path / "data").exists()


def test_manifests_of_lhotse(own: Path, tmp_path: Path) -> None:
    whole = make_cut("whole", own / "train/t0.flac", 16000, "ONE", "ann")
    part = make_cut("of", own / "train/t1.flac", 16000, "TWO", "bob").truncate(offset=0.25, duration=0.5)
    part.id = "part"
    save_cuts(CutSet.from_cuts([whole, part]), own / "cuts_train.jsonl.gz")
    with pytest.raises(UserError, match="has train twice"):
        prepare(own, tmp_path / "data")
    (own / "train" / "text").unlink()
    prepared = prepare(own, tmp_path / "data")
    found = {cut.id: (cut.num_samples, cut.supervisions[0].text) for cut in prepared.load("train")}
    assert found == {"whole": (16000, "ONE"), "part": (8000, "TWO")}


def test_commands_run_only_if_they_may(own: Path, tmp_path: Path) -> None:
    lines = f"t0 cat {own}/train/t0.flac |\nt1 false |\nt2 echo no audio |\n"
    (own / "train" / "wav.scp").write_text(lines + "".join(f"t{i} t{i}.flac\n" for i in range(3, 6)), encoding="utf-8")
    said = reasons(prepare(own, tmp_path / "a"))
    assert all("pass --run-commands if you trust it" in said["wav.scp", line] for line in (1, 2, 3))
    prepared = prepare(own, tmp_path / "b", custom.Options(run_commands=True))
    said = reasons(prepared)
    assert "its command ends with 1" in said["wav.scp", 2] and "writes no audio" in said["wav.scp", 3]
    assert prepared.counts["train"] == 4


def test_the_report_says_what_may_surprise(own: Path, tmp_path: Path) -> None:
    train = own / "train"
    rng = np.random.default_rng(0)
    soundfile.write(train / "t0.flac", 1e-3 * rng.uniform(-1, 1, 16000), 16000)
    soundfile.write(train / "t1.flac", np.clip(3 * rng.uniform(-1, 1, 16000), -1, 1), 16000)
    (train / "t2.flac").write_bytes((train / "t3.flac").read_bytes())
    soundfile.write(train / "t5.flac", np.zeros(16000), 16000)
    texts = (train / "text").read_text().replace("t4 ONE TWO", f"t4 {'ONE TWO ' * 20}")
    (train / "text").write_text(texts, encoding="utf-8")
    (own / "dev" / "text").write_text("d0 ÖNE\nd1 TWO\n", encoding="utf-8")
    write_16khz(own / "dev" / "d1.flac", 1.0, channels=2)
    prepared = prepare(own, tmp_path / "data")
    lines = dict(line.split(": ", 1) for line in (tmp_path / "data/preflight.txt").read_text().splitlines())
    assert lines["nearly silent, peak below -50 dB"] == "1: t0"
    assert lines["clipped, more than 0.1% of the samples at full scale"] == "1: t1"
    assert lines["the same sound twice"] == "1: train/t2 = train/t3"
    assert lines["symbols of valid that training never hears"] == "1: 'Ö' 1"
    assert next(text for what, text in lines.items() if what.startswith("more characters")) == "1: t4"
    assert "5 utterances of 1 speakers and 3 recordings of unnamed speakers, 1.00 to 1.00 s" in lines["train"]
    assert "2 utterances of 2 recordings of unnamed speakers" in lines["valid"]
    assert lines["of files with several channels, which are mixed into one"] == "1: d1"
    assert reasons(prepared) == {("wav.scp", 6): "t5: it holds nothing but zeros"}
    assert prepared.preflight is not None and prepared.preflight.durations_s["valid"] == [1.0, 1.0]
    assert any(note.startswith("the same sound twice: ") for note in prepared.notes)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="custom has no download; pass --corpus-dir DIR with train/"):
        custom.download(tmp_path, ALL)
    with pytest.raises(UserError, match="has no training data: train/"):
        prepare(tmp_path, tmp_path / "data")
    write_folder(tmp_path / "train", {"a": "ONE"})
    with pytest.raises(UserError, match="too few training recordings to hold some out"):
        prepare(tmp_path, tmp_path / "data")
    (tmp_path / "train" / "text").write_bytes(b"a \xff\n")
    with pytest.raises(UserError, match="text is not UTF-8"):
        prepare(tmp_path, tmp_path / "data")


def test_texts_without_spaces_are_scored_by_characters(own: Path, tmp_path: Path) -> None:
    (own / "train" / "text").write_text("".join(f"t{i} 今天天气很好\n" for i in range(6)), encoding="utf-8")
    said = " ".join(prepare(own, tmp_path / "data").notes)
    assert "--characters, and mostly --set tokenizer.kind=char: 6: 今天天气很好" in said
    assert "--characters" not in " ".join(prepare(own, tmp_path / "b", custom.Options(characters=True)).notes)
