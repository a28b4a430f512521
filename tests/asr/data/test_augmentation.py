from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.data.augmentation import (
    AugmentConfig,
    SpecAugmentConfig,
    add_noise,
    augment_samples,
    expand_cuts,
    pink_noise,
    random_generator,
    spec_augment,
    time_warp,
    white_noise,
)
from asr.data.features import load_samples
from tests.asr.data.speech import RATE_HZ, make_samples, write_cuts

NOISY = AugmentConfig(noise_prob=1.0)


def augmented(seed: int = 0, epoch: int = 0, cut_id: str = "a", config: AugmentConfig = NOISY) -> np.ndarray:
    return augment_samples(make_samples(8000, 1), config, seed=seed, epoch=epoch, cut_id=cut_id)


def masked(seed: int = 0, epoch: int = 0, cut_id: str = "a") -> np.ndarray:
    features = np.random.default_rng(0).standard_normal((300, 80)).astype(np.float32)
    spec_augment(features, SpecAugmentConfig(prob=1.0), seed=seed, epoch=epoch, cut_id=cut_id)
    return features


def warped(seed: int = 0, epoch: int = 0, cut_id: str = "a") -> np.ndarray:
    features = np.random.default_rng(0).standard_normal((300, 80)).astype(np.float32)
    config = SpecAugmentConfig(time_masks=0, freq_masks=0, prob=1.0, time_warp_max_frames=40)
    spec_augment(features, config, seed=seed, epoch=epoch, cut_id=cut_id)
    return features


@pytest.mark.parametrize("augment", [augmented, masked, warped])
def test_result_is_a_function_of_seed_epoch_and_id(augment) -> None:
    first = augment(seed=1, epoch=2, cut_id="x")
    augment(seed=5, epoch=5, cut_id="y")  # nothing is left behind by other calls
    np.random.seed(3)
    np.testing.assert_array_equal(first, augment(seed=1, epoch=2, cut_id="x"))
    for other in ({"seed": 2, "epoch": 2, "cut_id": "x"}, {"seed": 1, "epoch": 3, "cut_id": "x"}):
        assert (first != augment(**other)).any()
    assert (first != augment(seed=1, epoch=2, cut_id="x2")).any()


def test_draws_are_the_same_on_every_machine() -> None:
    draws = random_generator(1, 2, "id", "noise").integers(0, 1000, 4).tolist()
    assert draws == [142, 335, 406, 813]
    assert draws != random_generator(1, 2, "id", "volume").integers(0, 1000, 4).tolist()


@pytest.mark.parametrize("make_noise", [white_noise, pink_noise])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 30.0])
def test_noise_has_the_ratio_that_was_asked_for(make_noise, snr_db: float) -> None:
    samples = make_samples(20001, 4)
    noisy = add_noise(samples, make_noise(np.random.default_rng(0), samples.size), snr_db)
    added = noisy.astype(np.float64) - samples
    measured = 10 * np.log10(np.mean(samples.astype(np.float64) ** 2) / np.mean(added**2))
    assert noisy.dtype == np.float32
    assert abs(measured - snr_db) < 0.1


def test_snr_lies_in_its_range_and_noise_in_its_share() -> None:
    config = AugmentConfig(volume_db=0, noise_snr_db=[10, 20], noise_prob=0.4)
    samples = make_samples(4000, 1)
    ratios = []
    for i in range(400):
        added = augment_samples(samples, config, seed=0, epoch=0, cut_id=str(i)).astype(np.float64) - samples
        if added.any():
            ratios.append(10 * np.log10(np.mean(samples.astype(np.float64) ** 2) / np.mean(added**2)))
    assert 120 < len(ratios) < 200
    assert 9.9 < min(ratios) < 11 and 19 < max(ratios) < 20.1


def test_volume_changes_the_level_only() -> None:
    config = AugmentConfig(volume_db=6, noise_snr_db=[])
    samples = make_samples(4000, 1)
    gains = [augment_samples(samples, config, seed=0, epoch=0, cut_id=str(i))[7] / samples[7] for i in range(200)]
    decibels = 20 * np.log10(gains)
    assert -6 <= decibels.min() < -5 and 5 < decibels.max() <= 6
    out = augment_samples(samples, config, seed=0, epoch=0, cut_id="0")
    np.testing.assert_allclose(out, samples * gains[0], rtol=1e-5)


