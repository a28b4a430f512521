from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut

from asr.data.augmentation import AugmentConfig, SpecAugmentConfig
from asr.data.batch import Batch
from asr.data.features import Fbank, FeatureConfig, compute_cut_features, compute_features
from asr.data.loader import (
    BatchLoader,
    DataConfig,
    _start_worker,
    eval_loader,
    explain_dead_worker,
    train_loader,
)
from asr.data.plan import Plan, plan_epoch, split_by_lattice
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from tests.asr.data.speech import WORDS, write_cuts

TOKENIZER = Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))
DURATIONS_S = [0.31 + 0.17 * (7 * i % 23) for i in range(23)]
NO_AUGMENT = AugmentConfig(speed_factors=[1.0], volume_db=0, noise_snr_db=[])
OFF = SpecAugmentConfig(prob=0)
STORED = DataConfig(augment=NO_AUGMENT, max_duration_s=10, num_buckets=4, num_workers=0)
FLY = replace(STORED, features=FeatureConfig(storage="on_the_fly"))


@pytest.fixture(scope="module")
def audio_cuts(tmp_path_factory: pytest.TempPathFactory) -> list[MonoCut]:
    return write_cuts(tmp_path_factory.mktemp("audio"), DURATIONS_S)


@pytest.fixture(scope="module")
def stored_cuts(audio_cuts: list[MonoCut], tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    return compute_features(audio_cuts, tmp_path_factory.mktemp("features") / "train", FeatureConfig(), None, 0)


def load(cuts, config: DataConfig, epoch: int = 0, skip: int = 0, seed: int = 1) -> list[Batch]:
    return list(train_loader(cuts, TOKENIZER, config, seed=seed, epoch=epoch, skip_batches=skip))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert (a.cut_ids, a.texts, a.durations_s) == (b.cut_ids, b.texts, b.durations_s)
        for name in ("features", "feature_lens", "targets", "target_lens"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def ids(batches: list[Batch]) -> list[str]:
    return [cut_id for batch in batches for cut_id in batch.cut_ids]


def test_batches_hold_what_they_say(stored_cuts: CutSet) -> None:
    for batch in load(stored_cuts, replace(STORED, spec_augment=OFF)):
        assert batch.features.dtype == torch.float32
        assert batch.features.shape == (batch.size, int(batch.feature_lens.max()), 80)
        assert batch.targets.dtype == batch.target_lens.dtype == batch.feature_lens.dtype == torch.int64
        assert batch.targets.shape == (batch.size, int(batch.target_lens.max()))
        for i, cut_id in enumerate(batch.cut_ids):
            cut = stored_cuts[cut_id]
            length = int(batch.feature_lens[i])
            np.testing.assert_array_equal(batch.features[i, :length].numpy(), compute_cut_features(cut, Fbank()))
            assert not batch.features[i, length:].any()
            targets = batch.targets[i, : int(batch.target_lens[i])].tolist()
            assert TOKENIZER.decode(targets) == batch.texts[i] == cut.supervisions[0].text
            assert not batch.targets[i, len(targets) :].any()
            assert batch.durations_s[i] == cut.duration


@pytest.mark.parametrize("storage", ["stored", "on_the_fly"])
def test_bits_do_not_depend_on_workers_or_skipping(
    storage: str, audio_cuts: list[MonoCut], stored_cuts: CutSet
) -> None:
    if storage == "stored":
        cuts, config = stored_cuts, STORED
    else:  # with everything that draws random numbers, and with torch's resampling
        augment = AugmentConfig(speed_factors=[0.9, 1.0], noise_prob=1.0)
        cuts, config = CutSet.from_cuts(audio_cuts[:6]), replace(FLY, augment=augment, max_duration_s=5)
    expected = load(cuts, config, epoch=3)
    for workers in (1, 2):
        other = replace(config, num_workers=workers)
        assert_same(load(cuts, other, epoch=3), expected)
        for skip in (1, len(expected) - 1):
            assert_same(load(cuts, other, epoch=3, skip=skip), expected[skip:])
    assert_same(load(cuts, config, epoch=3, skip=2), expected[2:])
    assert load(cuts, replace(config, num_workers=2), epoch=3, skip=len(expected)) == []


def test_bits_do_not_depend_on_global_state(stored_cuts: CutSet) -> None:
    expected = load(stored_cuts, STORED)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert_same(load(stored_cuts, STORED), expected)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_every_cut_comes_once_and_epochs_differ(stored_cuts: CutSet) -> None:
    everything = sorted(cut.id for cut in stored_cuts)
    orders = [ids(load(stored_cuts, STORED, epoch=epoch, seed=seed)) for epoch, seed in ((0, 1), (1, 1), (0, 2))]
    for order in orders:
        assert sorted(order) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0]
    plain = replace(STORED, shuffle=False, num_buckets=1)
    assert sorted(ids(load(stored_cuts, plain))) == everything
    assert ids(load(stored_cuts, plain)) == [cut.id for cut in stored_cuts]


def test_masks_change_with_the_epoch_and_only_there(stored_cuts: CutSet) -> None:
    def features_of(batches: list[Batch]) -> dict[str, torch.Tensor]:
        return {
            cut_id: batch.features[i, : batch.feature_lens[i]]
            for batch in batches
            for i, cut_id in enumerate(batch.cut_ids)
        }

    first, second = (features_of(load(stored_cuts, STORED, epoch=epoch)) for epoch in (0, 1))
    clean = features_of(list(eval_loader(stored_cuts, TOKENIZER, STORED)))
    changed = [cut_id for cut_id in clean if not torch.equal(first[cut_id], second[cut_id])]
    assert len(changed) > len(clean) * 0.8
    for cut_id, values in clean.items():
        audio = int(stored_cuts[cut_id].duration * 100)
        assert torch.equal(first[cut_id][audio + 1 :], values[audio + 1 :]), "the tail was masked"


def test_stored_equals_on_the_fly(audio_cuts: list[MonoCut], stored_cuts: CutSet) -> None:
    assert_same(load(stored_cuts, STORED), load(audio_cuts, FLY))
    assert_same(list(eval_loader(stored_cuts, None, STORED)), list(eval_loader(audio_cuts, None, FLY)))


def test_stored_equals_the_first_epoch_on_the_fly(audio_cuts: list[MonoCut], tmp_path: Path) -> None:
    augment = AugmentConfig(noise_prob=1.0)
    stored = compute_features(audio_cuts[:5], tmp_path / "features", FeatureConfig(), augment, 1)
    on_the_fly = replace(FLY, augment=augment)
    assert_same(load(stored, replace(STORED, augment=augment)), load(audio_cuts[:5], on_the_fly))


def test_on_the_fly_epochs_hold_every_speed_and_copy(audio_cuts: list[MonoCut]) -> None:
    config = replace(FLY, augment=AugmentConfig(copies=2), spec_augment=OFF)
    first, second = load(audio_cuts[:3], config, epoch=0), load(audio_cuts[:3], config, epoch=1)
    assert len(ids(first)) == len(set(ids(first))) == 18 and sorted(ids(first)) == sorted(ids(second))
    name = "utt000_sp1.1_copy1"
    one, two = (
        next(b.features[b.cut_ids.index(name)] for b in batches if name in b.cut_ids) for batches in (first, second)
    )
    length = min(len(one), len(two))
    assert not torch.equal(one[:length], two[:length])


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.05, 40.0), min_size=1, max_size=60),
    limit_s=st.floats(1.0, 120.0),
    buckets=st.integers(1, 12),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_plans_are_complete_and_bounded(
    durations: list[float], limit_s: float, buckets: int, shuffle: bool, epoch: int
) -> None:
    config = DataConfig(max_duration_s=limit_s, num_buckets=buckets, shuffle=shuffle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = plan_epoch(durations, config, seed=0, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(durations)))
    for batch in batches:
        padded = len(batch) * max(durations[i] for i in batch)
        assert len(batch) == 1 or padded <= limit_s * (1 + 1e-9)
    assert list(batches) == list(plan_epoch(durations, config, seed=0, epoch=epoch))


