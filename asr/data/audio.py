"""Recordings as people have them: whether a file is whole, and its samples as features need them."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

from asr.errors import UserError

SAMPLE_RATE_HZ = 16000

_UNKNOWN_WAV_LENGTH = 0x7FFF0000
"""Programs that stream into a pipe cannot know the length. They declare 0, or the largest number that they can think
of: SoX 0x7FFFF000, ffmpeg 0xFFFFFFFF, others that less the size of the header. All of these are at least this one."""
_UNKNOWN_FRAMES = 1 << 62
"""libsndfile counts at least this many frames where a header (FLAC's) leaves the length open."""
_BLOCK_FRAMES = 1 << 18


class AudioError(UserError):
    """A recording cannot be used; the message is the reason, without the file name."""


def audio_problem(path: str | os.PathLike[str], num_samples: int | None = None) -> str | None:
    """Why an audio file cannot be used, or None if it can.

    Wav files are judged by header and size; other formats are decoded.

    Args:
        path: the file.
        num_samples: samples per channel that it should hold, where that is known.
    """
    try:
        with _opened(path) as file:
            declared = len(file)
            held = declared if file.format in ("WAV", "WAVEX") else _decoded_length(file)
            _check_length(held, declared)
    except AudioError as error:
        return str(error)
    if held == 0:
        return "it holds no samples"
    if num_samples is not None and held != num_samples:
        return f"it holds {held} samples, but the manifest says {num_samples}"
    return None


def read_audio(path: str | os.PathLike[str], max_duration_s: float = math.inf) -> np.ndarray:
    """Samples of any recording, float32 [N] in [-1, 1] at 16 kHz; channels are averaged, other rates resampled.

    Raises:
        AudioError: the file is missing, truncated, not audio, without samples, longer than ``max_duration_s``, or has
            samples that are not finite.
    """
    with _opened(path) as file:
        rate_hz, declared = file.samplerate, len(file)
        if declared > max_duration_s * rate_hz:
            raise AudioError(
                f"{declared / rate_hz:.0f} s long, over the limit of decoding.batch_duration_s={max_duration_s:g};"
                " cut it into parts, or raise the limit if memory allows"
            )
        # soundfile wants the number of frames where it cannot seek (GSM 6.10)
        channels = file.read(frames=declared, dtype="float64", always_2d=True)
    _check_length(len(channels), declared)
    if not len(channels):
        raise AudioError("it holds no samples")
    mono = channels.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError("it holds samples that are not finite numbers")
    return resample(mono, rate_hz)


def resample(samples: np.ndarray, rate_hz: int, target_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Polyphase resampling of [N] samples to [ceil(N * target / rate)] float32; images and aliases are below -75 dB."""
    if rate_hz == target_hz or not len(samples):
        return np.ascontiguousarray(samples, dtype=np.float32)
    from scipy.signal import resample_poly  # 60 MB, which training from stored features never needs

    divisor = math.gcd(rate_hz, target_hz)
    up, down = target_hz // divisor, rate_hz // divisor
    return resample_poly(samples, up, down, window=_low_pass(up, down)).astype(np.float32)


@cache
def _low_pass(up: int, down: int) -> np.ndarray:
    """scipy's default length with a steeper window; designing it takes as long as filtering a short utterance."""
    from scipy.signal import firwin

    widest = max(up, down)
    return firwin(2 * 10 * widest + 1, 1 / widest, window=("kaiser", 8.0))


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[soundfile.SoundFile]:
    """An audio file that is whole as far as its header tells; errors of reading it become ``AudioError``."""
    path = Path(path)
    try:
        if path.is_dir():
            raise AudioError("this is a folder, not an audio file")
        if path.stat().st_size == 0:
            raise AudioError("the file is empty")
        _check_wav_is_whole(path)
        with soundfile.SoundFile(str(path)) as file:
            if len(file) >= _UNKNOWN_FRAMES:
                raise AudioError(
                    "the header does not say how long it is; re-encode it, e.g. ffmpeg -i in.flac out.flac"
                )
            yield file
    except AudioError:  # a ValueError too
        raise
    except UnicodeEncodeError as error:
        raise AudioError("the file name is not valid UTF-8; rename the file") from error
    except FileNotFoundError:
        raise AudioError("the file does not exist") from None
    except OSError as error:
        raise AudioError(f"the file cannot be read ({error.strerror or error})") from error
    # libsndfile's errors; TypeError: headerless formats such as .raw; ValueError: what soundfile itself refuses
    except (RuntimeError, TypeError, ValueError) as error:
        raise AudioError(f"not readable as audio ({_tail(error)})") from error


def _check_wav_is_whole(path: Path) -> None:
    """Compare the size that a wav header declares with the file: libsndfile reads truncated files without a word."""
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
            return
        while True:
            chunk = file.read(8)
            if len(chunk) < 8:
                raise AudioError("truncated: the wav header has no data chunk")
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                break
            file.seek(length + length % 2, os.SEEK_CUR)
        held = path.stat().st_size - file.tell()
    if held < length < _UNKNOWN_WAV_LENGTH:
        raise AudioError(f"truncated: the header declares {length} bytes of samples, the file holds {held}")


def _check_length(held: int, declared: int) -> None:
    if held < declared:
        raise AudioError(f"truncated: {held} of {declared} samples can be read")


def _decoded_length(file: soundfile.SoundFile) -> int:
    """Counted by reading: ``SoundFile.blocks`` yields as many samples as are declared, even if they are not there."""
    held = 0
    while count := len(file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        held += count
    return held


def _tail(error: BaseException) -> str:
    """libsndfile says "Error opening 'path': reason"; the path is said elsewhere."""
    return " ".join(str(error).rsplit(": ", 1)[-1].split()) or type(error).__name__
