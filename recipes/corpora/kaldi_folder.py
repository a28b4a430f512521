"""Utterances of a Kaldi data folder: wav.scp and text, with segments and utt2spk where there are such files."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from asr.data.audio import AudioError, resample
from asr.errors import UserError

FILES = ("wav.scp", "text")
Bad = Callable[[Path, str, int], None]
"""Takes a file, what is wrong with a line of it, and the number of the line."""


@dataclass(frozen=True)
class Spoken:
    """An utterance: where its sound is, and which part of it.

    source: a path, or with a "|" behind it a command that writes a wav file.
    start_s, end_s: of a segment; None for the whole recording.
    has_speaker: whether the speaker is named; else the utterance stands in.
    """

    utterance: str
    source: str
    text: str
    speaker: str
    listed_in: Path
    line: int
    start_s: float | None = None
    end_s: float | None = None
    has_speaker: bool = True

    @property
    def is_command(self) -> bool:
        return self.source.endswith("|")


def is_kaldi_folder(folder: Path) -> bool:
    """Whether it has the files that every such folder has."""
    return all((folder / name).is_file() for name in FILES)


def missing_files(folder: Path) -> str:
    """Which of these files a folder that has another of them has not; nothing of other folders."""
    there = {name for name in FILES if (folder / name).is_file()}
    return " and ".join(name for name in FILES if there and name not in there)


def _table(path: Path, bad: Bad, told: set[str], least: int = 1) -> dict[str, tuple[int, str]]:
    """By first word of each line: its number, and the rest; ``told`` gets the first words of lines that are bad."""
    found: dict[str, tuple[int, str]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows put a mark at the beginning
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    for number, line in enumerate(lines, 1):
        key, *rest = line.split(maxsplit=1) or [""]
        if not key:
            continue
        if key in found:
            bad(path, f"{key} stands in line {found[key][0]} too", number)
        elif len(" ".join(rest).split()) < least:
            told.add(key)
            bad(path, f"{key} has {'less than it needs' if rest else 'nothing'} behind it", number)
        else:
            found[key] = number, rest[0].strip()
    return found


def read_kaldi_folder(folder: Path, bad: Bad) -> list[Spoken]:
    """The utterances of a folder, sorted by id; paths in it count from the current folder, as Kaldi's do, or else from
    the data folder itself.

    Args:
        folder: with ``FILES`` in it.
        bad: is told of lines that cannot be used.
    """
    told: set[str] = set()  # one fault of an utterance is enough
    recordings, texts = _table(folder / "wav.scp", bad, told), _table(folder / "text", bad, told)
    speakers = _table(folder / "utt2spk", bad, told) if (folder / "utt2spk").is_file() else {}
    listed = folder / "segments" if (folder / "segments").is_file() else folder / "wav.scp"
    if listed.name == "segments":
        parts = _segments(listed, bad, told)
    else:
        parts = {name: (line, name, None, None) for name, (line, _) in recordings.items()}
    found = []
    for name, (line, recording, start_s, end_s) in sorted(parts.items()):
        if name in told:
            continue
        if recording not in recordings:
            bad(listed, f"{name} is of recording {recording}, which wav.scp does not have", line)
        elif name not in texts:
            bad(listed, f"{name} has no text in {folder / 'text'}", line)
        else:
            source = _located(recordings[recording][1], folder)
            named = name in speakers
            speaker = speakers[name][1] if named else name
            found.append(Spoken(name, source, texts[name][1], speaker, listed, line, start_s, end_s, named))
    for name, (line, _) in texts.items():
        if name not in parts and name not in told:
            bad(folder / "text", f"{name} has no recording in {listed}", line)
    return found


def _segments(path: Path, bad: Bad, told: set[str]) -> dict[str, tuple[int, str, float | None, float | None]]:
    """By utterance: line, recording, start and end in seconds; an end of -1 is that of the recording."""
    found: dict[str, tuple[int, str, float | None, float | None]] = {}
    for name, (line, rest) in _table(path, bad, told, least=3).items():
        recording, start, end = rest.split()[:3]
        try:
            start_s, end_s = float(start), float(end)
        except ValueError:
            told.add(name)
            bad(path, f"{name}: {start} and {end} are not times in seconds", line)
            continue
        if start_s < 0 or (end_s != -1 and end_s <= start_s):
            told.add(name)
            bad(path, f"{name} begins at {start_s} s and ends at {end_s} s", line)
            continue
        found[name] = line, recording, start_s, None if end_s == -1 else end_s
    return found


def _located(source: str, folder: Path) -> str:
    """An absolute path, or the command as it stands."""
    if source.endswith("|"):
        return source
    path = Path(source)
    return str((folder / path if not path.is_absolute() and not path.exists() else path).absolute())


def command_output(command: str) -> np.ndarray:
    """What a command of wav.scp ("... |") says: float32 [N] at 16 kHz.

    Raises:
        AudioError: it fails, or writes no audio.
    """
    done = subprocess.run(command.rstrip()[:-1], shell=True, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise AudioError(f"its command ends with {done.returncode}: {said[-1] if said else 'no message'}")
    try:
        samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"its command writes no audio ({' '.join(str(error).split())})") from error
    return resample(samples.mean(axis=1), rate)
