"""Corpora whose recordings are usable as they are, one file an utterance: cuts name the files, nothing is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import soundfile

from asr.data.audio import SAMPLE_RATE_HZ
from recipes.corpora.base import CorpusWriter

FLAC_MD5 = slice(26, 42)
"""Where the first block of a FLAC file holds the MD5 sum of its samples (RFC 9639, section 8.2)."""


class Row(NamedTuple):
    """An utterance as a list of transcripts has it, and the line that says so."""

    split: str
    cut_id: str
    audio: Path
    text: str
    speaker: str
    listed_in: Path
    line: int


class _Found(NamedTuple):
    """What the header of a file says, or why it cannot be used."""

    num_samples: int = 0
    digest: str = ""
    problem: str = ""


def add_rows(writer: CorpusWriter, rows: Sequence[Row], num_jobs: int) -> None:
    """Adds the utterances whose files are 16 kHz mono, and a bad row for each other.

    Headers are read and nothing is decoded: a thousand hours take minutes. What is damaged behind its header shows when
    training or decoding reads it.
    """
    with ThreadPoolExecutor(num_jobs) as pool:
        for row, found in zip(rows, pool.map(_look, (row.audio for row in rows)), strict=True):
            if found.problem:
                writer.bad(row.listed_in, f"{row.cut_id}: {found.problem}: {row.audio}", row.line)
            elif not row.text:
                writer.bad(row.listed_in, f"{row.cut_id} has no text", row.line)
            else:
                writer.add_file(
                    row.split, row.cut_id, row.audio, found.num_samples, found.digest, row.text, row.speaker
                )


def _look(path: Path) -> _Found:
    if not path.is_file():
        return _Found(problem="there is no such file")
    try:
        info = soundfile.info(str(path))
        if (info.samplerate, info.channels) != (SAMPLE_RATE_HZ, 1):
            return _Found(problem=f"it has {info.channels} channels at {info.samplerate} Hz, not one at 16000")
        if not info.frames:
            return _Found(problem="it holds no samples")
        return _Found(info.frames, _digest(path))
    except (OSError, soundfile.LibsndfileError) as error:
        return _Found(problem=f"not readable as audio ({' '.join(str(error).split())})")


def _digest(path: Path) -> str:
    """Of the samples: the sum that a FLAC file holds; of another file, that of all its bytes."""
    with open(path, "rb") as file:
        if path.suffix == ".flac":
            digest = file.read(FLAC_MD5.stop)[FLAC_MD5]
            if any(digest):
                return digest.hex()
            file.seek(0)
        return hashlib.sha256(file.read()).hexdigest()
