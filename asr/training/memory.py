"""Settings of the C library's memory allocation, and the memory that a process has taken."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from asr.errors import UserError

# numbers of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Lets this process reuse freed memory instead of giving it back to the system; says whether that was possible.

    A step on CPU frees and allocates the same large tensors again and again. By default glibc returns those of 32 MiB
    and more at once, and the rest at the end of the step; the system then clears each page anew, about a tenth of the
    time of a step. The process stays as large as its largest step. Whoever has set glibc's own variable wants it
    otherwise.
    """
    if not sys.platform.startswith("linux") or os.environ.get("MALLOC_MMAP_THRESHOLD_") is not None:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where that is possible, and from now on at once: there is little left."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    for name, arguments in (
        ("mallopt", (M_MMAP_THRESHOLD, 2**17)),
        ("mallopt", (M_TRIM_THRESHOLD, 2**17)),
        ("mallopt", (M_ARENA_MAX, 1)),  # what one thread has freed serves the others
        ("malloc_trim", (0,)),
    ):
        if (function := getattr(library, name, None)) is not None:
            function(*arguments)


class Computing:
    """Calls functions in this thread, or in a new one after oneDNN has failed to compile in this one for lack of
    memory: its assembler keeps that error for as long as the thread lives."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def call(self, function: Callable[[], Any]) -> Any:
        """What the function returns or raises."""
        return function() if self._thread is None else self._thread.submit(function).result()

    def renew(self) -> None:
        """Take a new thread."""
        if self._thread is not None:
            self._thread.shutdown()
        # a thread that does not ask for their number would set it, for all of torch
        self._thread = ThreadPoolExecutor(1, initializer=torch.get_num_threads)


def peak_bytes() -> int | None:
    """Most resident memory that this process has had since it began; None where there is no /proc."""
    return status_bytes("VmHWM")


def used_bytes(device: torch.device) -> int:
    """Resident memory of this process on CPU, without the pages of files; of its tensors on CUDA.

    Raises:
        UserError: this system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _asked("RssAnon") + _asked("RssShmem")


def peak_bytes_of(device: torch.device, function: Callable[[], Any]) -> int:
    """Most memory that a call has had above what was used before.

    Raises:
        UserError: this system does not say.
    """
    if device.type == "cuda":
        before = used_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = _asked("VmRSS")
    function()
    return max(0, _asked("VmHWM") - before)


def _asked(name: str) -> int:
    size = status_bytes(name)
    if size is None:
        raise UserError("this system does not tell how much memory a process has; memory.limit needs Linux, or CUDA")
    return size


def status_bytes(name: str) -> int | None:
    """A size in /proc/self/status, by its name there; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
