"""Batches for training and evaluation.

The main process plans an epoch: which cuts form which batch, from durations alone. Workers turn a list of cut numbers
into a Batch, and are pure functions of it: batch k of epoch e has the same bits whatever the number of workers, and
whether the batches before it were loaded or skipped. A resumed run therefore needs to remember the epoch and the
number of batches that it consumed, nothing else.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lhotse import CutSet, MonoCut
from torch.utils.data import DataLoader, Dataset

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.augmentation import (
    AugmentConfig,
    SpecAugmentConfig,
    check_recordings,
    spec_augment,
)
from asr.data.batch import Batch, collate
from asr.data.features import (
    Fbank,
    FeatureConfig,
    check_stored_features,
    features_of,
    load_stored_features,
    num_audio_frames,
    num_encoder_frames,
)
from asr.data.packed_cuts import ChosenCuts, ExpandedCuts, JoinedCuts, PackedCuts, cuts_of_epoch
from asr.data.plan import draw_windows, plan_epoch, split_by_lattice
from asr.data.shar import Ahead, SharConfig, Shards
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.data.utterances import Utterance, Utterances
from asr.errors import UserError

PREFETCH_PER_WORKER = 3


@dataclass
class DataConfig:
    """From cuts to batches.

    Args:
        features: the features and whether they are stored.
        augment: augmentation of the waveform of training cuts.
        spec_augment: warping and masking of the features of training cuts.
        shar: reading of shards.
        max_duration_s: audio seconds in a batch at most, counted as utterances times the longest they may be; one
            utterance that is longer forms a batch of its own.
        max_lattice_cells: of a training batch at most: utterances times encoder frames of the longest times tokens and
            one of the one with most; times the vocabulary, what a loss with all logits in memory holds. 0 is no limit.
        num_buckets: training batches hold utterances of one of this many classes of similar duration.
        sorted_epochs: in so many first epochs, batches come in order of rising duration (SortaGrad, Amodei et al. 2016,
            "Deep Speech 2"): from short utterances a model learns sooner which sound is which token. With shards, those
            of each window do.
        num_workers: processes that load batches; 0 loads them in the main process.
        shuffle: draw training batches in random order; otherwise take cuts in the order given.
        strict: stop at the first bad row instead of leaving it out.
        max_bad_fraction: stop when more than this fraction of rows is bad.
        more_cuts: manifests that train beside the own one, and how much of each an epoch holds, like
            {other/cuts_train.jsonl.gz: 0.2}: another fifth in each epoch; 2.0 is all of it twice.
    """

    features: FeatureConfig = field(default_factory=FeatureConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    shar: SharConfig = field(default_factory=SharConfig)
    max_duration_s: float = 120.0
    max_lattice_cells: int = 0
    num_buckets: int = 10
    sorted_epochs: int = 0
    num_workers: int = 2
    shuffle: bool = True
    strict: bool = False
    max_bad_fraction: float = 0.1
    more_cuts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_duration_s <= 0:
            raise ValueError(f"max_duration_s={self.max_duration_s}; it must be positive")
        if self.max_lattice_cells < 0:
            raise ValueError(f"max_lattice_cells={self.max_lattice_cells}; it must not be negative, 0 is no limit")
        if self.num_buckets < 1:
            raise ValueError(f"num_buckets={self.num_buckets}; at least 1 is needed")
        if self.sorted_epochs < 0:
            raise ValueError(f"sorted_epochs={self.sorted_epochs}; it must not be negative")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}; it must not be negative")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}; it must lie in [0, 1]")
        for path, share in self.more_cuts.items():
            if not 0 < share <= (1 if self.features.storage == "stored" else 100):
                most = "1 with stored features" if self.features.storage == "stored" else "100"
                raise ValueError(
                    f"more_cuts has {path}: {share}; how much of it an epoch holds is above 0, at most {most}"
                )
        # the parser makes the whole before its parts
        if isinstance(self.augment, AugmentConfig) and isinstance(self.features, FeatureConfig):
            changed = self.augment.changes_lengths
            if changed is not None and self.features.storage == "stored":
                raise ValueError(
                    f"augment.{changed} needs features.storage=on_the_fly: stored features are those of single cuts"
                )


class BatchLoader(Iterable[Batch]):
    """Batches in a fixed order. ``len`` is the number that an iteration gives; each iteration starts anew.

    The first ``own`` of them count; one more may stand in for a batch that is not there, see `train_loader`.

    Leaving an iteration early ends its workers, also by an exception or a signal handler that raises. ``ahead`` is told
    the number of each batch when it is asked for, in this process.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batches: Sequence[list[int]],
        num_workers: int,
        pin_memory: bool,
        own: int | None = None,
        ahead: Callable[[int], None] | None = None,
    ) -> None:
        self.batches = batches
        self.own = len(batches) if own is None else own
        self._dataset = dataset
        self._num_workers = min(num_workers, len(batches))
        self._pin_memory = pin_memory
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._num_workers == 0:
            return self._inline()
        return self._with_workers()

    def _inline(self) -> Iterator[Batch]:
        for indices in _Order(self.batches, self._ahead):
            batch = _unwrap(self._dataset[indices])
            yield batch.pin_memory() if self._pin_memory else batch

    def _with_workers(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_Order(self.batches, self._ahead),
            collate_fn=_identity,
            num_workers=self._num_workers,
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCH_PER_WORKER,
            pin_memory=self._pin_memory,
            # forked workers share the cuts of the parent; elsewhere they are pickled once per worker
            multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
        )
        iterator = iter(loader)
        try:
            while True:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    raise explain_dead_worker(error) from error
                yield _unwrap(item)
        finally:
            # the last reference: its destructor ends the workers now and not at some later collection
            del iterator


