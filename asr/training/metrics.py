"""What a run says of itself: a JSONL file, TensorBoard events, and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


def _finite(value: Any) -> Any:
    """JSON knows no NaN: non-finite numbers are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lacks_newline(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


class MetricsWriter:
    """Appends one JSON object a line to metrics.jsonl, and numbers to TensorBoard.

    A resumed run appends; a reader lets the later of two records of one step win. A full disk ends no run: records
    wait, up to some kilobytes, for one that can be written.

    Args:
        out_dir: receives metrics.jsonl and tensorboard/; None writes nothing (all processes but the first).
        tensorboard: also write TensorBoard events.
        step: steps that lie behind; TensorBoard drops what an earlier process logged of later ones.
        say: takes a line where something cannot be written.
    """

    def __init__(
        self, out_dir: Path | None, tensorboard: bool, step: int = 0, say: Callable[[str], None] | None = None
    ):
        self._say = say or print
        self._full = False
        self._file: TextIO | None = None
        self._board: Any = None
        if out_dir is None:
            return
        path = out_dir / "metrics.jsonl"
        torn = _lacks_newline(path)
        self._file = open(path, "a", encoding="utf-8")
        if torn:  # a full disk cut the last line: it must not swallow the next one
            self._file.write("\n")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(out_dir / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=step + 1, max_queue=100, flush_secs=30)

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        record = {"kind": kind, **{name: _finite(value) for name, value in values.items()}}
        try:
            # the buffer keeps what cannot be written, and whole lines alone are refused where it is full
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._full = False
        except OSError as error:
            if not self._full:
                self._say(f"error: {self._file.name} cannot be written to: {error.strerror or error}; training goes on")
            self._full = True
        if self._board is not None and kind in ("train", "valid"):
            try:
                for name, value in record.items():
                    if isinstance(value, (int, float)) and name not in ("step", "time_s"):
                        self._board.add_scalar(f"{kind}/{name}", value, values["step"], walltime=time.time())
            except OSError as error:  # its thread has ended
                self._say(f"error: TensorBoard events end here: {error.strerror or error}; training goes on")
                self._board = None

    def close(self) -> None:
        for part in (self._file, self._board):
            if part is not None:
                with suppress(OSError):  # it has been said
                    part.close()


class ProgressLine:
    """One line on a terminal, rewritten; on a file or pipe, a line at most every ``every_s`` seconds.

    With ``quiet`` it says nothing: one of several processes speaks for all.
    """

    def __init__(self, stream: TextIO | None = None, every_s: float = 10.0, quiet: bool = False):
        self._stream = stream = stream or sys.stdout
        self._quiet = quiet
        self._live = stream.isatty()
        self._every_s = 0.2 if self._live else every_s
        self._last = -math.inf
        self._open = False

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self._quiet or now - self._last < self._every_s:
            return
        self._last = now
        if self._live:
            self._stream.write(f"\r\x1b[K{text}")
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._open:
            self._stream.write("\r\x1b[K")
            self._open = False
        self._stream.write(text + "\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """75 to '1:15', 3700 to '1:01:40'."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
