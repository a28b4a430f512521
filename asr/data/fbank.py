"""The feature extractor and its geometry: log-mel energies of the waveform with a silent tail.

Features are always those of the waveform with its silent tail (``pad_tail``), so a network sees the same end of an
utterance in training, in offline decoding and on a device that is fed the same padded waveform.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import kaldi_native_fbank
import numpy as np
import torch
from lhotse.features.base import FeatureExtractor, register_extractor

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank_kernel import Tables, log_mel, make_tables

FRAME_SHIFT_MS = 10
FRAME_SHIFT_SAMPLES = SAMPLE_RATE_HZ * FRAME_SHIFT_MS // 1000
FRAME_SAMPLES = 400
FIRST_SAMPLE = FRAME_SHIFT_SAMPLES // 2 - FRAME_SAMPLES // 2
"""The first frame begins this far before the audio: frames are centred on the middles of their shifts."""
PREEMPHASIS = np.float32(0.97)
SUBSAMPLING = 4
"""Feature frames per encoder frame: two unpadded 3x3 stride-2 convolutions, T' = (T - 3) // 4."""
EXTRA_FRAMES = 3
"""Feature frames that a chunk of C encoder frames needs beyond its own 4C."""

Count = TypeVar("Count", int, np.ndarray)


@dataclass
class FeatureConfig:
    """Features and their storage.

    Args:
        num_mel_bins: mel bins; 80 is what device runtimes expect.
        storage: stored computes features once in the features stage (fast epochs, about 32 kB a second of audio and
            copy); on_the_fly computes them in the workers of the loader (fresh augmentation in every epoch, no disk);
            so does shar, whose features stage writes the audio of training cuts as lhotse Shar, 16-bit FLAC in tar
            files, which are read from beginning to end, from a disk or an object store: see data.shar.
        shard_cuts: cuts in a file of storage=shar.
        tail_chunk_ms: silence is appended up to the next whole chunk of this length plus one chunk; a multiple of 40
            ms, and a multiple of the chunk of a streaming model.
        num_jobs: processes that compute stored features.
    """

    num_mel_bins: int = 80
    storage: Literal["stored", "on_the_fly", "shar"] = "stored"
    shard_cuts: int = 1000
    tail_chunk_ms: int = 320
    num_jobs: int = 2

    def __post_init__(self) -> None:
        step_ms = SUBSAMPLING * FRAME_SHIFT_MS
        if not 4 <= self.num_mel_bins <= 256:
            raise ValueError(f"num_mel_bins={self.num_mel_bins}; it must lie in [4, 256]")
        if self.storage not in ("stored", "on_the_fly", "shar"):
            raise ValueError(f"storage={self.storage!r}; it must be stored, on_the_fly or shar")
        if self.shard_cuts < 1:
            raise ValueError(f"shard_cuts={self.shard_cuts}; at least 1 is needed")
        if self.tail_chunk_ms < step_ms or self.tail_chunk_ms % step_ms:
            raise ValueError(f"tail_chunk_ms={self.tail_chunk_ms}; it must be a positive multiple of {step_ms}")
        if self.num_jobs < 1:
            raise ValueError(f"num_jobs={self.num_jobs}; at least 1 is needed")


