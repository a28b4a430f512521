"""A small imitation of the yesno corpus, and the settings that run its recipe in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 8000
FREQUENCY_HZ = {"0": 400.0, "1": 1200.0}

CONFIG = """
name: tiny
model: {preset: xs}
tokenizer: {kind: word}
data:
  num_workers: 0
  max_duration_s: 25
  augment: {speed_factors: [1.0], noise_prob: 0.0}
training:
  max_epochs: 2
  checkpoint_every_steps: 2
  log_every_steps: 1
  precision: fp32
  tensorboard: false
average: {last: [1, 2]}
"""


def write_corpus(folder: Path, count: int = 60) -> None:
    """``count`` recordings of eight tones, low for 0 and high for 1, named like those of yesno."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    time_s = np.arange(int(0.22 * RATE_HZ)) / RATE_HZ
    window = np.hanning(len(time_s))
    pause = np.zeros(int(0.12 * RATE_HZ))
    for number in range(count):
        name = f"{number * 4:08b}"
        tones = [0.5 * window * np.sin(2 * np.pi * FREQUENCY_HZ[digit] * time_s) for digit in name]
        samples = np.concatenate([pause, *(part for tone in tones for part in (tone, pause))])
        samples += 0.001 * rng.standard_normal(len(samples))
        soundfile.write(folder / f"{'_'.join(name)}.wav", samples, RATE_HZ, subtype="PCM_16")


def write_config(path: Path) -> Path:
    path.write_text(CONFIG, encoding="utf-8")
    return path
