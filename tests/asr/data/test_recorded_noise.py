from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Recording, RecordingSet

from asr.data import audio, recordings
from asr.data.audio import read_section
from asr.data.augmentation import AugmentConfig, augment_samples, check_recordings
from asr.data.features import FeatureConfig, compute_features
from asr.data.loader import DataConfig, train_loader
from asr.data.recorded_noise import RecordedNoiseConfig, noise_places, noise_probabilities
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from tests.asr.data.speech import RATE_HZ, WORDS, make_samples, write_cuts

TOKENIZER = Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))


def write_noise(path: Path, seconds: float, seed: int, *, rate_hz: int = RATE_HZ, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate_hz), channels))
    soundfile.write(path, values, rate_hz, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def musan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout, in which folder names repeat below those of the kinds."""
    root = tmp_path_factory.mktemp("musan") / "musan"
    for kind, part, count in (("noise", "free-sound", 3), ("music", "rfm", 2), ("speech", "librivox", 4)):
        for number in range(count):
            name = f"{kind}-{part}-{number:04d}.wav"
            write_noise(root / kind / part / name, 0.7 + number, hash_of(name), rate_hz=(16000, 8000)[number % 2])
        (root / kind / part / "README").write_text("no audio")
    return root


def hash_of(name: str) -> int:
    return sum(name.encode())


def config_of(path: Path, **values) -> AugmentConfig:
    recorded = RecordedNoiseConfig(path=str(path), **values)
    return AugmentConfig(speed_factors=[1.0], volume_db=0, noise_snr_db=[], recorded_noise=recorded)


def added_by(config: AugmentConfig, samples: np.ndarray, cut_id: str, **place) -> np.ndarray:
    where = {"seed": 0, "epoch": 0} | place
    return augment_samples(samples, config, cut_id=cut_id, **where).astype(np.float64) - samples


def snr_db(samples: np.ndarray, added: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples.astype(np.float64) ** 2) / np.mean(added**2)))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["noise", "music", "babble"]),
    wanted_db=st.floats(-5, 30),
    num_samples=st.integers(1, 40_000),
    seed=st.integers(0, 1000),
)
def test_the_mix_has_the_ratio_that_was_asked_for(
    musan: Path, kind: str, wanted_db: float, num_samples: int, seed: int
) -> None:
    probs = {f"{other}_prob": float(other == kind) for other in ("noise", "music", "babble")}
    config = config_of(musan, **probs, **{f"{kind}_snr_db": [wanted_db, wanted_db]})
    samples = make_samples(num_samples, 1) + np.float32(0.01)
    added = added_by(config, samples, "a", seed=seed)
    assert abs(snr_db(samples, added) - wanted_db) < 0.1


def test_each_kind_has_its_share_and_its_range(musan: Path) -> None:
    ranges = {"noise_snr_db": [0, 4], "music_snr_db": [10, 14], "babble_snr_db": [20, 24]}
    config = config_of(musan, noise_prob=0.4, music_prob=0.2, babble_prob=0.1, **ranges)
    samples = make_samples(2000, 1)
    counts = {"noise": 0, "music": 0, "babble": 0}
    for number in range(600):
        added = added_by(config, samples, str(number))
        if added.any():
            ratio = snr_db(samples, added)
            kind = next(k for k in counts if ranges[f"{k}_snr_db"][0] - 0.1 < ratio < ranges[f"{k}_snr_db"][1] + 0.1)
            counts[kind] += 1
    # within four deviations of what is expected
    assert 190 < counts["noise"] < 290 and 80 < counts["music"] < 160 and 30 < counts["babble"] < 90


def test_babble_has_many_speakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_noise(tmp_path / "speech" / f"{number}.wav", 1.0, number)
    read = []
    monkeypatch.setattr("asr.data.recordings.read_section", lambda *a, **k: read.append(a[0]) or read_section(*a, **k))
    config = config_of(tmp_path, noise_prob=0, babble_prob=1.0)
    counts = set()
    for number in range(60):
        read.clear()
        added_by(config, make_samples(8000, 1), str(number))
        counts.add(len(read))
    assert counts == {3, 4, 5, 6, 7}


def test_the_same_mix_for_the_same_utterance(musan: Path) -> None:
    config = config_of(musan, noise_prob=1.0, music_prob=0, babble_prob=0)
    samples = make_samples(8000, 1)
    first = added_by(config, samples, "a", seed=1, epoch=2)
    np.testing.assert_array_equal(first, added_by(config, samples, "a", seed=1, epoch=2))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert (first != added_by(config, samples, "a", **other)).any()
    assert (first != added_by(config, samples, "b", seed=1, epoch=2)).any()


def test_a_long_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise(tmp_path / "long.flac", 60.0, 0, rate_hz=8000, channels=2)
    read: list[int] = []
    monkeypatch.setattr(audio, "_soundfile", lambda path: counting(soundfile.SoundFile(path), read))
    starts = set()
    whole, _ = soundfile.read(tmp_path / "long.flac", dtype="float32")
    for place in (0.0, 0.25, 0.999999):
        found = read_section(tmp_path / "long.flac", 16000, place)
        assert len(found) == 16000 and read.pop() == 8000 and not read
        middle = found[4000:12000:2]  # away from the ends, where resampling sees silence
        starts.add(int(place * (60 * 8000 - 8000 + 1)))
        expected = whole[max(starts) + 2000 : max(starts) + 6000, 0]
        assert np.corrcoef(middle, expected)[0, 1] > 0.99
    assert max(starts) == 59 * 8000


def counting(file: soundfile.SoundFile, read: list[int]) -> soundfile.SoundFile:
    original = file.read

    def wrapped(frames: int = -1, **rest):
        read.append(frames)
        return original(frames=frames, **rest)

    file.read = wrapped
    return file


def test_music_and_speech_are_told_from_noise(musan: Path, tmp_path: Path) -> None:
    counts = {"noise": 3, "music": 2, "babble": 4}
    for path in (musan, musan.parent):  # also where the archive was unpacked
        assert {kind: len(found) for kind, found in noise_places(str(path)).items()} == counts
    plain = write_noise(tmp_path / "plain" / "street" / "a.wav", 1, 0).parents[1]
    assert {kind: len(found) for kind, found in noise_places(str(plain)).items()} == {
        "noise": 1,
        "music": 0,
        "babble": 0,
    }
    recordings = RecordingSet.from_recordings(Recording.from_file(path) for path in sorted(musan.rglob("*.wav")))
    recordings.to_file(tmp_path / "recordings.jsonl.gz")
    found = noise_places(str(tmp_path / "recordings.jsonl.gz"))
    assert {kind: len(places) for kind, places in found.items()} == counts
    assert found["music"][0].path == str(musan / "music" / "rfm" / "music-rfm-0000.wav")
    cuts = CutSet.from_manifests(recordings=recordings).cut_into_windows(0.5).to_eager()
    cuts.to_file(tmp_path / "cuts.jsonl")
    windows = noise_places(str(tmp_path / "cuts.jsonl"))["noise"]
    assert len(windows) > 6 and {place.length_s for place in windows} >= {0.5}
    one = next(place for place in windows if place.begin_s == 0.5)
    np.testing.assert_array_equal(
        one.read(8000, 0.3)[: round(0.2 * RATE_HZ)], read_section(one.path, 8000, begin_s=0.5)[: round(0.2 * RATE_HZ)]
    )


def test_kinds_without_a_probability_take_what_there_is(musan: Path, tmp_path: Path) -> None:
    assert noise_probabilities(RecordedNoiseConfig(str(musan))) == {"noise": 0.25, "music": 0.15, "babble": 0.15}
    full = noise_probabilities(RecordedNoiseConfig(str(musan), noise_prob=0.9))
    assert full == pytest.approx({"noise": 0.9, "music": 0.05, "babble": 0.05})
    write_noise(tmp_path / "a.wav", 1, 0)
    plain = RecordedNoiseConfig(str(tmp_path))
    assert noise_probabilities(plain) == {"noise": 0.25, "music": 0, "babble": 0}
    with pytest.raises(UserError, match=f"music_prob=0.2, but .*{tmp_path} holds no recordings of music; set it to 0"):
        check_recordings(AugmentConfig(recorded_noise=replace(plain, music_prob=0.2)))


def test_silent_recordings_are_passed_over(tmp_path: Path) -> None:
    for number in range(4):
        soundfile.write(tmp_path / f"silent{number}.wav", np.zeros(16000), RATE_HZ)
    config = config_of(tmp_path, noise_prob=1.0)
    with pytest.raises(UserError, match="sections of 4 recordings for augmentation are all silent") as caught:
        added_by(config, make_samples(4000, 1), "a")
    assert "\n" not in str(caught.value)
    heard = tmp_path / "heard"
    for number in range(2):
        write_noise(heard / f"{number}.wav", 1.0, number)
        soundfile.write(heard / f"silent{number}.wav", np.zeros(16000), RATE_HZ)
    for number in range(50):
        added = added_by(config_of(heard, noise_prob=1.0), make_samples(4000, 1), str(number))
        assert np.abs(added).reshape(8, -1).max(axis=1).min() > 0, "no part of it is silent"


@pytest.mark.parametrize("how", ["text", "truncated", "missing"])
def test_a_broken_recording_is_named_in_one_line(tmp_path: Path, how: str) -> None:
    path = write_noise(tmp_path / "noises" / "a.wav", 1.0, 0)
    config = config_of(path.parent, noise_prob=1.0)
    check_recordings(config)
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no audio" if how == "text" else path.read_bytes()[:20000])
    cuts = write_cuts(tmp_path / "audio", [0.5] * 4)
    data = DataConfig(features=FeatureConfig(storage="on_the_fly"), augment=config, num_workers=2, max_duration_s=1)
    wanted = f"cannot use the recording {re.escape(str(path))} for augmentation: .*; mend or remove it"
    for attempt in (
        lambda: check_recordings(config),
        lambda: list(train_loader(cuts, TOKENIZER, data, seed=0, epoch=0)),
        lambda: compute_features(cuts, tmp_path / "features", FeatureConfig(), config, 0, bad_rows=[]),
    ):
        with pytest.raises(UserError, match=wanted) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_recordings_that_were_whole_are_not_looked_into_again_while_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_noise(tmp_path / "noises" / "a.wav", 1.0, 0)
    config, note = config_of(path.parent, noise_prob=1.0), tmp_path / "out" / "note.txt"
    looked: list[str] = []
    real = recordings.header_problem

    def counted(path: str) -> str | None:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(recordings, "header_problem", counted)
    for _ in range(3):
        check_recordings(config, note=note)
    assert looked == [str(path)]
    path.write_bytes(path.read_bytes()[:20000])
    for _ in range(2):  # what is broken is not noted
        with pytest.raises(UserError, match=re.escape(str(path))):
            check_recordings(config, note=note)
    assert looked == [str(path)] * 3


def test_what_holds_no_recordings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a")
    (tmp_path / "broken.jsonl").write_text("{]\n")
    (tmp_path / "none.jsonl").write_text("")
    for name, says in (
        ("empty", "holds no audio files"),
        ("typo", "does not exist; pass a folder"),
        ("list.txt", "neither a folder nor a manifest"),
        ("broken.jsonl", "not a manifest of lhotse"),
        ("none.jsonl", "none.jsonl"),
    ):
        with pytest.raises(UserError, match=f"data.augment.recorded_noise.path: .*{says}") as caught:
            check_recordings(config_of(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise_prob": 1.5}, "noise_prob=1.5"),
        ({"noise_prob": 0.8, "music_prob": 0.3}, "add up to 1.1"),
        ({"noise_snr_db": []}, "two numbers"),
        ({"music_snr_db": [5, 1]}, "must not exceed"),
        ({"babble_speakers": [0, 3]}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordedNoiseConfig(**values)