def padded_num_samples(num_samples: Count, config: FeatureConfig) -> Count:
    """Length of a waveform after ``pad_tail``: a whole number of chunks plus three frames of overlap, in samples.

    Of one waveform, or of many: int64 in and out, as in what follows."""
    chunk = config.tail_chunk_ms * SAMPLE_RATE_HZ // 1000
    overlap = EXTRA_FRAMES * FRAME_SHIFT_SAMPLES
    whole_chunks = -(-(num_samples - overlap) // chunk)
    return (whole_chunks * (whole_chunks > 0) + 1) * chunk + overlap


def num_feature_frames(num_samples: Count, config: FeatureConfig) -> Count:
    """Feature frames T of a waveform of ``num_samples`` (before its tail); (T - 3) // 4 is a number of whole chunks."""
    return padded_num_samples(num_samples, config) // FRAME_SHIFT_SAMPLES


def num_encoder_frames(num_samples: Count, config: FeatureConfig) -> Count:
    """Encoder frames T' = (T - 3) // 4 of a waveform of ``num_samples`` (before its tail): whole chunks."""
    return (num_feature_frames(num_samples, config) - EXTRA_FRAMES) // SUBSAMPLING


def num_audio_frames(num_samples: int) -> int:
    """Feature frames of the audio itself, without the tail."""
    return (num_samples + FRAME_SHIFT_SAMPLES // 2) // FRAME_SHIFT_SAMPLES


def pad_tail(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Append silence up to the next whole chunk, plus one chunk.

    Args:
        samples: float32 [N] at 16 kHz.
        config: ``tail_chunk_ms`` is the chunk.

    Returns:
        float32 [N'] whose features have T = 4 C n + 3 frames, so that (T - 3) // 4 encoder frames are n whole chunks
        of C. At least one chunk of silence follows the audio: the encoder and the search get to see the end of the
        last word.
    """
    padded = np.zeros(padded_num_samples(samples.size, config), dtype=np.float32)
    padded[: samples.size] = samples
    return padded


class Fbank:
    """Log-mel energies with the settings that device runtimes use: those of kaldi-native-fbank but for rounding.

    25 ms Povey windows every 10 ms, 512-point FFT, mel bins from 20 Hz to 7600 Hz, pre-emphasis 0.97, DC removed, no
    dither, frames centred on multiples of 10 ms (snip_edges off), no energy. Samples in [-1, 1], not in the 16-bit
    range.
    """

    def __init__(self, config: FeatureConfig | None = None) -> None:
        self.config = FeatureConfig() if config is None else config
        self._tables = _tables(self.config.num_mel_bins)

    def extract(self, samples: np.ndarray) -> np.ndarray:
        """Features of a waveform as it is; call ``pad_tail`` before.

        Args:
            samples: float32 [N] in [-1, 1] at 16 kHz.

        Returns:
            float32 [T, num_mel_bins] with T = (N + 80) // 160.

        Raises:
            ValueError: ``samples`` is not a float32 vector, or holds a value that is not finite.
        """
        check_samples(samples)
        return self.frames(samples, FIRST_SAMPLE, num_audio_frames(samples.size))

    def frames(self, samples: np.ndarray, start: int, count: int) -> np.ndarray:
        """``count`` frames, the first from sample ``start`` on, float32 [count, F]; samples as ``extract`` takes them.

        At both ends the waveform goes on with its mirror image.
        """
        features = np.empty((count, self.config.num_mel_bins), dtype=np.float32)
        # one form of array, so that the loops are compiled once
        wave = np.require(samples, np.float32, ["C", "W"])
        log_mel(wave, start, FRAME_SHIFT_SAMPLES, PREEMPHASIS, self._tables, features)
        return features

    def stream(self) -> FbankStream:
        """Features of a waveform that arrives in pieces."""
        return FbankStream(self)


@cache
def _tables(num_mel_bins: int) -> Tables:
    """Window and mel weights of kaldi-native-fbank."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE_HZ
    options.frame_opts.frame_length_ms = FRAME_SAMPLES * 1000 // SAMPLE_RATE_HZ
    options.frame_opts.window_type = "povey"
    options.frame_opts.round_to_power_of_two = True
    options.mel_opts.num_bins = num_mel_bins
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = -400
    window = kaldi_native_fbank.FeatureWindowFunction(options.frame_opts).window
    return make_tables(window, kaldi_native_fbank.MelBanks(options.mel_opts, options.frame_opts).get_matrix())


class FbankStream:
    """Features of one waveform in pieces: together those of ``Fbank.extract(pad_tail(samples))``, bit by bit.

    Made by ``Fbank.stream``. Nothing is kept but what later frames need.
    """

    def __init__(self, fbank: Fbank) -> None:
        self.num_samples = 0  # so far, without the tail
        self._fbank = fbank
        self._taken = 0
        self._rest = np.zeros(0, dtype=np.float32)
        self._rest_start = 0  # the number of its first sample

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """The next samples, float32 [N] in [-1, 1] at 16 kHz, of any number.

        Returns:
            float32 [T, F], the frames that are known now. A frame needs 17.5 ms of audio behind its time.

        Raises:
            ValueError: ``samples`` is not a float32 vector, or holds a value that is not finite.
        """
        check_samples(samples)
        self.num_samples += samples.size
        self._rest = np.concatenate([self._rest, samples])
        received = self._rest_start + self._rest.size
        return self._take(max(0, (received - FIRST_SAMPLE - FRAME_SAMPLES) // FRAME_SHIFT_SAMPLES + 1))

    def finish(self) -> np.ndarray:
        """Appends the silent tail; float32 [T, F], the last frames. Nothing may come after it."""
        padded = padded_num_samples(self.num_samples, self._fbank.config)
        tail = np.zeros(padded - self.num_samples, dtype=np.float32)
        self._rest = np.concatenate([self._rest, tail])
        return self._take(num_audio_frames(padded))

    def _take(self, known: int) -> np.ndarray:
        start = FIRST_SAMPLE + self._taken * FRAME_SHIFT_SAMPLES
        features = self._fbank.frames(self._rest, start - self._rest_start, known - self._taken)
        self._taken = known
        keep = max(0, FIRST_SAMPLE + known * FRAME_SHIFT_SAMPLES - self._rest_start)
        self._rest = self._rest[keep:].copy()
        self._rest_start += keep
        return features


def check_samples(samples: np.ndarray) -> None:
    """Raises ValueError unless samples are a float32 vector of finite numbers."""
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise ValueError(f"samples must be float32 [N], got {samples.dtype} of shape {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("samples hold NaN or infinity; the recording is broken")


@dataclass
class FbankExtractorConfig:
    """What lhotse stores beside features.

    Args:
        num_mel_bins: mel bins.
        tail_chunk_ms: chunk of the silent tail.
    """

    num_mel_bins: int = 80
    tail_chunk_ms: int = 320

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FbankExtractorConfig:
        return FbankExtractorConfig(**data)


@register_extractor
class FbankExtractor(FeatureExtractor):
    """``pad_tail`` and ``Fbank`` behind lhotse's interface, for its tools; the toolkit itself calls them directly."""

    name = "tail-padded-fbank"
    config_type = FbankExtractorConfig

    def __init__(self, config: FbankExtractorConfig | None = None) -> None:
        super().__init__(config)
        self._features = FeatureConfig(num_mel_bins=self.config.num_mel_bins, tail_chunk_ms=self.config.tail_chunk_ms)
        self._fbank = Fbank(self._features)

    @property
    def frame_shift(self) -> float:
        return FRAME_SHIFT_MS / 1000

    def feature_dim(self, sampling_rate: int) -> int:
        return int(self.config.num_mel_bins)

    def extract(self, samples: Any, sampling_rate: int) -> np.ndarray:
        """Features float32 [T, F] of samples [N] or [1, N] at 16 kHz, tail included."""
        if sampling_rate != SAMPLE_RATE_HZ:
            raise ValueError(f"sampling rate is {sampling_rate} Hz; features need {SAMPLE_RATE_HZ}, resample the audio")
        array = samples.numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
        if array.ndim == 2 and array.shape[0] != 1:
            raise ValueError(f"samples have {array.shape[0]} channels; features need one")
        return self._fbank.extract(pad_tail(array.reshape(-1).astype(np.float32, copy=False), self._features))
