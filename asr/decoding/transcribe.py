"""The text of audio files: any rate, any number of channels, any format, any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asr.data.audio import SAMPLE_RATE_HZ, AudioError, read_pieces
from asr.data.tokenizer import Tokenizer
from asr.decoding.decode import evaluation_mode
from asr.decoding.playing import AT_ONCE, Player
from asr.decoding.regions import Region, RegionBatch, RegionCutter
from asr.decoding.streaming import StreamingRecognizer
from asr.decoding.transcript import Segment, Transcript

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment

SHORT_S = 30.0
"""Files up to this length are decoded whole: training saw few longer utterances, and attention's cost is quadratic."""
LIVE_CHUNK_MS = 640
CUTTING_CHUNK_MS = 1280
CUTTING_LEFT_CONTEXT_MS = 5120

Reader = Callable[[Path], Iterator[np.ndarray]]


class Listener:
    """Is told while files are transcribed; does nothing with it."""

    def heard(self, duration_s: float) -> None:
        """So much more audio is done."""

    def segment(self, path: Path, segment: Segment) -> None:
        """A segment is final, or, in chunks, has come so far."""


def transcribe_files(
    model: Any,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    config: Experiment,
    device: str | torch.device = "cpu",
    *,
    listener: Listener | None = None,
    read: Reader = read_pieces,
    at_once: int = AT_ONCE,
) -> Iterator[Transcript]:
    """Transcribe files in the order given; one that cannot be used yields its error, and the rest goes on.

    With ``decoding.chunk_ms`` in ms each file is a stream, and segments end at endpoints. With ``full``, files of up to
    30 s are decoded whole, in batches; longer ones are cut where a stream of them has its endpoints, and each part is
    decoded with full context. Memory does not grow with the length of a file.

    Args:
        model: a transducer on ``device``; it decodes in evaluation mode and is left in the mode that it came in.
        tokenizer: of the model.
        paths: audio files.
        config: ``data.features`` and ``decoding`` are used.
        device: where the model is.
        listener: is told of segments and progress.
        read: gives the samples of a path as ``read_pieces`` does.
        at_once: streams that are read at the same time.

    Raises:
        UserError: settings that cannot stream, where that is asked for.
    """

    def player(config: Experiment) -> Player:
        return Player(StreamingRecognizer(model, tokenizer, config, device))

    results = _Results(paths, listener or Listener())
    with evaluation_mode(model):
        if config.decoding.chunk_ms == "full":
            batch = RegionBatch(model, tokenizer, config, device)
            longest_s = min(SHORT_S, config.decoding.batch_duration_s)
            steps = _whole(results, batch, lambda: player(_for_cutting(config)), longest_s, read, at_once)
        else:
            steps = _in_chunks(results, player(config), read, at_once)
        for _ in steps:
            yield from results.ready()


class _Results:
    """Collects segments file by file, and gives files in their order once all of a file is there."""

    def __init__(self, paths: Sequence[Path], listener: Listener) -> None:
        self.paths, self.listener = paths, listener
        self._segments: list[list[Segment]] = [[] for _ in paths]
        self._waiting = [0] * len(paths)  # regions to be decoded
        self._ends: list[Transcript | None] = [None] * len(paths)
        self._next = 0

    def add(self, key: int, segment: Segment) -> None:
        self.listener.segment(self.paths[key], segment)
        self._segments[key].append(segment)

    def decode(self, batch: RegionBatch, regions: Sequence[Region]) -> None:
        for region in regions:
            self._waiting[region.key] += 1
            self.decoded(batch.add(region))

    def decoded(self, found: Iterable[tuple[Region, Segment]]) -> None:
        for region, segment in found:
            self._waiting[region.key] -= 1
            self.listener.heard(region.duration_s)
            if segment.hypothesis.tokens:
                self.add(region.key, segment)

    def end(self, key: int, num_samples: int, error: str | None = None) -> None:
        """No more regions or segments come of this file."""
        segments = [] if error else self._segments[key]
        self._ends[key] = Transcript(self.paths[key], segments, num_samples / SAMPLE_RATE_HZ, error)

    def ready(self) -> Iterator[Transcript]:
        while self._next < len(self.paths):
            found = self._ends[self._next]
            if found is None or (self._waiting[self._next] and found.error is None):
                return
            self._ends[self._next], self._segments[self._next] = None, []
            self._next += 1
            yield found


