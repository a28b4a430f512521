"""Audio of the corpora: read any recording once as 16 kHz mono, join pieces without clicks, write PCM_16 wav files.

Everything here is a pure function of its arguments, so that the same corpus and seed give the same bytes on every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from asr.data.audio import SAMPLE_RATE_HZ, AudioError, read_audio

PEAK_LIMIT = 0.98
"""Louder audio is scaled down to this peak: resampling overshoots recordings that touch full scale."""
MIN_DURATION_S = 0.05


def read_recording(path: Path) -> np.ndarray:
    """Read a recording as float32 [N] at 16 kHz, no louder than ``PEAK_LIMIT``.

    Raises AudioError for a file that is no audio, is truncated, or holds less than 50 ms.
    """
    samples = read_audio(path)
    duration_s = len(samples) / SAMPLE_RATE_HZ
    if duration_s < MIN_DURATION_S:
        raise AudioError(f"it holds {duration_s:.3f} s of audio, at least {MIN_DURATION_S} s are needed")
    return limit_peak(samples)


def limit_peak(samples: np.ndarray, limit: float = PEAK_LIMIT) -> np.ndarray:
    """Scale the whole signal down if its peak is above ``limit``; the signal is returned unchanged otherwise."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples if peak <= limit else (samples * (limit / peak)).astype(np.float32)


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """float32 [N] in [-1, 1] -> int16 [N], rounded to nearest; peaks are scaled below full scale, never clipped."""
    return np.rint(limit_peak(samples) * 32767.0).astype(np.int16)


def write_wav(path: Path, pcm: np.ndarray) -> None:
    """Write int16 [N] as a 16 kHz mono PCM_16 wav file."""
    soundfile.write(str(path), pcm, SAMPLE_RATE_HZ, subtype="PCM_16", format="WAV")


def pcm_digest(pcm: np.ndarray) -> str:
    """SHA-256 (hex) of little-endian samples."""
    return hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()


def join(pieces: Sequence[np.ndarray], fade_s: float = 0.01) -> np.ndarray:
    """Concatenate pieces [N_i] with equal-power cross-fades, so that no joint clicks.

    Neighbours overlap by ``fade_s`` (less where a piece is shorter than twice that): the result is shorter than the sum
    by the overlaps. Equal power keeps the level of two uncorrelated noise floors constant through the joint.
    """
    if not pieces:
        return np.zeros(0, dtype=np.float32)
    fade = int(round(fade_s * SAMPLE_RATE_HZ))
    out = [np.array(pieces[0], dtype=np.float32)]
    for piece in pieces[1:]:
        left = out[-1]
        overlap = min(fade, len(left) // 2, len(piece) // 2)
        if overlap == 0:
            out.append(np.array(piece, dtype=np.float32))
            continue
        phase = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap * (np.pi / 2)
        blend = left[-overlap:] * np.cos(phase) + piece[:overlap] * np.sin(phase)
        out[-1] = left[:-overlap]
        out.append(np.concatenate([blend.astype(np.float32), piece[overlap:]]))
    return np.concatenate(out).astype(np.float32)


def rms(samples: np.ndarray) -> float:
    """Root mean square of [N] samples (0 for none)."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def energy_db(samples: np.ndarray, hop_s: float = 0.01, window_s: float = 0.02) -> np.ndarray:
    """Short-time level [N // hop] in dB relative to full scale, one value per hop, the window centred on its start."""
    hop, window = int(hop_s * SAMPLE_RATE_HZ), int(window_s * SAMPLE_RATE_HZ)
    total = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    centres = np.arange(len(samples) // hop) * hop
    starts, ends = np.maximum(centres - window // 2, 0), np.minimum(centres + window // 2, len(samples))
    return 10 * np.log10((total[ends] - total[starts]) / (ends - starts) + 1e-12)
