"""Small recordings and cuts made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

RATE_HZ = 16000
WORDS = ("ONE", "TWO", "THREE", "FOUR", "FIVE")


def make_samples(num_samples: int, seed: int) -> np.ndarray:
    """Something with a spectrum that moves: float32 [num_samples] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(num_samples) / RATE_HZ
    tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * seed % 900) * time_s * (1 + time_s))
    return np.clip(tone + 0.02 * rng.standard_normal(num_samples), -1, 1).astype(np.float32)


def make_cut(
    path: Path, cut_id: str, text: str, num_samples: int, *, rate_hz: int = RATE_HZ, speaker: str = "ann"
) -> MonoCut:
    """A cut over a whole file, made without opening it."""
    duration = num_samples / rate_hz
    source = AudioSource(type="file", channels=[0], source=str(path))
    return MonoCut(
        id=cut_id,
        start=0.0,
        duration=duration,
        channel=0,
        recording=Recording(cut_id, [source], rate_hz, num_samples, duration),
        supervisions=[SupervisionSegment(cut_id, cut_id, 0.0, duration, text=text, speaker=speaker)],
    )


def write_cuts(folder: Path, durations_s: Sequence[float], *, prefix: str = "utt") -> list[MonoCut]:
    """One wav file and one cut per duration."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = []
    for i, duration_s in enumerate(durations_s):
        num_samples = round(duration_s * RATE_HZ)
        path = folder / f"{prefix}{i:03d}.wav"
        soundfile.write(path, make_samples(num_samples, i), RATE_HZ, subtype="PCM_16")
        text = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 3))
        cuts.append(make_cut(path, f"{prefix}{i:03d}", text, num_samples))
    return cuts
