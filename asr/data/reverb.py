"""Reverberation with room impulse responses (Ko et al. 2017, "A study on data augmentation of reverberant speech for
robust speech recognition")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.recordings import MOST_DRAWS, Place, RecordingError, find_places
from asr.data.value_checks import check_probability
from asr.errors import UserError

KEY = "data.augment.reverb.path"
LONGEST_S = 10.0
"""Of a response; more is read of none."""


@dataclass
class ReverbConfig:
    """Reverberation. Times of words stay: the direct path has no delay, and the echo behind the end is cut off.

    Args:
        path: folder or lhotse manifest of room impulse responses, with one channel or several, of which one is drawn;
            null turns reverberation off. Of RIRS_NOISES (OpenSLR 28) the responses are taken and not the noises.
        prob: probability that an utterance is reverberated.
    """

    path: str | None = None
    prob: float = 0.3

    def __post_init__(self) -> None:
        check_probability("prob", self.prob)


@cache
def response_places(path: str) -> tuple[Place, ...]:
    """The responses of a folder or manifest. Raises UserError if there are none."""
    found = find_places(KEY, Path(path))
    names = {name: name.removeprefix("RIRS_NOISES/").split("/") for name in found}
    if any(parts[0] in ("simulated_rirs", "real_rirs_isotropic_noises") for parts in names.values()):
        rooms = [
            place
            for place, parts in zip(found.values(), names.values(), strict=True)
            if parts[0] == "simulated_rirs" or (parts[0].startswith("real_rirs") and "noise" not in parts[-1].lower())
        ]
        if not rooms:
            raise UserError(f"{KEY}: {path} holds noises of RIRS_NOISES only, no room responses")
        return tuple(rooms)
    return tuple(found.values())


def draw_response(path: str, rng: np.random.Generator) -> np.ndarray:
    """One channel of a random response, float32 [K] at 16 kHz with a peak of 1; one without a peak is skipped.

    Raises:
        UserError: there are no responses, or all are silent; or one cannot be read.
    """
    places = response_places(path)
    for _ in range(MOST_DRAWS):
        chosen = places[int(rng.integers(len(places)))]
        response = chosen.read(int(LONGEST_S * SAMPLE_RATE_HZ), 0.0, rng.random())
        peak = float(np.abs(response).max())
        if peak > 0:
            return response / np.float32(peak)
    raise RecordingError(f"{MOST_DRAWS} room responses are silent, the last is {chosen.path}; remove them")


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Samples as they sound in a room.

    Args:
        samples: float32 [N].
        response: float32 [K], of which the largest value is the direct path.

    Returns:
        float32 [N] with the energy of ``samples``; what reaches the microphone by the direct path is where it was.
    """
    energy = float(np.sum(np.square(samples, dtype=np.float64)))
    if energy == 0.0:
        return samples
    direct = int(np.argmax(np.abs(response)))
    size = next_fast_len(samples.size + response.size - 1, real=True)
    heard = irfft(rfft(samples, size) * rfft(response, size), size)[direct : direct + samples.size]
    heard_energy = float(np.sum(np.square(heard, dtype=np.float64)))
    if heard_energy == 0.0:
        return samples
    return np.asarray(heard * np.float32(np.sqrt(energy / heard_energy)), dtype=np.float32)
