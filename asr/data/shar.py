"""Audio of training cuts in lhotse Shar: tar files ("shards") that are read whole, from a disk or an object store.

The manifest of such cuts says of each recording where it lies: a source of type "shar", its text shard, first byte,
number of bytes and CRC-32, with colons between. Audio is therefore a function of the cut, as it is with files. An epoch
goes through windows of a few shards (``plan.draw_windows``), and each shard is read from beginning to end when it is
opened; the recordings of a batch then come from the system's page cache, which all workers share. Of a URL, whole
shards are fetched into a folder that they share.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from lhotse import AudioSource, MonoCut

from asr.atomic import write_whole
from asr.errors import UserError

SOURCE_TYPE = "shar"
_BLOCK_BYTES = 4 << 20
_KEY_LETTERS = 16
_TAR_END = bytes(1024)
"""A whole tar file ends with two empty blocks."""
_WAITS_S = (1.0, 10.0)
"""Before a shard is asked for again that could not be fetched."""


@dataclass
class SharConfig:
    """Reading of shards, with features.storage=shar.

    Args:
        window: batches take utterances of so many shards, then of so many others, in an order of its own in each epoch.
            More mix better; fewer need less memory of the system (its page cache) and less of cache_gb.
        urls: where shards lie that are not, or no longer, where the features stage wrote them: folders, and for each
            another folder or a URL of fsspec, like {EXP/data/features/train: s3://bucket/train}.
        cache: folder on a local disk for shards from URLs, which all workers share; by default one in the system's
            folder for temporary files.
        cache_gb: what it may hold; the oldest leave. Shards of three windows should fit.
    """

    window: int = 8
    urls: dict[str, str] = field(default_factory=dict)
    cache: str | None = None
    cache_gb: float = 20.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window}; at least 1 shard is needed")
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb={self.cache_gb}; it must be positive")

    def place(self, shard: str) -> str:
        """Where the shard of a manifest is read: a path or a URL."""
        for folder, place in self.urls.items():
            if os.path.dirname(shard) == os.path.abspath(folder):
                return f"{place.rstrip('/')}/{os.path.basename(shard)}"
        return shard

    @property
    def cache_folder(self) -> Path:
        """Where shards from URLs are kept."""
        return Path(self.cache) if self.cache else Path(tempfile.gettempdir(), f"asr-shards-{os.getuid()}")


class Shards:
    """Reads recordings out of shards, which stay open; those of three windows, the last used.

    Args:
        config: where they are.
        whole: read each shard once from beginning to end when it is opened, for those who will take most of it.
    """

    def __init__(self, config: SharConfig | None = None, *, whole: bool = False) -> None:
        self._config, self._whole = config or SharConfig(), whole
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __reduce__(self) -> Any:
        return _shards, (self._config, self._whole)

    def read(self, source: str) -> bytes:
        """The encoded audio that a source of type "shar" names.

        Raises:
            UserError: the shard is missing, truncated or another one.
        """
        shard, first, size, checksum = split_source(source)
        data = os.pread(self._file(shard).fileno(), size, first)
        if zlib.crc32(data) != checksum:
            place = self._config.place(shard)
            if is_url(place):  # next time it is fetched anew
                _cached(place, self._config).unlink(missing_ok=True)
            raise UserError(
                f"shard {place} does not hold at byte {first} what the manifest says: it was changed or is damaged; "
                "run the features stage again, or copy the shard again"
            )
        return data

    def fill(self, cut: MonoCut) -> MonoCut:
        """The cut with its recording in memory, encoded, in place of where it lies. Raises UserError as ``read``."""
        recording = cut.recording
        assert recording is not None
        (source,) = recording.sources
        memory = AudioSource("memory", source.channels, self.read(str(source.source)))
        return replace(cut, recording=replace(recording, sources=[memory]))

    def _file(self, shard: str) -> IO[bytes]:
        file = self._files.pop(shard, None)
        if file is None:
            while len(self._files) >= 3 * self._config.window:
                self._files.popitem(last=False)[1].close()
            file = open_shard(self._config.place(shard), self._config)
            if self._whole:
                _read_through(file)
        self._files[shard] = file
        return file


def _shards(config: SharConfig, whole: bool) -> Shards:
    return Shards(config, whole=whole)


class Ahead:
    """Brings the shards of the next window near while this one's are used, in a thread: called with the number of each
    batch as it is asked for.

    Args:
        windows: int64 [batches], the window of each batch, rising.
        shards: of each window.
        config: where they are.
    """

    def __init__(self, windows: np.ndarray, shards: Sequence[Sequence[str]], config: SharConfig) -> None:
        self._windows, self._shards, self._config = windows, shards, config
        self._begun = -1
        self._thread: threading.Thread | None = None

    def __call__(self, batch: int) -> None:
        wanted = int(self._windows[batch]) + 1
        if self._begun < wanted < len(self._shards):
            self._begun = wanted
            self._thread = threading.Thread(target=self._bring, args=(wanted, self._thread), daemon=True)
            self._thread.start()

    def _bring(self, window: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        for shard in self._shards[window]:
            try:
                with open_shard(self._config.place(shard), self._config) as file:
                    _read_through(file)
            except (UserError, OSError):  # told by the worker that needs it
                return


def source_of(shard: str | os.PathLike[str], first: int, data: bytes) -> str:
    """Where a recording lies, as ``Shards.read`` takes it."""
    return f"{os.fspath(shard)}:{first}:{len(data)}:{zlib.crc32(data):08x}"


def split_source(source: str) -> tuple[str, int, int, int]:
    """Shard, first byte, number of bytes and CRC-32. Raises UserError for the placeholders of lhotse's manifests."""
    try:
        shard, first, size, checksum = source.rsplit(":", 3)
        return shard, int(first), int(size), int(checksum, 16)
    except ValueError:
        raise UserError(
            f"{source!r} does not say where in a shard a recording lies; train from the manifest of the features stage"
        ) from None


def shard_of(cut: MonoCut) -> str:
    """The shard in which the recording of a cut lies. Raises UserError if that is none."""
    source = cut.recording.sources[0] if cut.recording is not None else None
    if source is None or source.type != SOURCE_TYPE:
        raise UserError(
            f"cut {cut.id} lies in no shard; run the features stage with data.features.storage=shar, or set it to "
            "on_the_fly"
        )
    return split_source(str(source.source))[0]


def check_shards(shards: Iterable[str], config: SharConfig) -> None:
    """Whether the shards are there and whole, without reading them; of URLs, whether they can be opened at all.

    Raises:
        UserError: a shard is missing or truncated, fsspec lacks a package for a URL, or ``urls`` names a folder where
            none of the shards was.
    """
    shards = list(shards)
    folders = sorted({os.path.dirname(shard) for shard in shards})
    for folder in config.urls:
        if os.path.abspath(folder) not in folders:
            raise UserError(
                f"data.shar.urls names {folder}, but shards were written to {' and '.join(folders)}; name that folder"
            )
    for shard in shards:
        place = config.place(shard)
        if is_url(place):
            _filesystem(place)
        else:
            open_shard(place, config).close()


def is_url(place: str) -> bool:
    """Whether fsspec must open it."""
    return "://" in place


def open_shard(place: str, config: SharConfig) -> IO[bytes]:
    """A shard as a local file; of a URL it is fetched first, if it is not in the cache.

    Raises:
        UserError: it is missing or truncated, or cannot be fetched.
    """
    try:
        while is_url(place):
            try:
                return open(_fetched(place, config), "rb", buffering=0)
            except FileNotFoundError as error:
                if error.filename != str(_cached(place, config)):
                    raise
                # another process has just made room for other shards
        file: IO[bytes] = open(place, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read shard {place}: {error.strerror or error}; {_MEND}") from error
    try:
        _check_whole(file, place)
    except UserError:
        file.close()
        raise
    return file


_MEND = "run the features stage again, or say in data.shar.urls where it is"


def _check_whole(file: IO[bytes], place: str) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(_TAR_END)))
    if size % 512 or file.read(len(_TAR_END)) != _TAR_END:
        raise UserError(f"shard {place} is truncated: {size} bytes and no end of a tar file; {_MEND}")
    file.seek(0)


