"""fsdd: digit strings joined from the Free Spoken Digit Dataset (6 speakers, 50 recordings of each digit, 8 kHz).

A recording is called ``{digit}_{speaker}_{index}.wav``. Index 0 to 4 is the official test set; here 5 to 7 are for
valid strings and the rest for training, so no recording serves two splits. A string has one speaker; recordings keep
their own levels. The gaps hold a faint noise floor instead of digital silence, as quiet as the quietest frames of that
string's recordings (30 to 60 dB under its speech) and band-limited like them.

With ``held_out_speaker`` the other speakers train and validate as before (their index 0 to 4 stays unused), and the
test strings use all 500 recordings of the held-out one.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr.data.audio import SAMPLE_RATE_HZ, AudioError, resample
from asr.errors import UserError
from recipes.corpora import noise
from recipes.corpora.audio import energy_db, join, read_recording, rms
from recipes.corpora.base import Archive, CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.commands import DIGITS
from recipes.corpora.download import fetch_and_unpack, find_wavs

NAME = "fsdd"
URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.tar.gz"
NUM_RECORDINGS = 3000
NUM_TEST, NUM_TEST_HELD_OUT, NUM_VALID = 600, 300, 200
TEST_INDICES, VALID_INDICES = range(0, 5), range(5, 8)
GAP_S = (0.05, 0.4)
EDGE_S = (0.1, 0.3)
RECORDED_RATE_HZ = 8000
_FILE_NAME = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]+)")
_EXPECTED = "the wav files of free-spoken-digit-dataset/recordings, named like 7_jackson_32.wav"
_FOLDER = "free-spoken-digit-dataset"
_TEST_LENGTHS = {length: 1.0 for length in range(3, 8)}
# Training also hears single digits and pairs, so that string length is no cue.
_TRAIN_LENGTHS = {1: 0.5, 2: 0.5, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 7: 1.0, 8: 0.5}


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus.

    num_train_strings: training strings (5,000 are about 4 hours). Test and valid strings do not depend on it.
    held_out_speaker: name of the speaker that is tested and not trained on; None for the official split.
    """

    num_train_strings: int = 5000
    held_out_speaker: str | None = None

    def __post_init__(self) -> None:
        if self.num_train_strings < 1:
            raise UserError(f"num_train_strings={self.num_train_strings} is too small; pass at least 1")

    @property
    def archive_sizes(self) -> tuple[Archive, ...]:
        return (Archive(_FOLDER, 16e6, 30e6),)

    @property
    def expected_hours(self) -> dict[str, float]:
        tests = NUM_TEST if self.held_out_speaker is None else NUM_TEST_HELD_OUT
        counts = {"train": self.num_train_strings, "valid": NUM_VALID, "test": tests}
        return {split: count * 3.1 / 3600 for split, count in counts.items()}


@dataclass(frozen=True)
class DigitString:
    """One string: its speaker, its recordings (file stems), and pauses in seconds (before, between, after)."""

    cut_id: str
    speaker: str
    recordings: tuple[str, ...]
    pauses_s: tuple[float, ...]

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(DIGITS[int(stem[0])] for stem in self.recordings)

    @property
    def row(self) -> str:
        """A line of test_strings.tsv."""
        pauses = " ".join(f"{pause:.3f}" for pause in self.pauses_s)
        return "\t".join([self.cut_id, self.speaker, self.text, " ".join(self.recordings), pauses])


def download(dest: Path, options: Options) -> Path:
    """Fetch the dataset's archive (about 16 MB) from GitHub into ``dest``."""
    folder = fetch_and_unpack(URL, dest, f"{_FOLDER}.tar.gz", _FOLDER)
    found = len(_list(folder)[0])
    if found < NUM_RECORDINGS:
        raise UserError(f"{folder} holds {found} recordings, not {NUM_RECORDINGS}; delete {dest} and download again")
    return folder


def _list(corpus_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """Recordings of the corpus sorted by name, and wav files of other names."""
    subfolders = ("recordings", f"{_FOLDER}/recordings", f"{_FOLDER}-master/recordings")
    place, wavs = find_wavs(corpus_dir, NAME, subfolders, _EXPECTED)
    good = [path for path in wavs if _FILE_NAME.fullmatch(path.stem)]
    if not good:
        raise UserError(f"none of the {len(wavs)} wav files in {place} is a recording of fsdd; needed: {_EXPECTED}")
    return good, [path for path in wavs if path not in set(good)]


def _read_all(paths: Iterable[Path], writer: CorpusWriter) -> dict[str, np.ndarray]:
    """Samples by file stem; unreadable files become bad rows."""
    samples = {}
    for path in paths:
        try:
            samples[path.stem] = read_recording(path)
        except AudioError as error:
            writer.bad(path, str(error))
    return samples


def pools(stems: Iterable[str], held_out_speaker: str | None) -> dict[str, dict[str, list[str]]]:
    """Which recordings serve which split: split -> speaker -> sorted file stems."""
    split_pools: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in ("train", "valid", "test")}
    for stem in sorted(stems):
        _, speaker, index = stem.split("_")
        if speaker == held_out_speaker:
            split = "test"
        elif int(index) in TEST_INDICES:
            if held_out_speaker is not None:
                continue
            split = "test"
        else:
            split = "valid" if int(index) in VALID_INDICES else "train"
        split_pools[split][speaker].append(stem)
    return split_pools