def test_plans_are_well_filled() -> None:
    rng = np.random.default_rng(0)
    durations = rng.uniform(1, 6, 2000).tolist()
    batches = plan_epoch(durations, DataConfig(max_duration_s=120), seed=0, epoch=0)
    assert sum(durations) / len(batches) > 0.8 * 120
    padded = sum(len(b) * max(durations[i] for i in b) for b in batches)
    assert padded < 1.15 * sum(durations)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 80)), min_size=1, max_size=40),
    limit=st.integers(1, 100_000),
    width=st.integers(1, 12),
)
def test_the_lattice_bounds_batches(sizes: list[tuple[int, int]], limit: int, width: int) -> None:
    frames, tokens = np.array(sizes).T
    numbers = np.arange(len(sizes))
    whole = Plan(numbers, np.minimum(np.arange(width, len(sizes) + width, width), len(sizes)))
    found = split_by_lattice(whole, frames, tokens, limit)
    assert [i for batch in found for i in batch] == numbers.tolist() and all(found)
    cells = [len(b) * max(frames[i] for i in b) * (max(tokens[i] for i in b) + 1) for b in found]
    assert all(len(batch) == 1 or count <= limit for batch, count in zip(found, cells, strict=True))
    assert list(split_by_lattice(whole, frames, tokens, 10**9)) == list(whole)
    taken: list[list[int]] = []  # as one after the other would be put in
    for batch in whole:
        for place, i in enumerate(batch):
            more = [*taken[-1], i] if place else []
            if more and len(more) * max(frames[j] for j in more) * (max(tokens[j] for j in more) + 1) <= limit:
                taken[-1] = more
            else:
                taken.append([i])
    assert list(found) == taken


