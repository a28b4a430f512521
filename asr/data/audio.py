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
PIECE_S = 5.0


class AudioError(UserError):
    """A recording cannot be used; the message is the reason, without the file name."""


class UnknownFormatError(AudioError):
    """libsndfile does not read the format."""


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


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Samples of any recording, whole: float32 [N] in [-1, 1] at 16 kHz, those of ``read_pieces``.

    Raises:
        AudioError: as ``read_pieces``.
    """
    return np.concatenate(list(read_pieces(path)))


def read_pieces(path: str | os.PathLike[str], piece_s: float = PIECE_S) -> Iterator[np.ndarray]:
    """Samples of any recording in pieces, float32 [N] in [-1, 1] at 16 kHz; channels are averaged, other rates
    resampled. What libsndfile does not read, ffmpeg does, where it is installed.

    Args:
        path: of a file of any length: about one piece of it is held at a time.
        piece_s: seconds of audio that are read at a time, about the length of a piece.

    Raises:
        AudioError: the file is missing, truncated, not audio, without samples, or has samples that are not finite.
            Where only reading shows it, the pieces before have been given.
    """
    resampler: Resampler | None = None
    for rate_hz, channels in _blocks(path, piece_s):
        resampler = resampler or Resampler(rate_hz)
        mono = channels.mean(axis=1)
        if not np.isfinite(mono).all():
            raise AudioError("it holds samples that are not finite numbers")
        piece = resampler.accept(mono)
        if len(piece):
            yield piece
    if resampler is None:
        raise AudioError("it holds no samples")
    piece = resampler.finish()
    if len(piece):
        yield piece


def audio_duration_s(path: str | os.PathLike[str]) -> float | None:
    """Seconds of audio that a header declares; None where it does not say, or libsndfile does not read it."""
    try:
        with _opened(path) as file:
            return len(file) / file.samplerate
    except AudioError:
        return None


def header_problem(path: str | os.PathLike[str]) -> str | None:
    """Why a recording cannot be used, as far as header and size tell, or None; see ``audio_problem``."""
    try:
        with _opened(path) as file:
            return None if len(file) else "it holds no samples"
    except AudioError as error:
        return str(error)


def read_section(
    path: str | os.PathLike[str],
    num_samples: int,
    place: float = 0.0,
    *,
    channel: float = 0.0,
    begin_s: float = 0.0,
    length_s: float | None = None,
) -> np.ndarray:
    """A section of one channel of a recording that libsndfile reads, without reading the rest.

    Args:
        path: of a file of any length.
        num_samples: of the section at 16 kHz; fewer come of a shorter recording.
        place: where it begins, in [0, 1), among all places at which so many samples follow.
        channel: which channel, in [0, 1) from the first to the last.
        begin_s, length_s: the part of the file that the recording is, in seconds; all of it by default.

    Returns:
        float32 [N] at 16 kHz, 1 <= N <= num_samples.

    Raises:
        AudioError: the file is missing, truncated, not audio, without samples in this part, or has samples that are not
            finite.
    """
    with _opened(path) as file:
        first = min(round(begin_s * file.samplerate), len(file))
        held = len(file) - first if length_s is None else min(round(length_s * file.samplerate), len(file) - first)
        if held < 1:
            raise AudioError("it holds no samples")
        wanted = min(held, max(1, math.ceil(num_samples * file.samplerate / SAMPLE_RATE_HZ)))
        file.seek(first + int(place * (held - wanted + 1)))
        channels = file.read(frames=wanted, dtype="float32", always_2d=True)
        if len(channels) < wanted:
            raise AudioError(f"truncated: {len(channels)} of {wanted} samples can be read")
        samples = channels[:, int(channel * channels.shape[1])]
        rate_hz = file.samplerate
    if not np.isfinite(samples).all():
        raise AudioError("it holds samples that are not finite numbers")
    return resample(samples, rate_hz)[:num_samples]


def resample(samples: np.ndarray, rate_hz: int, target_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Polyphase resampling of [N] samples to [ceil(N * target / rate)] float32; images and aliases are below -75 dB."""
    resampler = Resampler(rate_hz, target_hz)
    return np.concatenate([resampler.accept(samples), resampler.finish()])


