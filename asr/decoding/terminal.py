"""What `asr transcribe` shows while it works: words as they come, or how far it is."""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from asr.data.audio import audio_duration_s
from asr.decoding.transcribe import Listener
from asr.decoding.transcript import Segment, Transcript

CLEAR = "\r\x1b[K"
EVERY_S = 0.2


class LiveText(Listener):
    """Segments as they come. On a terminal what goes on is a line that is written anew; elsewhere only what is final.

    Args:
        out: where to.
        named: whether each line begins with the path.
    """

    def __init__(self, out: TextIO, named: bool = True) -> None:
        self._out, self._named, self._tty = out, named, out.isatty()

    def segment(self, path: Path, segment: Segment) -> None:
        text = f"{path}: {segment.text}" if self._named else segment.text
        if segment.final:
            print(CLEAR + text if self._tty else text, file=self._out, flush=True)
        elif self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(CLEAR + _end_of(text, width))
            self._out.flush()


class Progress(Listener):
    """Files and audio that are done, how fast, and what is left, in one line of a terminal; elsewhere nothing.

    Args:
        out: where to.
        paths: of all files.
    """

    def __init__(self, out: TextIO, paths: Sequence[Path]) -> None:
        self._out, self._files = out, len(paths)
        self._tty = out.isatty()
        # a file that does not say how long it is makes the whole unknown
        lengths = [audio_duration_s(path) for path in paths] if self._tty else []
        self._total_s = None if None in lengths else sum(length or 0.0 for length in lengths)
        self._done = 0
        self._audio_s = 0.0
        self._begin = self._shown = time.monotonic()

    def heard(self, duration_s: float) -> None:
        self._audio_s += duration_s
        now = time.monotonic()
        if self._tty and now - self._shown >= EVERY_S:
            self._shown = now
            width = shutil.get_terminal_size().columns - 1
            self._out.write(CLEAR + self.line(now - self._begin)[:width])
            self._out.flush()

    def finished(self, transcript: Transcript) -> None:
        """A file is done. The line makes room for what is printed about it."""
        self._done += 1
        self.clear()

    def clear(self) -> None:
        """Removes the line."""
        if self._tty:
            self._out.write(CLEAR)
            self._out.flush()

    def line(self, seconds: float) -> str:
        """What is said after so many seconds of work."""
        times = self._audio_s / max(seconds, 1e-3)
        of = f" of {clock(self._total_s)}" if self._total_s is not None else ""
        text = f"{self._done}/{self._files} files, {clock(self._audio_s)}{of} of audio, {times:.0f} times real time"
        if self._total_s is None or not times:
            return text
        return f"{text}, {clock(max(0.0, self._total_s - self._audio_s) / times)} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _end_of(text: str, width: int) -> str:
    """The end of a text that fits into so many columns: a line that wraps could not be written anew."""
    columns = 0
    for i in range(len(text) - 1, -1, -1):
        columns += 2 if unicodedata.east_asian_width(text[i]) in "WF" else 1
        if columns > width:
            return text[i + 1 :]
    return text
