"""Compiled loops on several threads: how to compile them and how to run them.

Not numba's parallel=True: its OpenMP layer kills forked data workers, its workqueue layer aborts under two threads.

The threads of the pool run torch operations on one thread each. Where compiled loops and matrix products take turns,
whole tiles are handed to the pool (`start_tasks`): torch's own threads would wait for the next product in a busy loop,
and take the processor from the compiled loops between.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit


def _compiled(function: Callable, fastmath: set[str]) -> Callable:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": a read-only install without a home
        return njit(**options)(function)


def jit(function: Callable) -> Callable:
    """Compile without the GIL; keep machine code on disk where a place for it can be written, else in memory only.

    Only the file of the function itself is checked for changes when machine code is read back, so a compiled function
    must not call one of another file.
    """
    return _compiled(function, {"contract"})


def jit_reordering(function: Callable) -> Callable:
    """As `jit`; sums of this function, not those of functions that it calls, may be taken in another order."""
    return _compiled(function, {"contract", "reassoc"})


def _one_torch_thread(lock: threading.Lock) -> None:
    """Let torch use one thread in the calling thread, and in no other.

    torch.set_num_threads also sets what threads that begin later start with; a short-lived thread sets that back.
    Asking first matters: a thread that has not done so takes over the others' number at its first parallel operation.
    """
    with lock:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(torch.set_num_threads, count).result()


class _Pool:
    """A thread pool that a forked child replaces by its own: the parent's threads do not exist there."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):  # not on systems without fork
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self._lock = threading.Lock()  # a new one: the old one may have been held by another thread at the fork
        self._executor: ThreadPoolExecutor | None = None
        self.starting = threading.Lock()

    def submit(self, function: Callable, *arguments: object) -> Future | None:
        """None when no thread can be started (interpreter shutdown): the caller then does the work itself."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(
                    os.cpu_count() or 1, "losses", initializer=_one_torch_thread, initargs=(self.starting,)
                )
            try:
                return self._executor.submit(function, *arguments)
            except RuntimeError:
                return None


_pool = _Pool()
_END = object()
T = TypeVar("T")
R = TypeVar("R")


def balanced(costs: Sequence[int], count: int) -> list[np.ndarray]:
    """Indices of costs in at most `count` groups of about equal sums: largest first, each to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(i)
        loads[lightest] += costs[i]
    return [np.array(g, dtype=np.int64) for g in groups if g]


def run_groups(function: Callable[[np.ndarray], None], costs: Sequence[int], inline_below: int) -> None:
    """Call function(indices) for groups that cover all of costs, on as many threads as torch uses here.

    The caller's thread does a group itself; problems of a total cost under `inline_below` are left to it wholly.
    """
    count = 1 if sum(costs) < inline_below else max(1, min(len(costs), torch.get_num_threads()))
    run_each(function, balanced(costs, count))


def run_each(function: Callable[[np.ndarray], None], groups: Sequence[np.ndarray]) -> None:
    """Call function(group) of each group: the first on the caller's thread, the others on threads of the pool.

    What none of them has begun when the caller's has nothing left to do, it does itself: it may be one of the pool's.
    """
    if not groups:
        return
    started = [(_pool.submit(function, group), group) for group in groups[1:]]
    function(groups[0])
    for future, group in started:
        if future is None or future.cancel():
            function(group)
        else:
            future.result()


@contextmanager
def serial_torch() -> Iterator[int]:
    """Torch operations of this thread run on one thread within; gives the number that was allowed."""
    count = torch.get_num_threads()
    if count > 1:
        _one_torch_thread(_pool.starting)
    try:
        yield count
    finally:
        if count > 1:
            torch.set_num_threads(count)


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """function(item) of each item, in their order, on so many threads of the pool, each with one thread of torch.

    No more items are taken than are computed at once. With one thread the caller's does the work, and torch has all its
    threads.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    under_way: deque[tuple[T, Future | None]] = deque()
    rest = iter(items)
    try:
        while True:
            while len(under_way) < threads and (item := next(rest, _END)) is not _END:
                under_way.append((item, _pool.submit(function, item)))  # type: ignore[arg-type]
            if not under_way:
                return
            first, future = under_way.popleft()
            yield function(first) if future is None else future.result()
    finally:
        for _, future in under_way:
            if future is not None:
                future.cancel()


def start_tasks(tasks: Sequence[Callable[[], None]], threads: int) -> Callable[[], None]:
    """Call each of the tasks, in any order, on so many threads of the pool; the result waits until all are done.

    What is started later begins when threads are free. The tasks write to different places, so that the outcome does
    not depend on which thread took which. The first error is raised, by waiting, when all threads have stopped. With
    one thread the caller's does the work when it waits.
    """
    todo = iter(tasks)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                task = next(todo, None)
            if task is None:
                return
            task()

    if threads == 1:
        return work
    started = [_pool.submit(work) for _ in range(min(threads, len(tasks)))]

    def wait() -> None:
        if None in started:
            work()
        errors = [future.exception() for future in started if future is not None]
        for error in errors:
            if error is not None:
                raise error

    return wait
