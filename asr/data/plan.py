"""Which cuts of an epoch form which batch: in array operations, since an epoch of a thousand hours has a million."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

from asr.data.augmentation import random_generator

if TYPE_CHECKING:  # it imports this module
    from asr.data.loader import DataConfig


class Plan(Sequence[list[int]]):
    """Batches as lists of numbers of utterances, none of them empty.

    Args:
        members: int64 [N], the numbers of all batches one after the other.
        ends: int64 [M], where each batch ends in them.
    """

    def __init__(self, members: np.ndarray, ends: np.ndarray) -> None:
        self.members, self.ends = members, ends
        self.starts = np.append(0, ends)[:-1]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Plan: ...
    def __getitem__(self, index: int | slice) -> list[int] | Plan:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.members[self.starts[index] : self.ends[index]].tolist()  # type: ignore[no-any-return]

    def take(self, numbers: np.ndarray) -> Plan:
        """The batches of these numbers, int64 [K], in their order."""
        starts, ends = self.starts[numbers], self.ends[numbers]
        taken = np.cumsum(ends - starts)
        place = np.arange(taken[-1] if len(taken) else 0)
        return Plan(self.members[place + np.repeat(ends - taken, ends - starts)], taken)


def plan_epoch(
    durations_s: Sequence[float] | np.ndarray,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    windows: np.ndarray | None = None,
) -> Plan:
    """Which cuts form which batch: a pure function of its arguments. Buckets of similar duration are shuffled and cut
    into batches, and the batches of all buckets are shuffled; with windows, those of one after those of the other.

    Not by lhotse's sampler, which takes a sixth of a millisecond a cut to do so: minutes at each start of an epoch of a
    thousand hours.

    Args:
        durations_s: duration of each cut.
        config: ``max_duration_s``, ``num_buckets``, ``shuffle``, ``sorted_epochs``.
        seed: seed of the experiment.
        epoch: number of the epoch.
        windows: int64, the window of each cut, see ``draw_windows``: no batch has cuts of two.

    Returns:
        The batches of the epoch; every cut is in one of them.
    """
    durations = np.asarray(durations_s, np.float64)
    rng = random_generator(seed, epoch, "", "batches")
    if windows is None:
        return _plan(durations, config, rng, epoch)
    members, ends, total = [], [], 0
    rising = np.argsort(windows, kind="stable")
    for numbers in np.split(rising, np.flatnonzero(np.diff(windows[rising])) + 1):
        plan = _plan(durations[numbers], config, rng, epoch)
        members.append(numbers[plan.members])
        ends.append(plan.ends + total)
        total += len(numbers)
    return Plan(np.concatenate(members), np.concatenate(ends))


def _plan(durations: np.ndarray, config: DataConfig, rng: np.random.Generator, epoch: int) -> Plan:
    order = rng.permutation(len(durations)) if config.shuffle else np.arange(len(durations))
    limits = _bucket_limits(durations, config.num_buckets)
    bucket = np.searchsorted(limits, durations[order])
    members, ends = [], [np.zeros(1, np.int64)]
    for number, longest_s in enumerate(limits):
        # as many as fit where each is as long as the bucket allows
        size = max(1, int(config.max_duration_s / longest_s + 1e-9)) if longest_s > 0 else 1
        members.append(order[bucket == number])
        count = len(members[-1])
        ends.append(ends[-1][-1] + np.minimum(np.arange(size, count + size, size), count))
    plan = Plan(np.concatenate(members), np.concatenate(ends[1:]))
    if config.shuffle:
        plan = plan.take(rng.permutation(len(plan)))
    if epoch < config.sorted_epochs:
        longest = np.maximum.reduceat(durations[plan.members], plan.starts)
        plan = plan.take(np.argsort(longest, kind="stable"))
    return plan


class Windows(NamedTuple):
    """Of an epoch: the window of each cut, int64 [N], numbered in the order in which they come, and the shards of each
    window."""

    of_cuts: np.ndarray
    shards: list[list[str]]


def draw_windows(
    shard_of_cuts: np.ndarray, shards: Sequence[str], config: DataConfig, *, seed: int, epoch: int
) -> Windows:
    """Which shards an epoch reads at the same time: a pure function of its arguments.

    Args:
        shard_of_cuts: int [N], numbers of shards.
        shards: their names.
        config: ``shar.window``, how many are in a window at most; all have about equally many. ``shuffle`` decides
            whether they come in random order.
        seed: seed of the experiment.
        epoch: number of the epoch.
    """
    count = -(-len(shards) // config.shar.window)
    places = np.arange(len(shards))
    if config.shuffle:
        places = random_generator(seed, epoch, "", "shards").permutation(len(shards))
    of_shards = places * count // len(shards)
    named = [[shards[number] for number in np.flatnonzero(of_shards == window).tolist()] for window in range(count)]
    return Windows(of_shards[shard_of_cuts], named)


def _bucket_limits(durations: np.ndarray, num_buckets: int) -> np.ndarray:
    """The longest duration of each bucket, rising; buckets have about equal total duration."""
    rising = np.sort(durations)
    total = np.cumsum(rising)
    ends = np.searchsorted(total, total[-1] * np.arange(1, num_buckets) / num_buckets)
    return np.unique(np.append(rising[ends], rising[-1]))


def split_by_lattice(plan: Plan, frames: np.ndarray, tokens: np.ndarray, max_cells: int) -> Plan:
    """Batches of at most so many lattice cells, in the same order; an utterance with more is a batch of its own.

    Args:
        plan: of numbers of utterances.
        frames: int64, T of each utterance, encoder frames.
        tokens: int64, U of each.
        max_cells: of B * max(T) * (max(U) + 1).
    """
    begins = np.zeros(len(plan.members), bool)
    longest, most, count = np.zeros((3, len(plan)), np.int64)  # of the part that each batch has reached
    sizes = plan.ends - plan.starts
    for place in range(sizes.max(initial=0)):  # the place-th utterance of all batches at once
        rows = np.flatnonzero(sizes > place)
        at = plan.starts[rows] + place
        number = plan.members[at]
        own_frames, own_tokens = frames[number], tokens[number] + 1
        grown, grown_tokens = np.maximum(longest[rows], own_frames), np.maximum(most[rows], own_tokens)
        full = (count[rows] > 0) & ((count[rows] + 1) * grown * grown_tokens > max_cells)
        begins[at] = full | (place == 0)
        longest[rows] = np.where(full, own_frames, grown)
        most[rows] = np.where(full, own_tokens, grown_tokens)
        count[rows] = np.where(full, 1, count[rows] + 1)
    return Plan(plan.members, np.append(np.flatnonzero(begins)[1:], len(plan.members)) if len(plan) else plan.ends)
