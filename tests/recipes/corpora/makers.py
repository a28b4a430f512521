"""Small corpora in the official layouts, of tones and noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 8000
TONE_HZ = {"0": 400.0, "1": 1200.0}


def tone(frequency_hz: float, duration_s: float, level: float = 0.3) -> np.ndarray:
    """A tone with soft edges, float64 [duration * 8000]."""
    time = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    return level * np.sin(2 * np.pi * frequency_hz * time) * np.minimum(1, 50 * np.minimum(time, time[-1] - time))


def write_8khz(path: Path, samples: np.ndarray) -> None:
    """A wav file as both corpora have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), samples, RATE_HZ, subtype="PCM_16")


def make_yesno(folder: Path) -> Path:
    """60 recordings: the digit 0 is a low tone, 1 a high one."""
    rng = np.random.default_rng(0)
    for number in rng.permutation(256)[:60]:
        digits = f"{number:08b}"
        pieces = [np.zeros(int(rng.uniform(0.5, 0.9) * RATE_HZ))]
        for digit in digits:
            pieces += [tone(TONE_HZ[digit], rng.uniform(0.3, 0.4)), np.zeros(int(rng.uniform(0.15, 0.3) * RATE_HZ))]
        pieces.append(np.zeros(int(0.5 * RATE_HZ)))
        samples = np.concatenate(pieces)
        write_8khz(folder / f"{'_'.join(digits)}.wav", samples + 1e-3 * rng.standard_normal(len(samples)))
    return folder


def make_fsdd(folder: Path, speakers: Sequence[str] = ("ann", "bob", "cy"), num_indices: int = 10) -> Path:
    """Recordings 0 to ``num_indices`` - 1 of ten digits: short tones, one pitch for each digit."""
    rng = np.random.default_rng(0)
    for speaker in speakers:
        for digit in range(10):
            for index in range(num_indices):
                samples = tone(300.0 + 200 * digit, rng.uniform(0.15, 0.3), level=0.2)
                noisy = samples + 1e-3 * rng.standard_normal(len(samples))
                write_8khz(folder / "recordings" / f"{digit}_{speaker}_{index}.wav", noisy)
    return folder


def write_16khz(path: Path, duration_s: float = 0.5, seed: int = 0, channels: int = 1, rate_hz: int = 16000) -> None:
    """A recording of noise, FLAC or wav by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.05 * np.random.default_rng(seed).standard_normal((int(duration_s * rate_hz), channels))
    soundfile.write(str(path), samples, rate_hz, subtype="PCM_16")


def make_librispeech(folder: Path, parts: Sequence[str]) -> Path:
    """Two speakers with two utterances in each official folder."""
    for place, part in enumerate(parts):
        for speaker in (10 * place + 1, 10 * place + 2):
            chapter = folder / "LibriSpeech" / part / str(speaker) / "77"
            lines = []
            for number in range(2):
                name = f"{speaker}-77-{number:04d}"
                write_16khz(chapter / f"{name}.flac", seed=100 * speaker + number)
                lines.append(f"{name} THE CAT {'SAT' if number else 'CAME'}\n")
            (chapter / f"{speaker}-77.trans.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def make_aishell(folder: Path) -> Path:
    """Two utterances in each of train, dev and test, and a text without a recording."""
    lines = ["BAC009S0900W0001 没 有\n"]
    for place, split in enumerate(("train", "dev", "test")):
        for number in range(2):
            name = f"BAC009S{place:04d}W{number:04d}"
            speaker = folder / "data_aishell" / "wav" / split / f"S{place:04d}"
            write_16khz(speaker / f"{name}.wav", seed=place + 9 * number)
            lines.append(f"{name} 今天  天气 ｂ好\n")
    transcript = folder / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    transcript.parent.mkdir(parents=True)
    transcript.write_text("".join(lines), encoding="utf-8")
    return folder
