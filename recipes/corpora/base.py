"""What every corpus gives to the recipes: prepared cuts on disk, and the writer that makes them.

Layout (contract of the prepare stage)::

    DATA/audio/<split>/<id>.wav    16 kHz mono PCM_16; none of a corpus that has such files itself: cuts name those
    DATA/cuts_<split>.jsonl.gz     lhotse CutSet of MonoCuts with one supervision each
    DATA/bad_rows.txt              file, line, reason (tab separated) of what was left out; empty if nothing was

Splits are train, valid, and the test sets of the corpus, mostly one: test.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.bad_rows import BadRow, write_bad_rows
from asr.models.context import Milliseconds
from recipes.corpora.audio import pcm_digest, to_pcm16, write_wav

if TYPE_CHECKING:  # lhotse imports torch: listing corpora and their options must not wait for it
    from lhotse import CutSet, MonoCut

    from recipes.corpora.preflight import Preflight

TRAINED = ("train", "valid")


@dataclass(frozen=True)
class Archive:
    """Something to download.

    folder: where it is once it is unpacked, below the download folder.
    download_bytes, unpacked_bytes: sizes; both stay on the disk.
    """

    folder: str
    download_bytes: float
    unpacked_bytes: float


@dataclass
class CorpusOptions:
    """What the options of every corpus answer."""

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the test sets; the last line of a run is the result on the first."""
        return ("test",)

    @property
    def archives(self) -> tuple[str, ...]:
        """Parts of the corpus to download, where it has several: with others the download stage runs again."""
        return ()

    @property
    def scores_characters(self) -> bool:
        """Whether results are character error rates, for texts without spaces."""
        return False

    @property
    def decode_chunks(self) -> tuple[Milliseconds, ...]:
        """What the test sets are decoded in besides decoding.chunk_ms, if training heard chunks."""
        return ()

    @property
    def archive_sizes(self) -> tuple[Archive, ...]:
        """What a download fetches, as published."""
        return ()

    @property
    def expected_hours(self) -> dict[str, float]:
        """Hours of each set, as published or counted once; empty where they cannot be known before prepare."""
        return {}

    @property
    def in_place(self) -> bool:
        """Whether the audio is used where it lies, so that prepare writes none."""
        return False

    @property
    def splits(self) -> tuple[str, ...]:
        """All sets."""
        return (*TRAINED, *self.tests)


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` wrote.

    ``checksums`` maps each split (and each further list that the corpus writes) to a SHA-256 that depends on ids,
    transcripts and samples only, not on paths or times. ``num_rows`` counts all rows that were looked at, bad ones too.
    ``preflight`` is what was found out about somebody's own recordings.
    """

    data_dir: Path
    cuts: dict[str, Path]
    counts: dict[str, int]
    durations_s: dict[str, float]
    bad_rows: list[BadRow]
    num_rows: int
    checksums: dict[str, str]
    notes: list[str] = field(default_factory=list)
    preflight: Preflight | None = None

    def load(self, split: str) -> CutSet:
        """The cuts of "train", "valid" or a test set."""
        from lhotse import CutSet

        return CutSet.from_file(self.cuts[split])

    def summary(self) -> list[str]:
        """Lines for the log: size and checksum of every split, further checksums, and what is worth knowing."""
        lines = [
            f"{split}: {self.counts[split]} utterances, {self.durations_s[split] / 60:.1f} min, "
            f"sha256 {self.checksums[split][:16]}"
            for split in self.cuts
        ]
        lines += [f"{name}: sha256 {digest}" for name, digest in self.checksums.items() if name not in self.cuts]
        lines += self.notes
        if self.bad_rows:
            reasons = self.data_dir / "bad_rows.txt"
            lines.append(f"left out {len(self.bad_rows)} of {self.num_rows} rows, reasons in {reasons}")
        return lines


class Corpus(Protocol):
    """A module of this package. ``Options`` is its dataclass of settings, a CorpusOptions; every field is an option of
    the recipe."""

    @property
    def NAME(self) -> str:
        """The name on the command line."""

    @property
    def Options(self) -> type[CorpusOptions]:
        """The dataclass of settings."""

    def download(self, dest: Path, options: Any) -> Path:
        """Fetch what the options need into ``dest`` and return the folder for ``prepare``. Raises UserError without a
        network."""

    def prepare(
        self, corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Any, num_jobs: int = 2
    ) -> Prepared:
        """Write cuts and audio into ``data_dir``. Raises UserError if ``corpus_dir`` is not this corpus."""


class CorpusWriter:
    """Writes audio as it comes, and cuts, bad rows and checksums at the end.

    Older output in ``data_dir`` goes first: an interrupted run must never leave cuts of one setting beside audio of
    another.
    """

    def __init__(self, data_dir: Path, splits: Sequence[str] = CorpusOptions().splits) -> None:
        self.data_dir = data_dir.absolute()
        for path in self.data_dir.glob("cuts_*.jsonl.gz"):
            path.unlink()
        shutil.rmtree(self.data_dir / "audio", ignore_errors=True)
        for split in splits:
            (self.data_dir / "audio" / split).mkdir(parents=True, exist_ok=True)
        self.bad_rows: list[BadRow] = []
        self._cuts: dict[str, list[MonoCut]] = {split: [] for split in splits}
        self._digests: dict[str, dict[str, str]] = {split: {} for split in splits}

    def _cuts_path(self, split: str) -> Path:
        return self.data_dir / f"cuts_{split}.jsonl.gz"

    def audio_path(self, split: str, cut_id: str) -> Path:
        """Where the audio of one cut lies."""
        return self.data_dir / "audio" / split / f"{cut_id}.wav"

    def bad(self, file: Path | str, reason: str, line: int = 0) -> None:
        """Leave a row out."""
        self.bad_rows.append(BadRow(str(file), line, reason))

    def add(self, split: str, cut_id: str, samples: np.ndarray, text: str, speaker: str, **custom: Any) -> None:
        """Write float32 [N] at 16 kHz as one utterance. ``custom`` tells where it comes from and stays with the cut."""
        pcm = to_pcm16(samples)
        write_wav(self.audio_path(split, cut_id), pcm)
        self.add_written(split, cut_id, len(pcm), pcm_digest(pcm), text, speaker, **custom)

    def add_written(
        self, split: str, cut_id: str, num_samples: int, digest: str, text: str, speaker: str, **custom: Any
    ) -> None:
        """Like ``add`` for audio that another process already wrote to ``audio_path``; ``digest`` is its pcm_digest."""
        self.add_file(split, cut_id, self.audio_path(split, cut_id), num_samples, digest, text, speaker, **custom)

    def add_file(
        self, split: str, cut_id: str, path: Path, num_samples: int, digest: str, text: str, speaker: str, **custom: Any
    ) -> None:
        """One utterance whose audio, 16 kHz mono in any format, stays where it is; ``digest`` is of its samples."""
        if cut_id in self._digests[split]:
            raise ValueError(f"cut id {cut_id!r} appears twice in {split}")
        self._cuts[split].append(make_cut(cut_id, path, num_samples, text, speaker, custom))
        self._digests[split][cut_id] = f"{cut_id}\t{text}\t{digest}\n"

    def finish(self, num_rows: int, *, checksums: dict[str, str] | None = None, notes: Iterable[str] = ()) -> Prepared:
        """Write cuts and bad_rows.txt, and say what was made."""
        from lhotse import CutSet

        write_bad_rows(self.bad_rows, self.data_dir / "bad_rows.txt")
        digests: dict[str, str] = {}
        for split in self._cuts:
            partial = self.data_dir / f"partial-cuts_{split}.jsonl.gz"
            CutSet.from_cuts(self._cuts[split]).to_file(partial)
            partial.replace(self._cuts_path(split))
            lines = "".join(self._digests[split][cut_id] for cut_id in sorted(self._digests[split]))
            digests[split] = hashlib.sha256(lines.encode()).hexdigest()
        return Prepared(
            data_dir=self.data_dir,
            cuts={split: self._cuts_path(split) for split in self._cuts},
            counts={split: len(self._cuts[split]) for split in self._cuts},
            durations_s={split: float(sum(cut.duration for cut in self._cuts[split])) for split in self._cuts},
            bad_rows=self.bad_rows,
            num_rows=num_rows,
            checksums={**digests, **(checksums or {})},
            notes=list(notes),
        )


def make_cut(
    cut_id: str, path: Path, num_samples: int, text: str, speaker: str, custom: dict[str, Any] | None = None
) -> MonoCut:
    """One MonoCut over a whole 16 kHz mono file, with one supervision; made without opening the file again."""
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    duration = num_samples / SAMPLE_RATE_HZ
    recording = Recording(
        id=cut_id,
        sources=[AudioSource(type="file", channels=[0], source=str(path))],
        sampling_rate=SAMPLE_RATE_HZ,
        num_samples=num_samples,
        duration=duration,
    )
    supervision = SupervisionSegment(
        id=cut_id, recording_id=cut_id, start=0.0, duration=duration, channel=0, text=text, speaker=speaker
    )
    return MonoCut(
        id=cut_id,
        start=0.0,
        duration=duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
        custom=custom or None,
    )