def _read_through(file: IO[bytes]) -> None:
    """From now on it lies in the page cache: what is read of it in any order is no matter of the disk any more."""
    block = bytearray(_BLOCK_BYTES)
    while file.readinto(block):  # type: ignore[attr-defined]
        pass


def _cached(url: str, config: SharConfig) -> Path:
    key = hashlib.sha256(url.encode()).hexdigest()[:_KEY_LETTERS]
    return config.cache_folder / f"{key}-{url.rsplit('/', 1)[-1]}"


def _fetched(url: str, config: SharConfig) -> Path:
    """The shard in the cache; one process fetches it, others wait for it."""
    path = _cached(url, config)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            os.utime(path)
            return path
        for wait_s in (*_WAITS_S, None):
            try:
                write_whole(path, lambda file: _copy(url, file))
                break
            except FileNotFoundError:
                raise
            except Exception as error:  # fsspec's file systems raise what their libraries do
                if wait_s is None:
                    if isinstance(error, UserError):
                        raise
                    said = " ".join(str(error).split()) or type(error).__name__
                    raise UserError(f"cannot fetch shard {url} into {path.parent}: {said}") from error
                time.sleep(wait_s)
        _drop_oldest(path, config)
    return path


def _copy(url: str, file: IO[bytes]) -> None:
    with _filesystem(url).open(url, "rb") as source:
        shutil.copyfileobj(source, file, _BLOCK_BYTES)
    file.flush()
    with open(file.name, "rb", buffering=0) as written:
        _check_whole(written, url)


def _filesystem(url: str) -> Any:
    """fsspec's file system of a URL. Raises UserError if there is none."""
    import fsspec  # with torch; what it needs for a protocol, users install

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open shards at {url}: {' '.join(str(error).split())}") from error


def _drop_oldest(newest: Path, config: SharConfig) -> None:
    """Files that a process still reads stay on the disk until it closes them."""
    held = sorted(_ages(config.cache_folder), reverse=True)
    total = 0
    for _, size, path in held:
        total += size
        if total > config.cache_gb * 1e9 and path != newest:
            path.unlink(missing_ok=True)


def _ages(folder: Path) -> Iterator[tuple[int, int, Path]]:
    for path in folder.glob(f"{'[0-9a-f]' * _KEY_LETTERS}-*"):  # the folder may hold what is somebody's own
        try:
            status = path.stat()
        except FileNotFoundError:  # another process dropped it
            continue
        yield status.st_mtime_ns, status.st_size, path