def draw_strings(
    split: str, pool: dict[str, list[str]], count: int, lengths: dict[int, float], rng: np.random.Generator
) -> list[DigitString]:
    """``count`` strings, speakers in turn; a speaker's recordings are dealt like cards, so they are evenly used."""
    speakers = sorted(pool)
    decks: dict[str, list[str]] = {speaker: [] for speaker in speakers}
    weights = np.array(list(lengths.values()))
    drawn = []
    for number in range(count):
        speaker = speakers[number % len(speakers)]
        length = int(rng.choice(list(lengths), p=weights / weights.sum()))
        recordings = []
        for _ in range(length):
            if not decks[speaker]:
                decks[speaker] = [pool[speaker][i] for i in rng.permutation(len(pool[speaker]))]
            recordings.append(decks[speaker].pop())
        edges = rng.uniform(*EDGE_S, size=2)
        pauses = [edges[0], *rng.uniform(*GAP_S, size=length - 1), edges[1]]
        cut_id = f"{split}-{speaker}-{number:05d}"
        drawn.append(DigitString(cut_id, speaker, tuple(recordings), tuple(round(float(p), 3) for p in pauses)))
    return drawn


def render(string: DigitString, samples: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """float32 [N] at 16 kHz: the string's recordings and noise-filled pauses, joined with cross-fades of 5 ms."""
    rng = np.random.default_rng([seed, 9, *string.cut_id.encode()])
    pieces = [samples[stem] for stem in string.recordings]
    speech_db = 20 * np.log10(max(rms(np.concatenate(pieces)), 1e-6))
    quiet_db = float(np.percentile(np.concatenate([energy_db(piece) for piece in pieces]), 5))
    floor = 10 ** (min(max(quiet_db, speech_db - 60), speech_db - 30) / 20)
    joined: list[np.ndarray] = []
    for position, pause_s in enumerate(string.pauses_s):
        recorded = noise.coloured("pink", int(pause_s * RECORDED_RATE_HZ), rng)
        joined.append(resample(recorded, RECORDED_RATE_HZ, SAMPLE_RATE_HZ) * np.float32(floor))
        if position < len(pieces):
            joined.append(pieces[position])
    return join(joined, fade_s=0.005)


def write_test_list(path: Path, strings: Sequence[DigitString]) -> str:
    """Write the list of test strings as a table; returns its SHA-256."""
    header = "id\tspeaker\twords\trecordings\tpauses_s"
    data = "".join(f"{line}\n" for line in [header, *(string.row for string in strings)]).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Write the strings of all splits, and ``test_strings.tsv``. ``num_jobs`` is accepted and not needed.

    The test and valid strings depend on the seed, the held-out speaker and the recordings present, on nothing else.
    Raises UserError for an unknown speaker, or if a split has no recordings.
    """
    recordings, strangers = _list(corpus_dir)
    speakers = sorted({path.stem.split("_")[1] for path in recordings})
    held_out = options.held_out_speaker
    if held_out is not None and held_out not in speakers:
        raise UserError(f"held_out_speaker={held_out!r} is not in the corpus; its speakers are {', '.join(speakers)}")
    writer = CorpusWriter(data_dir)
    for path in strangers:
        writer.bad(path, "the name is not digit_speaker_index.wav, like 7_jackson_32.wav")
    samples = _read_all(recordings, writer)
    split_pools = pools(samples, held_out)
    counts = {
        "test": (NUM_TEST if held_out is None else NUM_TEST_HELD_OUT, _TEST_LENGTHS),
        "valid": (NUM_VALID, _TEST_LENGTHS),
        "train": (options.num_train_strings, _TRAIN_LENGTHS),
    }
    checksums, notes = {}, []
    for stream, (split, (count, lengths)) in enumerate(counts.items()):
        if not split_pools[split]:
            raise UserError(f"{corpus_dir} holds no readable recordings for {split}; needed: {_EXPECTED}")
        strings = draw_strings(split, split_pools[split], count, lengths, np.random.default_rng([seed, stream]))
        for string in strings:
            used = list(string.recordings)
            writer.add(
                split, string.cut_id, render(string, samples, seed), string.text, string.speaker, recordings=used
            )
        if split == "test":
            checksums["test_strings.tsv"] = write_test_list(writer.data_dir / "test_strings.tsv", strings)
        digits = sum(len(string.recordings) for string in strings)
        notes.append(f"{split}: {digits} digits of {len(split_pools[split])} speakers")
    if len(samples) != NUM_RECORDINGS:
        notes.append(f"{len(samples)} usable recordings, not the official {NUM_RECORDINGS}: results are not comparable")
    return writer.finish(len(recordings) + len(strangers), checksums=checksums, notes=notes)
