from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.errors import UserError
from recipes.corpora import Prepared, noise, synth
from recipes.corpora.audio import rms
from recipes.corpora.commands import sentences
from recipes.corpora.espeak import Request, speak

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs espeak-ng: pip install 'transducer-asr[synth]'"
)
SMALL = {"NUM_TEST": 24, "NUM_VALID": 12, "SHARD": 10}


def test_plan_has_sixty_words_and_keeps_test_sentences_apart() -> None:
    plan = synth.plan(0, synth.Options())
    texts = {split: [u.text for u in plan if u.split == split] for split in ("train", "valid", "test")}
    assert {split: len(lines) for split, lines in texts.items()} == {"train": 5000, "valid": 150, "test": 300}
    for split in texts:
        assert len({word for text in texts[split] for word in text.split()}) >= 60
    assert len(set(texts["test"])) == 300
    assert not set(texts["test"]) & (set(texts["train"]) | set(texts["valid"]))
    assert not set(texts["valid"]) & set(texts["train"])
    words = [word for text in texts["train"] for word in text.split()]
    assert min(words.count(word) for word in set(words)) >= 30  # no word is too rare to be learned
    assert all(text == text.upper() and "," not in text for lines in texts.values() for text in lines)


def test_test_voices_are_new_in_variant_and_half_in_base() -> None:
    plan = synth.plan(0, synth.Options())
    heard = {u.request.voice for u in plan if u.split == "train"}
    tested = {u.request.voice for u in plan if u.split == "test"}
    assert len(tested) >= 8 and len(heard) > 100
    bases, variants = ({voice.split("+")[part] for voice in heard} for part in (0, 1))
    assert not variants & {voice.split("+")[1] for voice in tested}
    assert sum(voice.split("+")[0] not in bases for voice in tested) * 2 >= len(tested)
    unheard = [u for u in plan if u.split == "valid" and u.request.voice not in heard]
    assert len({u.request.voice for u in unheard}) == 2 and len(unheard) == 50
    assert not {u.request.voice for u in unheard} & tested
    per_voice = [sum(u.request.voice == voice for u in plan if u.split == "test") for voice in tested]
    assert max(per_voice) - min(per_voice) <= 1


def test_test_and_valid_do_not_depend_on_the_size_of_train() -> None:
    small, large = (synth.plan(3, synth.Options(num_train=n)) for n in (5, 500))
    kept = [[u for u in plan if u.split != "train"] for plan in (small, large)]
    assert kept[0] == kept[1]
    assert [u for u in small if u.split == "train"][0].text == [u for u in large if u.split == "train"][0].text
    other = [u for u in synth.plan(4, synth.Options(num_train=5)) if u.split == "test"]
    assert other != [u for u in small if u.split == "test"]
    with pytest.raises(UserError, match="num_train=0"):
        synth.Options(num_train=0)


def test_sentences_avoid_taken_ones() -> None:
    first = sentences(200, np.random.default_rng(0), set(), distinct=True)
    second = sentences(200, np.random.default_rng(0), set(first), distinct=False)
    assert len(set(first)) == 200 and not set(first) & set(second)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_has_unit_power_and_its_colour(kind: str) -> None:
    rng = np.random.default_rng(0)
    voices = [rng.standard_normal(32000).astype(np.float32) for _ in range(8)]
    made = noise.make(kind, 32001, np.random.default_rng(1), voices)
    assert made.dtype == np.float32 and made.shape == (32001,)
    assert rms(made) == pytest.approx(1.0, rel=1e-3)
    assert np.array_equal(made, noise.make(kind, 32001, np.random.default_rng(1), voices))
    power = np.abs(np.fft.rfft(made)) ** 2
    hertz = np.fft.rfftfreq(len(made), 1 / 16000)
    octaves = [power[(hertz >= low) & (hertz < 2 * low)].mean() for low in (400, 800, 1600)]
    falls_db = -10 * np.log10(octaves[2] / octaves[0]) / 2  # per octave
    assert falls_db == pytest.approx({"pink": 3.0, "brown": 6.0}.get(kind, 0.0), abs=0.7)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(synth, name, value)
        return synth.prepare(
            None, tmp_path_factory.mktemp("synth"), seed=0, options=synth.Options(num_train=25, num_words=10)
        )


