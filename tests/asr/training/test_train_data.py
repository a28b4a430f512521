"""What training leaves out before it begins, so that no utterance ends it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asr.config import Experiment
from asr.data.fbank import FeatureConfig, num_encoder_frames
from asr.data.loader import train_loader
from asr.data.manifests import save_cuts
from asr.data.shar_writing import write_shards
from asr.errors import UserError
from asr.training import train_data
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
    assert data.num_valid == 3
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


def test_what_was_checked_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tmp_path, on_the_fly(1.0))
    looked = []
    plain = train_data.checked_cuts

    def counting(cuts: Any, *args: Any, **kwargs: Any) -> Any:
        found = list(plain(cuts, *args, **kwargs))
        looked.append(len(found))
        return iter(found)

    monkeypatch.setattr(train_data, "checked_cuts", counting)
    again = load(tmp_path, on_the_fly(1.0))
    assert looked == [0, 0]
    for old, new in zip((first.train_cuts, first.valid_cuts), (again.train_cuts, again.valid_cuts), strict=True):
        assert [cut.id for cut in old] == [cut.id for cut in new]
        assert new.tokens.tolist() == [len(TOKENIZER.encode(cut.supervisions[0].text)) for cut in new]
    load(tmp_path, on_the_fly(1.0, FAST))  # another speed: training cuts are looked at, and one is bad
    assert looked[2:] == [3, 0]
    load(tmp_path, on_the_fly(1.0, FAST))
    assert looked[4:] == [1, 0]
    (tmp_path / "checked-train.npz").write_bytes(b"torn")
    assert len(load(tmp_path, on_the_fly(1.0, FAST)).train_cuts) == 2
    assert looked[6:] == [3, 0]


def test_a_mended_recording_is_used(tmp_path: Path) -> None:
    config = on_the_fly(1.0)
    load(tmp_path, config)
    path = next((tmp_path / "audio").rglob("*.wav"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    for name in ("train", "valid"):
        (tmp_path / f"checked-{name}.npz").unlink()
    paths = tmp_path / "train.jsonl.gz", tmp_path / "valid.jsonl.gz"
    assert len(load_train_data(config, *paths, TOKENIZER, None, tmp_path).train_cuts) == 2
    path.write_bytes(whole)
    assert len(load_train_data(config, *paths, TOKENIZER, None, tmp_path).train_cuts) == 3


def test_other_corpora_train_beside_the_own_one(tmp_path: Path) -> None:
    for name in ("own", "other"):
        load(tmp_path / name, on_the_fly(1.0))
    other = tmp_path / "other" / "train.jsonl.gz"
    settings = [f"data.more_cuts={{{other}: 0.34}}", "data.augment={speed_factors: [1.0], copies: 2}"]
    config = experiment("data.features.storage=on_the_fly", *settings)
    paths = tmp_path / "own" / "train.jsonl.gz", tmp_path / "own" / "valid.jsonl.gz"
    data = load_train_data(config, *paths, TOKENIZER, None, tmp_path / "run")
    assert len(data.train_cuts) == 6 and data.train_cuts.tokens.shape == (6,)
    for epoch in range(3):
        loader = train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=epoch)
        assert sum(batch.size for batch in loader) == 2 * 4
    with pytest.raises(UserError, match="more_cuts has .*: 2"):
        experiment("data.features.storage=stored", f"data.more_cuts={{{other}: 2.0}}")


def test_shards_are_looked_for_before_training(tmp_path: Path) -> None:
    paths = tmp_path / "train.jsonl.gz", tmp_path / "valid.jsonl.gz"
    valid = write_cuts(tmp_path / "audio", [0.9, 1.3, 0.7, 1.1])
    features = FeatureConfig(storage="shar", shard_cuts=2, num_jobs=1)
    save_cuts(write_shards(valid, tmp_path / "shards", features, 0), paths[0])
    save_cuts(valid, paths[1])
    settings = ["data.features.storage=shar", "training.max_epochs=2", "data.shar.window=1"]
    config = experiment(*settings)
    data = load_train_data(config, *paths, TOKENIZER, None, tmp_path)
    assert len(data.train_cuts) == 4
    assert run(data, tmp_path / "out", *settings).reason == "finished"
    more = experiment(*settings, f"data.more_cuts={{{paths[1]}: 0.5}}")
    with pytest.raises(UserError, match="cut utt000 lies in no shard; run the features stage with data.features.stor"):
        load_train_data(more, *paths, TOKENIZER, None, tmp_path)
    tar = tmp_path / "shards" / "recording.000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard \S+/shards/recording.000001.tar is truncated: \d+ bytes and no end"):
        load_train_data(config, *paths, TOKENIZER, None, tmp_path)
    tar.unlink()
    with pytest.raises(UserError, match=r"cannot read shard \S+/shards/recording.000001.tar: No such file"):
        load_train_data(config, *paths, TOKENIZER, None, tmp_path)


@pytest.mark.parametrize("key", ["recorded_noise", "reverb"])
def test_recordings_for_augmentation_are_looked_for_before_training(tmp_path: Path, key: str) -> None:
    (tmp_path / "empty").mkdir()
    setting = f"data.augment.{key}.path={tmp_path / 'empty'}"
    with pytest.raises(UserError, match=f"data.augment.{key}.path: the folder .*empty holds no audio files"):
        load(tmp_path, experiment("data.features.storage=on_the_fly", "data.max_bad_fraction=0.5", setting))
    (tmp_path / "empty" / "a.wav").write_bytes(b"")
    with pytest.raises(UserError, match="recording .*a.wav for augmentation: the file is empty"):
        load(tmp_path, experiment("data.features.storage=on_the_fly", "data.max_bad_fraction=0.5", setting))
