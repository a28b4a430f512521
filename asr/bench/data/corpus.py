"""Cuts of noise at the pace of speech for measurements: few files, as many cuts as are wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from lhotse import MonoCut

from asr.bench.processes import write_cut
from asr.bench.streaming.model import noise

FILES = 200


def write_corpus(folder: Path, count: int, seconds: float) -> list[MonoCut]:
    """``count`` cuts of 0.5 to 1.5 times ``seconds``, of at most 200 files (16 bit, 16 kHz) below ``folder``."""
    generator = np.random.default_rng(0)
    cuts = [
        write_cut(folder / f"{number:03d}.wav", noise(seconds * generator.uniform(0.5, 1.5), number), generator)
        for number in range(min(count, FILES))
    ]
    return [replace(cuts[number % len(cuts)], id=f"cut-{number}") for number in range(count)]
