"""Silence around utterances and utterances that are joined: what an epoch holds, and the batches of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut

from asr.data.augmentation import AugmentConfig, SpecAugmentConfig
from asr.data.batch import Batch
from asr.data.features import Fbank, FeatureConfig, load_samples, num_encoder_frames, pad_tail
from asr.data.loader import DataConfig, train_loader
from asr.data.recorded_noise import RecordedNoiseConfig
from asr.data.reverb import ReverbConfig
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.data.utterances import Utterances
from tests.asr.data.speech import RATE_HZ, WORDS, make_samples, write_cuts

TOKENIZER = Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))
DURATIONS_S = [0.31 + 0.17 * (7 * i % 13) for i in range(13)]
PLAIN = AugmentConfig(speed_factors=[1.0], volume_db=0, noise_snr_db=[])
JOINED = replace(PLAIN, concat_prob=0.6, concat_max_s=5.0, pad_front_ms=[20, 300], pad_behind_ms=[0, 150])
FLY = DataConfig(
    features=FeatureConfig(storage="on_the_fly"),
    augment=JOINED,
    spec_augment=SpecAugmentConfig(prob=0),
    max_duration_s=8,
    num_buckets=3,
    num_workers=0,
)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[MonoCut]:
    return write_cuts(tmp_path_factory.mktemp("audio"), DURATIONS_S)


def load(cuts, config: DataConfig, epoch: int = 0, skip: int = 0, **place) -> list[Batch]:
    return list(train_loader(cuts, TOKENIZER, config, seed=1, epoch=epoch, skip_batches=skip, **place))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert (a.cut_ids, a.texts, a.durations_s) == (b.cut_ids, b.texts, b.durations_s)
        for name in ("features", "feature_lens", "targets", "target_lens"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.05, 30.0), min_size=1, max_size=60),
    front=st.tuples(st.floats(0, 500), st.floats(0, 500)).map(sorted),
    behind=st.tuples(st.floats(0, 500), st.floats(0, 500)).map(sorted),
    prob=st.floats(0, 1),
    max_s=st.floats(0.1, 60),
    epoch=st.integers(0, 3),
)
def test_every_cut_comes_once_within_all_bounds(
    durations: list[float], front: list[float], behind: list[float], prob: float, max_s: float, epoch: int
) -> None:
    cuts = [SimpleNamespace(id=str(i), duration=s, num_samples=round(s * RATE_HZ)) for i, s in enumerate(durations)]
    config = replace(PLAIN, concat_prob=prob, pad_front_ms=list(front), pad_behind_ms=list(behind))

    def make() -> Utterances:
        # no two even numbers
        fits = lambda first, second, num_samples: (first + second) % 2 == 1  # noqa: E731
        return Utterances(cuts, config, seed=0, epoch=epoch, max_s=max_s, fits=fits)

    found = make()
    rows = list(found)
    assert sorted(int(cut.id) for row in rows for cut in row.cuts) == list(range(len(cuts)))
    for row, duration_s in zip(rows, found.durations_s, strict=True):
        assert abs(row.num_samples - duration_s * RATE_HZ) <= 2
        assert len(row.cuts) == 1 or duration_s <= max_s + 2 / RATE_HZ
        assert len(row.cuts) == 1 or sum(int(cut.id) for cut in row.cuts) % 2 == 1
        for before, after in row.silence:
            assert front[0] - 0.1 <= before / 16 <= front[1] + 0.1 and behind[0] - 0.1 <= after / 16 <= behind[1] + 0.1
    assert rows == list(make())


def test_utterances_are_joined_as_often_as_asked_for() -> None:
    cuts = [SimpleNamespace(id=str(i), duration=1.0) for i in range(4000)]
    for prob in (0.0, 0.3, 1.0):
        found = Utterances(cuts, replace(PLAIN, concat_prob=prob), max_s=20)
        assert np.mean(found.members[:, 1] >= 0) == pytest.approx(prob, abs=0.04)
    first, second = (Utterances(cuts, JOINED, epoch=epoch, max_s=20).members.tolist() for epoch in (0, 1))
    assert first != second


def test_batches_hold_silence_and_both_utterances(cuts: list[MonoCut]) -> None:
    batches = load(cuts, FLY)
    by_id = {cut.id: cut for cut in cuts}
    joined = 0
    for batch in batches:
        padded_s = []
        for i, name in enumerate(batch.cut_ids):
            members = [by_id[part] for part in name.split("+")]
            joined += len(members) - 1
            words = " ".join(cut.supervisions[0].text for cut in members)
            assert batch.texts[i] == words == TOKENIZER.decode(batch.targets[i, : batch.target_lens[i]].tolist())
            assert batch.durations_s[i] == pytest.approx(sum(cut.duration for cut in members))
            audio_s = sum(cut.duration for cut in members)
            assert batch.target_lens[i] <= (batch.feature_lens[i] - 3) // 4
            padded_s.append((float(batch.feature_lens[i]) - 3) / 100 - 0.32)
            assert audio_s <= padded_s[-1] + 1e-6
        assert batch.size == 1 or batch.size * (max(padded_s) - 0.32) <= 8
    assert joined >= 2 and sorted(part for b in batches for name in b.cut_ids for part in name.split("+")) == [
        cut.id for cut in cuts
    ]


def test_features_are_those_of_the_joined_audio(cuts: list[MonoCut]) -> None:
    utterances = Utterances(cuts, JOINED, seed=1, epoch=0, max_s=5.0)
    row = next(row for row in utterances if len(row.cuts) == 2)
    parts = []
    for cut, (front, behind) in zip(row.cuts, row.silence, strict=True):
        parts += [np.zeros(front, np.float32), load_samples(cut), np.zeros(behind, np.float32)]
    expected = Fbank().extract(pad_tail(np.concatenate(parts), FeatureConfig()))
    (batch,) = [batch for batch in load(cuts, FLY) if row.id in batch.cut_ids]
    i = batch.cut_ids.index(row.id)
    np.testing.assert_array_equal(batch.features[i, : batch.feature_lens[i]].numpy(), expected)


def test_joined_utterances_have_a_frame_for_each_token(tmp_path: Path) -> None:
    """Each of them spends the frames of its silent tail too, of which two together have but one."""
    cuts = write_cuts(tmp_path, [0.3] * 8)
    frames = num_encoder_frames(cuts[0].num_samples, FLY.features)
    for number, cut in enumerate(cuts):
        cut.supervisions[0].text = " ".join((WORDS * frames)[: frames if number < 4 else 1])
    config = replace(FLY, augment=replace(PLAIN, concat_prob=1.0))
    joined = 0
    for epoch in range(4):
        for batch in load(cuts, config, epoch=epoch):
            assert (batch.target_lens <= (batch.feature_lens - 3) // 4).all()
            joined += sum("+" in name for name in batch.cut_ids)
    assert joined > 0


def test_the_lattice_bounds_joined_batches(cuts: list[MonoCut]) -> None:
    config = replace(FLY, max_lattice_cells=400)
    batches = load(cuts, config)
    assert len(batches) > len(load(cuts, FLY))
    for batch in batches:
        frames = int(((batch.feature_lens - 3) // 4).max())
        assert batch.size == 1 or batch.size * frames * (int(batch.target_lens.max()) + 1) <= 400
    assert_same(batches[2:], load(cuts, config, skip=2))


def test_in_order_neighbours_are_joined(cuts: list[MonoCut]) -> None:
    config = replace(FLY, shuffle=False, num_buckets=1, augment=replace(PLAIN, concat_prob=1.0, concat_max_s=8.0))
    names = [part for batch in load(cuts, config) for name in batch.cut_ids for part in name.split("+")]
    assert names == [cut.id for cut in cuts]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """All that draws random numbers at once."""
    root = tmp_path_factory.mktemp("sounds")
    for kind in ("noise", "music", "speech"):
        for number in range(3):
            (root / kind).mkdir(exist_ok=True)
            soundfile.write(root / kind / f"{number}.flac", make_samples(9000 + 7000 * number, number), RATE_HZ)
    (root / "rirs").mkdir()
    for number in range(3):
        response = make_samples(2000, number) * np.exp(-np.arange(2000) / 300)
        soundfile.write(root / "rirs" / f"{number}.wav", response, RATE_HZ)
    augment = replace(
        JOINED,
        speed_factors=[0.9, 1.0],
        volume_db=6,
        noise_snr_db=[10, 20],
        noise_prob=0.5,
        recorded_noise=RecordedNoiseConfig(str(root), noise_prob=0.3, music_prob=0.3, babble_prob=0.3),
        reverb=ReverbConfig(str(root / "rirs"), prob=0.5),
    )
    return replace(FLY, augment=augment, spec_augment=SpecAugmentConfig(time_warp_max_frames=20))


def test_bits_depend_on_seed_epoch_and_number_alone(cuts: list[MonoCut], everything: DataConfig) -> None:
    expected = load(cuts, everything, epoch=2)
    assert any("+" in name for batch in expected for name in batch.cut_ids)
    workers = replace(everything, num_workers=2)
    assert_same(load(cuts, workers, epoch=2), expected)
    for skip in (1, len(expected) - 1):
        assert_same(load(cuts, workers, epoch=2, skip=skip), expected[skip:])
    shares = [load(cuts, everything, epoch=2, rank=rank, size=2) for rank in (0, 1)]
    assert_same(shares[0], expected[0::2])
    assert_same(shares[1][: len(expected[1::2])], expected[1::2])
    other = load(cuts, everything, epoch=3)
    assert [batch.cut_ids for batch in other] != [batch.cut_ids for batch in expected]


def test_stored_features_are_of_single_cuts() -> None:
    for augment, named in (
        (replace(PLAIN, concat_prob=0.3), "augment.concat_prob=0.3"),
        (replace(PLAIN, pad_front_ms=[0, 100]), r"augment.pad_front_ms=\[0, 100\]"),
    ):
        with pytest.raises(ValueError, match=f"{named} needs features.storage=on_the_fly"):
            DataConfig(augment=augment)


@pytest.mark.parametrize(
    ("kind", "texts", "joined"),
    [("char", ["你好", "世界"], "你好世界"), ("char", ["A B", "B"], "A B B"), ("word", ["A", "B A "], "A B A")],
)
def test_texts_are_joined_as_they_are_spelt(kind, texts: list[str], joined: str) -> None:
    tokenizer = Tokenizer.train(texts, TokenizerConfig(kind))
    assert tokenizer.join(texts) == joined
    tokens = tokenizer.encode(joined)
    assert tokenizer.decode(tokens) == joined
    assert len(tokens) <= sum(len(tokenizer.encode(text)) for text in texts) + 1
