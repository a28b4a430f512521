"""Cuts of noise at the pace of speech for measurements: few files, as many cuts as are wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
from lhotse import MonoCut, Recording, SupervisionSegment

from asr.bench.processes import WORDS
from asr.bench.streaming.model import noise
from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.tokenizer import Tokenizer, TokenizerConfig

FILES = 200
WORDS_PER_S = 2.0


def write_corpus(folder: Path, count: int, seconds: float) -> list[MonoCut]:
    """``count`` cuts of 0.5 to 1.5 times ``seconds``, of at most 200 files (16 bit, 16 kHz) below ``folder``."""
    generator = np.random.default_rng(0)
    cuts = []
    for number in range(min(count, FILES)):
        path = folder / f"{number:03d}.wav"
        samples = noise(seconds * generator.uniform(0.5, 1.5), number)
        soundfile.write(path, samples, SAMPLE_RATE_HZ, subtype="PCM_16")
        recording = Recording.from_file(path)
        text = " ".join(generator.choice(WORDS, max(1, round(WORDS_PER_S * recording.duration))))
        supervision = SupervisionSegment(path.stem, recording.id, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(path.stem, 0.0, recording.duration, 0, recording=recording, supervisions=[supervision]))
    return [replace(cuts[number % len(cuts)], id=f"cut-{number}") for number in range(count)]


def word_tokenizer() -> Tokenizer:
    """Of the words that the cuts have."""
    return Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))