class BatchDataset(Dataset[Batch]):
    """Turns a list of numbers into a Batch: a pure function, run in workers.

    Args:
        utterances: all of the epoch.
        tokenizer: None leaves targets empty.
        config: features and augmentation.
        seed: seed of the experiment.
        epoch: the epoch, or None for evaluation, which augments nothing.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer | None,
        config: DataConfig,
        seed: int,
        epoch: int | None,
    ) -> None:
        self._utterances = utterances
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._epoch = epoch
        self._fbank = Fbank(config.features)
        self._shards = Shards(config.shar, whole=epoch is not None and config.features.storage == "shar")

    def __len__(self) -> int:
        return len(self._utterances)

    def __getitem__(self, indices: list[int]) -> Batch | _Failure:  # type: ignore[override]
        try:
            return self._load([self._utterances[index] for index in indices])
        except UserError as error:
            # an exception would arrive with the traceback of the worker in its message
            return _Failure(str(error))

    def _load(self, rows: list[Utterance]) -> Batch:
        texts = [self._text(row) for row in rows]
        targets = [self._encode(row, text) for row, text in zip(rows, texts, strict=True)]
        features = [self._features(row) for row in rows]
        batch = collate(features, targets, [row.id for row in rows], texts, [row.duration_s for row in rows])
        if self._epoch is not None and self._config.spec_augment.prob > 0:
            # on the padded copy: stored features are a read-only map
            for values, row in zip(batch.features.numpy(), rows, strict=True):
                spec_augment(
                    values,
                    self._config.spec_augment,
                    seed=self._seed,
                    epoch=self._epoch,
                    cut_id=row.id,
                    num_frames=num_audio_frames(row.num_samples),
                )
        return batch

    def _text(self, row: Utterance) -> str:
        texts = [transcript(cut) for cut in row.cuts]
        return texts[0] if len(texts) == 1 or self._tokenizer is None else self._tokenizer.join(texts)

    def _encode(self, row: Utterance, text: str) -> list[int]:
        if self._tokenizer is None:
            return []
        try:
            return self._tokenizer.encode(text)
        except UnknownToken as error:
            raise UserError(f"cut {row.id}: {error}") from error

    def _features(self, row: Utterance) -> np.ndarray:
        if row.cuts[0].features is not None:
            return load_stored_features(row.cuts[0])
        samples = row.load(self._shards)
        if self._epoch is None:
            return features_of(samples, row.id, self._fbank)
        return features_of(samples, row.id, self._fbank, self._config.augment, seed=self._seed, epoch=self._epoch)


def train_loader(
    cuts: CutSet | Sequence[MonoCut],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    skip_batches: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    size: int = 1,
) -> BatchLoader:
    """Augmented batches of one epoch, in random order, every cut once, or as ``JoinedCuts`` has it; some joined.

    Of several processes, each takes every size-th batch of the same order. Where they do not come out even, a process
    without a batch in the last round gets the first of that round to stand in, which must not count.

    Args:
        cuts: with stored features if ``config.features.storage`` is "stored" (then speeds and copies are among them
            already); with recordings otherwise (then speeds and copies are added here), which lie in shards if it is
            "shar". ``PackedCuts`` stay packed; whoever made them has called ``check_stored_features``.
        tokenizer: makes the targets.
        config: how.
        seed: seed of the experiment.
        epoch: number of the epoch; decides order and augmentation.
        skip_batches: leave out this many batches of the epoch, of all processes, without loading them; the others stay
            bit-identical, whatever the number of processes.
        pin_memory: page-locked memory, for copies to a CUDA device.
        rank, size: number of this process, and of all.

    Raises:
        UserError: there are no cuts; stored features are missing or were made with other settings; cuts lie in no
            shard; or there are no recordings for augmentation. While iterating: a cut or such a recording cannot be
            loaded, or a worker was killed.
    """
    plain = cuts if isinstance(cuts, PackedCuts | JoinedCuts) else list(cuts)
    if not plain:
        raise UserError("no cuts to train on")
    if skip_batches < 0:
        raise ValueError(f"skip_batches={skip_batches}; it must not be negative")
    stored = config.features.storage == "stored"
    if stored and plain is not cuts:
        check_stored_features(plain, config.features)
    of_epoch, chosen = _cuts_of_epoch(plain, config, seed, epoch)
    if not stored:
        check_recordings(config.augment, headers=False)  # before workers are forked, which then share the lists
    tokens = np.zeros(0, np.int64)
    if config.max_lattice_cells or config.augment.concat_prob > 0:
        counted = plain.tokens if isinstance(plain, PackedCuts | JoinedCuts) else None
        if counted is None:
            counted = np.array([len(tokenizer.encode(transcript(cut))) for cut in plain])
        tokens = counted[chosen % len(plain)].astype(np.int64)

    def fits(first: int, second: int, num_samples: int) -> bool:
        # a token a frame, as of cuts (check_cuts); one may come between them
        return bool(tokens[first] + tokens[second] + 1 <= num_encoder_frames(num_samples, config.features))

    windows = None
    if config.features.storage == "shar":
        of_plain, names = (plain if isinstance(plain, PackedCuts | JoinedCuts) else PackedCuts(plain)).shards()
        windows = draw_windows(of_plain[chosen % len(plain)], names, config, seed=seed, epoch=epoch)
    utterances = Utterances(
        of_epoch,
        None if stored else config.augment,
        seed=seed,
        epoch=epoch,
        order=None if config.shuffle else np.arange(len(of_epoch)),
        windows=None if windows is None else windows.of_cuts,
        max_s=min(config.augment.concat_max_s, config.max_duration_s),
        fits=fits,
    )
    of_utterances = None if windows is None else windows.of_cuts[utterances.members[:, 0]]
    batches = plan_epoch(utterances.durations_s, config, seed=seed, epoch=epoch, windows=of_utterances)
    if config.max_lattice_cells:
        samples = np.round(utterances.durations_s * SAMPLE_RATE_HZ).astype(np.int64)
        frames = num_encoder_frames(samples, config.features)
        batches = split_by_lattice(batches, frames, utterances.tokens(tokens), config.max_lattice_cells)
    dataset = BatchDataset(utterances, tokenizer, config, seed, epoch)
    left = batches[skip_batches:]
    own = left[rank::size]
    count = len(own)
    if count < -(-len(left) // size):
        own = left.take(np.append(np.arange(rank, len(left), size), (len(left) - 1) // size * size))
    ahead = None
    if windows is not None and of_utterances is not None:
        ahead = Ahead(of_utterances[own.members[own.starts]], windows.shards, config.shar)
    return BatchLoader(dataset, own, config.num_workers, pin_memory, count, ahead)


def _cuts_of_epoch(
    plain: Sequence[MonoCut], config: DataConfig, seed: int, epoch: int
) -> tuple[Sequence[MonoCut], np.ndarray]:
    """The cuts of an epoch at all speeds, and for each number a + k * len(plain) of the a-th of the plain cuts."""
    stored = config.features.storage == "stored"
    times = max(1, math.ceil(max(plain.shares))) if isinstance(plain, JoinedCuts) else 1
    expanded = plain if stored else ExpandedCuts(plain, config.augment, times)
    if not isinstance(plain, JoinedCuts):
        return expanded, np.arange(len(expanded))
    chosen = cuts_of_epoch(plain, len(expanded) // len(plain) // times, seed=seed, epoch=epoch)
    return ChosenCuts(expanded, chosen), chosen


def eval_loader(
    cuts: CutSet | Sequence[MonoCut],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    max_duration_s: float | None = None,
    num_workers: int | None = None,
    pin_memory: bool = False,
    rank: int = 0,
    size: int = 1,
) -> BatchLoader:
    """Batches without augmentation, longest utterances first, every cut exactly once.

    Of several processes, each takes every size-th batch of the same order; there may be none for the last.

    Args:
        cuts: stored features are used where a cut has them, others are computed from its audio (with the same result).
        tokenizer: makes the targets; None leaves them empty.
        config: how.
        max_duration_s: audio seconds in a batch; ``config.max_duration_s`` by default.
        num_workers: processes; ``config.num_workers`` by default.
        pin_memory: page-locked memory, for copies to a CUDA device.
        rank, size: number of this process, and of all.

    Raises:
        UserError: there are no cuts, or stored features were made with other settings; while iterating as for training.
    """
    cut_list = list(cuts)
    if not cut_list:
        raise UserError("no cuts to evaluate on")
    check_stored_features((cut for cut in cut_list if cut.features is not None), config.features)
    limit_s = config.max_duration_s if max_duration_s is None else max_duration_s
    if limit_s <= 0:
        raise ValueError(f"max_duration_s={limit_s}; it must be positive")
    order = sorted(range(len(cut_list)), key=lambda i: (-cut_list[i].duration, cut_list[i].id))
    batches: list[list[int]] = []
    for index in order:
        # the first cut of a batch is its longest
        if batches and (len(batches[-1]) + 1) * cut_list[batches[-1][0]].duration <= limit_s:
            batches[-1].append(index)
        else:
            batches.append([index])
    workers = config.num_workers if num_workers is None else num_workers
    dataset = BatchDataset(Utterances(cut_list), tokenizer, config, 0, None)
    return BatchLoader(dataset, batches[rank::size], workers, pin_memory)


def transcript(cut: MonoCut) -> str:
    """The text of a cut's supervision; empty if it has none."""
    return cut.supervisions[0].text or "" if cut.supervisions else ""


