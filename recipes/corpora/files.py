"""What a corpus of the user's own looks like from outside, so that mended files are noticed without reading them."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_SOURCE = re.compile(r'"source": "([^"\\\\]+)"')


def files_of(corpus_dir: Path, archives: Sequence[str], exp_dir: Path) -> str | None:
    """How many files there are and a hash of their names, sizes and times of change; None without the folder.

    Args:
        corpus_dir: folder of the corpus. Files outside that its wav.scp and cuts_*.jsonl name count too.
        archives: where folders of these names are in it or just below, only those count.
        exp_dir: left out where it is within the corpus.
    """
    if not corpus_dir.is_dir():
        return None
    parts = [path for name in archives for path in (corpus_dir / name, *corpus_dir.glob(f"*/{name}")) if path.is_dir()]
    own = {path.absolute() for part in parts or [corpus_dir] for path in _below(part, exp_dir.absolute())}
    named = {path for listed in own for path in _named_in(listed)}
    total = hashlib.sha256()
    paths = sorted(own | named)
    for path in paths:
        name = path.relative_to(corpus_dir.absolute()) if path in own else path
        total.update(f"{name} {state_of(path)}\n".encode())
    return f"{len(paths)} files, {total.hexdigest()[:12]}"


def state_of(path: Path) -> str:
    """Size and time of change of a file, or that it is missing."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def _below(folder: Path, left_out: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).absolute() != left_out]
        yield from (here / name for name in names if not name.startswith("."))


def _named_in(listed: Path) -> Iterable[Path]:
    """Files that a list of recordings names by absolute paths."""
    try:
        if listed.name == "wav.scp":
            lines = listed.read_text(encoding="utf-8").splitlines()
            words = [line.split(maxsplit=1)[-1].strip() for line in lines if line.strip()]
        elif listed.name.startswith("cuts_") and ".jsonl" in listed.suffixes:
            with gzip.open(listed, "rt") if listed.suffix == ".gz" else open(listed, encoding="utf-8") as file:
                words = [word for line in file for word in _SOURCE.findall(line)]
        else:
            return []
        return [Path(word) for word in words if word.startswith("/")]
    except (OSError, ValueError, EOFError):
        return []  # prepare says what is wrong with it
