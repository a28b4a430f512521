"""Recordings as people have them: whether a file is whole, and its samples as features need them."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from asr.data.augmentation import SAMPLE_RATE_HZ
from asr.errors import UserError

_UNKNOWN_LENGTHS = (0, 0x7FFFFFFF, 0xFFFFFFFF)
"""Programs that stream into a pipe declare one of these because they cannot know the length."""


def audio_problem(path: str | os.PathLike[str], num_samples: int | None = None) -> str | None:
    """Why an audio file cannot be used, or None if it can.

    Wav files are judged by header and size, since libsndfile reads truncated ones without a word; other formats are
    decoded.

    Args:
        path: the file.
        num_samples: samples per channel that it should hold, where that is known.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        if path.suffix.lower() == ".wav":
            problem = _wav_problem(path)
            if problem is not None:
                return problem
        with soundfile.SoundFile(str(path)) as file:
            declared = len(file)
            held = declared if path.suffix.lower() == ".wav" else _decoded_length(file)
    except FileNotFoundError:
        return "the file does not exist"
    except OSError as error:
        return f"the file cannot be read ({error.strerror or error})"
    except RuntimeError as error:  # libsndfile's errors
        return f"not an audio file, or one of an unknown kind ({_tail(error)})"
    if held < declared:
        return f"truncated: {held} of {declared} samples can be read"
    if held == 0:
        return "it holds no samples"
    if num_samples is not None and held != num_samples:
        return f"it holds {held} samples, but the manifest says {num_samples}"
    return None


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Samples of any recording, float32 [N] in [-1, 1] at 16 kHz; channels are averaged, other rates resampled.

    Raises:
        UserError: the file is missing, truncated or not audio; the message names it and says why.
    """
    problem = audio_problem(path)
    if problem is not None:
        raise UserError(f"cannot use {path}: {problem}")
    try:
        samples, rate_hz = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot use {path}: {_tail(error)}") from error
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise UserError(f"cannot use {path}: it holds samples that are not finite numbers")
    if rate_hz != SAMPLE_RATE_HZ:
        divisor = math.gcd(rate_hz, SAMPLE_RATE_HZ)
        mono = resample_poly(mono, SAMPLE_RATE_HZ // divisor, rate_hz // divisor)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _wav_problem(path: Path) -> str | None:
    """Compare the length that the header declares with that of the file."""
    with open(path, "rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:12] != b"WAVE":
            return "not a wav file (it has no RIFF/WAVE header)"
        if head[:4] != b"RIFF":
            return None
        while True:
            chunk = file.read(8)
            if len(chunk) < 8:
                return "truncated: the wav header has no data chunk"
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                held = path.stat().st_size - file.tell()
                break
            file.seek(length + length % 2, os.SEEK_CUR)
    if length not in _UNKNOWN_LENGTHS and held < length:
        return f"truncated: the header declares {length} bytes of samples, the file holds {held}"
    return None


def _decoded_length(file: soundfile.SoundFile) -> int:
    held = 0
    for block in file.blocks(blocksize=1 << 18, dtype="float32"):
        held += len(block)
    return held


def _tail(error: BaseException) -> str:
    """libsndfile says "Error opening 'path': reason"; the path is said elsewhere."""
    return " ".join(str(error).rsplit(": ", 1)[-1].split()) or type(error).__name__