@needs_espeak
def test_same_bytes_whatever_the_number_of_jobs(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(synth, name, value)
    again = synth.prepare(None, tmp_path, seed=0, options=synth.Options(num_train=25, num_words=10), num_jobs=1)
    assert again.checksums == prepared.checksums
    for split in ("train", "valid", "test"):
        files = sorted((prepared.data_dir / "audio" / split).iterdir())
        assert len(files) == prepared.counts[split]
        for path in files:
            assert path.read_bytes() == (tmp_path / "audio" / split / path.name).read_bytes()


@needs_espeak
def test_prepared_audio_is_sane(prepared: Prepared) -> None:
    assert prepared.counts == {"train": 35, "valid": 12, "test": 24}
    assert prepared.bad_rows == [] and (prepared.data_dir / "bad_rows.txt").read_text() == ""
    for split in ("train", "valid", "test"):
        for cut in prepared.load(split):
            assert soundfile.info(cut.recording.sources[0].source).samplerate == 16000
            samples = cut.load_audio()[0]
            words = len(cut.supervisions[0].text.split())
            # seconds a word; 0.2 to 0.8 s of the recording are the silence around the words
            assert 0.15 < (cut.duration - 0.2) / words and (cut.duration - 0.8) / words < 1.0
            assert np.abs(samples).max() < 0.99
            assert -33 < 20 * np.log10(rms(samples)) < -19
            assert 10 <= cut.snr_db <= 20
            assert np.abs(samples[:400]).max() > 0  # noise from the first sample on, no digital silence
    table = json.loads((prepared.data_dir / "voices.json").read_text())
    assert {cut.supervisions[0].speaker for cut in prepared.load("test")} <= set(table["test"])


@needs_espeak
def test_noise_is_at_the_wanted_ratio() -> None:
    utterance = next(u for u in synth.plan(0, synth.Options(num_train=50)) if u.split == "train" and u.noise == "white")
    speech = np.sin(np.arange(16000) / 3).astype(np.float32) * 0.1
    mixture = synth.mix(speech, utterance, [speech], seed=0)
    lead = int(utterance.lead_s * 16000)
    background = rms(mixture[: lead - 100])
    both = rms(mixture[lead : lead + 15000])
    assert 10 * np.log10(both**2 / background**2 - 1) == pytest.approx(utterance.snr_db, abs=0.4)


@needs_espeak
def test_every_voice_speaks() -> None:
    voices = synth.voices()
    names = [name for part in voices.values() for name in part]
    rate, spoken = speak([Request("set a timer", name) for name in names])
    assert rate == 22050
    for name, raw in zip(names, spoken, strict=True):
        samples = np.frombuffer(raw, np.int16)
        assert 0.4 < len(samples) / rate < 2.0, name
        assert 300 < np.abs(samples.astype(int)).max() < 32767, name


@needs_espeak
def test_breath_of_a_voice_does_not_depend_on_the_time_of_day() -> None:
    requests = [Request("turn on the light", voice) for voice in ("en-us+f3", "en-us+f5", "en-us+victor")]
    first = speak(requests)
    time.sleep(1.1)
    assert speak(requests) == first


@needs_espeak
def test_unknown_voice_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown voice 'xx-none'") as caught:
        speak([Request("hello", "xx-none")])
    assert "\n" not in str(caught.value)


def test_missing_espeak_tells_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuts_test.jsonl.gz").write_text("older output")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'transducer-asr\[synth\]'"):
        synth.prepare(None, tmp_path, seed=0, options=synth.Options())
    assert (tmp_path / "cuts_test.jsonl.gz").read_text() == "older output"


def test_download_has_nothing_to_do(tmp_path: Path) -> None:
    assert synth.download(tmp_path / "new", synth.Options()) == tmp_path / "new"
