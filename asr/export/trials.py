"""What verification lets a runtime hear, and what the model itself hears of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr.checkpoint import Loaded
from asr.data.audio import SAMPLE_RATE_HZ
from asr.export.eager import Heard, hear_streams, hear_whole, pad_for_devices
from asr.models.context import Milliseconds

PIECES = 24
STREAMS = 12
RESETS = 6
"""Utterances of the trials that are not made with all of them."""


@dataclass(frozen=True)
class Trial:
    """``streams``: of each, the parts that it hears, each the number of a waveform and the sizes of its pieces; stream
    n starts n * ``stagger`` rounds late, or with None when the one before it has ended."""

    streams: list[list[tuple[int, list[int]]]]
    stagger: int | None = None

    def as_job(self) -> dict[str, Any]:
        """For a child process."""
        return {"streams": self.streams, "stagger": self.stagger}


@dataclass(frozen=True)
class Trials:
    """Waveforms, padded as devices must be given them; what they are; trials by name; how many of them, the first ones,
    are recordings.

    "alone" has one stream for each recording, and is the one that is timed and scored.
    """

    waveforms: list[np.ndarray]
    names: list[str]
    trials: dict[str, Trial]
    recordings: int


def make_trials(samples: Sequence[np.ndarray], names: Sequence[str], chunk_ms: Milliseconds, seed: int = 0) -> Trials:
    """Trials with recordings, float32 [N] at 16 kHz.

    Beside each alone: odd pieces, several streams that start one after another, two recordings in one stream with an
    endpoint between, silence, one sample, and nothing at all. Whole utterances come alone and in batches.
    """
    quiet = [np.zeros(3 * SAMPLE_RATE_HZ, np.float32), np.full(1, 0.1, np.float32), np.zeros(0, np.float32)]
    waveforms = [pad_for_devices(one, chunk_ms) for one in [*samples, *quiet]]
    count = len(samples)
    random_ = random.Random(seed)
    some = random_.sample(range(count), count)
    trials = {
        "alone": Trial([[(number, [])] for number in range(count)]),
        "silence": Trial([[(count + number, [])] for number in range(len(quiet))]),
    }
    if chunk_ms == "full":
        trials["batch"] = Trial([[(number, [])] for number in some[:STREAMS]], stagger=0)
    else:
        together = [[(number, _pieces(len(waveforms[number]), random_, 4000))] for number in some[:STREAMS]]
        pairs = zip(some[:RESETS], some[1 : RESETS + 1], strict=False)
        trials["pieces"] = Trial([[(number, _pieces(len(waveforms[number]), random_))] for number in some[:PIECES]])
        trials["streams"] = Trial(together, stagger=1)
        trials["after an endpoint"] = Trial([[(a, []), (b, [])] for a, b in pairs], stagger=0)
    return Trials(waveforms, [*names, "3 s of silence", "one sample", "nothing"], trials, count)


def _pieces(length: int, random_: random.Random, longest: int = 8000) -> list[int]:
    """Sizes from one sample to half a second, each magnitude as likely."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(int(longest ** random_.random()))
    return sizes


class Expected:
    """What the model hears in the trials, each stream of parts once."""

    def __init__(self, loaded: Loaded, trials: Trials, chunk_ms: Milliseconds, left_context_ms: Milliseconds):
        every = (tuple(number for number, _ in parts) for trial in trials.trials.values() for parts in trial.streams)
        keys = list(dict.fromkeys(every))
        parts = [[trials.waveforms[number] for number in key] for key in keys]
        if chunk_ms == "full":
            heard = [[hear_whole(loaded, one[0])] for one in parts]
        else:
            heard = hear_streams(loaded, parts, chunk_ms, left_context_ms)
        self._heard = dict(zip(keys, heard, strict=True))

    def of(self, numbers: Sequence[int]) -> list[Heard]:
        """One result a waveform, of those that one stream hears one after another."""
        return self._heard[tuple(numbers)]
