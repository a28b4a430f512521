"""The compiled kernels in forked workers, threads, fresh processes, and installs that cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from losses import rnnt_loss
from losses.backends import numba_lattice, threads

ROOT = Path(__file__).resolve().parents[3]

CALL = """
import torch
from losses import rnnt_loss
logits = torch.linspace(-1, 1, 2 * 5 * 3 * 7).view(2, 5, 3, 7).sin().requires_grad_()
loss = rnnt_loss(logits, torch.ones(2, 2, dtype=torch.int64), torch.tensor([5, 4]), torch.tensor([2, 1]))
loss.backward()
print(f"{loss.item():.5f} {logits.grad.abs().sum().item():.5f}")
"""


def threaded_problem() -> tuple[torch.Tensor, ...]:
    """A lattice large enough for the thread pool, and logits that torch computes on the thread that asks (it shares out
    32,768 elements and more): its own OpenMP threads do not survive a fork."""
    logits = torch.randn(6, 35, 21, 6, generator=torch.Generator().manual_seed(0))
    assert logits.numel() < 2**15 and logits[..., 0].numel() >= numba_lattice.SMALL_PROBLEM
    return logits, torch.ones(6, 20, dtype=torch.int64), torch.full((6,), 35), torch.full((6,), 20)


def loss_and_gradient() -> tuple[float, float]:
    logits, *rest = threaded_problem()
    logits.requires_grad_()
    loss = rnnt_loss(logits, *rest)
    loss.backward()
    return loss.item(), float(logits.grad.abs().sum())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _in_child(queue) -> None:
    torch.set_num_threads(2)
    result = loss_and_gradient()
    assert threads._pool._executor is not None  # its own
    queue.put(result)


def test_a_forked_worker_can_call_it_after_its_parent(two_threads) -> None:
    """The parent's pool exists at the fork, its threads do not in the child; one pool lock is even held."""
    expected = loss_and_gradient()
    assert threads._pool._executor is not None
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with threads._pool._lock:
        children = [context.Process(target=_in_child, args=(queue,)) for _ in range(2)]
        for child in children:
            child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert results == [expected, expected]
    assert loss_and_gradient() == expected


def test_four_threads_can_call_it_at_once(two_threads) -> None:
    expected = loss_and_gradient()
    results: list[tuple[float, float]] = []

    def work() -> None:
        for _ in range(5):
            results.append(loss_and_gradient())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert results == [expected] * 20


def test_without_a_place_for_machine_code_it_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the lattice's inner function as in a read-only install without a home."""
    from numba.core import caching

    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    compiled = threads.jit(numba_lattice._exp.py_func)
    assert isinstance(compiled._cache, caching.NullCache)
    assert compiled(1.5) == pytest.approx(4.4816890703380645, rel=1e-15)


def start(code: str, cache: Path | None = None) -> subprocess.Popen[str]:
    """A fresh interpreter; cache: another folder for machine code than that of this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"NUMBA_CACHE_DIR": str(cache)} if cache else {})}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.strip()


@pytest.mark.slow
def test_two_processes_compile_at_once_and_a_third_reads_what_they_wrote(tmp_path: Path) -> None:
    first, second = start(CALL, tmp_path), start(CALL, tmp_path)
    result = finish(first)
    assert finish(second) == result
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nbc")}
    assert written
    assert finish(start(CALL, tmp_path)) == result
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nbc")} == written  # nothing compiled again


@pytest.mark.slow
def test_a_read_only_install_without_a_home_works(tmp_path: Path) -> None:
    prelude = "from numba.core import caching\ncaching.FunctionCache._impl_class._locator_classes = []\n"
    assert finish(start(prelude + CALL, tmp_path)) == finish(start(CALL, tmp_path / "other"))
    assert not list(tmp_path.glob("*.nbc"))


def test_importing_the_package_needs_no_compiler_and_no_other_part() -> None:
    """numba is imported by the first call on CPU only; nothing of the toolkit or its data libraries ever is."""
    code = (
        "import sys, losses\n"
        "assert 'numba' not in sys.modules\n"
        f"{CALL}\n"
        "assert 'numba' in sys.modules\n"
        "others = {'asr', 'recipes', 'tests', 'lhotse', 'torchaudio', 'k2'}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & others))"
    )
    assert finish(start(code)).splitlines()[-1] == "[]"


def test_tasks_run_on_one_torch_thread_each_and_leave_the_setting_alone(two_threads) -> None:
    seen: list[int] = []
    with threads.serial_torch() as count:
        assert count == 2 and torch.get_num_threads() == 1
        threads.start_tasks([lambda: seen.append(torch.get_num_threads())] * 20, count)()
    assert seen == [1] * 20
    assert torch.get_num_threads() == 2
    later: list[int] = []
    worker = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    worker.start()
    worker.join(60)
    assert later == [2]


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_of_a_task_is_raised(count: int) -> None:
    with pytest.raises(ZeroDivisionError):
        threads.start_tasks([lambda: None, lambda: 1 // 0, lambda: None], count)()  # type: ignore[list-item]
