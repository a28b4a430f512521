"""Background noise of unit power, as pure functions of a generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import fft

from asr.data.audio import SAMPLE_RATE_HZ
from recipes.corpora.audio import rms

KINDS = ("white", "pink", "brown", "babble")
_EXPONENTS = {"white": 0.0, "pink": 0.5, "brown": 1.0}
_LOWEST_HZ = 50.0


def coloured(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [length] of unit RMS; power over frequency: white f^0, pink f^-1, brown f^-2 (flat below 50 Hz)."""
    white = rng.standard_normal(length, dtype=np.float32)
    exponent = _EXPONENTS[kind]
    if exponent:
        padded = fft.next_fast_len(length, real=True)
        spectrum = fft.rfft(white, padded)
        frequency = np.maximum(fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ), _LOWEST_HZ)
        spectrum *= (frequency / _LOWEST_HZ).astype(np.float32) ** np.float32(-exponent)
        white = fft.irfft(spectrum, padded)[:length]
    return (white / max(rms(white), 1e-9)).astype(np.float32)


def babble(voices: Sequence[np.ndarray], length: int, rng: np.random.Generator, count: int = 6) -> np.ndarray:
    """float32 [length] of unit RMS: ``count`` random voices of equal level, over a faint pink floor."""
    mixture = 0.1 * coloured("pink", length, rng)
    for index in rng.choice(len(voices), size=count, replace=len(voices) < count):
        voice = np.roll(voices[index], -int(rng.integers(len(voices[index]))))
        mixture += np.resize(voice, length) / max(rms(voice), 1e-9) / np.sqrt(count)
    return (mixture / max(rms(mixture), 1e-9)).astype(np.float32)


def make(kind: str, length: int, rng: np.random.Generator, voices: Sequence[np.ndarray]) -> np.ndarray:
    """Noise of one of ``KINDS``; ``voices`` are what babble is mixed from."""
    return babble(voices, length, rng) if kind == "babble" else coloured(kind, length, rng)
