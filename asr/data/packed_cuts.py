"""Many cuts in little memory: as compressed lines of their manifest, made into objects when they are asked for.

A cut as an object takes some 5 kB and half a tenth of a millisecond; as a compressed line about 100 bytes. Forked
workers share the lines with their parent, whereas objects are copied one after the other into each worker's own memory
as it counts references to them.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from lhotse import MonoCut
from lhotse.serialization import deserialize_item

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.augmentation import AugmentConfig, expand_cut, random_generator
from asr.data.shar import shard_of
from asr.errors import UserError

BLOCK = 64
"""Lines that are compressed together: more take less memory, and more time to reach one of them."""

# how lhotse begins a cut, and how the features stage names shards: what is read this way need not be parsed
_HEAD = re.compile(rb'\{"id": "([^"\\]*)", "start": [-+.e0-9]+, "duration": ([-+.e0-9]+),')


_SHARD = re.compile(rb'"type": "shar", "channels": \[[0-9]+\], "source": "([^"\\]+):[0-9]+:[0-9]+:[0-9a-f]{8}"')


class _Cuts(Sequence[MonoCut]):
    """A list whose cuts are made when they are asked for, by ``_at`` of their number."""

    durations_s: np.ndarray

    def __len__(self) -> int:
        return len(self.durations_s)

    @overload
    def __getitem__(self, index: int) -> MonoCut: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MonoCut]: ...
    def __getitem__(self, index: int | slice) -> MonoCut | Sequence[MonoCut]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"cut {index} of {len(self)}")
        return self._at(index % len(self))

    def _at(self, number: int) -> MonoCut:
        raise NotImplementedError


class PackedCuts(_Cuts):
    """A fixed list of cuts.

    Made by ``PackedCuts.open`` of a manifest, or of cuts that are there. ``durations_s`` is float64 [N]; ``tokens`` is
    int32 [N], what training's tokenizer makes of each transcript, where somebody has counted.
    """

    tokens: np.ndarray | None = None

    def __init__(self, cuts: Iterable[MonoCut] = ()) -> None:
        self._path: Path | None = None
        self._shards: tuple[np.ndarray, list[str]] | None = None
        self._pack(json.dumps(cut.to_dict(), ensure_ascii=False).encode() for cut in cuts)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PackedCuts:
        """Reads a manifest, ``.jsonl`` or ``.jsonl.gz``; its lines are not made into cuts yet.

        Raises:
            UserError: the manifest is missing, cannot be read, or holds no cuts; a line is no JSON object with an id
                and a duration, or an id comes twice. The message names the line.
        """
        path = Path(path)
        packed = cls()
        packed._path = path
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
                packed._pack(file)
        except FileNotFoundError as error:
            raise UserError(
                f"manifest {path} does not exist; run the stage that writes it, or mend the path"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}:{packed._read + 1}: the manifest cannot be read: {error}") from error
        if not len(packed):
            raise UserError(f"manifest {path} holds no cuts")
        return packed

    def keep(self, numbers: Iterable[int]) -> PackedCuts:
        """The cuts of these numbers, in rising order."""
        wanted = set(numbers)
        kept = PackedCuts()
        lines = (line for block in range(len(self._ends) - 1) for line in self._block(block))
        kept._pack(line for number, line in enumerate(lines) if number in wanted)
        return kept

    def _pack(self, lines: Iterable[bytes]) -> None:
        seen: dict[int, int] = {}
        durations_s: list[float] = []
        packed = []
        rest = iter(lines)
        self._read = 0
        while block := list(islice(rest, BLOCK)):
            for line in block:
                self._read += 1
                found = _HEAD.match(line)
                try:
                    entry: Any = {"id": found[1], "duration": found[2]} if found else json.loads(line)
                    durations_s.append(float(entry["duration"]))
                    key = hash(entry["id"] if isinstance(entry["id"], bytes) else str(entry["id"]).encode())
                except (ValueError, KeyError, TypeError) as error:
                    if isinstance(error, KeyError) and "type" in entry:
                        self._cut(line, self._read - 1)  # lhotse says what is wrong with it
                    raise self._no_cut(self._read, error) from None
                if seen.setdefault(key, self._read) != self._read and self._path is not None:
                    named = json.loads(line)["id"]
                    raise UserError(
                        f"{self._path}:{self._read}: id {named!r} is in line {seen[key]} too; ids must be unique"
                    )
            packed.append(zlib.compress(b"\n".join(line.rstrip(b"\n") for line in block), 1))
        self._ends = np.cumsum([0, *(len(block) for block in packed)])
        self._data = np.frombuffer(b"".join(packed), np.uint8)
        self.durations_s = np.array(durations_s)

    def shards(self) -> tuple[np.ndarray, list[str]]:
        """In which shard each cut lies, int32 [N], and the names of the shards, in the order in which they come.

        Raises:
            UserError: a cut lies in no shard.
        """
        if self._shards is None:
            numbers: dict[str, int] = {}
            found = np.empty(len(self), np.int32)
            for number, line in enumerate(line for block in range(len(self._ends) - 1) for line in self._block(block)):
                named = _SHARD.findall(line)
                name = named[0].decode() if len(named) == 1 else shard_of(self._cut(line, number))
                found[number] = numbers.setdefault(name, len(numbers))
            self._shards = found, list(numbers)
        return self._shards

    def _no_cut(self, line: int, error: Exception) -> UserError:
        return UserError(f"{self._path or 'cuts'}:{line}: this is not a cut ({type(error).__name__}: {error})")

    def _at(self, number: int) -> MonoCut:
        return self._cut(self._block(number // BLOCK)[number % BLOCK], number)

    def __iter__(self) -> Iterator[MonoCut]:
        for block in range(len(self._ends) - 1):
            for number, line in enumerate(self._block(block), block * BLOCK):
                yield self._cut(line, number)

    def _block(self, number: int) -> list[bytes]:
        return zlib.decompress(self._data[self._ends[number] : self._ends[number + 1]].tobytes()).split(b"\n")

    def _cut(self, line: bytes, number: int) -> MonoCut:
        try:
            cut = deserialize_item(json.loads(line))
        except Exception as error:  # lhotse's constructors raise almost anything for a wrong field
            raise self._no_cut(number + 1, error) from error
        if not isinstance(cut, MonoCut):
            raise UserError(f"{self._path or 'cuts'}:{number + 1}: this is a {type(cut).__name__}; a MonoCut is needed")
        return cut


class JoinedCuts(_Cuts):
    """Several corpora, one after the other, with how much of each an epoch holds.

    Args:
        parts: the cuts of each.
        shares: of each, how often an epoch holds one of its cuts on average: 1 is all of them, 0.2 another fifth in
            each epoch, 2 all of them twice.
    """

    def __init__(self, parts: Sequence[PackedCuts], shares: Sequence[float]) -> None:
        self._parts, self.shares = list(parts), list(shares)
        self._begins = np.cumsum([0, *(len(part) for part in parts)])
        self.durations_s = np.concatenate([part.durations_s for part in parts])
        counted = [part.tokens for part in parts if part.tokens is not None]
        self.tokens = np.concatenate(counted) if len(counted) == len(parts) else None

    @property
    def sizes(self) -> list[int]:
        """How many cuts each part has."""
        return [len(part) for part in self._parts]

    def shards(self) -> tuple[np.ndarray, list[str]]:
        """As of ``PackedCuts``."""
        numbers: dict[str, int] = {}
        found = []
        for part in self._parts:
            own, names = part.shards()
            found.append(np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)[own])
        return np.concatenate(found), list(numbers)

    def _at(self, number: int) -> MonoCut:
        part = int(np.searchsorted(self._begins, number, side="right")) - 1
        return self._parts[part][number - int(self._begins[part])]

    def __iter__(self) -> Iterator[MonoCut]:
        for part in self._parts:
            yield from part


class ChosenCuts(_Cuts):
    """Those cuts of a list that have these numbers, in their order."""

    def __init__(self, cuts: Sequence[MonoCut], numbers: np.ndarray) -> None:
        self._cuts, self._numbers = cuts, numbers
        self.durations_s = durations_of(cuts)[numbers]

    def _at(self, number: int) -> MonoCut:
        return self._cuts[int(self._numbers[number])]


def mean_share(cuts: object) -> np.ndarray | float:
    """How often an epoch holds each cut on average, float64 [N], or 1 for all."""
    return np.repeat(cuts.shares, cuts.sizes) if isinstance(cuts, JoinedCuts) else 1.0


def cuts_of_epoch(cuts: JoinedCuts, places: int, *, seed: int, epoch: int) -> np.ndarray:
    """Which cuts an epoch holds: a pure function of its arguments.

    A part of less than its whole is another one in each epoch: all of a corpus are heard before one is heard again.

    Args:
        cuts: of several corpora, N in all.
        places: speeds times copies that each cut has anyway.
        seed: of the experiment.
        epoch: number of the epoch.

    Returns:
        int64, rising: place * N + cut, where the places of the second time that a cut is heard follow those of the
        first.
    """
    found = []
    begin = 0
    for part, (count, share) in enumerate(zip(cuts.sizes, cuts.shares, strict=True)):
        for time in range(math.ceil(share)):
            chosen = _turn(count, min(1.0, share - time), f"{part}-{time}", seed, epoch)
            found += [(time * places + place) * len(cuts) + begin + chosen for place in range(places)]
        begin += count
    return np.sort(np.concatenate(found))


def _turn(count: int, share: float, name: str, seed: int, epoch: int) -> np.ndarray:
    """The share of ``count`` whose turn it is in an epoch, round and round in one random order."""
    first, last = round(share * count * epoch), round(share * count * (epoch + 1))
    return random_generator(seed, 0, name, "mix").permutation(count)[np.arange(first, last) % count]


def durations_of(cuts: Iterable[MonoCut]) -> np.ndarray:
    """Durations in seconds, float64 [N]."""
    if isinstance(cuts, _Cuts):
        return cuts.durations_s
    return np.array([cut.duration for cut in cuts])


class ExpandedCuts(_Cuts):
    """``expand_cuts`` of cuts without their stored features, each made when it is asked for; all so many times."""

    def __init__(self, cuts: Sequence[MonoCut], config: AugmentConfig, times: int = 1) -> None:
        self._cuts, self._config = cuts, config
        plain = durations_of(cuts)
        by_speed = [plain if factor == 1.0 else _at_speed(plain, factor) for factor in config.speed_factors]
        self.durations_s = np.concatenate(by_speed * config.copies * times)

    def _at(self, number: int) -> MonoCut:
        place, number = divmod(number, len(self._cuts))
        copy, speed = divmod(place, len(self._config.speed_factors))
        return expand_cut(self._cuts[number].drop_features(), self._config.speed_factors[speed], copy)


def _at_speed(durations_s: np.ndarray, factor: float) -> np.ndarray:
    """As lhotse's perturb_num_samples rounds: the half up for factors of 1 and more, else down."""
    samples = np.round(np.round(durations_s * SAMPLE_RATE_HZ) / factor, 8)
    return (np.floor(samples + 0.5) if factor >= 1 else np.ceil(samples - 0.5)) / SAMPLE_RATE_HZ
