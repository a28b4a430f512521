"""The text of audio files: any rate, any number of channels, any format that libsndfile reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly

from asr.data.fbank import Fbank, pad_tail
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import decode_features, evaluation_mode
from asr.decoding.search import Hypothesis
from asr.errors import UserError

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment

SAMPLE_RATE_HZ = 16_000


class AudioError(UserError):
    """An audio file that cannot be used. The message does not repeat the path."""


@dataclass(frozen=True)
class Transcript:
    """One file: its text, or in ``error`` why there is none."""

    path: Path
    text: str = ""
    hypothesis: Hypothesis | None = None
    duration_s: float = 0.0
    error: str | None = None


def read_audio(path: Path, max_duration_s: float = math.inf) -> np.ndarray:
    """Samples as float32 ``[N]`` in [-1, 1] at 16 kHz: channels are averaged, other rates resampled (polyphase filter).

    Raises:
        AudioError: absent, not readable as audio, longer than ``max_duration_s``, or with samples that are not finite.
    """
    if not path.exists():
        raise AudioError("no such file")
    if path.is_dir():
        raise AudioError("this is a folder; pass audio files")
    try:
        with soundfile.SoundFile(path) as file:
            rate_hz = file.samplerate
            duration_s = file.frames / rate_hz
            if duration_s > max_duration_s:
                raise AudioError(
                    f"{duration_s:.0f} s long, over the limit of decoding.batch_duration_s={max_duration_s:g};"
                    " cut it into parts, or raise the limit if memory allows"
                )
            channels = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: headerless formats such as .raw
        raise AudioError(f"not readable as audio ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise AudioError(f"cannot be read ({error.strerror or error})") from None
    samples = channels.mean(axis=1, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise AudioError("holds samples that are not finite numbers")
    if rate_hz != SAMPLE_RATE_HZ and samples.size:
        divisor = math.gcd(SAMPLE_RATE_HZ, rate_hz)
        samples = resample_poly(samples, SAMPLE_RATE_HZ // divisor, rate_hz // divisor).astype(np.float32)
    return samples


def transcribe_files(
    model: Any,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    config: Experiment,
    device: str | torch.device = "cpu",
) -> Iterator[Transcript]:
    """Transcribe files in the order given; one that cannot be used yields its error, and the rest goes on.

    Files are decoded in batches of at most ``config.decoding.batch_duration_s`` seconds, padding included. Features are
    those of training, with the same silent tail.

    Args:
        model: a transducer on ``device``.
        tokenizer: of the model.
        paths: audio files.
        config: ``data.features`` and ``decoding`` are used.
        device: where the model is.
    """
    limit_s = config.decoding.batch_duration_s
    fbank = Fbank(config.data.features)
    waiting: list[Transcript | tuple[Path, np.ndarray]] = []  # in order: errors, and files to decode
    lengths: list[int] = []
    for path in paths:
        try:
            samples = read_audio(path, limit_s)
        except AudioError as error:
            waiting.append(Transcript(path, error=str(error)))
            continue
        longest = max(lengths + [samples.size])
        if lengths and longest * (len(lengths) + 1) > limit_s * SAMPLE_RATE_HZ:
            yield from _decode_waiting(model, tokenizer, waiting, fbank, config, device)
            waiting, lengths = [], []
        waiting.append((path, samples))
        lengths.append(samples.size)
    yield from _decode_waiting(model, tokenizer, waiting, fbank, config, device)


def _decode_waiting(
    model: Any,
    tokenizer: Tokenizer,
    waiting: list[Transcript | tuple[Path, np.ndarray]],
    fbank: Fbank,
    config: Experiment,
    device: str | torch.device,
) -> list[Transcript]:
    audio = [item for item in waiting if isinstance(item, tuple)]
    decoded: Iterator[Hypothesis] = iter(())
    if audio:
        features = [torch.from_numpy(fbank.extract(pad_tail(samples, config.data.features))) for _, samples in audio]
        lens = torch.tensor([len(rows) for rows in features])
        padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        with evaluation_mode(model):
            decoded = iter(decode_features(model, padded.to(device), lens.to(device), config.decoding))
    found = []
    for item in waiting:
        if isinstance(item, Transcript):
            found.append(item)
        else:
            path, samples = item
            hypothesis = next(decoded)
            text = tokenizer.decode(hypothesis.tokens)
            found.append(Transcript(path, text, hypothesis, samples.size / SAMPLE_RATE_HZ))
    return found
