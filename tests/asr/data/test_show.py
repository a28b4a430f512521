"""What `asr show-data` shows is what the loader hands to training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lhotse import MonoCut

from asr.data.augmentation import AugmentConfig, SpecAugmentConfig
from asr.data.features import FeatureConfig, compute_features, load_samples
from asr.data.loader import DataConfig, train_loader
from asr.data.packed_cuts import PackedCuts
from asr.data.shar_writing import write_shards
from asr.data.show import ShownCut, choose_cuts, show_cut
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from tests.asr.data.speech import WORDS, write_cuts

TOKENIZER = Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))
FLY = DataConfig(
    features=FeatureConfig(storage="on_the_fly"),
    augment=AugmentConfig(noise_prob=0.5),
    spec_augment=SpecAugmentConfig(prob=0.7),
    num_workers=0,
)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[MonoCut]:
    return write_cuts(tmp_path_factory.mktemp("audio"), [0.9, 1.3, 0.7, 1.1])


def batches_of(cuts, config: DataConfig, seed: int, epoch: int) -> dict[str, np.ndarray]:
    found = {}
    for batch in train_loader(cuts, TOKENIZER, config, seed=seed, epoch=epoch):
        for i, cut_id in enumerate(batch.cut_ids):
            found[cut_id] = batch.features[i, : batch.feature_lens[i]].numpy()
    return found


def shown(cuts, config: DataConfig, seed: int, epoch: int, count: int = 100) -> dict[str, ShownCut]:
    chosen = choose_cuts(PackedCuts(cuts), config, count, seed=seed, epoch=epoch)
    return {cut.id: show_cut(cut, TOKENIZER, config, seed=seed, epoch=epoch) for cut in chosen}


def test_features_are_those_of_training_to_the_bit(cuts: list[MonoCut]) -> None:
    trained, seen = batches_of(cuts, FLY, 3, 2), shown(cuts, FLY, 3, 2)
    assert seen.keys() == trained.keys() and len(seen) == 12
    for cut_id, one in seen.items():
        np.testing.assert_array_equal(one.after, trained[cut_id])
    assert {one.speed for one in seen.values()} == {0.9, 1.0, 1.1}
    other = shown(cuts, FLY, 3, 1)
    assert all((other[cut_id].after != one.after).any() for cut_id, one in seen.items())


def test_what_was_drawn_is_what_was_done(cuts: list[MonoCut]) -> None:
    by_id = {cut.id: cut for cut in cuts}
    quiet = replace(FLY, augment=replace(FLY.augment, noise_prob=0.0), spec_augment=SpecAugmentConfig(prob=0))
    for cut_id, one in shown(cuts, quiet, 0, 0).items():
        plain = by_id[cut_id.split("_")[0]]
        np.testing.assert_array_equal(one.samples_before, load_samples(plain))
        played = plain if one.speed == 1 else plain.perturb_speed(one.speed)
        gain = np.float32(10 ** (one.drawn["gain_db"] / 20))
        np.testing.assert_array_equal(one.samples_after, load_samples(played) * gain)
        assert one.drawn.keys() == {"gain_db"}
        assert [symbol.strip("\u2581") for symbol in one.tokens] == one.text.split()
    noisy = replace(FLY, augment=AugmentConfig(speed_factors=[1.0], volume_db=0, noise_prob=1.0))
    for one in shown(cuts, noisy, 0, 0).values():
        added = one.samples_after.astype(np.float64) - one.samples_before
        ratio = 10 * np.log10(np.mean(one.samples_before.astype(np.float64) ** 2) / np.mean(added**2))
        assert ratio == pytest.approx(one.drawn["snr_db"], abs=0.05)
    masked = replace(quiet, augment=replace(noisy.augment, noise_prob=0.0), spec_augment=SpecAugmentConfig(prob=1.0))
    for one in shown(cuts, masked, 0, 0).values():
        rows, columns = np.nonzero(one.after != one.before)
        frames = {i for start, width in one.drawn["masked_frames"] for i in range(start, start + width)}
        bins = {i for start, width in one.drawn["masked_bins"] for i in range(start, start + width)}
        assert all(row in frames or column in bins for row, column in zip(rows, columns, strict=True))
        assert bins <= set(columns) and frames <= set(rows)


def test_stored_features_are_shown_without_their_sound(cuts: list[MonoCut], tmp_path: Path) -> None:
    config = replace(FLY, features=FeatureConfig())
    stored = list(compute_features(cuts, tmp_path / "train", config.features, config.augment, 0))
    trained, seen = batches_of(stored, config, 1, 4), shown(stored, config, 1, 4)
    assert seen.keys() == trained.keys()
    for cut_id, one in seen.items():
        np.testing.assert_array_equal(one.after, trained[cut_id])
        assert one.samples_after is None and "gain_db" not in one.drawn
        plain = next(cut for cut in cuts if cut.id == cut_id.split("_")[0])
        np.testing.assert_array_equal(one.samples_before, load_samples(plain))
    for cut in cuts:
        Path(cut.recording.sources[0].source).rename(tmp_path / f"{cut.id}.wav")
    gone = shown(stored, config, 1, 4)
    assert all(one.before is None and one.problem.startswith("no sound: ") for one in gone.values())
    with pytest.raises(UserError, match="cannot"):
        shown(cuts, FLY, 1, 4)
    for cut in cuts:
        (tmp_path / f"{cut.id}.wav").rename(cut.recording.sources[0].source)


def test_cuts_of_shards_are_shown_as_those_of_files(cuts: list[MonoCut], tmp_path: Path) -> None:
    config = replace(FLY, features=FeatureConfig(storage="shar", num_jobs=1))
    sharded = write_shards(cuts, tmp_path / "train", config.features, 0)
    seen, files = shown(sharded, config, 3, 2), shown(cuts, FLY, 3, 2)
    assert seen.keys() == files.keys() and len(seen) == 12
    for cut_id, one in seen.items():
        assert (one.problem, one.speed) == ("", files[cut_id].speed)
        for name in ("before", "after", "samples_before", "samples_after"):
            np.testing.assert_array_equal(getattr(one, name), getattr(files[cut_id], name))
