"""Compiled loops on several threads: how to compile them and how to run them.

Not numba's parallel=True: its OpenMP layer kills forked data workers, its workqueue layer aborts under two threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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


class _Pool:
    """A thread pool that a forked child replaces by its own: the parent's threads do not exist there."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):  # not on systems without fork
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self._lock = threading.Lock()  # a new one: the old one may have been held by another thread at the fork
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable, *arguments: object) -> Future | None:
        """None when no thread can be started (interpreter shutdown): the caller then does the work itself."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="losses")
            try:
                return self._executor.submit(function, *arguments)
            except RuntimeError:
                return None


_pool = _Pool()


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
    groups = balanced(costs, count)
    if not groups:
        return
    started = [(_pool.submit(function, group), group) for group in groups[1:]]
    function(groups[0])
    for future, group in started:
        if future is None:
            function(group)
        else:
            future.result()
