"""Stretches of recordings that are decoded whole, in batches: short files, and parts of long ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank import FRAME_SHIFT_SAMPLES, SUBSAMPLING, Fbank, pad_tail
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import decode_features
from asr.decoding.playing import Heard
from asr.decoding.search import Hypothesis
from asr.decoding.transcript import Segment, make_segment
from asr.decoding.words import frames_of, seconds_of

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment

FRAME_SAMPLES = SUBSAMPLING * FRAME_SHIFT_SAMPLES
CPU_BATCH_S = 60.0
"""Most audio of a batch on a CPU: memory above the model grows with it."""


@dataclass(frozen=True)
class Region:
    """A stretch of the recording ``key`` from an encoder frame on: float32 [N] at 16 kHz."""

    key: int
    start: int
    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        return self.samples.size / SAMPLE_RATE_HZ


class RegionCutter:
    """Cuts one long recording where a stream of it has ended segments, and holds only what is not yet cut.

    All of the recording is in one region or another: what the stream takes for silence, the whole context may not.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._samples = np.zeros(0, dtype=np.float32)
        self._start = 0  # encoder frame of the first of them
        self.num_samples = 0

    def hear(self, heard: Heard) -> list[Region]:
        """The regions that a step of the stream has ended."""
        self._samples = np.concatenate([self._samples, heard.samples])
        self.num_samples += heard.samples.size
        times = [time_s for segment in heard.segments for time_s in (segment.start_s, segment.end_s)]
        regions = [self._cut(frames_of(time_s)) for time_s in [*times, heard.partial.start_s]]
        if heard.ended:
            regions.append(self._cut(self._start + -(-self._samples.size // FRAME_SAMPLES)))
        return [region for region in regions if region.samples.size]

    def _cut(self, frame: int) -> Region:
        count = (frame - self._start) * FRAME_SAMPLES
        region = Region(self._key, self._start, self._samples[:count])
        self._samples, self._start = self._samples[count:], frame
        return region


class RegionBatch:
    """Collects regions and decodes them with full context, as many at once as a batch holds.

    Features are those of training, with the same silent tail.

    Args:
        model: a transducer on ``device``, in evaluation mode.
        tokenizer: of the model.
        config: ``data.features`` and ``decoding`` are used; ``decoding.batch_duration_s`` counts padding.
        device: where the model is.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, config: Experiment, device: str | torch.device) -> None:
        self._model, self._tokenizer, self._config, self._device = model, tokenizer, config, device
        limit_s = config.decoding.batch_duration_s
        self._limit_s = min(limit_s, CPU_BATCH_S) if torch.device(device).type == "cpu" else limit_s
        self._fbank = Fbank(config.data.features)
        self._waiting: list[Region] = []

    def add(self, region: Region) -> Iterator[tuple[Region, Segment]]:
        """Takes a region; if it does not fit to those that wait, they are decoded first and given."""
        longest_s = max(one.duration_s for one in [*self._waiting, region])
        if self._waiting and longest_s * (len(self._waiting) + 1) > self._limit_s:
            yield from self.flush()
        self._waiting.append(region)

    def flush(self) -> Iterator[tuple[Region, Segment]]:
        """Decodes what waits."""
        regions, self._waiting = self._waiting, []
        if not regions:
            return
        data = self._config.data.features
        features = [torch.from_numpy(self._fbank.extract(pad_tail(region.samples, data))) for region in regions]
        lens = torch.tensor([len(rows) for rows in features])
        padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        found = decode_features(self._model, padded.to(self._device), lens.to(self._device), self._config.decoding)
        for region, one in zip(regions, found, strict=True):
            moved = Hypothesis(one.tokens, [region.start + f for f in one.frames], one.score, one.confidences)
            start_s = seconds_of(region.start)
            yield region, make_segment(self._tokenizer, moved, start_s, start_s + region.duration_s)