def test_batches_of_a_plan_are_taken_in_any_order() -> None:
    plan = Plan(np.array([4, 1, 0, 3, 2]), np.array([2, 3, 5]))
    assert list(plan) == [[4, 1], [0], [3, 2]] and len(plan) == 3
    assert list(plan.take(np.array([2, 0, 2]))) == [[3, 2], [4, 1], [3, 2]]
    assert list(plan[1:]) == [[0], [3, 2]] and list(plan[::-2]) == [[3, 2], [4, 1]]
    assert list(plan[3:]) == [] and len(plan[3:]) == len(plan[3:].starts) == 0


def test_batches_bounded_by_the_lattice_resume(stored_cuts: CutSet) -> None:
    config = replace(STORED, max_lattice_cells=600)
    batches = load(stored_cuts, config)
    assert len(batches) > len(load(stored_cuts, STORED))
    for batch in batches:
        frames = int(((batch.feature_lens - 3) // 4).max())
        assert batch.size == 1 or batch.size * frames * (int(batch.target_lens.max()) + 1) <= 600
    assert sorted(ids(batches)) == sorted(cut.id for cut in stored_cuts)
    assert_same(batches[3:], load(stored_cuts, config, skip=3))


def test_evaluation_takes_every_cut_once_longest_first(stored_cuts: CutSet) -> None:
    loader = eval_loader(stored_cuts, TOKENIZER, STORED, max_duration_s=8.0)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert sorted(ids(batches)) == sorted(cut.id for cut in stored_cuts)
    durations = [duration for batch in batches for duration in batch.durations_s]
    assert durations == sorted(durations, reverse=True)
    assert all(batch.size == 1 or batch.size * max(batch.durations_s) <= 8.0 for batch in batches)
    assert_same(batches, list(eval_loader(list(stored_cuts)[::-1], TOKENIZER, STORED, max_duration_s=8.0)))
    assert_same(batches, list(eval_loader(stored_cuts, TOKENIZER, STORED, max_duration_s=8.0, num_workers=2)))
    (whole,) = eval_loader(stored_cuts, None, STORED, max_duration_s=1e6)
    assert whole.targets.shape == (len(DURATIONS_S), 0) and not whole.target_lens.any()


def test_skipped_batches_are_not_loaded(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path, [0.5] * 8)
    config = replace(FLY, max_duration_s=1.0, num_buckets=1)
    expected = load(cuts, config)
    for cut in cuts:
        if cut.id in ids(expected[:2]):
            Path(cut.recording.sources[0].source).unlink()
    assert_same(load(cuts, config, skip=2), expected[2:])


@pytest.mark.parametrize("size", [2, 3, 4, 50])
def test_processes_share_the_batches_of_one(stored_cuts: CutSet, size: int) -> None:
    def plan(rank: int, size: int, skip: int) -> BatchLoader:
        chosen = {"seed": 1, "epoch": 2, "skip_batches": skip, "rank": rank, "size": size}
        return train_loader(stored_cuts, TOKENIZER, replace(STORED, max_duration_s=3), **chosen)

    for skip in (0, 1, 3):
        expected = list(plan(0, 1, skip).batches)
        loaders = [plan(rank, size, skip) for rank in range(size)]
        rounds = list(zip(*(loader.batches for loader in loaders), strict=True))  # as many on each
        assert len(rounds) == -(-len(expected) // size)
        assert [b for r in range(len(rounds)) for x in loaders for b in x.batches[r : r + 1] if r < x.own] == expected
        for loader in loaders:
            for r in range(loader.own, len(rounds)):
                assert r == len(rounds) - 1 and loader.batches[r] == rounds[r][0]
    assert [len(plan(rank, size, len(plan(0, 1, 0)))) for rank in range(size)] == [0] * size


def test_len_is_the_number_of_batches(stored_cuts: CutSet) -> None:
    loader = train_loader(stored_cuts, TOKENIZER, STORED, seed=1, epoch=0)
    assert len(loader) == len(list(loader)) == len(list(loader))
    rest = train_loader(stored_cuts, TOKENIZER, STORED, seed=1, epoch=0, skip_batches=3)
    assert len(rest) == len(loader) - 3


def test_nothing_to_load_is_an_error(audio_cuts: list[MonoCut]) -> None:
    with pytest.raises(UserError, match="no cuts to train on"):
        load([], STORED)
    with pytest.raises(UserError, match="no cuts to evaluate on"):
        eval_loader([], None, STORED)
    with pytest.raises(UserError, match="no stored features"):
        load(audio_cuts, STORED)
    with pytest.raises(ValueError, match="skip_batches=-1"):
        load(audio_cuts, FLY, skip=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_are_one_clear_line(tmp_path: Path, workers: int) -> None:
    cuts = write_cuts(tmp_path, [0.5] * 6)
    config = replace(FLY, num_workers=workers, max_duration_s=1.0)
    broken = Path(cuts[3].recording.sources[0].source)
    broken.write_text("no recording")
    with pytest.raises(UserError, match="cut utt003 .*not readable as audio") as caught:
        load(cuts, config)
    assert "\n" not in str(caught.value) and str(broken) in str(caught.value)
    with pytest.raises(UserError, match="cut utt00[12]: token '(TWO|THREE)'"):
        list(train_loader(cuts[:3], Tokenizer.train(["ONE"], TokenizerConfig("word")), config, seed=0, epoch=0))
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_the_workers(stored_cuts: CutSet) -> None:
    config = replace(STORED, num_workers=2, max_duration_s=4)
    began = time.monotonic()
    for batch in train_loader(stored_cuts, TOKENIZER, config, seed=0, epoch=0):
        assert batch.size and len(multiprocessing.active_children()) == 2
        break
    assert multiprocessing.active_children() == []
    with pytest.raises(KeyboardInterrupt):
        for _ in train_loader(stored_cuts, TOKENIZER, config, seed=0, epoch=0):
            raise KeyboardInterrupt
    iterator = iter(train_loader(stored_cuts, TOKENIZER, config, seed=0, epoch=0))
    next(iterator)
    del iterator
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 15


def test_a_killed_worker_ends_the_iteration(stored_cuts: CutSet) -> None:
    config = replace(STORED, num_workers=1, max_duration_s=1)
    # torch raises from its signal handler: in the loop below or in the loader, which explains it
    with pytest.raises((UserError, RuntimeError), match="(worker of the data loader was|DataLoader worker.*) killed"):
        try:
            for _ in train_loader(stored_cuts, TOKENIZER, config, seed=0, epoch=0):
                (child,) = multiprocessing.active_children()
                os.kill(child.pid, signal.SIGKILL)
        finally:
            time.sleep(0.5)  # where the broken connection was noticed first, the signal may still be under way
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "was killed, perhaps for lack of memory"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "was killed, perhaps for lack of memory"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "ran out of shared memory"),
    ],
)
def test_dead_workers_are_explained(message: str, expected: str) -> None:
    error = explain_dead_worker(RuntimeError(message))
    assert isinstance(error, UserError) and expected in str(error)
    assert "was killed" in str(explain_dead_worker(ConnectionResetError()))
    other = RuntimeError("shapes do not fit")
    assert explain_dead_worker(other) is other


CONSUMER = """
import signal, sys, time
from asr.data.loader import DataConfig, train_loader
from asr.data.manifests import load_cuts
from asr.data.tokenizer import Tokenizer

stopping = []
if sys.argv[2] == "handle":
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
cuts = load_cuts(sys.argv[1])
tokenizer = Tokenizer.load(sys.argv[3])
config = DataConfig(num_workers=2, max_duration_s=2)
for epoch in range(10_000):
    for batch in train_loader(cuts, tokenizer, config, seed=0, epoch=epoch):
        print("batch", flush=True)
        time.sleep(0.02)
        if stopping:
            print("saved", flush=True)
            sys.exit(0)
"""


@pytest.mark.parametrize("how", ["handle", pytest.param("default", marks=pytest.mark.slow), "kill"])
def test_signals_leave_no_process_behind(stored_cuts: CutSet, tmp_path: Path, how: str) -> None:
    """A scheduler sends SIGTERM to the whole group: the workers must leave the decision to the main process."""
    stored_cuts.to_file(tmp_path / "cuts.jsonl")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    TOKENIZER.save(tmp_path / "tokenizer.json")
    command = [sys.executable, *(str(tmp_path / name) for name in ("consumer.py", "cuts.jsonl")), how]
    command.append(str(tmp_path / "tokenizer.json"))
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "batch\n"
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    if how == "handle":
        assert process.returncode == 0, err
        assert out.endswith("saved\n") and "Traceback" not in err
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive the main process"
        time.sleep(0.1)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_duration_s": 0}, "max_duration_s=0"),
        ({"num_buckets": 0}, "num_buckets=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"max_bad_fraction": 2}, "max_bad_fraction=2"),
    ],
)
def test_wrong_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_sorted_epochs_rise_in_duration_and_hold_the_same_cuts() -> None:
    durations = [1.0 + (7 * i) % 50 / 10 for i in range(200)]
    config = DataConfig(max_duration_s=20, sorted_epochs=1)
    first, second = (plan_epoch(durations, config, seed=0, epoch=epoch) for epoch in (0, 1))
    longest = [max(durations[i] for i in batch) for batch in first]
    assert longest == sorted(longest)
    assert [max(durations[i] for i in batch) for batch in second] != sorted(longest)
    assert (
        sorted(i for batch in first for i in batch) == sorted(i for batch in second for i in batch) == list(range(200))
    )


def _leaves_a_starting_worker(pids: multiprocessing.Queue) -> None:
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_orphaned_before_it_starts, args=(pids,))
    worker.start()
    os.kill(os.getpid(), signal.SIGKILL)


def _orphaned_before_it_starts(pids: multiprocessing.Queue) -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(0.01)
    pids.put(os.getpid())
    _start_worker(0)
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_worker_that_starts_without_its_parent_ends() -> None:
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    process = context.Process(target=_leaves_a_starting_worker, args=(pids,))
    process.start()
    worker = pids.get(timeout=60)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "it waits for a parent that it never saw"
        time.sleep(0.05)
