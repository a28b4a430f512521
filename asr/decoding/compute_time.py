"""How long a chunk of one stream takes to compute, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank import Fbank, pad_tail
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import decode_features
from asr.decoding.search import DecodingConfig
from asr.decoding.streaming import StreamingRecognizer

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment


def chunk_compute_ms(
    model: Any,
    tokenizer: Tokenizer,
    config: Experiment,
    decoding: DecodingConfig,
    recordings: Sequence[np.ndarray],
    device: str | torch.device = "cpu",
) -> float:
    """Median wall time in ms of a chunk of a single stream, from its samples to its partial text.

    Without chunks, that of a whole utterance.

    Args:
        model: a transducer on ``device`` in evaluation mode.
        tokenizer: of the model.
        config: ``data.features`` is used.
        decoding: the chunk, the left context and the search.
        recordings: float32 [N] at 16 kHz, one or more. The first is heard twice, and its first time does not count:
            then memory is taken, and kernels are compiled.
    """
    streams = decoding.chunk_ms != "full"
    measure = chunk_times if streams else _utterance_times
    config = replace(config, decoding=decoding)
    times = [measure(model, tokenizer, config, samples, device) for samples in [recordings[0], *recordings]]
    return 1000 * float(np.median(np.concatenate(times[1:])))


def chunk_times(
    model: Any,
    tokenizer: Tokenizer,
    config: Experiment,
    samples: np.ndarray,
    device: str | torch.device = "cpu",
    *,
    endpoints: bool = False,
) -> list[float]:
    """Wall time in seconds of each chunk of a single stream: features, encoder, search and the partial text.

    Samples arrive in pieces of a chunk. The silent tail, which no one waits for, is left out unless all is shorter.

    Args:
        model: a transducer on ``device`` in evaluation mode.
        tokenizer: of the model.
        config: ``data.features`` and ``decoding`` are used.
        samples: float32 [N] at 16 kHz.
        endpoints: as of `StreamingRecognizer`.
    """
    recognizer = StreamingRecognizer(model, tokenizer, config, device, endpoints=endpoints)
    stream = recognizer.open()
    piece = int(config.decoding.chunk_ms) * SAMPLE_RATE_HZ // 1000
    times = []
    for start in range(0, samples.size, piece):
        begin = time.perf_counter()
        stream.accept(samples[start : start + piece])
        if recognizer.advance([stream]):
            _ = stream.partial.text
            times.append(time.perf_counter() - begin)
        stream.take()
    if times:
        return times
    begin = time.perf_counter()
    stream.finish()
    recognizer.advance([stream])
    return [time.perf_counter() - begin]


def _utterance_times(
    model: Any, tokenizer: Tokenizer, config: Experiment, samples: np.ndarray, device: str | torch.device
) -> list[float]:
    begin = time.perf_counter()
    features = Fbank(config.data.features).extract(pad_tail(samples, config.data.features))
    batch = torch.from_numpy(features)[None].to(device)
    found = decode_features(model, batch, torch.tensor([len(features)], device=device), config.decoding)
    tokenizer.decode(found[0].tokens)
    return [time.perf_counter() - begin]
