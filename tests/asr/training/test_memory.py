"""Freed memory is kept where the C library can."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

# in a process of its own: the setting stays for good
CODE = """
import resource, torch
from asr.training.memory import keep_freed_memory
kept = keep_freed_memory()
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sorted(faults)[len(faults) // 2])
"""


def test_large_tensors_reuse_freed_pages() -> None:
    shown = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == str(platform.libc_ver()[0] == "glibc")
    if shown[0] == "True":
        assert int(shown[1]) < 1000  # of 16384 pages


def test_settings_of_the_environment_win() -> None:
    """glibc has read them; what is freed is given back."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    shown = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    kept, faults = shown.stdout.split()
    assert kept == "False" and (platform.libc_ver()[0] != "glibc" or int(faults) > 10_000)