def test_nothing_happens_when_all_is_off() -> None:
    off = AugmentConfig(speed_factors=[1.0], volume_db=0, noise_snr_db=[])
    np.testing.assert_array_equal(augmented(config=off), make_samples(8000, 1))
    np.testing.assert_array_equal(augmented(config=AugmentConfig(volume_db=0, noise_prob=0)), make_samples(8000, 1))
    features = np.ones((50, 80), dtype=np.float32) * np.arange(80, dtype=np.float32)
    before = features.copy()
    spec_augment(features, SpecAugmentConfig(prob=0), seed=0, epoch=0, cut_id="a")
    np.testing.assert_array_equal(features, before)


def test_silence_gets_no_noise() -> None:
    silent = np.zeros(1000, dtype=np.float32)
    np.testing.assert_array_equal(augment_samples(silent, NOISY, seed=0, epoch=0, cut_id="a"), silent)
    assert augment_samples(silent[:0], NOISY, seed=0, epoch=0, cut_id="a").size == 0


def test_pink_noise_falls_by_three_decibels_an_octave() -> None:
    power = np.abs(np.fft.rfft(pink_noise(np.random.default_rng(0), 1 << 17))) ** 2
    hertz = np.fft.rfftfreq(1 << 17, 1 / RATE_HZ)
    octaves = [10 * np.log10(power[(hertz >= low) & (hertz < 2 * low)].mean()) for low in (125, 250, 500, 1000, 2000)]
    np.testing.assert_allclose(np.diff(octaves), -3.01, atol=0.4)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_changes_duration_as_stated(tmp_path: Path, factor: float) -> None:
    (cut,) = write_cuts(tmp_path, [1.37])
    (perturbed,) = expand_cuts([cut], AugmentConfig(speed_factors=[factor]))
    assert perturbed.id == f"{cut.id}_sp{factor}"
    assert perturbed.duration == pytest.approx(cut.duration / factor, abs=1.5 / RATE_HZ)
    assert perturbed.supervisions[0].text == cut.supervisions[0].text
    samples = load_samples(perturbed)
    assert len(samples) == perturbed.num_samples
    # the waveform is the same on a stretched axis
    stretched = np.interp(np.arange(8000) * factor, np.arange(cut.num_samples), load_samples(cut))
    assert np.corrcoef(samples[:8000], stretched)[0, 1] > 0.99


def test_every_cut_comes_at_every_speed_and_copy(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path, [0.5, 0.6])
    expanded = expand_cuts(cuts, AugmentConfig(copies=2))
    ids = [cut.id for cut in expanded]
    assert len(ids) == len(set(ids)) == 12
    assert ids[:6] == ["utt000_sp0.9", "utt001_sp0.9", "utt000", "utt001", "utt000_sp1.1", "utt001_sp1.1"]
    assert ids[6:] == [f"{i}_copy1" for i in ids[:6]]


@settings(max_examples=200, deadline=None)
@given(
    frames=st.integers(1, 400),
    audio_share=st.floats(0.1, 1.0),
    time_masks=st.integers(0, 12),
    width=st.integers(0, 300),
    fraction=st.floats(0, 0.99),
    freq_masks=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_masks_stay_within_their_bounds(
    frames: int, audio_share: float, time_masks: int, width: int, fraction: float, freq_masks: int, seed: int
) -> None:
    config = SpecAugmentConfig(time_masks, width, fraction, freq_masks, 26, prob=1.0)
    # ramps in both directions: no value equals the mean of its bin by chance
    features = (np.arange(frames)[:, None] ** 1.5 + 1000 * np.arange(80)[None] + 0.123).astype(np.float32)
    original = features.copy()
    audio = max(1, int(frames * audio_share))
    spec_augment(features, config, seed=seed, epoch=0, cut_id="a", num_frames=audio)
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(features[audio:], original[audio:])
    changed = features[:audio] != original[:audio]
    if audio <= 2:  # too few to tell a mask along time from one along frequency
        return
    masked_bins = changed.all(axis=0)
    assert masked_bins.sum() <= freq_masks * 26 < 80
    masked_frames = changed.all(axis=1)
    assert masked_frames.sum() <= min(fraction * audio, time_masks * width)
    mean = original[:audio].mean(axis=0)
    np.testing.assert_array_equal(features[:audio][changed], np.broadcast_to(mean, (audio, 80))[changed])


def test_masks_do_mask() -> None:
    features = np.random.default_rng(0).standard_normal((1000, 80)).astype(np.float32)
    original = features.copy()
    hidden_time = hidden_freq = 0
    for i in range(50):
        features[:] = original
        spec_augment(features, SpecAugmentConfig(prob=1.0), seed=0, epoch=0, cut_id=str(i))
        changed = features != original
        hidden_time += changed.all(axis=1).sum()
        hidden_freq += changed.all(axis=0).sum()
    # 5 masks of 0 to 30 frames, 2 of 0 to 27 bins, less what overlaps
    assert 50 < hidden_time / 50 < 75
    assert 18 < hidden_freq / 50 < 27


@settings(max_examples=300, deadline=None)
@given(frames=st.integers(1, 300), max_frames=st.integers(1, 150), seed=st.integers(0, 10_000))
def test_a_warp_moves_one_frame_and_keeps_order_and_length(frames: int, max_frames: int, seed: int) -> None:
    if frames <= 2 * max_frames:
        return
    # a frame's value is its place
    places = np.arange(frames, dtype=np.float32)[:, None] * np.array([[1, 100]], np.float32)
    found = time_warp(places, max_frames, np.random.default_rng(seed))
    assert found.shape == places.shape and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 1], 100 * found[:, 0], rtol=1e-5, atol=1e-3)
    assert found[0, 0] == 0 and found[-1, 0] == frames - 1
    assert (np.diff(found[:, 0]) > 0).all()
    assert np.abs(found[:, 0] - places[:, 0]).max() <= max_frames + 1e-3
    # two straight lines
    assert (np.abs(np.diff(found[:, 0], 2)) > 1e-3).sum() <= 2


