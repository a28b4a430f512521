"""Features of many cuts in one file: lhotse's storage interface over raw float32 arrays behind each other.

One small file per cut costs an open, a header and a close for each; here a cut is one copy out of a memory map. Files
hold nothing but the little-endian float32 values; where an array lies and its shape are in the key, which travels in
the ``Features`` of the cut: ``"<first byte>:<frames>:<bins>"``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import TracebackType

import numpy as np
from lhotse.features.io import FeaturesReader, FeaturesWriter, register_reader, register_writer

from asr.errors import UserError

STORAGE_NAME = "packed_float32"
_DTYPE = np.dtype("<f4")


@register_writer
class PackedWriter(FeaturesWriter):
    """Writes float32 [frames, bins] arrays behind each other into one new file.

    Args:
        storage_path: the file; it must not exist.
    """

    name = STORAGE_NAME

    def __init__(self, storage_path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(storage_path)
        self._file = open(self._path, "xb")

    @property
    def storage_path(self) -> str:
        return self._path

    def write(self, key: str, value: np.ndarray) -> str:
        """Append one array and return the key that reads it back; ``key`` itself is not needed."""
        if value.ndim != 2 or value.dtype != np.float32:
            raise ValueError(f"features must be float32 [frames, bins], got {value.dtype} of shape {value.shape}")
        first = self._file.tell()
        self._file.write(np.ascontiguousarray(value, dtype=_DTYPE).data)
        return f"{first}:{value.shape[0]}:{value.shape[1]}"

    def close(self) -> None:
        """Bring everything to the disk, so that a manifest written afterwards never names missing bytes."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@register_reader
class PackedReader(FeaturesReader):
    """Reads what PackedWriter wrote; the arrays are views into a read-only memory map."""

    name = STORAGE_NAME

    def __init__(self, storage_path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(storage_path)

    def read(self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray:
        return read_packed(self._path, key)[left_offset_frames:right_offset_frames]


def read_packed(path: str, key: str) -> np.ndarray:
    """The array float32 [frames, bins] behind a key, as a read-only view (no copy).

    Raises:
        UserError: the file is missing or ends before the array does.
    """
    first, frames, bins = (int(part) for part in key.split(":"))
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read stored features {path}: {error.strerror}; run the features stage") from error
    values = _open(path, status.st_ino, status.st_mtime_ns, status.st_size)
    begin = first // _DTYPE.itemsize
    end = begin + frames * bins
    if end > values.size:
        raise UserError(
            f"stored features end too early: {path} holds {values.size} values, {end} are needed; "
            f"remove its folder and run the features stage again"
        )
    return values[begin:end].reshape(frames, bins)


@lru_cache(maxsize=1024)
def _open(path: str, inode: int, mtime_ns: int, size: int) -> np.ndarray:
    """Map a file once per process; what identifies its content is in the key, so a replaced file is mapped anew."""
    if size == 0:
        return np.empty(0, dtype=_DTYPE)
    # np.asarray drops the memmap subclass, whose bookkeeping makes every slice several times slower
    return np.asarray(np.memmap(path, dtype=_DTYPE, mode="r", shape=(size // _DTYPE.itemsize,)))
