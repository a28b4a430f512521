from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.data.augmentation import AugmentConfig, augment_samples, check_recordings
from asr.data.reverb import ReverbConfig, draw_response, response_places, reverberate
from asr.errors import UserError
from tests.asr.data.speech import RATE_HZ, make_samples


def response_of(delay: int, seed: int = 0, length: int = 4000) -> np.ndarray:
    """A decaying echo behind a direct path that arrives after ``delay`` samples."""
    rng = np.random.default_rng(seed)
    values = np.zeros(delay + length, dtype=np.float32)
    values[delay:] = np.clip(0.3 * rng.standard_normal(length) * np.exp(-np.arange(length) / 800), -0.9, 0.9)
    values[delay] = 1.0
    return values


def write_response(path: Path, values: np.ndarray, rate_hz: int = RATE_HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, values, rate_hz, subtype="FLOAT")
    return path


@settings(max_examples=50, deadline=None)
@given(
    num_samples=st.integers(1, 20_000),
    delay=st.integers(0, 3000),
    length=st.integers(1, 6000),
    sign=st.sampled_from([-1.0, 1.0]),
    seed=st.integers(0, 100),
)
def test_energy_length_and_onset_stay(num_samples: int, delay: int, length: int, sign: float, seed: int) -> None:
    samples = make_samples(num_samples, 1) + np.float32(0.01)
    samples[: num_samples // 2] = 0
    heard = reverberate(samples, np.float32(sign) * response_of(delay, seed, length) / 7)
    assert heard.dtype == np.float32 and heard.shape == samples.shape
    energy, before = (np.sum(values.astype(np.float64) ** 2) for values in (heard, samples))
    assert energy == pytest.approx(before, rel=1e-4)
    # nothing is heard before the direct path of the first sample
    assert np.abs(heard[: num_samples // 2]).max(initial=0) < 1e-5 < np.abs(heard[num_samples // 2 :]).max()


def test_it_is_the_convolution() -> None:
    samples, response = make_samples(3000, 2), response_of(300)
    expected = np.convolve(samples.astype(np.float64), response)[300:3300]
    expected *= np.sqrt(np.sum(samples.astype(np.float64) ** 2) / np.sum(expected**2))
    np.testing.assert_allclose(reverberate(samples, response), expected, atol=1e-5)


def test_an_impulse_and_silence_stay() -> None:
    samples = make_samples(1000, 1)
    for delay in (0, 77):
        impulse = np.zeros(200, dtype=np.float32)
        impulse[delay] = -0.2
        np.testing.assert_allclose(np.abs(reverberate(samples, impulse)), np.abs(samples), atol=1e-6)
    silent = np.zeros(100, dtype=np.float32)
    np.testing.assert_array_equal(reverberate(silent, response_of(10)), silent)
    assert reverberate(silent[:0], response_of(10)).size == 0


def test_the_official_folder_is_read_without_its_noises(tmp_path: Path) -> None:
    root = tmp_path / "RIRS_NOISES"
    responses = [
        root / "simulated_rirs" / "smallroom" / "Room001" / "Room001-00001.wav",
        root / "real_rirs_isotropic_noises" / "RVB2014_type1_rir_largeroom1_near_angla.wav",
    ]
    noises = [
        root / "real_rirs_isotropic_noises" / "RVB2014_type1_noise_largeroom1_1.wav",
        root / "pointsource_noises" / "noise-free-sound-0000.wav",
    ]
    for path in (*responses, *noises):
        write_response(path, response_of(5))
    for folder in (root, tmp_path):
        assert {place.path for place in response_places(str(folder))} == {str(path) for path in responses}
    plain = write_response(tmp_path / "plain" / "kitchen" / "noise.wav", response_of(5)).parent
    assert len(response_places(str(plain))) == 1
    for path in responses:
        path.unlink()
    other = root.rename(tmp_path / "noises-only")
    with pytest.raises(UserError, match="no room responses"):
        response_places(str(other))


def test_one_channel_of_several_is_taken(tmp_path: Path) -> None:
    channels = np.stack([response_of(delay, seed) for delay, seed in ((5, 1), (5, 2), (5, 3))], axis=1)
    write_response(tmp_path / "array.wav", channels)
    drawn = {draw_response(str(tmp_path), np.random.default_rng(seed)).tobytes() for seed in range(30)}
    expected = {(channels[:, k] / np.float32(np.abs(channels[:, k]).max())).tobytes() for k in range(3)}
    assert drawn == expected


def test_draws_are_repeatable_and_have_their_share(tmp_path: Path) -> None:
    for number in range(3):
        write_response(tmp_path / f"{number}.wav", response_of(40 * number, number), (16000, 48000)[number % 2])
    write_response(tmp_path / "silent.wav", np.zeros(100))
    reverb = ReverbConfig(path=str(tmp_path), prob=0.4)
    config = AugmentConfig(speed_factors=[1.0], volume_db=0, noise_snr_db=[], reverb=reverb)
    samples = make_samples(2000, 1)
    results = [augment_samples(samples, config, seed=0, epoch=0, cut_id=str(number)) for number in range(200)]
    changed = sum((result != samples).any() for result in results)
    assert 52 < changed < 108
    again = [augment_samples(samples, config, seed=0, epoch=0, cut_id=str(number)) for number in range(200)]
    np.testing.assert_array_equal(results, again)


def test_broken_and_silent_responses_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.augment.reverb.path: the folder .*empty holds no audio"):
        check_recordings(AugmentConfig(reverb=ReverbConfig(path=str(tmp_path / "empty"))))
    write_response(tmp_path / "silent" / "a.wav", np.zeros(100))
    with pytest.raises(UserError, match="room responses are silent, the last is .*a.wav"):
        draw_response(str(tmp_path / "silent"), np.random.default_rng(0))
    broken = write_response(tmp_path / "broken" / "a.wav", response_of(5))
    broken.write_bytes(broken.read_bytes()[:300])
    for attempt in (
        lambda: draw_response(str(broken.parent), np.random.default_rng(0)),
        lambda: check_recordings(AugmentConfig(reverb=ReverbConfig(path=str(broken.parent)))),
    ):
        with pytest.raises(UserError, match="cannot use the recording .*a.wav .* truncated") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="prob=2"):
        ReverbConfig(prob=2)