def _in_chunks(results: _Results, player: Player, read: Reader, at_once: int) -> Iterator[None]:
    """Every file is a stream. Fills the results, and yields after each step."""
    lengths = [0] * len(results.paths)
    coming = enumerate(results.paths)
    while True:
        while len(player) < at_once and (item := next(coming, None)):
            player.add(item[0], read(item[1]))
        if not len(player):
            return
        for heard in player.step():
            lengths[heard.key] += heard.samples.size
            results.listener.heard(heard.samples.size / SAMPLE_RATE_HZ)
            for segment in heard.segments:
                results.add(heard.key, segment)
            if heard.ended:
                results.end(heard.key, lengths[heard.key], heard.error)
            elif heard.partial.hypothesis.tokens:
                results.listener.segment(results.paths[heard.key], heard.partial)
        yield


def _whole(
    results: _Results,
    batch: RegionBatch,
    make_player: Callable[[], Player],
    longest_s: float,
    read: Reader,
    at_once: int,
) -> Iterator[None]:
    """Files up to ``longest_s`` are regions, of others streams cut them. Fills the results, yields after each step."""
    player: Player | None = None  # not every search and model can stream, and short files need not
    cutters: dict[int, RegionCutter] = {}
    coming = enumerate(results.paths)
    while True:
        while (player is None or len(player) < at_once) and (item := next(coming, None)):
            key, path = item
            pieces = read(path)
            try:
                head, all_of_it = _head(pieces, longest_s)
            except AudioError as error:
                results.end(key, 0, str(error))
                yield
                continue
            if all_of_it:
                results.end(key, head.size)
                results.decode(batch, [Region(key, 0, head)])
                yield
            else:
                player = player or make_player()
                player.add(key, chain([head], pieces))
                cutters[key] = RegionCutter(key)
        if not player:
            break
        for heard in player.step():
            cutter = cutters[heard.key]
            if heard.error is None:
                results.decode(batch, cutter.hear(heard))
            if heard.ended:
                results.end(heard.key, cutter.num_samples, heard.error)
                del cutters[heard.key]
        yield
    results.decoded(batch.flush())
    yield


def _head(pieces: Iterator[np.ndarray], longest_s: float) -> tuple[np.ndarray, bool]:
    """The first samples of a recording, and whether they are all; then there are at most ``longest_s`` seconds."""
    found, count = [], 0
    for piece in pieces:
        found.append(piece)
        count += piece.size
        if count > longest_s * SAMPLE_RATE_HZ:
            return np.concatenate(found), False
    return np.concatenate(found), True


def streaming_settings(config: Experiment, *, must: bool, search_given: bool) -> Experiment:
    """The settings with a chunk, where a stream is wanted (``must``), and with the search that streams, where there is
    a chunk and nobody has asked for another search."""
    chunk_ms = config.decoding.chunk_ms
    if must and chunk_ms == "full":
        chunk_ms = LIVE_CHUNK_MS
    if chunk_ms == "full":
        return config
    search = config.decoding.search if search_given else "greedy"
    return _with_decoding(config, chunk_ms=chunk_ms, search=search)


def _for_cutting(config: Experiment) -> Experiment:
    """The settings of the stream that finds where to cut."""
    left_ms = CUTTING_LEFT_CONTEXT_MS if config.decoding.left_context_ms == "full" else config.decoding.left_context_ms
    return _with_decoding(config, search="greedy", chunk_ms=CUTTING_CHUNK_MS, left_context_ms=left_ms)


def _with_decoding(config: Experiment, **changes: Any) -> Experiment:
    return replace(config, decoding=replace(config.decoding, **changes))