class _Order:
    """A sampler of torch's DataLoader: one batch is one item."""

    def __init__(self, batches: Sequence[list[int]], ahead: Callable[[int], None] | None) -> None:
        self._batches, self._ahead = batches, ahead

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self._batches):
            if self._ahead is not None:
                self._ahead(number)
            yield batch

    def __len__(self) -> int:
        return len(self._batches)


@dataclass
class _Failure:
    """What a worker returns when a batch cannot be loaded."""

    message: str


def _identity(item: Any) -> Any:
    return item


def _unwrap(item: Batch | _Failure) -> Batch:
    if isinstance(item, _Failure):
        raise UserError(item.message)
    return item


def explain_dead_worker(error: Exception) -> Exception:
    """A UserError of one line if torch reports a killed worker or cannot reach one; otherwise the error itself.

    torch raises it from a signal handler, so it may meet the main process anywhere; iterations translate it where it
    meets them, and the code around a training loop can do the same.
    """
    message = str(error)
    # a batch lies in memory that its worker hands over on request: a connection that breaks is a worker that died
    unreachable = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if not unreachable and ("DataLoader worker" not in message or "Traceback" in message):
        return error
    if "Bus error" in message or "shared memory" in message:
        return UserError(
            "a worker of the data loader ran out of shared memory (/dev/shm); enlarge it, lower data.max_duration_s, "
            "or set data.num_workers=0"
        )
    return UserError(
        f"a worker of the data loader was killed, perhaps for lack of memory; lower data.num_workers or "
        f"data.max_duration_s ({message.splitlines()[0] if message else type(error).__name__})"
    )


def _start_worker(worker_id: int) -> None:
    """Signals for the whole process group are the main process's business: it saves and then ends its workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        # torch's own handler would let the worker die, and the main process with an error instead of a checkpoint
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # not os.getppid(): a parent that was killed before this line has handed its children on already
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End the worker when its parent asks for it or is gone, even while the worker's main thread hangs in a read."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
