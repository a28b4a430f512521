"""Features by an executor that is given, and by the workers of a Dask scheduler: those of this process, to the bit."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import asr.data.features as features_module
from asr.data import dask_cluster
from asr.data.augmentation import AugmentConfig
from asr.data.bad_rows import BadRow
from asr.data.dask_cluster import check_dask, dask_executor
from asr.data.features import FeatureConfig, compute_features
from asr.errors import UserError
from tests.asr.data.speech import write_cuts

# resampling, which several threads of torch would round in another order
AUGMENT = AugmentConfig(speed_factors=[0.9, 1.0, 1.1], noise_prob=1.0)
DURATIONS_S = [0.4, 0.6, 0.5, 0.8, 0.3]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CUTS_PER_FILE", 2)


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def compute(tmp_path: Path, name: str, executor: Executor | None, **more: Any) -> list[Any]:
    cuts = write_cuts(tmp_path / "audio", DURATIONS_S)
    stored = compute_features(cuts, tmp_path / name, FeatureConfig(), AUGMENT, 7, 1, executor=executor, **more)
    return [(cut.id, cut.features.storage_key) for cut in stored]


def test_bytes_do_not_depend_on_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "TASKS_UNDER_WAY", 3)
    most = 0

    class Counting(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **more: Any) -> Any:
            nonlocal most
            self.futures = [one for one in getattr(self, "futures", []) if not one.done()]
            self.futures.append(super().submit(*arguments, **more))
            most = max(most, len(self.futures))
            return self.futures[-1]

    here = compute(tmp_path, "here", None)
    with Counting(4) as executor:
        assert compute(tmp_path, "there", executor) == here
    assert made(tmp_path / "there") == made(tmp_path / "here") and len(made(tmp_path / "here")) == 8
    assert 0 < most <= 3


def test_a_task_that_was_lost_begins_again(tmp_path: Path) -> None:
    class Losing(ThreadPoolExecutor):
        """What a dead worker has left of a file is there when another one begins."""

        def submit(self, function: Any, task: Any, /, *arguments: Any, **more: Any) -> Any:
            Path(task.path).write_bytes(b"half a file")
            return super().submit(function, task, *arguments, **more)

    compute(tmp_path, "here", None)
    with Losing(2) as executor:
        compute(tmp_path, "there", executor)
    assert made(tmp_path / "there") == made(tmp_path / "here")


def test_folders_that_others_do_not_see_and_work_that_ends(tmp_path: Path) -> None:
    class Elsewhere(ThreadPoolExecutor):
        def submit(self, function: Any, task: Any, /, *arguments: Any, **more: Any) -> Any:
            shutil.rmtree(Path(task.path).parent, ignore_errors=True)
            return super().submit(function, task, *arguments, **more)

    with Elsewhere(1) as executor, pytest.raises(UserError, match="has no folder .*/there.partial; all machines need"):
        compute(tmp_path, "there", executor)

    class Gone(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **more: Any) -> Any:
            future: Future[Any] = Future()
            future.cancel()
            return future

    with Gone(1) as executor, pytest.raises(UserError, match="ended before they were done; run the stage again"):
        compute(tmp_path, "there", executor)
    assert not (tmp_path / "there").exists()


def test_what_is_wrong_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "distributed" else find(name))
        with pytest.raises(UserError, match=r"--dask needs distributed; install: .*'transducer-asr\[dask\]'$"):
            check_dask("tcp://127.0.0.1:8786")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: find("json"))
        with pytest.raises(UserError, match="'127.0.0.1:8786' is no address of a scheduler"):
            check_dask("127.0.0.1:8786")
        check_dask("tls://127.0.0.1:8786")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="pip install 'transducer-asr[dask]'")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster:
        yield cluster


def test_dask_gives_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    here = compute(tmp_path, "here", None)
    for _ in range(2):  # the second time nothing is taken from the first
        with dask_executor(cluster.scheduler_address) as executor:
            assert compute(tmp_path, "there", executor) == here
        assert made(tmp_path / "there") == made(tmp_path / "here")


def test_bad_recordings_are_found_by_workers(cluster: Any, tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "audio", DURATIONS_S)
    Path(cuts[1].recording.sources[0].source).write_text("this is no recording")
    bad: list[BadRow] = []
    with dask_executor(cluster.scheduler_address) as executor:
        stored = compute_features(cuts, tmp_path / "out", FeatureConfig(), AUGMENT, 7, bad_rows=bad, executor=executor)
    assert len(stored) == 12 and [row.file for row in bad] == [cuts[1].recording.sources[0].source]


def test_no_scheduler(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_S", 1)
    with pytest.raises(UserError, match="--dask tcp://127.0.0.1:1: no scheduler answers there"):
        with dask_executor("tcp://127.0.0.1:1"):
            pass


def test_workers_that_die(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that begins with a task: the scheduler gives up, and that is one line."""
    monkeypatch.setattr(features_module, "_compute_elsewhere", _die)
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with pytest.raises(UserError, match="were lost again and again"):
        with dask_executor(cluster.scheduler_address) as executor:
            compute(tmp_path, "there", executor)
    assert not (tmp_path / "there").exists()


def _die(task: Any) -> None:
    os._exit(1)
