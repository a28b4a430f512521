"""yesno: 60 recordings of one speaker who says eight words each, "yes" or "no" in Hebrew (OpenSLR 1, 8 kHz).

The file name is the transcript: 1 is YES, 0 is NO. The split is lhotse's: of the sorted files every other one is test.
Every fifth recording of the training half is valid; training uses the other 24, and recordings recombined from the
words of those 24.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr.data.audio import AudioError
from asr.errors import UserError
from recipes.corpora.audio import read_recording
from recipes.corpora.base import Archive, CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.download import fetch_and_unpack, find_wavs
from recipes.corpora.recombine import Recombiner, find_words

NAME = "yesno"
URL = "https://www.openslr.org/resources/1/waves_yesno.tar.gz"
NUM_RECORDINGS = 60
WORDS_PER_RECORDING = 8
WORD_OF = {"0": "NO", "1": "YES"}
SPEAKER = "yesno"
_FILE_NAME = re.compile(r"[01](_[01]){7}")
_EXPECTED = f"the {NUM_RECORDINGS} files of waves_yesno.tar.gz, named like 0_1_0_0_1_1_0_1.wav"


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus.

    num_recombined: training recordings of 1 to 10 words put together from the words of the real ones; 0 for none.
    """

    num_recombined: int = 700

    def __post_init__(self) -> None:
        if self.num_recombined < 0:
            raise UserError(f"num_recombined={self.num_recombined} is negative; pass 0 for none")

    @property
    def archive_sizes(self) -> tuple[Archive, ...]:
        return (Archive("waves_yesno", 4.7e6, 6e6),)

    @property
    def expected_hours(self) -> dict[str, float]:
        return {"train": (150 + 3.1 * self.num_recombined) / 3600, "valid": 0.01, "test": 0.05}


def download(dest: Path, options: Options) -> Path:
    """Fetch waves_yesno.tar.gz (4.7 MB) from OpenSLR into ``dest``."""
    folder = fetch_and_unpack(URL, dest, "waves_yesno.tar.gz", "waves_yesno")
    _recordings(folder)
    return folder


def _recordings(corpus_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """All 60 recordings sorted by name (the split hangs on it: all must be there), and wav files of other names."""
    place, wavs = find_wavs(corpus_dir, NAME, ("waves_yesno",), _EXPECTED)
    good = [path for path in wavs if _FILE_NAME.fullmatch(path.stem)]
    if len(good) != NUM_RECORDINGS:
        raise UserError(f"{place} holds {len(good)} recordings of yesno, not {NUM_RECORDINGS}; needed: {_EXPECTED}")
    return good, [path for path in wavs if path not in set(good)]


def split_recordings(recordings: Sequence[Path]) -> dict[str, list[Path]]:
    """lhotse's alternate split of the sorted files, with every fifth of the training half as valid: 24 + 6 + 30."""
    ordered = sorted(recordings)
    half = ordered[::2]
    return {
        "train": [path for index, path in enumerate(half) if index % 5 != 4],
        "valid": half[4::5],
        "test": ordered[1::2],
    }


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Write the three splits and the recombined recordings. ``num_jobs`` is accepted and not needed."""
    recordings, strangers = _recordings(corpus_dir)
    writer = CorpusWriter(data_dir)
    for path in strangers:
        writer.bad(path, "the name is not eight times 0 or 1, like 0_1_0_0_1_1_0_1.wav")
    bank = Recombiner()
    unsegmented: list[str] = []
    for split, paths in split_recordings(recordings).items():
        for path in paths:
            try:
                samples = read_recording(path)
            except AudioError as error:
                writer.bad(path, str(error))
                continue
            words = [WORD_OF[digit] for digit in path.stem.split("_")]
            writer.add(split, path.stem, samples, " ".join(words), SPEAKER, origin=path.name)
            if split == "train":
                found = find_words(samples, WORDS_PER_RECORDING)
                if found is None:
                    unsegmented.append(path.stem)
                else:
                    bank.add(path.stem, samples, words, found)
    notes = _write_recombined(writer, bank, seed, options.num_recombined, unsegmented)
    return writer.finish(NUM_RECORDINGS + len(strangers), notes=notes)


def _write_recombined(
    writer: CorpusWriter, bank: Recombiner, seed: int, count: int, unsegmented: Sequence[str]
) -> list[str]:
    if count == 0:
        return []
    if not bank.usable:
        raise UserError(
            "no training recording could be cut into its eight words, so none can be recombined; pass num_recombined=0"
        )
    for index, made in enumerate(bank.generate(count, np.random.default_rng([seed, 1]))):
        cut_id = f"recombined-{index:04d}"
        writer.add("train", cut_id, made.samples, " ".join(made.words), SPEAKER, sources=made.sources)
    note = f"{count} recombined training recordings from the words of the training recordings"
    if unsegmented:
        note += f"; {len(unsegmented)} of them not cut, because eight words were not found: {', '.join(unsegmented)}"
    return [note]
