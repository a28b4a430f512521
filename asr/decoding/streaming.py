"""Transcription of audio as it comes: many streams at once, chunk by chunk, with endpoints."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asr.data.fbank import EXTRA_FRAMES, SUBSAMPLING, Fbank, FbankStream
from asr.data.tokenizer import Tokenizer
from asr.decoding.greedy import advance_greedy, init_greedy
from asr.decoding.search import Hypothesis
from asr.decoding.transcript import Segment, make_segment
from asr.decoding.words import pause_between, seconds_of
from asr.errors import UserError
from losses.backends.threads import map_in_threads

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment


@dataclass
class _Open:
    """The segment that goes on."""

    start: int  # encoder frame
    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    score: float = 0.0


class Stream:
    """One source of audio. Made by ``StreamingRecognizer.open``; fed here, advanced there.

    ``segments`` holds the final segments; who listens to an endless stream takes them with ``take``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        symbols: list[str],
        inside: frozenset[int],
        fbank: FbankStream,
        chunk_frames: int,
        slot: int,
    ):
        self.segments: list[Segment] = []
        self.frames = 0  # encoder frames so far
        self.finished = False  # no more audio will come
        self._tokenizer, self._symbols, self._inside = tokenizer, symbols, inside
        self._fbank, self._chunk_frames = fbank, chunk_frames
        self._slot: int | None = slot  # None once all is heard
        self._features: list[np.ndarray] = []
        self._num_features = 0
        self._open = _Open(0)

    @property
    def ended(self) -> bool:
        """Whether all audio is heard and all segments are final."""
        return self._slot is None

    @property
    def partial(self) -> Segment:
        """What is there of the segment that goes on."""
        return self._segment(final=False)

    def accept(self, samples: np.ndarray) -> None:
        """The next samples, float32 [N] in [-1, 1] at 16 kHz; any number.

        Raises:
            ValueError: after ``finish``; samples of another form, or that are not finite.
        """
        if self.finished:
            raise ValueError("this stream is finished; open another")
        self._add(self._fbank.accept(samples))

    def finish(self) -> None:
        """No more audio comes: the silent tail follows, with which the last word is heard."""
        if not self.finished:
            self.finished = True
            self._add(self._fbank.finish())

    def take(self) -> list[Segment]:
        """The final segments since the last call, which are kept no longer."""
        segments, self.segments = self.segments, []
        return segments

    @property
    def ready(self) -> bool:
        """Whether there is a chunk to advance by."""
        return self._next_frames() > 0

    def _add(self, features: np.ndarray) -> None:
        if len(features):
            self._features.append(features)
            self._num_features += len(features)

    def _next_frames(self) -> int:
        """Encoder frames of the next chunk, 0 if it is not there yet."""
        there = (self._num_features - EXTRA_FRAMES) // SUBSAMPLING
        if there >= self._chunk_frames:
            return self._chunk_frames
        return max(0, there) if self.finished else 0

    def _next(self, out: np.ndarray) -> int:
        """Writes the features of the next chunk into out [4 C + 3, F] and goes on behind it; its encoder frames."""
        frames = self._next_frames()
        features = np.concatenate(self._features) if len(self._features) > 1 else self._features[0]
        count = SUBSAMPLING * frames + EXTRA_FRAMES
        out[:count] = features[:count]
        self._features = [features[SUBSAMPLING * frames :]]
        self._num_features -= SUBSAMPLING * frames
        return frames

    def _segment(self, final: bool) -> Segment:
        found = self._open
        hypothesis = Hypothesis(list(found.tokens), list(found.frames), found.score, list(found.confidences))
        start_s, end_s = seconds_of(found.start), seconds_of(self.frames)
        return make_segment(self._tokenizer, hypothesis, start_s, end_s, final=final)

    def _close(self) -> None:
        """The segment that goes on is final; one without text leaves nothing."""
        if self._open.tokens:
            self.segments.append(self._segment(final=True))
        self._open = _Open(self.frames)

    def _cut(self) -> None:
        """The segment that goes on is too long: it ends in a pause, and what follows the pause goes on.

        The score of what was heard so far is the first part's.
        """
        found = self._open
        at = pause_between(self._symbols, found.tokens, found.frames, found.start, self.frames, self._inside)
        count = bisect_left(found.frames, at)
        if count:
            first = Hypothesis(found.tokens[:count], found.frames[:count], found.score, found.confidences[:count])
            self.segments.append(make_segment(self._tokenizer, first, seconds_of(found.start), seconds_of(at)))
        self._open = _Open(at, found.tokens[count:], found.frames[count:], found.confidences[count:])


