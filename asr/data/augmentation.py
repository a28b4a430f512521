"""Augmentation as pure functions of (seed, epoch, cut id, transform).

No generator is shared between cuts, workers or epochs, so the same utterance gets the same treatment whichever worker
meets it, in whatever order, and after any interruption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import MonoCut
from scipy.fft import irfft, next_fast_len

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.recorded_noise import RecordedNoiseConfig, draw_noise, noise_places, noise_probabilities
from asr.data.recordings import Place, check_places
from asr.data.reverb import ReverbConfig, draw_response, response_places, reverberate
from asr.data.value_checks import check_probability, check_range


@dataclass
class AugmentConfig:
    """Augmentation of the waveform: reverberation, then the level, then noise.

    With stored features the draws are made once per copy when features are computed; on the fly they are made in
    every epoch. What changes lengths, silence and joined utterances, is for features on the fly only.

    Args:
        speed_factors: every training utterance appears once per epoch at each of these speeds (Ko et al. 2015, "Audio
            augmentation for speech recognition"); 1.1 is faster and shorter. [1.0] turns it off.
        copies: how many independently augmented copies of each utterance and speed an epoch holds.
        volume_db: the level changes by a gain drawn uniformly from minus to plus this many decibels; 0 turns it off.
        noise_snr_db: range (low, high) of the signal-to-noise ratio in decibels of the noise that is added, white or
            pink with equal chance; an empty list turns noise off.
        noise_prob: probability that an utterance gets such noise.
        recorded_noise: noise, music and babble from recordings.
        reverb: measured or simulated room responses.
        pad_front_ms: range (low, high) of the digital silence before every utterance in milliseconds, so that a model
            does not lose first words; an empty list adds none.
        pad_behind_ms: the same behind every utterance.
        concat_prob: probability that an utterance is joined with another one, by chance, to one longer utterance. Each
            still comes once an epoch at each speed and copy.
        concat_max_s: no joined utterance gets longer than this many seconds, nor than a batch may be, nor one with more
            tokens than encoder frames.
    """

    speed_factors: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    copies: int = 1
    volume_db: float = 6.0
    noise_snr_db: list[float] = field(default_factory=lambda: [10.0, 30.0])
    noise_prob: float = 0.3
    recorded_noise: RecordedNoiseConfig = field(default_factory=RecordedNoiseConfig)
    reverb: ReverbConfig = field(default_factory=ReverbConfig)
    pad_front_ms: list[float] = field(default_factory=list)
    pad_behind_ms: list[float] = field(default_factory=list)
    concat_prob: float = 0.0
    concat_max_s: float = 20.0

    def __post_init__(self) -> None:
        if not self.speed_factors:
            raise ValueError("speed_factors is empty; pass at least one speed, [1.0] for no change")
        for factor in self.speed_factors:
            if not 0.5 <= factor <= 2.0:
                raise ValueError(f"speed_factors has {factor}; speeds must lie in [0.5, 2]")
        if len(set(self.speed_factors)) != len(self.speed_factors):
            raise ValueError(f"speed_factors={self.speed_factors} has a speed twice; use copies to repeat utterances")
        if self.copies < 1:
            raise ValueError(f"copies={self.copies}; at least 1 is needed")
        if not 0 <= self.volume_db <= 40:
            raise ValueError(f"volume_db={self.volume_db}; it must lie in [0, 40]")
        check_range("noise_snr_db", self.noise_snr_db, or_empty="no noise")
        check_probability("noise_prob", self.noise_prob)
        for name in ("pad_front_ms", "pad_behind_ms"):
            check_range(name, getattr(self, name), least=0, or_empty="no silence")
            if max(getattr(self, name), default=0) > 10_000:
                raise ValueError(f"{name}={getattr(self, name)}; silence of more than 10000 ms teaches nothing")
        check_probability("concat_prob", self.concat_prob)
        if self.concat_max_s <= 0:
            raise ValueError(f"concat_max_s={self.concat_max_s}; it must be positive")

    @property
    def changes_lengths(self) -> str | None:
        """The first setting, with its value, that makes utterances of an epoch other than the cuts at their speeds."""
        for name in ("concat_prob", "pad_front_ms", "pad_behind_ms"):
            if getattr(self, name):
                return f"{name}={getattr(self, name)}"
        return None


def check_recordings(config: AugmentConfig, *, headers: bool = True, note: Path | None = None) -> None:
    """Finds the recordings that a configuration names, before the first is wanted.

    Args:
        config: of the augmentation.
        headers: look into each of them, which takes about a tenth of a millisecond.
        note: file that says which have been found whole; they are not looked into again while they stay as they are.

    Raises:
        UserError: a folder or manifest is missing or holds nothing that can be used, or there is none of a kind that is
            asked for; or a recording is broken, which is then named.
    """
    places: list[Place] = []
    if config.recorded_noise.path is not None:
        wanted = noise_probabilities(config.recorded_noise)
        found = noise_places(config.recorded_noise.path)
        places += [place for kind, prob in wanted.items() if prob > 0 for place in found[kind]]
    if config.reverb.path is not None and config.reverb.prob > 0:
        places += response_places(config.reverb.path)
    if headers and places:
        check_places(places, note)


@dataclass
class SpecAugmentConfig:
    """Warping and masking of features (Park et al. 2019, "SpecAugment").

    Args:
        time_masks: number of masks along time; they adapt to the length (Park et al. 2020).
        time_mask_max_frames: greatest width of one of them in feature frames of 10 ms.
        time_mask_max_fraction: all masks along time together cover at most this fraction of the utterance, below 1.
        freq_masks: number of masks along frequency.
        freq_mask_max_bins: greatest width of one of them in mel bins.
        prob: probability that an utterance is warped and masked at all; 0 turns SpecAugment off.
        time_warp_max_frames: W of the paper: a frame at least so far from both ends moves by up to this many feature
            frames of 10 ms, what lies before it is stretched and what lies behind it is compressed, or the other way
            round. Utterances of 2 W frames and less stay as they are; 0 turns warping off.
    """

    time_masks: int = 5
    time_mask_max_frames: int = 40
    time_mask_max_fraction: float = 0.15
    freq_masks: int = 2
    freq_mask_max_bins: int = 27
    prob: float = 0.9
    time_warp_max_frames: int = 0

    def __post_init__(self) -> None:
        for name in ("time_warp_max_frames", "time_masks", "time_mask_max_frames", "freq_masks", "freq_mask_max_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must not be negative")
        if not 0 <= self.time_mask_max_fraction < 1:
            raise ValueError(f"time_mask_max_fraction={self.time_mask_max_fraction}; it must lie in [0, 1)")
        check_probability("prob", self.prob)


def random_generator(seed: int, epoch: int, cut_id: str, transform: str) -> np.random.Generator:
    """The generator of one transform of one cut in one epoch; equal arguments give equal draws on every machine."""
    text = f"{seed}\0{epoch}\0{cut_id}\0{transform}"
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def expand_cuts(cuts: Iterable[MonoCut], config: AugmentConfig) -> list[MonoCut]:
    """Every cut at every speed, ``copies`` times: what one epoch of augmented training holds.

    Ids get ``_sp0.9`` for a changed speed and ``_copy1`` for further copies. Durations are those after the change, so
    that batches can be planned by them.
    """
    plain = list(cuts)
    return [
        expand_cut(cut, factor, copy)
        for copy in range(config.copies)
        for factor in config.speed_factors
        for cut in plain
    ]


def expand_cut(cut: MonoCut, factor: float, copy: int) -> MonoCut:
    """One of ``expand_cuts``: the cut at a speed, with the number of the copy in its id."""
    perturbed = cut if factor == 1.0 else cut.perturb_speed(factor)
    return perturbed if copy == 0 else replace(perturbed, id=f"{perturbed.id}_copy{copy}")


def augment_samples(
    samples: np.ndarray,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    cut_id: str,
    drawn: dict[str, Any] | None = None,
) -> np.ndarray:
    """Reverberate, change the level and add noise; a pure function of its arguments and the recordings that they name.

    Signal-to-noise ratios are those of the whole utterance as it is then, silence and reverberation included.

    Args:
        samples: float32 [N] at 16 kHz, without the silent tail.
        config: what may happen and how strongly (speed is applied to the cut, see ``expand_cuts``).
        seed: seed of the experiment.
        epoch: the epoch, or the number of the copy when features are stored.
        cut_id: the id of the cut, with the suffixes of ``expand_cuts``.
        drawn: told what was drawn: reverb; gain_db; recorded_noise_snr_db; noise and snr_db where there is noise.

    Returns:
        float32 [N]. Values may pass 1 in magnitude: features do not mind and clipping would be one more distortion.

    Raises:
        UserError: a recording of noise or a room response cannot be read (``RecordingError``), or there is none.
    """
    if config.reverb.path is not None and config.reverb.prob > 0:
        rng = random_generator(seed, epoch, cut_id, "reverb")
        if rng.random() < config.reverb.prob:
            samples = reverberate(samples, draw_response(config.reverb.path, rng))
            if drawn is not None:
                drawn["reverb"] = True
    if config.volume_db > 0:
        rng = random_generator(seed, epoch, cut_id, "volume")
        gain_db = rng.uniform(-config.volume_db, config.volume_db)
        samples = samples * np.float32(10.0 ** (gain_db / 20.0))
        if drawn is not None:
            drawn["gain_db"] = gain_db
    if config.recorded_noise.path is not None:
        rng = random_generator(seed, epoch, cut_id, "recorded_noise")
        recorded = draw_noise(config.recorded_noise, rng, samples.size)
        if recorded is not None:
            samples = add_noise(samples, *recorded)
            if drawn is not None:
                drawn["recorded_noise_snr_db"] = recorded[1]
    if config.noise_snr_db and config.noise_prob > 0:
        rng = random_generator(seed, epoch, cut_id, "noise")
        if rng.random() < config.noise_prob:
            snr_db = rng.uniform(config.noise_snr_db[0], config.noise_snr_db[1])
            white = rng.random() < 0.5
            noise = white_noise(rng, samples.size) if white else pink_noise(rng, samples.size)
            samples = add_noise(samples, noise, snr_db)
            if drawn is not None:
                drawn |= {"noise": "white" if white else "pink", "snr_db": snr_db}
    return samples


def white_noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gaussian noise with equal power at all frequencies, float32 [num_samples]."""
    return rng.standard_normal(num_samples, dtype=np.float32)


def pink_noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gaussian noise whose power falls by 3 dB an octave above 20 Hz, much as room noise; float32 [num_samples]."""
    if num_samples == 0:
        return np.zeros(0, dtype=np.float32)
    # drawn as its spectrum: that of white noise is white noise
    size = next_fast_len(num_samples, real=True)
    bins = size // 2 + 1
    spectrum = rng.standard_normal((bins, 2), dtype=np.float32).view(np.complex64)[:, 0]
    frequencies_hz = np.arange(bins, dtype=np.float32) * np.float32(SAMPLE_RATE_HZ / size)
    spectrum *= np.float32(math.sqrt(size / 2)) / np.sqrt(np.maximum(frequencies_hz, np.float32(20.0)))
    return np.asarray(irfft(spectrum, n=size)[:num_samples], dtype=np.float32)


def add_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise at a signal-to-noise ratio of mean powers over the whole utterance; digital silence stays as it is.

    Args:
        samples: float32 [N].
        noise: float32 [N] of any level.
        snr_db: ratio of the powers of samples and added noise in decibels.
    """
    signal_power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    noise_power = float(np.mean(np.square(noise, dtype=np.float64))) if noise.size else 0.0
    if signal_power == 0.0 or noise_power == 0.0:
        return samples
    scale = np.sqrt(signal_power / noise_power * 10.0 ** (-snr_db / 10.0))
    return samples + noise * np.float32(scale)


def spec_augment(
    features: np.ndarray,
    config: SpecAugmentConfig,
    *,
    seed: int,
    epoch: int,
    cut_id: str,
    num_frames: int | None = None,
    drawn: dict[str, Any] | None = None,
) -> None:
    """Warp and mask features in place; a pure function of its arguments.

    Masked values become the mean of their mel bin over the utterance, which is close to zero for the network after
    normalisation. The silent tail after ``num_frames`` is left alone: masking it would teach nothing.

    Args:
        features: float32 [T, F], changed in place.
        config: number and size of masks.
        seed: seed of the experiment.
        epoch: the epoch.
        cut_id: the id of the cut.
        num_frames: frames of audio before the tail; all T by default.
        drawn: told what was drawn: masked_bins and masked_frames, each as pairs of start and width.

    Raises:
        ValueError: masks along frequency could cover all F bins.
    """
    total = features.shape[0] if num_frames is None else min(num_frames, features.shape[0])
    bins = features.shape[1]
    if config.freq_masks * config.freq_mask_max_bins >= bins:
        raise ValueError(
            f"{config.freq_masks} masks of up to {config.freq_mask_max_bins} bins can hide all {bins} mel bins; "
            f"lower freq_masks or freq_mask_max_bins"
        )
    rng = random_generator(seed, epoch, cut_id, "spec_augment")
    if total == 0 or rng.random() >= config.prob:
        return
    audio = features[:total]
    if total > 2 * config.time_warp_max_frames > 0:
        audio[:] = time_warp(audio, config.time_warp_max_frames, random_generator(seed, epoch, cut_id, "time_warp"))
    mean = audio.mean(axis=0)
    if config.freq_masks > 0:
        widths = rng.integers(0, config.freq_mask_max_bins + 1, size=config.freq_masks)
        starts = rng.integers(0, bins - widths + 1)
        for start, width in zip(starts, widths, strict=True):
            audio[:, start : start + width] = mean[start : start + width]
        _note(drawn, "masked_bins", starts, widths)
    if config.time_masks > 0:
        share = int(config.time_mask_max_fraction * total) // config.time_masks
        widths = rng.integers(0, min(config.time_mask_max_frames, share) + 1, size=config.time_masks)
        starts = rng.integers(0, total - widths + 1)
        for start, width in zip(starts, widths, strict=True):
            audio[start : start + width] = mean
        _note(drawn, "masked_frames", starts, widths)


def _note(drawn: dict[str, Any] | None, name: str, starts: np.ndarray, widths: np.ndarray) -> None:
    if drawn is not None:
        drawn[name] = [(start, width) for start, width in zip(starts.tolist(), widths.tolist(), strict=True) if width]


def time_warp(features: np.ndarray, max_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Moves a frame along time and stretches or compresses what lies on its sides, linearly between frames.

    Args:
        features: float32 [T, F], T > 2 * max_frames.
        max_frames: the frame lies at least so far from both ends and moves by up to so many frames, W.
        rng: draws the frame and how far it moves.

    Returns:
        float32 [T, F]; the first and the last frame stay.
    """
    total = len(features)
    centre = int(rng.integers(max_frames, total - max_frames))
    # each side keeps a frame of its own
    low, high = max(-max_frames, 1 - centre), min(max_frames, total - 2 - centre)
    if high < low:
        return features.copy()
    moved = centre + int(rng.integers(low, high + 1))
    source = np.interp(np.arange(total), [0, moved, total - 1], [0, centre, total - 1])
    before = np.minimum(source.astype(np.int64), total - 2)
    share = (source - before).astype(np.float32)[:, None]
    return features[before] * (1 - share) + features[before + 1] * share
