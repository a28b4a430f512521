"""Synthetic speech in the layouts of LibriSpeech and AISHELL."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from asr.errors import UserError
from recipes.corpora import aishell, librispeech, synth_layouts
from recipes.corpora.sentences import LENGTHS, VOCABULARY, chinese_number, english, mandarin
from recipes.corpora.synth_layouts import DEV, LAYOUTS, TEST, TRAIN, plan, unheard_characters, write

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs espeak-ng: pip install 'transducer-asr[synth]'"
)


def test_the_vocabulary_is_closed_and_used() -> None:
    rng = np.random.default_rng(0)
    texts = [english(rng).split() for _ in range(20000)]
    assert len(VOCABULARY) == 500 and {word for text in texts for word in text} == VOCABULARY
    assert {len(text) for text in texts} == set(LENGTHS)
    assert len({character for _ in range(3000) for character in mandarin(rng)}) > 100


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "零"),
        (10, "十"),
        (12, "十二"),
        (20, "二十"),
        (101, "一百零一"),
        (110, "一百一十"),
        (1001, "一千零一"),
        (2305, "二千三百零五"),
    ],
)
def test_numbers_are_said_in_characters(number: int, said: str) -> None:
    assert chinese_number(number) == said


@pytest.mark.parametrize("name", LAYOUTS)
def test_dev_and_test_hold_no_sentence_and_no_voice_of_training(name: str) -> None:
    utterances = [one for shard in plan(LAYOUTS[name], 1.0, 0) for one in shard]
    texts = {part: {one.request.text for one in utterances if one.split == part} for part in (TRAIN, DEV, TEST)}
    voices = {part: {one.request.voice for one in utterances if one.split == part} for part in (TRAIN, DEV, TEST)}
    for first, second in ((TRAIN, DEV), (TRAIN, TEST), (DEV, TEST)):
        plain = [{text.replace(",", "") for text in texts[part]} for part in (first, second)]
        assert not plain[0] & plain[1] and not voices[first] & voices[second]
    assert len({one.cut_id for one in utterances}) == len(utterances)


def test_characters_that_training_never_hears_are_known() -> None:
    assert unheard_characters(LAYOUTS["aishell"], 0.02, 0) and not unheard_characters(LAYOUTS["aishell"], 2.0, 0)
    assert not unheard_characters(LAYOUTS["librispeech"], 0.5, 0)


def test_out_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        synth_layouts.main(["--layout", "aishell", "--hours", "0.01", "--out", str(tmp_path / "file")])
    assert ended.value.code == 2 and "is a file; choose a folder" in capsys.readouterr().err


@needs_espeak
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_recipe_prepares_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth_layouts, "LEAST", 4)
    folder, hours = write(LAYOUTS[name], tmp_path, 0.01)
    assert 0.005 < hours[TRAIN] < 0.02
    corpus, options = {
        "librispeech": (librispeech, librispeech.Options()),
        "aishell": (aishell, aishell.Options()),
    }[name]
    prepared = corpus.prepare(tmp_path, tmp_path / "data", seed=0, options=options)  # type: ignore[attr-defined]
    assert not prepared.bad_rows and prepared.counts["valid"] == prepared.counts[options.tests[0]] == 4
    assert prepared.durations_s["train"] == pytest.approx(3600 * hours[TRAIN])
    digests = [{p.relative_to(folder): hashlib.md5(p.read_bytes()).digest() for p in folder.rglob("*.*")}]
    with pytest.raises(UserError, match=f"{folder} is there already"):
        write(LAYOUTS[name], tmp_path, 0.01)
    again, _ = write(LAYOUTS[name], tmp_path / "again", 0.01, num_jobs=1)
    digests.append({p.relative_to(again): hashlib.md5(p.read_bytes()).digest() for p in again.rglob("*.*")})
    assert digests[0] == digests[1]
