"""Recordings that augmentation takes from elsewhere: which there are, and sections of them.

A list is made once in a process and sorted, so that equal draws mean equal recordings in every worker and after every
interruption, as long as the folder stays as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lhotse import MonoCut, Recording

from asr.atomic import write_whole
from asr.data.audio import AudioError, header_problem, read_section
from asr.data.audio_files import find_audio
from asr.errors import UserError

MOST_DRAWS = 20
SILENT_POWER = 1e-8
"""Mean square of full scale, -80 dB: what is quieter would be nothing but rounding noise when it is made louder."""


class RecordingError(UserError):
    """A recording that augmentation wanted cannot be used: no fault of the utterance that it was for."""


class Place(NamedTuple):
    """A recording: a file, or of a manifest a part of one; seconds."""

    path: str
    begin_s: float = 0.0
    length_s: float | None = None

    def read(self, num_samples: int, place: float, channel: float = 0.0) -> np.ndarray:
        """A section, arguments and result as of ``read_section``. Raises RecordingError, which names the file."""
        try:
            return read_section(
                self.path, num_samples, place, channel=channel, begin_s=self.begin_s, length_s=self.length_s
            )
        except AudioError as error:
            raise _unusable(self.path, str(error)) from error


def _unusable(path: str, reason: str) -> RecordingError:
    return RecordingError(f"cannot use the recording {path} for augmentation: {reason}; mend or remove it")


def check_places(places: Iterable[Place], note: Path | None = None) -> None:
    """Raises RecordingError for the first whose header or size is not that of a whole recording.

    ``note`` is a file that remembers that all of them were whole, by their paths, sizes and times of change.
    """
    paths = list(dict.fromkeys(place.path for place in places))
    seen = ""
    if note is not None:
        seen = _as_they_are(paths)
        if seen and note.is_file() and note.read_text(encoding="utf-8") == seen:
            return
    for path in paths:
        problem = header_problem(path)
        if problem is not None:
            raise _unusable(path, problem)
    if note is not None and seen:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, lambda file: file.write(seen.encode()))


def _as_they_are(paths: Iterable[str]) -> str:
    """A hash of the files' paths, sizes and times of change; empty where one of them is not there."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    except OSError:
        return ""
    return digest.hexdigest()


def find_places(key: str, path: Path) -> dict[str, Place]:
    """Recordings by name, sorted: of a folder its audio files by their path in it, of a manifest of lhotse (recordings
    or cuts) its entries by the id of the recording.

    Raises:
        UserError: there are none; ``key`` is the setting that named the path.
    """
    if path.is_dir():
        try:
            return {file.relative_to(path).as_posix(): Place(str(file)) for file in find_audio([path])}
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    if not path.is_file():
        raise UserError(f"{key}: {path} does not exist; pass a folder of recordings, or a manifest of lhotse")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{key}: {path} is neither a folder nor a manifest (.jsonl, .jsonl.gz)")
    found = _of_manifest(key, path)
    if not found:
        raise UserError(f"{key}: the manifest {path} is empty")
    return dict(sorted(found.items()))


def _of_manifest(key: str, path: Path) -> dict[str, Place]:
    from lhotse import load_manifest

    try:
        entries = list(load_manifest(path))
    except Exception as error:  # lhotse's readers raise almost anything for a broken manifest
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: {path} is not a manifest of lhotse ({reason})") from error
    found: dict[str, Place] = {}
    for entry in entries:
        recording = entry.recording if isinstance(entry, MonoCut) else entry
        if not isinstance(recording, Recording):
            raise UserError(f"{key}: {path} has a {type(entry).__name__}; recordings or cuts of them are needed")
        if recording.transforms or len(recording.sources) != 1 or recording.sources[0].type != "file":
            raise UserError(f"{key}: recording {recording.id} of {path} is not one file as it is; write it to one")
        name, source = recording.id, str(recording.sources[0].source)
        if isinstance(entry, MonoCut):
            found[f"{name} {entry.start:012.4f} {entry.id}"] = Place(source, entry.start, entry.duration)
        else:
            found[name] = Place(source)
    return found


def is_silent(samples: np.ndarray) -> bool:
    """Whether there is nothing to be heard."""
    return float(np.mean(np.square(samples, dtype=np.float64))) <= SILENT_POWER


def draw_sections(places: tuple[Place, ...], rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """float32 [num_samples] from random places of random recordings, one after the other; silent sections are skipped.

    Of many short ones, what has been found after ``MOST_DRAWS`` repeats.

    Raises:
        UserError: only silence was found, or a recording cannot be read.
    """
    parts: list[np.ndarray] = []
    missing = num_samples
    for _ in range(MOST_DRAWS):
        chosen = places[int(rng.integers(len(places)))]
        part = chosen.read(missing, rng.random())
        if is_silent(part):
            continue
        parts.append(part)
        missing -= len(part)
        if missing <= 0:
            break
    if not parts:
        raise RecordingError(
            f"{MOST_DRAWS} sections of {len(places)} recordings for augmentation are all silent, the last of "
            f"{chosen.path}; remove silent recordings"
        )
    return np.resize(np.concatenate(parts), num_samples)
