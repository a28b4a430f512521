"""Training runs of a second: a few short cuts with stored features, and a model of a few thousand parameters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet

from asr.checkpoint import read, step_checkpoints
from asr.config import Experiment, load_experiment
from asr.data.features import FeatureConfig, compute_features
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.training.metrics import ProgressLine
from asr.training.ranks import Ranks
from asr.training.trainer import TrainData, Trainer, TrainResult, train
from tests.asr.data.speech import WORDS, write_cuts

DURATIONS_S = [0.5 + 0.06 * (5 * i % 11) for i in range(11)]
TOKENIZER = Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))

# differences from the defaults; a test's own settings come after them
SETTINGS = [
    "name=tiny",
    "tokenizer.kind=word",
    "model.preset=xs",
    "model.encoder={dim: 16, num_layers: 1, num_heads: 2, ff_dim: 32, conv_kernel: 3, subsampling_channels: 4}",
    "model.predictor.dim=16",
    "model.joiner.dim=16",
    "data.num_workers=0",
    "data.max_duration_s=2.5",
    "data.num_buckets=2",
    "data.augment={speed_factors: [1.0], volume_db: 0, noise_prob: 0}",
    "optim.warmup_steps=3",
    "training={max_epochs: 2, precision: fp32, log_every_steps: 1, checkpoint_every_steps: 2, tensorboard: false}",
]
CLOCK = ("time_s", "audio_s_per_s", "data_wait_fraction")
"""What a record says of the clock: it differs between equal runs."""
NO_DROPOUT = ["model.encoder.dropout=0", "model.predictor.dropout=0", "data.spec_augment.prob=0"]


def experiment(*overrides: str) -> Experiment:
    return load_experiment(None, [*SETTINGS, *overrides])


def write_data(folder: Path) -> tuple[CutSet, CutSet]:
    """Cuts with stored features below ``folder``: for training, and a few for validation."""
    sets = []
    for name, durations in (("train", DURATIONS_S), ("valid", DURATIONS_S[:3])):
        cuts = write_cuts(folder / "audio" / name, durations, prefix=name)
        sets.append(compute_features(cuts, folder / "features" / name, FeatureConfig(), None, 0))
        sets[-1].to_file(folder / f"cuts_{name}.jsonl.gz")
    return sets[0], sets[1]


def read_data(folder: Path) -> TrainData:
    """What :func:`write_data` left."""
    train, valid = (CutSet.from_file(folder / f"cuts_{name}.jsonl.gz").to_eager() for name in ("train", "valid"))
    return TrainData(train, valid, TOKENIZER)


def run(data: TrainData, out: Path, *settings: str, resume: str = "auto") -> TrainResult:
    return train(experiment(*settings), data, out, resume=resume, command="asr train --config a.yaml")


def make_trainer(
    config: Experiment, data: TrainData, out: Path, ranks: Ranks | None = None, device: str = "cpu"
) -> Trainer:
    trainer = Trainer(config, data, out, device, "asr train", ranks)
    trainer.line = ProgressLine(io.StringIO())
    return trainer


def spoil(cuts: CutSet, cut_id: str) -> None:
    """Writes NaN over the stored features of one cut."""
    features = cuts[cut_id].features
    first, frames, bins = (int(part) for part in features.storage_key.split(":"))
    with open(features.storage_path, "r+b") as file:
        file.seek(first)
        file.write(np.full((frames, bins), np.nan, dtype="<f4").tobytes())


def records(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all of them readable."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def newest(out: Path) -> dict[str, Any]:
    """The content of the newest checkpoint."""
    return read(step_checkpoints(out / "checkpoints")[-1])


def state_of(out: Path) -> dict[str, Any]:
    """The newest checkpoint without the time it took."""
    payload = newest(out)
    del payload["training"]["progress"]["time_s"]
    return payload


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Where two trees of tensors and plain values are not equal to the bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.numpy().tobytes() == right.numpy().tobytes()
        )
        return [] if same else [where]
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        return [d for i, (a, b) in enumerate(zip(left, right, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if left == right else [f"{where}: {left!r} and {right!r}"]
