"""A small set of recordings of noise bursts, and what decoding needs around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from asr.config import Experiment
from asr.data.loader import DataConfig
from asr.data.tokenizer import Tokenizer
from asr.decoding import DecodingConfig

SYMBOLS = ["<blk>", "a", "b", "c", "▁"]


def tokenizer() -> Tokenizer:
    return Tokenizer("char", SYMBOLS)


def config(**decoding: Any) -> Experiment:
    """An experiment of which decoding reads these parts."""
    data = DataConfig(num_workers=0)
    data.features.storage = "on_the_fly"
    return Experiment(data=data, decoding=DecodingConfig(**decoding))


def bursts(num_samples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    loud = np.repeat(generator.random(num_samples // 1600 + 1) < 0.5, 1600)[:num_samples]
    return (generator.standard_normal(num_samples) * np.where(loud, 0.2, 0.001)).clip(-1, 1).astype(np.float32)


def write_cuts(folder: Path, texts: list[str]) -> CutSet:
    """One 16 kHz recording per text, lengths from 0.3 s on, ids in no order of length."""
    cuts = []
    for i, text in enumerate(texts):
        path = folder / f"utt-{i}.wav"
        soundfile.write(path, bursts(4800 + 3333 * ((7 * i) % 5), seed=i), 16_000, subtype="PCM_16")
        recording = Recording.from_file(path, recording_id=f"utt-{i}")
        supervision = SupervisionSegment(f"utt-{i}", recording.id, 0, recording.duration, text=text)
        cuts.append(MonoCut(f"utt-{i}", 0, recording.duration, 0, recording=recording, supervisions=[supervision]))
    return CutSet.from_cuts(cuts)
