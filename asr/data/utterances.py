"""What an epoch holds: cuts, where asked for with silence around them, or two of them as one utterance.

All is drawn for the epoch at once, so that batches are planned by the lengths that utterances really have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from lhotse import MonoCut

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.augmentation import AugmentConfig, random_generator
from asr.data.features import load_samples
from asr.data.packed_cuts import durations_of
from asr.data.shar import Shards


@dataclass(frozen=True)
class Utterance:
    """A row of a batch.

    Args:
        cuts: one, or several that follow each other.
        silence: samples of digital silence before and behind each.
    """

    cuts: tuple[MonoCut, ...]
    silence: tuple[tuple[int, int], ...]

    @property
    def id(self) -> str:
        """The id of the cut; of several, joined with a plus sign."""
        return "+".join(cut.id for cut in self.cuts)

    @property
    def duration_s(self) -> float:
        """Seconds of the cuts, without silence."""
        return float(sum(cut.duration for cut in self.cuts))

    @property
    def num_samples(self) -> int:
        """At 16 kHz, silence included."""
        return sum(cut.num_samples for cut in self.cuts) + sum(map(sum, self.silence))

    def load(self, shards: Shards | None = None) -> np.ndarray:
        """Audio, float32 [num_samples] at 16 kHz. Arguments and errors as of ``load_samples``."""
        parts = [np.pad(load_samples(cut, shards), around) for cut, around in zip(self.cuts, self.silence, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Utterances(Sequence[Utterance]):
    """The utterances of an epoch, each made when it is asked for.

    Args:
        cuts: of the epoch, at all speeds.
        config: silence and joining; None for neither.
        seed, epoch: decide, with the numbers of the cuts, what is drawn.
        order: in which neighbours are joined, numbers of cuts; a random one by default.
        max_s: no joined utterance is longer, silence included.
        fits: whether two cuts of these numbers may be one utterance of so many samples.
        windows: int [N], the window of each cut: only cuts of the same one are joined.

    ``durations_s`` is float64 [M], silence included; ``members`` int64 [M, 2] has the numbers of the cuts, -1 for none.
    """

    def __init__(
        self,
        cuts: Sequence[MonoCut],
        config: AugmentConfig | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        order: np.ndarray | None = None,
        max_s: float = 0.0,
        fits: Callable[[int, int, int], bool] = lambda first, second, num_samples: True,
        windows: np.ndarray | None = None,
    ) -> None:
        self._cuts = cuts
        durations_s = durations_of(cuts)
        count = len(durations_s)
        self._silence: np.ndarray | None = None
        if config is not None and (config.pad_front_ms or config.pad_behind_ms):
            rng = random_generator(seed, epoch, "", "silence")
            ranges_ms = [limits or [0.0, 0.0] for limits in (config.pad_front_ms, config.pad_behind_ms)]
            low, high = np.array(ranges_ms).T * (SAMPLE_RATE_HZ / 1000)
            self._silence = np.round(rng.uniform(low, high, (count, 2))).astype(np.int64)
            durations_s = durations_s + self._silence.sum(axis=1) / SAMPLE_RATE_HZ
        self.members = np.stack([np.arange(count), np.full(count, -1)], axis=1)
        if config is not None and config.concat_prob > 0:
            rng = random_generator(seed, epoch, "", "concat")
            order = rng.permutation(count) if order is None else order
            wanted = rng.random(count) < config.concat_prob
            if windows is not None:  # neighbours are of one window, but for the last of each
                order = order[np.argsort(windows[order], kind="stable")]
                wanted[np.flatnonzero(np.diff(windows[order]))] = False
            self.members = _join(order, wanted, np.round(durations_s * SAMPLE_RATE_HZ), max_s, fits)
        first, second = self.members.T
        self.durations_s = durations_s[first] + np.where(second < 0, 0.0, durations_s[second])

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | Sequence[Utterance]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        numbers = [number for number in self.members[index].tolist() if number >= 0]
        silence = [(0, 0)] * len(numbers)
        if self._silence is not None:
            silence = [(front, behind) for front, behind in self._silence[numbers].tolist()]
        return Utterance(tuple(self._cuts[number] for number in numbers), tuple(silence))

    def tokens(self, counts: np.ndarray) -> np.ndarray:
        """Tokens of each utterance, int64, from those of each cut: at most one more comes between two."""
        first, second = self.members.T
        return counts[first] + np.where(second >= 0, counts[second] + 1, 0)


def _join(
    order: np.ndarray, wanted: np.ndarray, samples: np.ndarray, max_s: float, fits: Callable[[int, int, int], bool]
) -> np.ndarray:
    """Neighbours in the order, where wanted and possible; int64 [M, 2], each number in one row."""
    rows: list[tuple[int, int]] = []
    numbers, at = order.tolist(), 0
    lengths = samples.astype(np.int64).tolist()
    while at < len(numbers):
        first, second = numbers[at], numbers[at + 1] if at + 1 < len(numbers) else -1
        joined = False
        if second >= 0 and wanted[at]:
            total = lengths[first] + lengths[second]
            joined = total <= max_s * SAMPLE_RATE_HZ and fits(first, second, total)
        rows.append((first, second if joined else -1))
        at += 1 + joined
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
