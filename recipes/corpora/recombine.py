"""New recordings out of the words of old ones.

A small set of recordings with fixed word order is soon known by heart. Cut at its pauses and put together in random
order and number, its words teach the same sounds without the order. Every cut lies in a quiet place between two
words, so the pauses and the noise floor of the result are those of the recordings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from asr.data.audio import SAMPLE_RATE_HZ
from recipes.corpora.audio import energy_db, join

HOP_S = 0.01
THRESHOLDS_DB = (15.0, 18.0, 12.0, 21.0, 9.0)
"""Levels above the noise floor, tried in this order: breath in a pause needs a higher one, weak consonants a lower."""
MIN_PAUSE_S, MIN_WORD_S, MAX_WORD_S = 0.06, 0.15, 0.65
QUIET_DB = 8.0


@dataclass(frozen=True)
class Words:
    """One recording cut into words: sample indices, and pieces of its noise floor.

    ``cuts`` [W + 1]: word k lies in samples[cuts[k]:cuts[k + 1]], half of each neighbouring pause included.
    """

    cuts: list[int]
    quiet: list[tuple[int, int]]


def find_words(samples: np.ndarray, count: int) -> Words | None:
    """Cut float32 [N] at 16 kHz into exactly ``count`` words by energy; None if no threshold finds that many."""
    level = np.convolve(energy_db(samples, HOP_S), np.ones(3) / 3, mode="same")
    floor = float(np.percentile(level, 10))
    for threshold in THRESHOLDS_DB:
        runs = _active_runs(level > floor + threshold)
        lengths = [(end - start) * HOP_S for start, end in runs]
        if len(runs) == count and all(MIN_WORD_S <= length <= MAX_WORD_S for length in lengths):
            return _cut_between(samples, level, floor, runs)
    return None


def _active_runs(active: np.ndarray) -> list[tuple[int, int]]:
    """Runs of True as (start, end) in hops; pauses below MIN_PAUSE_S are bridged, then blips below 50 ms dropped."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active.astype(np.int8), [0]])))
    merged: list[list[int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if merged and start - merged[-1][1] < MIN_PAUSE_S / HOP_S:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged if end - start >= 0.05 / HOP_S]


def _cut_between(samples: np.ndarray, level: np.ndarray, floor: float, runs: list[tuple[int, int]]) -> Words:
    hop = int(HOP_S * SAMPLE_RATE_HZ)
    margin = int(0.1 / HOP_S)
    first, last = max(runs[0][0] - margin, 0), min(runs[-1][1] + margin, len(level))
    faded = np.flatnonzero(level[first : runs[0][0]] < floor - QUIET_DB)  # the recorder may still be fading in
    first += int(faded[-1]) + 1 if len(faded) else 0
    # The quietest place of the middle half, so that both words keep some pause.
    pauses = [(end, start, (start - end) // 4) for (_, end), (start, _) in zip(runs, runs[1:], strict=False)]
    between = [end + quarter + int(np.argmin(level[end + quarter : start - quarter])) for end, start, quarter in pauses]
    cuts = [hop * place for place in [first, *between, last]]
    outside = [(0, first), (last, len(level))]
    quiet = []
    for start, end in outside:
        # Neither clicks and breath (above the noise floor) nor a recorder that fades in (below it).
        near_floor = np.abs(level[start:end] - floor) < QUIET_DB
        calm = np.diff(np.concatenate([[0], near_floor.astype(np.int8), [0]]))
        spans = np.flatnonzero(calm).reshape(-1, 2)
        if len(spans):
            begin, stop = max(spans.tolist(), key=lambda span: span[1] - span[0])
            if stop - begin >= 0.15 / HOP_S:
                quiet.append((hop * (start + begin), hop * (start + stop)))
    return Words(cuts=cuts, quiet=quiet)


@dataclass(frozen=True)
class Recombined:
    """A new recording: float32 [N] at 16 kHz, its words, and where each comes from (``recording:position``)."""

    samples: np.ndarray
    words: list[str]
    sources: list[str]


class Recombiner:
    """A bank of words that makes new recordings."""

    def __init__(self) -> None:
        self._units: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
        self._quiet: list[np.ndarray] = []

    def add(self, name: str, samples: np.ndarray, texts: list[str], found: Words) -> None:
        """Take the words ``texts`` of one recording cut as ``found``."""
        for position, text in enumerate(texts):
            piece = samples[found.cuts[position] : found.cuts[position + 1]]
            self._units[text].append((f"{name}:{position}", piece))
        self._quiet += [samples[start:end] for start, end in found.quiet]

    @property
    def usable(self) -> bool:
        """Whether there are words and noise to make recordings of."""
        return bool(self._units and self._quiet)

    def generate(
        self, count: int, rng: np.random.Generator, min_words: int = 1, max_words: int = 10
    ) -> Iterator[Recombined]:
        """``count`` recordings of random words in random number; every piece of a word is used about equally often.

        A number of n words is drawn with a probability in proportion to 1 / n. Short recordings matter: which sound is
        which word is learnt from them at once, while long ones alone leave a loss that sums over all alignments on a
        plateau for thousands of steps.
        """
        vocabulary = sorted(self._units)
        lengths = np.arange(min_words, max_words + 1)
        shares = (1 / lengths) / (1 / lengths).sum()
        decks: dict[str, list[int]] = {word: [] for word in vocabulary}
        for _ in range(count):
            words = [vocabulary[i] for i in rng.integers(0, len(vocabulary), int(rng.choice(lengths, p=shares)))]
            pieces, sources = [self._silence(rng, 0.2, 1.0)], []
            for position, word in enumerate(words):
                if not decks[word]:
                    decks[word] = rng.permutation(len(self._units[word])).tolist()
                source, piece = self._units[word][decks[word].pop()]
                if position and rng.random() < 0.4:
                    pieces.append(self._silence(rng, 0.03, 0.35))
                pieces.append(piece)
                sources.append(source)
            pieces.append(self._silence(rng, 0.2, 1.0))
            yield Recombined(join(pieces), words, sources)

    def _silence(self, rng: np.random.Generator, min_s: float, max_s: float) -> np.ndarray:
        """A random stretch of a recording's noise floor, at most as long as that recording has."""
        source = self._quiet[rng.integers(len(self._quiet))]
        length = min(int(rng.uniform(min_s, max_s) * SAMPLE_RATE_HZ), len(source))
        start = int(rng.integers(0, len(source) - length + 1))
        return source[start : start + length]
