"""Training from shards: what is written, in which order it is read, and that it is the audio of the files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut

from asr.data import shar, shar_writing
from asr.data.augmentation import AugmentConfig
from asr.data.bad_rows import BadRow
from asr.data.fbank import FeatureConfig
from asr.data.features import load_samples
from asr.data.loader import DataConfig, train_loader
from asr.data.manifests import save_cuts
from asr.data.packed_cuts import JoinedCuts, PackedCuts
from asr.data.plan import draw_windows, plan_epoch
from asr.data.shar import Ahead, SharConfig, Shards, check_shards, shard_of
from asr.data.shar_writing import write_shards
from asr.errors import UserError
from tests.asr.data.speech import write_cuts
from tests.asr.data.test_loader import TOKENIZER, assert_same, ids, load

DURATIONS_S = [0.31 + 0.17 * (7 * i % 23) for i in range(23)]
FEATURES = FeatureConfig(storage="shar", shard_cuts=4, num_jobs=1)
AUGMENT = AugmentConfig(speed_factors=[0.9, 1.0], noise_prob=1.0)
CONFIG = DataConfig(
    features=FEATURES, augment=AUGMENT, shar=SharConfig(window=2), max_duration_s=8, num_buckets=2, num_workers=0
)


@pytest.fixture(scope="module")
def audio_cuts(tmp_path_factory: pytest.TempPathFactory) -> list[MonoCut]:
    return write_cuts(tmp_path_factory.mktemp("audio"), DURATIONS_S)


@pytest.fixture(scope="module")
def folder(audio_cuts: list[MonoCut], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shar") / "train"
    save_cuts(write_shards(audio_cuts, out, FEATURES, 0), out.parent / "cuts_train.jsonl.gz")
    return out


@pytest.fixture
def cuts(folder: Path) -> PackedCuts:
    return PackedCuts.open(folder.parent / "cuts_train.jsonl.gz")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> tuple[Path, PackedCuts]:
    """Shards that a test may damage, and their cuts."""
    place = tmp_path / "train"
    shutil.copytree(folder, place)
    text = gzip.open(folder.parent / "cuts_train.jsonl.gz", "rt").read().replace(str(folder), str(place))
    (tmp_path / "cuts.jsonl").write_text(text)
    return place, PackedCuts.open(tmp_path / "cuts.jsonl")


def test_shards_hold_the_audio_to_the_bit(audio_cuts: list[MonoCut], cuts: PackedCuts) -> None:
    by_id = {cut.id: cut for cut in audio_cuts}
    assert sorted(cut.id for cut in cuts) == sorted(by_id)
    assert [cut.id for cut in cuts] != sorted(by_id), "shards are of a random order"
    shards = Shards()
    for cut in cuts:
        own = by_id[cut.id]
        assert (cut.duration, cut.supervisions) == (own.duration, own.supervisions)
        np.testing.assert_array_equal(load_samples(cut, shards), load_samples(own))
        for speed in (0.9, 1.1):
            faster = load_samples(cut.perturb_speed(speed), shards)
            np.testing.assert_array_equal(faster, load_samples(own.perturb_speed(speed)))


def test_shards_are_lhotses(folder: Path, audio_cuts: list[MonoCut]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        name for i in range(6) for name in (f"cuts.{i:06d}.jsonl.gz", f"recording.{i:06d}.tar")
    )
    by_id = {cut.id: cut for cut in audio_cuts}
    read = list(CutSet.from_shar(in_dir=folder))
    assert len(read) == len(audio_cuts)
    for cut in read:
        np.testing.assert_array_equal(cut.load_audio()[0], load_samples(by_id[cut.id]))


def test_parts_of_recordings_become_recordings(audio_cuts: list[MonoCut], tmp_path: Path) -> None:
    part = audio_cuts[5].truncate(offset=0.11, duration=0.2, preserve_id=True)
    (cut,) = write_shards([part], tmp_path / "train", FEATURES, 0)
    assert cut.start == 0 and cut.recording.num_samples == 3200
    np.testing.assert_array_equal(load_samples(cut), load_samples(part))


def test_batches_are_those_of_files(audio_cuts: list[MonoCut], cuts: PackedCuts) -> None:
    """With all shards in one window the plan is that of on_the_fly over the same order."""
    by_id = {cut.id: cut for cut in audio_cuts}
    fly = replace(CONFIG, features=replace(FEATURES, storage="on_the_fly"))
    files = CutSet.from_cuts([by_id[cut.id] for cut in cuts])
    assert_same(load(cuts, replace(CONFIG, shar=SharConfig(window=6))), load(files, fly))


@pytest.mark.parametrize("augment", [AUGMENT, replace(AUGMENT, concat_prob=0.7, pad_front_ms=[0, 200], copies=2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_goes_through_windows(cuts: PackedCuts, augment: AugmentConfig, shuffle: bool) -> None:
    shard = {cut.id: shard_of(cut) for cut in cuts}
    orders = []
    for epoch in range(2):
        config = replace(CONFIG, augment=augment, shuffle=shuffle)
        batches = load(cuts, config, epoch=epoch)
        windows: list[set[str]] = []
        for batch in batches:
            names = [name.split("_")[0] for joined in batch.cut_ids for name in joined.split("+")]
            touched = {shard[name] for name in names}
            if windows and (windows[-1] & touched or len(windows[-1] | touched) <= 2):
                windows[-1] |= touched
            else:
                windows.append(touched)
        assert [len(window) for window in windows] == [2, 2, 2] and len(set.union(*windows)) == 6
        heard = Counter(name for joined in ids(batches) for name in joined.split("+"))
        assert len(heard) == len(cuts) * 2 * augment.copies and set(heard.values()) == {1}
        assert any("+" in joined for joined in ids(batches)) == (augment.concat_prob > 0)
        orders.append(windows)
    assert (orders[0] == orders[1]) != shuffle


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 60), st.integers(0, 3), st.booleans())
def test_plans_of_windows(shards: int, window: int, num_cuts: int, epoch: int, shuffle: bool) -> None:
    rng = np.random.default_rng(num_cuts)
    of_cuts, durations_s = rng.integers(0, shards, num_cuts), rng.uniform(0.5, 9, num_cuts)
    config = replace(CONFIG, shar=SharConfig(window=window), shuffle=shuffle, sorted_epochs=1)
    names = [str(number) for number in range(shards)]
    drawn = draw_windows(of_cuts, names, config, seed=3, epoch=epoch)
    assert sorted(name for group in drawn.shards for name in group) == sorted(names)
    assert {len(group) for group in drawn.shards} <= {
        len(drawn.shards[0]),
        len(drawn.shards[0]) + 1,
        len(drawn.shards[-1]),
    }
    assert max(map(len, drawn.shards)) <= window
    assert all(str(of_cuts[cut]) in drawn.shards[drawn.of_cuts[cut]] for cut in range(num_cuts))
    plan = plan_epoch(durations_s, config, seed=3, epoch=epoch, windows=drawn.of_cuts)
    batches = list(plan)
    assert sorted(number for batch in batches for number in batch) == list(range(num_cuts))
    of_batches = [{int(drawn.of_cuts[number]) for number in batch} for batch in batches]
    assert all(len(windows) == 1 for windows in of_batches)
    assert [min(windows) for windows in of_batches] == sorted(min(windows) for windows in of_batches)
    assert all(len(batch) * max(durations_s[batch]) <= 8 + 1e-6 for batch in batches if len(batch) > 1)


def test_bits_do_not_depend_on_workers_or_skipping(cuts: PackedCuts) -> None:
    config = replace(CONFIG, max_lattice_cells=4000)
    expected = load(cuts, config, epoch=3)
    for workers in (0, 2):
        other = replace(config, num_workers=workers)
        for skip in (0, 1, len(expected) - 1):
            assert_same(load(cuts, other, epoch=3, skip=skip), expected[skip:])
    # stopped in the validation after an epoch
    assert list(train_loader(cuts, TOKENIZER, config, seed=1, epoch=3, skip_batches=len(expected))) == []
    of_two = [list(train_loader(cuts, TOKENIZER, config, seed=1, epoch=3, rank=rank, size=2)) for rank in (0, 1)]
    assert_same(of_two[0], expected[::2])
    assert_same(of_two[1][: len(expected) // 2], expected[1::2])


def test_each_shard_is_opened_once_and_read_whole(cuts: PackedCuts, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read: list[int] = []
    real_open, real_read = shar.open_shard, shar._read_through
    monkeypatch.setattr(shar, "open_shard", lambda place, config: opened.append(place) or real_open(place, config))
    monkeypatch.setattr(shar, "_read_through", lambda file: (real_read(file), read.append(file.tell())))
    monkeypatch.setattr(Ahead, "__call__", lambda self, batch: None)
    load(cuts, CONFIG)
    _, names = cuts.shards()
    assert sorted(opened) == sorted(names) and sorted(read) == sorted(os.path.getsize(name) for name in names)


def test_the_next_window_is_brought_ahead(cuts: PackedCuts, tmp_path: Path) -> None:
    _, names = cuts.shards()
    folder = os.path.dirname(names[0])
    config = SharConfig(urls={folder: f"file://{folder}"}, cache=str(tmp_path / "cache"))
    ahead = Ahead(np.array([0, 0, 1]), [names[:2], names[2:4]], config)
    ahead(0)
    while any(thread is not threading.main_thread() for thread in [ahead._thread] if thread and thread.is_alive()):
        time.sleep(0.01)
    assert sorted(path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("[!.]*")) == sorted(
        os.path.basename(name) for name in names[2:4]
    )
    before = ahead._thread
    ahead(1)
    ahead(2)
    assert ahead._thread is before, "nothing is brought twice, and nothing after the last"


@pytest.mark.parametrize("workers", [0, 2])
def test_urls_are_fetched_whole_and_once(copy: tuple[Path, PackedCuts], tmp_path: Path, workers: int) -> None:
    place, cuts = copy
    expected = load(cuts, CONFIG)
    place.rename(tmp_path / "bucket")
    urls = {str(place): f"file://{tmp_path / 'bucket'}/"}
    config = replace(CONFIG, shar=replace(CONFIG.shar, urls=urls, cache=str(tmp_path / "cache")), num_workers=workers)
    assert_same(load(cuts, config), expected)
    shutil.rmtree(tmp_path / "bucket")
    assert_same(load(cuts, config), expected)
    moved = replace(config, shar=replace(CONFIG.shar, urls={str(place): str(tmp_path / "bucket")}))
    with pytest.raises(UserError, match=r"cannot read shard \S*bucket/recording\.00000\d\.tar: No such file"):
        load(cuts, moved)


def test_the_cache_drops_the_oldest(copy: tuple[Path, PackedCuts], tmp_path: Path) -> None:
    place, cuts = copy
    _, names = cuts.shards()
    size = max(os.path.getsize(name) for name in names)
    config = SharConfig(
        urls={str(place): f"file://{place}"}, cache=str(tmp_path / "cache"), cache_gb=(3 * size + 1) / 1e9
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "own-file.tar").write_bytes(bytes(10 * size))
    for number, name in enumerate(names):
        shar.open_shard(config.place(name), config).close()
        (held,) = (tmp_path / "cache").glob(f"*{os.path.basename(name)}")
        os.utime(held, (number, number))
    left = {path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("[!.]*-recording*")}
    assert 3 <= len(left) < 6 and left >= {os.path.basename(name) for name in names[-3:]}
    tight = replace(CONFIG, shar=replace(config, window=2, cache_gb=1e-9), num_workers=2)
    assert_same(load(cuts, tight), load(cuts, CONFIG))
    assert (tmp_path / "cache" / "own-file.tar").stat().st_size == 10 * size, "what is not a shard stays"


def test_object_stores_by_fsspec(copy: tuple[Path, PackedCuts], tmp_path: Path) -> None:
    place, cuts = copy
    store = fsspec.filesystem("memory")
    store.put(f"{place}/", "/bucket/train/", recursive=True)
    config = replace(CONFIG, shar=SharConfig(2, {str(place): "memory://bucket/train"}, str(tmp_path / "cache")))
    expected = load(cuts, CONFIG)
    shutil.rmtree(place)
    check_shards(cuts.shards()[1], config.shar)
    assert_same(load(cuts, config), expected)
    with pytest.raises(UserError, match="cannot open shards at nostore://x/.*: Protocol not known: nostore"):
        check_shards([f"{place}/recording.000000.tar"], SharConfig(urls={str(place): "nostore://x"}))
    with pytest.raises(UserError, match=rf"data.shar.urls names /other, but shards were written to {place}; name"):
        check_shards([f"{place}/recording.000000.tar"], SharConfig(urls={"/other": "memory://x"}))


@pytest.mark.parametrize("by_url", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_missing_and_truncated_shards_are_named(
    copy: tuple[Path, PackedCuts], tmp_path: Path, by_url: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cuts = copy
    monkeypatch.setattr(shar, "_WAITS_S", (0.0,))
    config = replace(CONFIG, num_workers=workers)
    if by_url:
        config.shar = SharConfig(2, {str(place): f"file://{place}"}, str(tmp_path / "cache"))
    tar = place / "recording.000002.tar"
    whole = tar.read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 0):
        tar.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"shard \S+recording\.000002\.tar is truncated: \d+ bytes"):
            load(cuts, config)
        assert not list(tmp_path.glob("cache/[!.]*000002*"))
    tar.unlink()
    with pytest.raises(UserError, match=r"cannot read shard \S+recording\.000002\.tar: .*(No such file|not exist)"):
        load(cuts, config)
    tar.write_bytes(whole)
    load(cuts, config)


def test_changed_shards_are_named(copy: tuple[Path, PackedCuts], tmp_path: Path) -> None:
    place, cuts = copy
    tars = [place / "recording.000001.tar", place / "recording.000003.tar"]
    url = SharConfig(2, {str(place): f"file://{place}"}, str(tmp_path / "cache"))
    first, second = (tar.read_bytes() for tar in tars)
    tars[0].write_bytes(second)
    tars[1].write_bytes(first)
    for config in (CONFIG, replace(CONFIG, shar=url)):
        with pytest.raises(
            UserError, match=r"shard \S+00000[13]\.tar does not hold at byte \d+ what the manifest says"
        ):
            load(cuts, config)
    for cut in cuts:  # what was fetched is fetched anew
        if shard_of(cut) in map(str, tars):
            with pytest.raises(UserError, match="does not hold"):
                load_samples(cut, Shards(url))
    tars[0].write_bytes(first)
    tars[1].write_bytes(second)
    load(cuts, replace(CONFIG, shar=url))


def test_failed_fetches_are_tried_again(
    copy: tuple[Path, PackedCuts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cuts = copy
    monkeypatch.setattr(shar, "_WAITS_S", (0.0, 0.0))
    config = SharConfig(urls={str(place): f"file://{place}"}, cache=str(tmp_path / "cache"))
    real, tries = shar._copy, []

    def flaky(url: str, file: object) -> None:
        tries.append(url)
        if len(tries) < failures:
            raise RuntimeError("connection reset\nby peer")
        real(url, file)  # type: ignore[arg-type]

    monkeypatch.setattr(shar, "_copy", flaky)
    failures = 3
    assert len(Shards(config).read(cuts[0].recording.sources[0].source)) > 0 and len(tries) == 3
    shutil.rmtree(tmp_path / "cache")
    tries.clear()
    failures = 9
    with pytest.raises(UserError, match=r"cannot fetch shard file://\S+\.tar into \S+cache: connection reset by peer"):
        Shards(config).read(cuts[0].recording.sources[0].source)
    assert len(tries) == 3


def test_cuts_in_no_shard_are_refused(audio_cuts: list[MonoCut], cuts: PackedCuts, folder: Path) -> None:
    with pytest.raises(UserError, match=r"cut utt000 lies in no shard; run the features stage"):
        load(CutSet.from_cuts(audio_cuts), CONFIG)
    joined = JoinedCuts([cuts, PackedCuts(audio_cuts)], [1.0, 1.0])
    with pytest.raises(UserError, match=r"lies in no shard"):
        joined.shards()
    with pytest.raises(UserError, match="'' does not say where in a shard a recording lies"):
        PackedCuts.open(folder / "cuts.000000.jsonl.gz").shards()


def test_several_corpora(audio_cuts: list[MonoCut], cuts: PackedCuts, tmp_path: Path) -> None:
    more = write_shards(write_cuts(tmp_path / "more", [0.5] * 6, prefix="more"), tmp_path / "b" / "train", FEATURES, 0)
    joined = JoinedCuts([cuts, PackedCuts(more)], [1.0, 0.5])
    numbers, names = joined.shards()
    assert len(names) == 8
    assert [names[number] for number in numbers] == [shard_of(cut) for cut in joined]
    heard = Counter(name.split("_")[0] for name in ids(load(joined, CONFIG)))
    assert sum(heard[cut.id] for cut in more) == 6 and all(heard[cut.id] == 2 for cut in audio_cuts)


def test_shards_by_several_processes_and_in_parts(
    audio_cuts: list[MonoCut], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    monkeypatch.setattr("asr.data.features.MIN_AUDIO_PER_PROCESS_S", 1.0)
    write_shards(audio_cuts, tmp_path / "two" / "train", FEATURES, 0, 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two" / "train").glob("*.tar")} == contents

    out = tmp_path / "train"
    real, written = shar_writing._write_shard, []

    def stops(task: shar_writing._Task) -> list[str | BadRow]:
        if task.number == 3:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(shar_writing, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        write_shards(audio_cuts, out, FEATURES, 0)
    assert not out.exists()
    partial = out.with_name("train.partial")
    ages = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(ages) == 3
    monkeypatch.setattr(shar_writing, "_write_shard", lambda task: (written.append(task.number), real(task))[1])
    again = write_shards(audio_cuts, out, FEATURES, 0)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == contents
    assert all((out / name).stat().st_mtime_ns == age for name, age in ages.items()), "they were not written again"
    assert len(list(out.iterdir())) == 12 and len(again) == len(audio_cuts) and not partial.exists()
    assert [json.dumps(cut.to_dict()).replace(str(out), str(folder)) for cut in again] == [
        json.dumps(cut.to_dict()) for cut in PackedCuts.open(folder.parent / "cuts_train.jsonl.gz")
    ]


def test_unreadable_recordings_are_left_out(tmp_path: Path) -> None:
    own = write_cuts(tmp_path / "audio", [0.5] * 5)
    (tmp_path / "audio" / "utt002.wav").write_bytes(b"no audio")
    bad: list[BadRow] = []
    written = write_shards(own, tmp_path / "train", FEATURES, 0, bad_rows=bad)
    assert len(written) == 4 and [row.file for row in bad] == [str(tmp_path / "audio" / "utt002.wav")]
    shards = Shards()
    for cut in written:
        np.testing.assert_array_equal(load_samples(cut, shards), load_samples(own[int(cut.id[3:])]))
    with pytest.raises(UserError, match="none of the 1 cuts could be read"):
        write_shards(own[2:3], tmp_path / "none", FEATURES, 0)
    with pytest.raises(UserError, match="no cuts to write"):
        write_shards([], tmp_path / "none", FEATURES, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"window": 0}, "window=0; at least 1"), ({"cache_gb": 0.0}, "cache_gb=0.0; it must be")]
)
def test_wrong_settings_are_refused(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharConfig(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_cuts=0; at least 1"):
        FeatureConfig(shard_cuts=0)