def test_warps_reach_their_bound_in_both_directions() -> None:
    places = np.arange(200, dtype=np.float32)[:, None]
    moved = [time_warp(places, 20, np.random.default_rng(seed)) - places for seed in range(300)]
    # where a frame comes from k frames later, what lies before it was compressed
    largest = [m.flat[np.abs(m).argmax()] for m in moved]
    assert -20 <= min(largest) < -18 and 18 < max(largest) <= 20


def test_warping_leaves_masks_tail_and_short_utterances_alone() -> None:
    plain = SpecAugmentConfig(prob=1.0)
    warping = replace(plain, time_warp_max_frames=30)
    original = np.random.default_rng(0).standard_normal((120, 80)).astype(np.float32)
    for audio, changed in ((60, False), (61, True), (100, True)):
        one, two = original.copy(), original.copy()
        spec_augment(one, plain, seed=0, epoch=0, cut_id="a", num_frames=audio)
        spec_augment(two, warping, seed=0, epoch=0, cut_id="a", num_frames=audio)
        np.testing.assert_array_equal(two[audio:], original[audio:])
        assert (one != two).any() == changed
        # masked bins are constant in both, and the same
        np.testing.assert_array_equal(np.ptp(one[:audio], axis=0) == 0, np.ptp(two[:audio], axis=0) == 0)


def test_too_wide_frequency_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="all 40 mel bins"):
        spec_augment(np.zeros((10, 40), np.float32), SpecAugmentConfig(), seed=0, epoch=0, cut_id="a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentConfig(speed_factors=[]), "speed_factors is empty"),
        (lambda: AugmentConfig(speed_factors=[3.0]), "speeds must lie"),
        (lambda: AugmentConfig(speed_factors=[1.0, 1.0]), "twice"),
        (lambda: AugmentConfig(copies=0), "copies=0"),
        (lambda: AugmentConfig(volume_db=-1), "volume_db=-1"),
        (lambda: AugmentConfig(noise_snr_db=[10]), "two numbers"),
        (lambda: AugmentConfig(noise_snr_db=[20, 10]), "must not exceed"),
        (lambda: AugmentConfig(noise_prob=1.5), "noise_prob=1.5"),
        (lambda: AugmentConfig(concat_prob=2), "concat_prob=2"),
        (lambda: AugmentConfig(concat_max_s=0), "concat_max_s=0"),
        (lambda: AugmentConfig(pad_front_ms=[-1, 5]), "at least 0"),
        (lambda: AugmentConfig(pad_behind_ms=[5]), "for no silence"),
        (lambda: AugmentConfig(pad_behind_ms=[5, 20_000]), "more than 10000 ms"),
        (lambda: SpecAugmentConfig(time_masks=-1), "time_masks=-1"),
        (lambda: SpecAugmentConfig(time_warp_max_frames=-1), "time_warp_max_frames=-1"),
        (lambda: SpecAugmentConfig(time_mask_max_fraction=1.0), "time_mask_max_fraction=1.0"),
        (lambda: SpecAugmentConfig(prob=-0.1), "prob=-0.1"),
    ],
)
def test_wrong_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
