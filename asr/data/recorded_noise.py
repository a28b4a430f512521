"""Noise, music and babble from recordings, such as MUSAN (Snyder et al. 2015, "MUSAN: A music, speech, and noise
corpus"), as for x-vectors (Snyder et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from asr.data.recordings import Place, draw_sections, find_places
from asr.data.value_checks import check_probability, check_range
from asr.errors import UserError

KEY = "data.augment.recorded_noise.path"
KINDS = {"noise": "noise", "music": "music", "babble": "speech"}
"""What is added, and the folder of MUSAN that it is made of."""
SHARE = 0.15
"""Probability of music, and of babble, where it is not set and there are recordings."""


@dataclass
class RecordedNoiseConfig:
    """Noise, music or babble from recordings, at most one of them in an utterance and all along it.

    Args:
        path: folder or lhotse manifest of recordings; null turns all of this off. In a folder, music/ and speech/ (or
            musan/music/ and musan/speech/) hold music and speech, and all else is noise; in a manifest, ids of
            recordings begin with music or speech, as MUSAN's do.
        noise_prob: probability that an utterance gets noise.
        noise_snr_db: range (low, high) of its signal-to-noise ratio in decibels.
        music_prob: probability of music; null is 0.15 where there are recordings of it, else 0.
        music_snr_db: range of its signal-to-noise ratio in decibels.
        babble_prob: probability of babble, several speakers at once; null is 0.15 where there is speech, else 0.
        babble_snr_db: range of its signal-to-noise ratio in decibels.
        babble_speakers: range of the number of speakers, each equally loud.
    """

    path: str | None = None
    noise_prob: float = 0.25
    noise_snr_db: list[float] = field(default_factory=lambda: [0.0, 15.0])
    music_prob: float | None = None
    music_snr_db: list[float] = field(default_factory=lambda: [5.0, 15.0])
    babble_prob: float | None = None
    babble_snr_db: list[float] = field(default_factory=lambda: [13.0, 20.0])
    babble_speakers: list[int] = field(default_factory=lambda: [3, 7])

    def __post_init__(self) -> None:
        for kind in KINDS:
            check_probability(f"{kind}_prob", getattr(self, f"{kind}_prob") or 0.0)
            check_range(f"{kind}_snr_db", getattr(self, f"{kind}_snr_db"))
        total = self.noise_prob + (self.music_prob or 0.0) + (self.babble_prob or 0.0)
        if total > 1 + 1e-9:
            raise ValueError(f"noise_prob, music_prob and babble_prob add up to {total:g}; at most 1 is possible")
        check_range("babble_speakers", self.babble_speakers, least=1)


@cache
def noise_places(path: str) -> dict[str, tuple[Place, ...]]:
    """The recordings of each of ``KINDS``. Raises UserError if there are none at all."""
    found: dict[str, list[Place]] = {kind: [] for kind in KINDS}
    folder = Path(path).is_dir()
    for name, place in find_places(KEY, Path(path)).items():
        first = name.removeprefix("musan/").partition("/" if folder else "-")[0]
        kind = {"music": "music", "speech": "babble"}.get(first, "noise")
        found[kind].append(place)
    return {kind: tuple(places) for kind, places in found.items()}


def noise_probabilities(config: RecordedNoiseConfig) -> dict[str, float]:
    """The probability of each of ``KINDS``.

    Raises:
        UserError: there are no recordings at all, or none of a kind whose probability is set and not 0.
    """
    assert config.path is not None
    found = noise_places(config.path)
    wanted = {}
    for kind, folder in KINDS.items():
        given = getattr(config, f"{kind}_prob")
        if given and not found[kind]:
            raise UserError(
                f"{kind}_prob={given}, but {KEY}={config.path} holds no recordings of {folder}; set it to 0, or put "
                f"some into {folder}/ there"
            )
        wanted[kind] = given if given is not None else SHARE * bool(found[kind])
    # what is not set takes no more than the others leave
    left = max(0.0, 1 - sum(getattr(config, f"{kind}_prob") or 0.0 for kind in KINDS))
    open_kinds = [kind for kind in KINDS if getattr(config, f"{kind}_prob") is None]
    for kind in open_kinds:
        wanted[kind] = min(wanted[kind], left / len(open_kinds))
    return wanted


def draw_noise(
    config: RecordedNoiseConfig, rng: np.random.Generator, num_samples: int
) -> tuple[np.ndarray, float] | None:
    """What an utterance gets: float32 [num_samples] of any level at 16 kHz, and its signal-to-noise ratio in decibels;
    None for nothing.

    Raises:
        UserError: as ``noise_probabilities``; or a recording cannot be read, or there is only silence.
    """
    draw = rng.random()
    if num_samples == 0:
        return None
    probabilities = noise_probabilities(config)
    ends = dict(zip(probabilities, accumulate(probabilities.values()), strict=True))
    kind = next((kind for kind, end in ends.items() if draw < end), None)
    if kind is None:
        return None
    assert config.path is not None
    places = noise_places(config.path)[kind]
    low, high = getattr(config, f"{kind}_snr_db")
    snr_db = float(rng.uniform(low, high))
    if kind != "babble":
        return draw_sections(places, rng, num_samples), snr_db
    total = np.zeros(num_samples, dtype=np.float32)
    for _ in range(int(rng.integers(config.babble_speakers[0], config.babble_speakers[1] + 1))):
        speech = draw_sections(places, rng, num_samples)
        total += speech / np.float32(np.sqrt(np.mean(np.square(speech, dtype=np.float64))))
    return total, snr_db
