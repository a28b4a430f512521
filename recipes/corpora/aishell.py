"""aishell: read Mandarin of 400 speakers, 178 hours (AISHELL-1, OpenSLR 33).

The official folders train, dev and test are the splits. The published texts have a space between words; it is left out,
as nobody writes Chinese with spaces, so that results are character error rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asr.errors import UserError
from asr.models.context import Milliseconds
from recipes.corpora.base import Archive, CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.download import lhotse_download, places_of
from recipes.corpora.in_place import Row, add_rows

NAME = "aishell"
_FOLDER = "data_aishell"
_TRANSCRIPT = "transcript/aishell_transcript_v0.8.txt"
_FOLDERS = {"train": "train", "valid": "dev", "test": "test"}
_ID = re.compile(r"[A-Z0-9]+(S\d{4})W\d{4}")


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus: it has none."""

    @property
    def scores_characters(self) -> bool:
        return True

    @property
    def decode_chunks(self) -> tuple[Milliseconds, ...]:
        return ("full", 640, 320)

    @property
    def archive_sizes(self) -> tuple[Archive, ...]:
        # unpacked are archives by speaker, which stay, and the recordings
        return (Archive(f"aishell/{_FOLDER}", 15_582_913_665, 2 * 178 * 3600 * 32_000),)

    @property
    def expected_hours(self) -> dict[str, float]:
        return {"train": 150, "valid": 18, "test": 10}

    @property
    def in_place(self) -> bool:
        return True


def download(dest: Path, options: Options) -> Path:
    """Fetch and unpack data_aishell.tgz (15 GB) from OpenSLR into ``dest``; what is there already stays."""
    from lhotse.recipes.aishell import download_aishell

    return lhotse_download(lambda: download_aishell(dest), dest / "aishell" / _FOLDER)


def _root(corpus_dir: Path | None) -> Path:
    """The folder of the transcripts."""
    places = places_of(corpus_dir, NAME, (_FOLDER,))
    for place in places:
        if (place / _TRANSCRIPT).is_file():
            missing = [name for name in _FOLDERS.values() if not (place / "wav" / name).is_dir()]
            if missing:
                raise UserError(f"{place} has no wav/{', wav/'.join(missing)}; unpack the archives in wav/ there")
            return place
    looked = " or ".join(str(place) for place in places)
    raise UserError(f"no {_TRANSCRIPT} of AISHELL in {looked}; pass --corpus-dir the folder {_FOLDER}")


def _texts(listed: Path, writer: CorpusWriter) -> dict[str, tuple[int, str, str]]:
    """By id: line, speaker and text without spaces; Latin letters are capitals of half width."""
    from lhotse.recipes.aishell import text_normalize

    found: dict[str, tuple[int, str, str]] = {}
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        name, _, text = line.strip().partition(" ")
        match = _ID.fullmatch(name)
        if match is None:
            if name:
                writer.bad(listed, f"{name} is not like BAC009S0002W0122", number)
        elif name in found:
            writer.bad(listed, f"{name} stands in line {found[name][0]} too", number)
        else:
            found[name] = number, match[1], text_normalize("".join(text.split()))
    return found


def _rows(root: Path, texts: dict[str, tuple[int, str, str]], writer: CorpusWriter) -> Iterator[Row]:
    """Of each recording that is there; what has a recording and no text, or a text and no recording, is bad."""
    left = dict(texts)
    for split, folder in _FOLDERS.items():
        for audio in sorted((root / "wav" / folder).rglob("*.wav")):
            left.pop(audio.stem, None)
            if audio.stem in texts:
                line, speaker, text = texts[audio.stem]
                yield Row(split, audio.stem, audio, text, speaker, root / _TRANSCRIPT, line)
            else:
                writer.bad(audio, f"{root / _TRANSCRIPT} has no text of it")
    for name, (line, _, _) in left.items():
        writer.bad(root / _TRANSCRIPT, f"{name} has no recording in wav/", line)


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Write the cuts of the three splits, which name the wav files where they are. ``seed`` is accepted and not
    needed."""
    root = _root(corpus_dir).absolute()
    writer = CorpusWriter(data_dir, options.splits)
    rows = list(_rows(root, _texts(root / _TRANSCRIPT, writer), writer))
    num_rows = len(rows) + len(writer.bad_rows)
    add_rows(writer, rows, num_jobs)
    return writer.finish(num_rows)
