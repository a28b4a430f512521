"""What training leaves out before it begins, so that no utterance ends it later."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr.config import Experiment
from asr.data.fbank import num_encoder_frames
from asr.data.manifests import save_cuts
from asr.training.train_data import load_train_data
from asr.training.trainer import TrainData
from losses.shapes import Lengths
from losses.simple import check_prune_range
from tests.asr.data.speech import WORDS, write_cuts
from tests.asr.training.runs import TOKENIZER, experiment, run

FAST = 1.25


def load(folder: Path, config: Experiment) -> TrainData:
    """Three cuts, of which the second has just as many tokens as frames at its own speed."""
    cuts = list(write_cuts(folder / "audio", [4.0, 4.2, 4.4]))
    frames = num_encoder_frames(cuts[1].num_samples, config.data.features)
    assert frames > num_encoder_frames(cuts[1].perturb_speed(FAST).num_samples, config.data.features)
    cuts[1].supervisions[0].text = " ".join((WORDS * frames)[:frames])
    paths = folder / "train.jsonl.gz", folder / "valid.jsonl.gz"
    for path in paths:
        save_cuts(cuts, path)
    return load_train_data(config, *paths, TOKENIZER, None, folder)


def on_the_fly(*speeds: float) -> Experiment:
    augment = f"data.augment={{speed_factors: {list(speeds)}, volume_db: 0, noise_prob: 0}}"
    return experiment("data.features.storage=on_the_fly", "data.max_bad_fraction=0.5", augment, "training.max_epochs=1")


def test_tokens_must_fit_at_the_fastest_speed_of_training(tmp_path: Path) -> None:
    config = on_the_fly(1.0, FAST)
    data = load(tmp_path, config)
    assert (len(data.train_cuts), len(data.valid_cuts)) == (2, 3), "validation plays cuts at their own speed"
    rows = (tmp_path / "bad_rows.txt").read_text().splitlines()
    assert len(rows) == 1 and "tokens are more than the" in rows[0] and "train.jsonl.gz" in rows[0]
    settings = ["data.features.storage=on_the_fly", "training.max_epochs=1", "loss.method=pruned"]
    augment = f"data.augment={{speed_factors: [1.0, {FAST}], volume_db: 0, noise_prob: 0}}"
    assert run(data, tmp_path / "out", *settings, augment).reason == "finished"


@pytest.mark.parametrize("speeds", [(1.0,), (0.8, 1.0)])
def test_slower_speeds_leave_nothing_out(tmp_path: Path, speeds: tuple[float, ...]) -> None:
    assert len(load(tmp_path, on_the_fly(*speeds)).train_cuts) == 3


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_every_prune_range_reaches_what_the_filter_lets_pass(topology: str) -> None:
    """One token a frame: no further filter is needed for loss.method=pruned."""
    for frames in range(1, 30):
        for tokens in range(1, frames + 1):
            for prune_range in range(2, 8):
                check_prune_range(Lengths((frames,), (tokens,)), prune_range, topology)
    if topology == "regular":
        with pytest.raises(ValueError, match="prune_range=2 cannot reach"):
            check_prune_range(Lengths((4,), (5,)), 2, topology)
