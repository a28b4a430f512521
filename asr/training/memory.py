"""Settings of the C library's memory allocation, and the memory that a process has taken."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# numbers of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Lets this process reuse freed memory instead of giving it back to the system; says whether that was possible.

    A step on CPU frees and allocates the same large tensors again and again. By default glibc returns those of 32 MiB
    and more at once, and the rest at the end of the step; the system then clears each page anew, about a tenth of the
    time of a step. The process stays as large as its largest step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak_bytes() -> int | None:
    """Most resident memory that this process has had since it began; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
