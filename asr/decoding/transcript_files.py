"""Transcripts as files: one for each recording and format, there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from asr.atomic import write_whole
from asr.decoding.subtitles import srt, vtt
from asr.decoding.transcript import Segment, Transcript
from asr.errors import UserError

CTM_CHANNEL = 1


def txt(transcript: Transcript, name: str) -> str:
    """A line for each segment."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def as_json(transcript: Transcript, name: str) -> str:
    """Everything: times in seconds from the start of the file, confidences as probabilities."""
    return json.dumps(to_dict(transcript), ensure_ascii=False, indent=1) + "\n"


def to_dict(transcript: Transcript) -> dict[str, Any]:
    """For JSON. The confidence of a word is the product, that of a segment the geometric mean, of those of tokens."""

    def segment(one: Segment) -> dict[str, Any]:
        words = [
            {
                "text": word.text,
                "start_s": round(word.start_s, 3),
                "end_s": round(word.end_s, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in one.words
        ]
        return {
            "start_s": round(one.start_s, 3),
            "end_s": round(one.end_s, 3),
            "text": one.text,
            "confidence": round(_mean(one.hypothesis.confidences), 4),
            "words": words,
        }

    return {
        "file": os.fspath(transcript.path),
        "duration_s": round(transcript.duration_s, 3),
        "text": transcript.text,
        "segments": [segment(one) for one in transcript.segments],
    }


def ctm(transcript: Transcript, name: str) -> str:
    """NIST's time marked conversation: name, channel, start and duration in seconds, word, confidence."""
    name = "_".join(name.split()) or "_"  # fields end at white space
    return "".join(
        f"{name} {CTM_CHANNEL} {word.start_s:.2f} {word.end_s - word.start_s:.2f} {word.text} {word.confidence:.4f}\n"
        for word in transcript.words
    )


# the text of a file, of a transcript and the name that its files have
FORMATS: dict[str, Callable[[Transcript, str], str]] = {"txt": txt, "json": as_json, "srt": srt, "vtt": vtt, "ctm": ctm}


def _mean(confidences: Sequence[float]) -> float:
    if not confidences or min(confidences) <= 0:
        return 0.0
    return math.exp(math.fsum(math.log(one) for one in confidences) / len(confidences))


def parse_formats(text: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        UserError: a format that is not known, or none.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"unknown format {name}; valid: {', '.join(FORMATS)}")
    if not names:
        raise UserError(f"--format names no format; valid: {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


class TranscriptFiles:
    """Writes transcripts into a folder, which is made.

    Args:
        folder: of the files.
        formats: names of ``FORMATS``.
        paths: all recordings, which share out the names of the files between them.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, formats: Sequence[str], paths: Sequence[Path]) -> None:
        self._folder, self._formats = folder, formats
        self._names = iter(unique_names(paths))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # before the work, not after it
        except OSError as error:
            raise UserError(
                f"--out-dir {folder} cannot be written ({error.strerror or error}); choose another folder"
            ) from error

    def write(self, transcript: Transcript) -> None:
        """The files of the next recording: called for all of them, in their order; one with an error has none.

        Raises:
            OSError: a file cannot be written.
        """
        name = next(self._names)
        if transcript.error is not None:
            return
        for kind in self._formats:
            data = FORMATS[kind](transcript, name).encode("utf-8", errors="replace")
            write_whole(self._folder / f"{name}.{kind}", partial(_put, data))


def _put(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def unique_names(paths: Iterable[Path]) -> list[str]:
    """A name for each file: its own without the ending, with it or a number where another file has that name already.

    Names differ also where upper and lower case are the same.
    """
    taken: set[str] = set()
    names = []
    for path in paths:
        choices = chain([path.stem, path.name], (f"{path.stem}-{number}" for number in count(2)))
        name = next(name for name in choices if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names
