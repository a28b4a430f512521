"""Which files are meant: files as they are named, of folders all that look like audio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr.errors import UserError

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph .voc "  # libsndfile
    ".m4a .m4b .aac .wma .webm .mka .amr .ac3 .mp2 .mp4 .mkv .mov .avi .3gp".split()  # ffmpeg
)


def find_audio(paths: Sequence[Path]) -> list[Path]:
    """Files in the order given, where a folder stands for the audio files in and below it, sorted by path.

    Hidden files and folders are left out. A file that does not exist or is no audio is told when it is read.

    Raises:
        UserError: a folder that does not exist or holds no audio files.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if _is_audio(file, path))
            if not inside:
                raise UserError(f"the folder {path} holds no audio files (.wav, .flac, .ogg, .mp3, .m4a, ...)")
            found += inside
        elif not path.suffix and not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            found.append(path)
    return found


def _is_audio(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
