"""The text of audio files: any rate, any number of channels, any format that libsndfile reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asr.data.audio import SAMPLE_RATE_HZ, AudioError, read_audio
from asr.data.fbank import Fbank, pad_tail
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import decode_features, evaluation_mode
from asr.decoding.search import Hypothesis

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment


@dataclass(frozen=True)
class Transcript:
    """One file: its text, or in ``error`` why there is none."""

    path: Path
    text: str = ""
    hypothesis: Hypothesis | None = None
    duration_s: float = 0.0
    error: str | None = None


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
