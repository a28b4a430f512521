"""Recordings played to a recognizer, several at once: what is heard in each, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asr.data.audio import AudioError
from asr.decoding.streaming import Stream, StreamingRecognizer
from asr.decoding.transcript import Segment

AT_ONCE = 16
"""Streams of one batch. Each holds a piece of its audio, and what is not yet cut of it."""


@dataclass(frozen=True)
class Heard:
    """What a step has brought of one recording.

    key: as it was added.
    samples: float32 [N] at 16 kHz, read in this step; may be empty.
    segments: that became final.
    partial: what goes on, and since when.
    ended: no more comes of this recording.
    error: why it ended before its time.
    """

    key: int
    samples: np.ndarray
    segments: list[Segment]
    partial: Segment
    ended: bool
    error: str | None = None


class Player:
    """Feeds recordings to the streams of a recognizer, each piece when the one before it is used up."""

    def __init__(self, recognizer: StreamingRecognizer) -> None:
        self._recognizer = recognizer
        self._playing: dict[int, tuple[Stream, Iterator[np.ndarray]]] = {}

    def __len__(self) -> int:
        """Recordings that have not ended."""
        return len(self._playing)

    def add(self, key: int, pieces: Iterator[np.ndarray]) -> None:
        """A recording: float32 [N] pieces at 16 kHz, whose reading may raise ``AudioError``."""
        self._playing[key] = (self._recognizer.open(), pieces)

    def step(self) -> list[Heard]:
        """One chunk of each recording."""
        read: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        for key, (stream, pieces) in self._playing.items():
            try:
                read[key] = _feed(stream, pieces)
            except AudioError as error:
                errors[key] = str(error)
                self._recognizer.close(stream)
        self._recognizer.advance([stream for stream, _ in self._playing.values()])
        found = []
        none = np.zeros(0, dtype=np.float32)
        for key, (stream, _) in list(self._playing.items()):
            samples = read.get(key, none)
            found.append(Heard(key, samples, stream.take(), stream.partial, stream.ended, errors.get(key)))
            if stream.ended:
                del self._playing[key]
        return found


def _feed(stream: Stream, pieces: Iterator[np.ndarray]) -> np.ndarray:
    """Reads until there is a chunk to advance by, or nothing more; the samples."""
    read = []
    while not stream.ready and not stream.finished:
        piece = next(pieces, None)
        if piece is None:
            stream.finish()
        else:
            stream.accept(piece)
            read.append(piece)
    return np.concatenate(read) if read else np.zeros(0, dtype=np.float32)
