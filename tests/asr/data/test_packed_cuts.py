from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import MonoCut

from asr.data.augmentation import AugmentConfig, expand_cuts
from asr.data.manifests import save_cuts
from asr.data.packed_cuts import (
    BLOCK,
    ExpandedCuts,
    JoinedCuts,
    PackedCuts,
    cuts_of_epoch,
    durations_of,
    mean_share,
)
from asr.errors import UserError
from tests.asr.data.speech import write_cuts


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[MonoCut]:
    few = write_cuts(tmp_path_factory.mktemp("audio"), [0.5 + 0.0613 * n for n in range(7)])
    return [few[n % 7].with_id(f"cut-{n}") for n in range(2 * BLOCK + 5)]


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_cuts_come_back_from_a_manifest(name: str, cuts: list[MonoCut], tmp_path: Path) -> None:
    save_cuts(cuts, tmp_path / name)
    packed = PackedCuts.open(tmp_path / name)
    assert list(packed) == cuts
    assert [packed[n] for n in (0, BLOCK - 1, BLOCK, -1)] == [cuts[n] for n in (0, BLOCK - 1, BLOCK, -1)]
    assert packed[3:70:9] == cuts[3:70:9]
    np.testing.assert_array_equal(packed.durations_s, [cut.duration for cut in cuts])
    with pytest.raises(IndexError):
        packed[len(cuts)]


def test_cuts_that_are_there_are_packed(cuts: list[MonoCut]) -> None:
    assert list(PackedCuts(cuts)) == cuts
    assert len(PackedCuts()) == 0 and list(PackedCuts()) == []


def test_some_are_kept(cuts: list[MonoCut]) -> None:
    numbers = [1, BLOCK, len(cuts) - 1]
    assert list(PackedCuts(cuts).keep(numbers)) == [cuts[n] for n in numbers]


@pytest.mark.parametrize(
    "config",
    [AugmentConfig(), AugmentConfig(speed_factors=[1.1, 0.9], copies=2), AugmentConfig(speed_factors=[1.0])],
)
def test_expanded_cuts_are_those_of_the_whole_list(config: AugmentConfig, cuts: list[MonoCut]) -> None:
    expected = expand_cuts(cuts, config)
    for plain in (cuts, PackedCuts(cuts)):
        expanded = ExpandedCuts(plain, config)
        assert list(expanded) == expected
        assert expanded[2:9:3] == expected[2:9:3]
        np.testing.assert_array_equal(durations_of(expanded), durations_of(expected))
    with pytest.raises(IndexError):
        expanded[len(expected)]


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.5, 1.37])
def test_durations_at_other_speeds_are_lhotses(factor: float, cuts: list[MonoCut]) -> None:
    config = AugmentConfig(speed_factors=[factor])
    many = [cut.truncate(duration=n / 16000) for cut in cuts[:2] for n in range(4000, 4100)]
    np.testing.assert_array_equal(
        durations_of(ExpandedCuts(many, config)), [c.duration for c in expand_cuts(many, config)]
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", r"cuts.jsonl:2: this is not a cut \(JSONDecodeError"),
        ('{"id": "b"}', r"cuts.jsonl:2: this is not a cut \(KeyError: 'duration'\)"),
        ("[]", r"cuts.jsonl:2: this is not a cut \(TypeError"),
        (None, r"cuts.jsonl:2: id 'cut-0' is in line 1 too; ids must be unique"),
    ],
)
def test_a_line_that_is_no_cut_is_named(second: str | None, message: str, cuts: list[MonoCut], tmp_path: Path) -> None:
    path = tmp_path / "cuts.jsonl"
    save_cuts(cuts[:1], path)
    first = path.read_text()
    path.write_text(first + (first if second is None else second + "\n"))
    with pytest.raises(UserError, match=message):
        PackedCuts.open(path)


def test_what_is_no_cut_after_all_is_named_when_it_is_read(cuts: list[MonoCut], tmp_path: Path) -> None:
    path = tmp_path / "cuts.jsonl"
    save_cuts(cuts[:1], path)
    path.write_text(path.read_text() + '{"id": "b", "duration": 1, "type": "MonoCut", "wrong": 1}\n')
    with pytest.raises(UserError, match="cuts.jsonl:2: this is not a cut"):
        list(PackedCuts.open(path))


def test_manifests_that_cannot_be_read(cuts: list[MonoCut], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        PackedCuts.open(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl holds no cuts"):
        PackedCuts.open(tmp_path / "empty.jsonl")
    save_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    whole = (tmp_path / "cuts.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz:\d+: the manifest cannot be read"):
        PackedCuts.open(tmp_path / "cut.jsonl.gz")
    (tmp_path / "text.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="text.jsonl.gz:1: the manifest cannot be read"):
        PackedCuts.open(tmp_path / "text.jsonl.gz")


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    shares=st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.25, 2.0]), min_size=3, max_size=3),
    places=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_an_epoch_of_several_corpora_holds_their_shares(
    sizes: list[int], shares: list[float], places: int, seed: int
) -> None:
    parts = [PackedCuts() for _ in sizes]
    for part, size in zip(parts, sizes, strict=True):
        part.durations_s = np.ones(size)
    joined = JoinedCuts(parts, shares[: len(sizes)])
    epochs = [cuts_of_epoch(joined, places, seed=seed, epoch=epoch) for epoch in range(20)]
    assert np.array_equal(epochs[3], cuts_of_epoch(joined, places, seed=seed, epoch=3))
    heard = np.zeros(len(joined))
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch)
        heard += np.bincount(epoch % len(joined), minlength=len(joined))
    begin = 0
    for size, share in zip(sizes, joined.shares, strict=True):
        times = heard[begin : begin + size] / places
        # all are heard before one is heard again, the whole times and the rest each by itself
        assert times.max() - times.min() <= 1 and abs(times.sum() - 20 * share * size) <= 1
        begin += size


def test_joined_cuts_are_those_of_their_parts(tmp_path: Path) -> None:
    cuts = list(write_cuts(tmp_path, [1.0, 1.5, 2.0]))
    joined = JoinedCuts([PackedCuts(cuts[:1]), PackedCuts(cuts[1:])], [1.0, 0.5])
    assert [cut.id for cut in joined] == [joined[i].id for i in range(3)] == [cut.id for cut in cuts]
    assert joined.durations_s.tolist() == [cut.duration for cut in cuts]
    assert (joined.durations_s * mean_share(joined)).sum() == pytest.approx(1.0 + 0.5 * 3.5)
