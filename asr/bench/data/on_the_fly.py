"""CPU time that one process takes to read a cut, change its speed, add noise and compute features, in one thread.

One JSON object for each part that is switched on; the last is the default augmentation of a configuration: speeds 0.9,
1.0 and 1.1, level, noise for three utterances in ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import MonoCut

from asr.bench.data.corpus import write_corpus
from asr.bench.streaming.model import noise
from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.augmentation import AugmentConfig, expand_cuts
from asr.data.features import Fbank, compute_cut_features
from asr.data.manifests import load_cuts
from asr.data.recorded_noise import RecordedNoiseConfig
from asr.data.reverb import ReverbConfig

RECORDINGS = 10
"""Of each kind, for augmentation: noise, music and speech of two minutes, responses of rooms of a second."""


def _cases(folder: Path) -> dict[str, AugmentConfig]:
    """Each with one more part; recordings for augmentation are written into ``folder``."""
    plain: dict[str, Any] = {"speed_factors": [1.0], "volume_db": 0, "noise_prob": 0}
    for number in range(RECORDINGS):
        for kind in ("noise", "music", "speech"):
            _write(folder / "musan" / kind / f"{number}.wav", noise(120.0, number))
        decay = np.exp(-np.arange(SAMPLE_RATE_HZ) / (0.05 * SAMPLE_RATE_HZ))
        _write(folder / "rooms" / f"{number}.wav", noise(1.0, number) * decay)
    recorded = RecordedNoiseConfig(str(folder / "musan"), noise_prob=0.4, music_prob=0.3, babble_prob=0.3)
    return {
        "reading and features": AugmentConfig(**plain),
        "and noise for all": AugmentConfig(**plain | {"noise_prob": 1}),
        "and recorded noise, music or babble for all": AugmentConfig(**plain, recorded_noise=recorded),
        "and reverberation for all": AugmentConfig(**plain, reverb=ReverbConfig(str(folder / "rooms"), prob=1.0)),
        "and other speeds for all": AugmentConfig(**plain | {"speed_factors": [0.9, 1.1]}),
        "the default": AugmentConfig(),
    }


def _write(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE_HZ, subtype="PCM_16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--cuts", type=Path, help="manifest of recordings at 16 kHz; noise without it")
    parser.add_argument("--limit", type=int, default=200, help="cuts")
    parser.add_argument("--repeats", type=int, default=3, help="of each case, in turns; medians are printed")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cuts = list(load_cuts(args.cuts).drop_features()) if args.cuts else write_corpus(Path(name), args.limit, 6.0)
        cuts = cuts[: args.limit]
        cases = _cases(Path(name) / "augmentation")
        times: dict[str, list[float]] = {case: [] for case in cases}
        for repeat in range(args.repeats):
            for case, augment in cases.items():
                times[case].append(_cpu_s_per_audio_s(cuts, augment, repeat))
    for case, values in times.items():
        cpu_s = statistics.median(values)
        result = {"case": case, "cpu_ms_per_audio_s": round(1e3 * cpu_s, 3), "cores_at_40_times_real_time": 40 * cpu_s}
        spread = [round(40 * value, 4) for value in (min(values), max(values))]
        print(json.dumps({**result, "range": spread, "cuts": len(cuts)}))
    return 0


def _cpu_s_per_audio_s(cuts: list[MonoCut], augment: AugmentConfig, epoch: int) -> float:
    fbank = Fbank()
    expanded = expand_cuts(cuts, augment)
    for cut in (expanded[0], expanded[-1]):  # compiles
        compute_cut_features(cut, fbank, augment)
    begin = time.process_time()
    for cut in expanded:
        compute_cut_features(cut, fbank, augment, epoch=epoch)
    return (time.process_time() - begin) / sum(cut.duration for cut in expanded)