class Resampler:
    """Polyphase resampling of a signal that comes in pieces: together what ``resample`` gives of the whole, bit by bit.

    Only the samples that the filter still reaches are kept. A call costs time also for an empty piece, that of
    arranging a filter of 20 * rate / gcd(rate, target) taps, so pieces of 10 ms or more are advised.

    Args:
        rate_hz: of the samples that come.
        target_hz: of those that it returns.
    """

    def __init__(self, rate_hz: int, target_hz: int = SAMPLE_RATE_HZ) -> None:
        divisor = math.gcd(rate_hz, target_hz)
        self._up, self._down = target_hz // divisor, rate_hz // divisor
        self._half = 10 * max(self._up, self._down)  # taps on each side of the middle
        self._kept = np.zeros(0)  # samples from number _first on
        self._first = 0
        self._returned = 0

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """The next samples, float [N]; float32 [M], those of the result that are known now."""
        if self._up == self._down:
            return np.ascontiguousarray(samples, dtype=np.float32)
        self._kept = np.concatenate([self._kept, samples])
        held = self._first + len(self._kept)
        return self._up_to(-((self._half - held * self._up) // self._down))

    def finish(self) -> np.ndarray:
        """float32 [M], the last of the result, as if silence followed. Nothing may come after it."""
        held = self._first + len(self._kept)
        return self._up_to(-(-held * self._up // self._down))

    def _up_to(self, end: int) -> np.ndarray:
        """The result from where it stands up to number ``end``."""
        count = end - self._returned
        if count <= 0:
            return np.zeros(0, dtype=np.float32)
        from scipy.signal import upfirdn  # 60 MB, which training from stored features never needs

        # upfirdn begins with the first tap on the first sample. Result number _returned has tap `tap` there, so some of
        # what comes before it is computed too, and the filter shifted until the distance is a whole number of results.
        tap = self._returned * self._down - self._first * self._up + self._half
        before = -(-tap // self._down)
        taps = np.concatenate([np.zeros(before * self._down - tap), _low_pass(self._up, self._down)])
        found = upfirdn(taps, self._kept, self._up, self._down)[before : before + count].astype(np.float32)
        self._returned = end
        needed = max(self._first, -((self._half - end * self._down) // self._up))
        self._kept = self._kept[needed - self._first :].copy()
        self._first = needed
        return found


@cache
def _low_pass(up: int, down: int) -> np.ndarray:
    """scipy's default length with a steeper window; designing it takes as long as filtering a short utterance."""
    from scipy.signal import firwin

    widest = max(up, down)
    return up * firwin(2 * 10 * widest + 1, 1 / widest, window=("kaiser", 8.0))


def _blocks(path: str | os.PathLike[str], block_s: float) -> Iterator[tuple[int, np.ndarray]]:
    """Rate in Hz and samples, float64 [N, channels], of one block after another."""
    try:
        with _opened(path) as file:
            declared, held = len(file), 0
            block = max(1, int(block_s * file.samplerate))
            while held < declared:
                # soundfile wants a number of frames that are there where it cannot seek (GSM 6.10)
                channels = file.read(frames=min(block, declared - held), dtype="float64", always_2d=True)
                if not len(channels):
                    break
                held += len(channels)
                yield file.samplerate, channels
            _check_length(held, declared)
            return
    except UnknownFormatError as error:
        reason = error
    from asr.data.ffmpeg import ffmpeg_blocks

    yield from ffmpeg_blocks(Path(path), block_s, reason)


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
        with _soundfile(path) as file:
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


def _soundfile(path: Path) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as error:
        raise UnknownFormatError(f"not readable as audio ({_tail(error)})") from error


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
