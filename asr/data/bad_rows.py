"""Rows of a corpus that cannot be used: what was wrong with which, and when that is too many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asr.errors import UserError


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its file, its line in that file (from 1; 0 when it is not from a list), and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line > 0 else self.file
        return f"{where}: {self.reason}"


def write_bad_rows(rows: Sequence[BadRow], path: str | os.PathLike[str]) -> None:
    """Write one line per row, ``file``, ``line`` and ``reason`` separated by tabs; an empty file if there are none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{_plain(row.file)}\t{row.line}\t{_plain(row.reason)}\n" for row in rows)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def report_bad_rows(
    rows: Sequence[BadRow],
    total: int,
    strict: bool,
    max_fraction: float,
    path: str | os.PathLike[str],
) -> None:
    """Write the list of bad rows and decide whether the run may go on without them.

    Args:
        rows: what was left out.
        total: how many rows were looked at, the bad ones included.
        strict: one bad row is enough to stop.
        max_fraction: more than this fraction of bad rows stops the run, in [0, 1].
        path: where the list goes; it is written in any case, before anything is raised.

    Raises:
        UserError: under ``strict`` or above ``max_fraction``; the message names the first row and the list.
    """
    write_bad_rows(rows, path)
    if not rows:
        return
    if len(rows) >= total:
        raise UserError(f"all {total} rows are bad, nothing is left; the first is {rows[0]} (all in {path})")
    if strict:
        raise UserError(
            f"{len(rows)} of {total} rows are bad and the strict mode allows none; the first is {rows[0]} "
            f"(all in {path}); mend or remove them, or run without the strict mode"
        )
    if len(rows) > max_fraction * total:
        raise UserError(
            f"{len(rows)} of {total} rows are bad, {len(rows) / total:.1%} and more than the {max_fraction:.1%} "
            f"allowed; the first is {rows[0]} (all in {path}); mend them or raise data.max_bad_fraction"
        )


def _plain(text: str) -> str:
    """Tabs and line ends would break the list."""
    return " ".join(text.split())