class StreamingRecognizer:
    """Greedy search over many streams at once.

    Open streams, feed them, and call ``advance`` with those that have something to say; a chunk of each is computed in
    one batch. Results do not depend on which streams share a batch, nor on how samples are divided into pieces; they
    are those of the whole utterance under the mask of the same chunks.

    Args:
        model: a transducer on ``device``, in evaluation mode.
        tokenizer: of the model.
        config: ``data.features`` and ``decoding`` are used; ``decoding.chunk_ms`` and ``left_context_ms`` must be
            numbers.
        device: where the model is.
        endpoints: whether segments end by ``decoding.endpoint``; without, a stream is one segment.

    Raises:
        UserError: a search or a context that cannot stream.
        ValueError: the model is in training mode.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: Experiment,
        device: str | torch.device = "cpu",
        *,
        endpoints: bool = True,
    ):
        if model.training:
            raise ValueError("the model is in training mode; call model.eval()")
        decoding = config.decoding
        for name in ("chunk_ms", "left_context_ms"):
            if getattr(decoding, name) == "full":
                raise UserError(f"decoding.{name}=full cannot stream; set milliseconds, such as decoding.{name}=640")
        if decoding.search != "greedy":
            raise UserError(f"decoding.search={decoding.search} cannot stream; use greedy")
        self._model, self._tokenizer, self._decoding, self._device = model, tokenizer, decoding, device
        self._on_cpu = torch.device(device).type == "cpu"
        self._symbols, self._inside = tokenizer.symbols, tokenizer.inside
        self._fbank = Fbank(config.data.features)
        self._chunk_frames, self._left_frames = decoding.context
        self._endpoints = decoding.endpoint if endpoints else None
        self._free: list[int] = []
        self._states = self._first(0)
        self._fresh = self._first(1)[1]

    @torch.inference_mode()
    def _first(self, batch_size: int) -> Any:
        """States of encoder and search of streams that have not begun."""
        encoder = self._model.encoder.init_state(batch_size, self._left_frames)
        return (encoder, init_greedy(self._model, batch_size, self._device))

    @torch.inference_mode()
    def open(self) -> Stream:
        """A stream that has heard nothing yet."""
        if not self._free:
            size = _size(self._states)
            more = max(1, size)
            self._states = _map(lambda old, new: torch.cat([old, new]), self._states, self._first(more))
            self._free = list(range(size + more - 1, size - 1, -1))
        slot = self._free.pop()
        self._model.encoder.restart(self._states[0], slot)
        self._forget_text(slot)
        return Stream(self._tokenizer, self._symbols, self._inside, self._fbank.stream(), self._chunk_frames, slot)

    def _forget_text(self, slot: int) -> None:
        """The search of a stream begins anew."""
        _map(lambda old, new: old[slot : slot + 1].copy_(new), self._states[1], self._fresh)

    def close(self, stream: Stream) -> None:
        """Ends a stream at once, without its tail."""
        if stream._slot is not None:
            self._free.append(stream._slot)
            stream.finished, stream._slot = True, None

    def advance(self, streams: Sequence[Stream]) -> list[Stream]:
        """One chunk of each stream that has one, and the end of those that are finished.

        Returns:
            The streams that went on: each may have a new ``partial`` and new ``segments``.
        """
        ready = [stream for stream in streams if stream._slot is not None and stream.ready]
        if ready:
            # in the order of their states, which then need not be picked out where all go on
            ready.sort(key=lambda stream: stream._slot or 0)
            # Not with torch's threads, which wait for work in a busy loop, in the way of those that share out streams.
            threads = torch.get_num_threads() if self._on_cpu else 1
            for _ in map_in_threads(lambda those: self._step(those, threads), [ready], threads):
                pass
        for stream in streams:
            if stream.finished and not stream.ended and not stream.ready:
                stream._close()
                self.close(stream)
        return ready

    @torch.inference_mode()
    def _step(self, streams: list[Stream], threads: int) -> None:
        chunk, bins = self._chunk_frames, self._fbank.config.num_mel_bins
        features = np.zeros((len(streams), SUBSAMPLING * chunk + EXTRA_FRAMES, bins), dtype=np.float32)
        counts = [stream._next(row) for stream, row in zip(streams, features, strict=True)]
        lens = torch.tensor(counts, device=self._device)
        slots = [stream._slot for stream in streams]
        everyone = slots == list(range(_size(self._states)))
        rows = torch.tensor(slots, device=self._device)
        encoder, search = self._states if everyone else _map(lambda state: state[rows], self._states)
        heard = torch.from_numpy(features).to(self._device)
        missing = None if min(counts) == chunk else lens
        enc, encoder = self._model.encoder.step(heard, encoder, missing, threads=threads, in_place=True)
        search, emissions, scores = advance_greedy(self._model, search, enc, lens, self._decoding)
        for row, token, frame, confidence in zip(*(column.tolist() for column in emissions), strict=True):
            stream = streams[row]
            stream._open.tokens.append(token)
            stream._open.frames.append(stream.frames + frame)
            stream._open.confidences.append(confidence)
        states = (encoder, search)
        if everyone:
            self._states = states
        else:
            _map(lambda old, new: old.index_copy_(0, rows, new), self._states, states)
        for stream, count, score in zip(streams, counts, scores.tolist(), strict=True):
            stream.frames += count
            stream._open.score += score
            if self._at_endpoint(stream):
                said = bool(stream._open.tokens)
                stream._close()
                # as device runtimes do: the encoder goes on hearing, the last tokens are the context of the next ones,
                # and only a segment without text makes the search forget
                if not said:
                    self._forget_text(stream._slot or 0)
            elif self._too_long(stream):
                stream._cut()  # in the midst of speech: the search goes on

    def _at_endpoint(self, stream: Stream) -> bool:
        rules = self._endpoints
        if rules is None:
            return False
        now, found = stream.frames, stream._open
        silence_s = seconds_of(now - (found.frames[-1] + 1 if found.frames else found.start))
        enough_s = rules.silence_after_text_s if found.tokens else rules.silence_s
        return silence_s >= enough_s

    def _too_long(self, stream: Stream) -> bool:
        longest_s = math.inf if self._endpoints is None else self._endpoints.max_segment_s
        return seconds_of(stream.frames - stream._open.start) >= longest_s


def _size(states: Any) -> int:
    return int(states[0].frames.shape[0])


def _map(function: Any, state: Any, *others: Any) -> Any:
    """The function of each tensor of a nested tuple, and of those in its place in others; a tuple of the same form."""
    if isinstance(state, torch.Tensor):
        return function(state, *others)
    parts = [_map(function, *entries) for entries in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
