"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def partial_name(path: Path) -> Path:
    """The hidden name beside ``path`` that it has until it is whole."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Lets ``write`` fill a file beside the target, syncs, renames: a reader sees the old file or the whole new one.

    Raises:
        OSError: the disk is full or not writable; the old file is untouched and nothing half-written stays.
    """
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Names of files, such as a rename gives, must survive a power cut too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def cause_on_disk(error: BaseException) -> BaseException:
    """torch's writer wraps ENOSPC in a RuntimeError; the cause says more."""
    return error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
