"""Batches that break a step, and signals that end a run."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from asr.checkpoint import atomic_save
from asr.data.batch import Batch
from asr.errors import UserError


class TooManyBadBatches(UserError):
    """More batches had a non-finite loss or gradient than the configuration allows."""


class BadBatches:
    """Counts, names and dumps batches that were skipped, and stops the run after too many.

    Of several processes each dumps its own; all count those of all, so that all stop.

    Args:
        folder: where dumps go, one file a batch, loadable with ``torch.load(..., weights_only=True)``.
        allowed: how many may be skipped.
        count: how many were skipped before (a resumed run).
        record: called with kind="bad_batch" fields, for the metrics file.
        say: prints a line.
        suffix: of the names of dumps, this process's own.
    """

    def __init__(
        self,
        folder: Path,
        allowed: int,
        count: int,
        record: Callable[..., None],
        say: Callable[[str], None],
        suffix: str = "",
    ):
        self.folder = folder
        self._dumped, self._suffix = count, suffix
        self.allowed = allowed
        self.count = count
        self._record = record
        self._say = say

    def skip(self, batch: Batch, step: int, reason: str) -> None:
        """Names and dumps one batch. `skipped` counts it."""
        self._dumped += 1
        path = self.folder / f"step-{step:08d}-{self._dumped}{self._suffix}.pt"
        fields: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        try:
            atomic_save({"reason": reason, "step": step, **fields}, path)
            dumped = f"dumped to {path}"
        except OSError as error:  # a full disk, say, must not end the run where the batch does not
            dumped = f"not dumped to {path} ({error.strerror or error})"
        self._record(step=step, reason=reason, cut_ids=batch.cut_ids, dump=str(path))
        ids = ", ".join(batch.cut_ids)
        self._say(f"warning: step {step}: {reason}; batch skipped, {dumped}, utterances: {ids}")

    def skipped(self, count: int) -> None:
        """Counts batches of all processes.

        Raises:
            TooManyBadBatches: these were too many.
        """
        self.count += count
        if self.count > self.allowed:
            raise TooManyBadBatches(
                f"{self.count} batches had a non-finite loss or gradient, or did not fit in memory, and"
                f" training.max_bad_batches={self.allowed} allows no more; look at the utterances dumped in"
                f" {self.folder}, or lower optim.lr or optim.clip_grad_norm, then go on with --resume auto"
            )


class Termination:
    """Turns SIGTERM and Ctrl-C into a flag that the training loop reads between steps, where the state can be saved.

    A second Ctrl-C interrupts at once. The old handlers come back at exit.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False  # by Ctrl-C
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        self.requested = True

    def __enter__(self) -> Termination:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: someone else owns the signals
            self._old = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
