"""Decode a set of cuts as a server would hear them: so many streams at once, chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import CutSet, MonoCut

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.features import load_samples
from asr.data.loader import transcript
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import Decoded, evaluation_mode
from asr.decoding.search import Hypothesis
from asr.decoding.streaming import Stream, StreamingRecognizer
from asr.errors import UserError
from asr.training.ranks import Ranks

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment


class _Source:
    """A cut that is being spoken into a stream."""

    def __init__(self, cut: MonoCut, samples: np.ndarray, stream: Stream):
        self.cut, self.stream = cut, stream
        self._samples, self._position = samples, 0

    def feed(self, count: int) -> None:
        """The next ``count`` samples, or those that are left and then the end."""
        if self.stream.finished:
            return
        try:
            self.stream.accept(self._samples[self._position : self._position + count])
        except ValueError as error:
            raise UserError(f"cut {self.cut.id}: {error}") from error
        self._position += count
        if self._position >= self._samples.size:
            self.stream.finish()


def decode_in_streams(
    model: Any,
    tokenizer: Tokenizer,
    cuts: CutSet,
    config: Experiment,
    device: str | torch.device = "cpu",
    ranks: Ranks | None = None,
    *,
    streams: int,
) -> list[Decoded]:
    """Decode every cut once, from its audio, in a stream of its own; the audio arrives in pieces of one chunk.

    As ``decode_cuts`` with the same ``decoding.chunk_ms`` and ``left_context_ms``: the tokens and frames are the same.
    Where nothing was recognised, the hypothesis has a score of 0.

    Args:
        model, tokenizer, device: as for ``decode_cuts``.
        cuts: recordings at 16 kHz; stored features are not used. The longest come first, so that few streams are left
            alone at the end.
        config: ``data.features`` and ``decoding`` are used; an utterance is one segment, without endpoints.
        ranks: of several processes each decodes its share, in ``streams`` streams; all call this.
        streams: how many are heard at once, at least 1. A new utterance takes the place of one that has ended.

    Returns:
        One entry per cut, sorted by cut id; of several processes on the first, and nothing on the others.

    Raises:
        UserError: ``streams`` below 1; a search or context that cannot stream; audio that cannot be read.
    """
    if streams < 1:
        raise UserError(f"{streams} streams hear nothing; at least 1 is needed")
    ranks = ranks or Ranks()
    order = sorted(cuts, key=lambda cut: (-cut.duration, cut.id))[ranks.rank :: ranks.size]
    results: list[Decoded] = []
    speaking: list[_Source] = []
    with evaluation_mode(model), closing(_read_ahead(order, streams)) as waiting:
        recognizer = StreamingRecognizer(model, tokenizer, config, device, endpoints=False)
        piece = int(config.decoding.chunk_ms) * SAMPLE_RATE_HZ // 1000
        while True:
            while len(speaking) < streams and (read := next(waiting, None)) is not None:
                speaking.append(_Source(*read, recognizer.open()))
            if not speaking:
                break
            for source in speaking:
                source.feed(piece)
            recognizer.advance([source.stream for source in speaking])
            results += [_decoded(source) for source in speaking if source.stream.ended]
            speaking = [source for source in speaking if not source.stream.ended]
    return sorted(ranks.gather(results), key=lambda result: result.cut_id)


def _decoded(source: _Source) -> Decoded:
    segments = source.stream.segments  # one, or none if nothing was recognised
    hypothesis = segments[0].hypothesis if segments else Hypothesis([], [], 0.0)
    text = segments[0].text if segments else ""
    return Decoded(source.cut.id, transcript(source.cut), text, hypothesis, source.cut.duration)


def _read_ahead(cuts: Iterable[MonoCut], ahead: int) -> Generator[tuple[MonoCut, np.ndarray], None, None]:
    """Cuts with their samples, up to ``ahead`` of which a thread has read before they are asked for."""
    remaining = iter(cuts)
    waiting: deque[tuple[MonoCut, Any]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="audio")
    try:
        while True:
            while len(waiting) <= ahead and (cut := next(remaining, None)) is not None:
                waiting.append((cut, pool.submit(load_samples, cut)))
            if not waiting:
                return
            cut, samples = waiting.popleft()
            yield cut, samples.result()
    finally:
        pool.shutdown(cancel_futures=True)
