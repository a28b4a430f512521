"""librispeech: read English of audiobooks, up to 960 hours (OpenSLR 12; the smallest selection is OpenSLR 31).

The official folders are the splits: subset "mini" trains on train-clean-5 and chooses on dev-clean-2, "100h" and "960h"
train on train-clean-100, or on that, train-clean-360 and train-other-500, and choose on dev-clean and dev-other. Test
sets are test-clean and test-other (mini: test-clean). Texts stay as they are published: capitals, no punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from asr.errors import UserError
from asr.models.context import Milliseconds
from recipes.corpora.base import Archive, CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.download import lhotse_download, places_of
from recipes.corpora.in_place import Row, add_rows

NAME = "librispeech"
_FOLDER = "LibriSpeech"
_ID = re.compile(r"(\d+)-(\d+)-(\d+)")


class Parts(NamedTuple):
    """Official folders that make up the sets."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    tests: tuple[str, ...]


SUBSETS = {
    "mini": Parts(("train-clean-5",), ("dev-clean-2",), ("test-clean",)),
    "100h": Parts(("train-clean-100",), ("dev-clean", "dev-other"), ("test-clean", "test-other")),
    "960h": Parts(
        ("train-clean-100", "train-clean-360", "train-other-500"),
        ("dev-clean", "dev-other"),
        ("test-clean", "test-other"),
    ),
}

# of each archive: bytes, hours (Panayotov et al. 2015, "Librispeech: an ASR corpus based on public domain audio books")
SIZES = {
    "train-clean-5": (332e6, 5.3),
    "dev-clean-2": (126e6, 2.0),
    "dev-clean": (337_926_286, 5.4),
    "dev-other": (314_305_928, 5.3),
    "test-clean": (346_663_984, 5.4),
    "test-other": (328_757_843, 5.1),
    "train-clean-100": (6_387_309_499, 100.6),
    "train-clean-360": (23_049_477_885, 363.6),
    "train-other-500": (30_593_501_606, 496.7),
}


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus.

    subset: how much to train on: mini (5 hours), 100h or 960h. A download takes 0.8, 7.7 or 61 GB.
    """

    subset: Literal["mini", "100h", "960h"] = "mini"

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise UserError(f"subset={self.subset!r} is none of {', '.join(SUBSETS)}")

    @property
    def parts(self) -> Parts:
        """The official folders."""
        return SUBSETS[self.subset]

    @property
    def tests(self) -> tuple[str, ...]:
        return self.parts.tests

    @property
    def decode_chunks(self) -> tuple[Milliseconds, ...]:
        return ("full", 640, 320)

    @property
    def archives(self) -> tuple[str, ...]:
        return (*self.parts.train, *self.parts.valid, *self.parts.tests)

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Official folders by set."""
        return {"train": self.parts.train, "valid": self.parts.valid, **{name: (name,) for name in self.parts.tests}}

    @property
    def archive_sizes(self) -> tuple[Archive, ...]:
        # FLAC files, which an archive does not make smaller
        return tuple(Archive(f"{_FOLDER}/{name}", SIZES[name][0], SIZES[name][0]) for name in self.archives)

    @property
    def expected_hours(self) -> dict[str, float]:
        return {split: sum(SIZES[name][1] for name in names) for split, names in self.sets.items()}

    @property
    def in_place(self) -> bool:
        return True


def download(dest: Path, options: Options) -> Path:
    """Fetch and unpack the archives of the subset from OpenSLR into ``dest``; what is there already stays."""
    from lhotse.recipes.librispeech import download_librispeech

    return lhotse_download(lambda: download_librispeech(dest, list(options.archives)), dest / _FOLDER)


def _root(corpus_dir: Path | None, archives: tuple[str, ...]) -> Path:
    """The folder that holds the official ones."""
    places = places_of(corpus_dir, NAME, (_FOLDER,))
    for place in places:
        missing = [name for name in archives if not (place / name).is_dir()]
        if not missing:
            return place
        if len(missing) < len(archives):
            raise UserError(
                f"{place} has no {', '.join(missing)}; unpack the archives of these names there, or choose a smaller "
                "--subset"
            )
    looked = " or ".join(str(place) for place in places)
    raise UserError(f"no folders of LibriSpeech in {looked}: {', '.join(archives)} are needed")


def _rows(split: str, part: Path, writer: CorpusWriter) -> Iterator[Row]:
    """What the lists of transcripts of one folder hold: SPEAKER-CHAPTER-NUMBER, and the words."""
    named: set[Path] = set()
    for listed in sorted(part.rglob("*.trans.txt")):
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            name, _, text = line.strip().partition(" ")
            match = _ID.fullmatch(name)
            if match is None:
                if name:
                    writer.bad(listed, f"{name} is not SPEAKER-CHAPTER-NUMBER", number)
                continue
            audio = listed.parent / f"{name}.flac"
            named.add(audio)
            yield Row(split, name, audio, text.strip(), match[1], listed, number)
    for audio in sorted(set(part.rglob("*.flac")) - named):
        writer.bad(audio, "no .trans.txt beside it has a line for it")


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Write the cuts of the subset's sets, which name the FLAC files where they are. ``seed`` is accepted and not
    needed."""
    root = _root(corpus_dir, options.archives).absolute()
    writer = CorpusWriter(data_dir, options.splits)
    rows = [row for split, names in options.sets.items() for name in names for row in _rows(split, root / name, writer)]
    num_rows = len(rows) + len(writer.bad_rows)
    add_rows(writer, rows, num_jobs)
    return writer.finish(num_rows)
