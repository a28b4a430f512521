"""Batches that are computed in pieces, since memory does not hold them whole."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from asr.atomic import write_whole
from asr.data.batch import Batch
from asr.training.memory import return_freed_memory
from losses.memory import MemoryLimitError

# what torch's allocator on CPU says, and oneDNN
NOT_COMPILED = "could not create a primitive"
WITHOUT_MEMORY = ("can't allocate memory", "could not create a memory object", NOT_COMPILED)
STAND_IN_FRAMES = 64
LOWERED = 0.8  # of the piece that did not fit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, on any device, or not within the loss's own limit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | MemoryLimitError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in WITHOUT_MEMORY)


def free_memory() -> None:
    """Give back what an abandoned step has left."""
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def split(batch: Batch, pieces: int) -> list[Batch]:
    """At most so many pieces of about equally many utterances, each padded to its own longest; longest first."""
    if pieces <= 1 or batch.size <= 1:
        return [batch]
    order = torch.argsort(batch.feature_lens, descending=True, stable=True)
    return [_rows(batch, rows) for rows in order.chunk(min(pieces, batch.size))]


def _rows(batch: Batch, rows: torch.Tensor) -> Batch:
    frames, tokens = int(batch.feature_lens[rows].max()), int(batch.target_lens[rows].max())
    numbers = rows.tolist()
    return Batch(
        features=batch.features[rows, :frames],
        feature_lens=batch.feature_lens[rows],
        targets=batch.targets[rows, :tokens],
        target_lens=batch.target_lens[rows],
        cut_ids=[batch.cut_ids[i] for i in numbers],
        texts=[batch.texts[i] for i in numbers],
        durations_s=[batch.durations_s[i] for i in numbers],
    )


def stand_in(batch: Batch) -> Batch:
    """An utterance of silence, as long as the beginning of one of the batch and without text: next to nothing, for a
    process without a piece. Nothing that may be wrong with the batch is in it: 0 times its loss must be 0."""
    first = _rows(batch, torch.zeros(1, dtype=torch.int64))
    return replace(
        first,
        features=torch.zeros_like(first.features[:, :STAND_IN_FRAMES]),
        feature_lens=first.feature_lens.clamp(max=STAND_IN_FRAMES),
        targets=first.targets[:, :0],
        target_lens=torch.zeros_like(first.target_lens),
    )


def padded_frames(size: int, frames: int) -> float:
    """The measure of a batch as long as nothing is known of memory."""
    return float(size * frames)


class Pieces:
    """In how many pieces each batch is computed.

    Args:
        folder: where each process notes which batches did not fit, so that the run goes on from there after it had to
            start again; read at the beginning, unless it was with other settings: they are how one makes things fit.
        lower_after: after so many steps without memory the limit falls.
        cost: of a batch of so many utterances, padded to so many frames.
        limit: most that a piece may cost.
        suffix: of this process's note.
        settings: all that memory depends on.
    """

    def __init__(
        self,
        folder: Path,
        lower_after: int,
        cost: Callable[[int, int], float] = padded_frames,
        limit: float = math.inf,
        suffix: str = "",
        settings: str = "",
    ):
        self._settings = settings
        self._path, self._lower_after, self._cost, self.limit = (
            folder / f"pieces{suffix}.json",
            lower_after,
            cost,
            limit,
        )
        self.events = 0
        self._known: dict[str, int] = {}
        for path in sorted(folder.glob("pieces*.json")):
            note = json.loads(path.read_text(encoding="utf-8"))
            if note.get("settings") != settings:
                continue
            self.events = max(self.events, note["events"])
            if note["limit"] is not None and note["cost"] == cost.__name__:
                self.limit = min(self.limit, note["limit"])
            self._known.update(note["known"])

    def of(self, batch: Batch) -> int:
        """Pieces of this batch; 0 of an utterance that does not fit alone, and must be left out."""
        if (known := self._known.get(_key(batch))) is not None:
            return known
        if self.limit == math.inf:
            return 1
        frames = batch.features.shape[1]
        fitting = (n for n in range(1, batch.size) if self._cost(-(-batch.size // n), frames) <= self.limit)
        return next(fitting, batch.size)

    def ran_out(self, batch: Batch, part: Batch, pieces: int) -> str:
        """Notes that memory did not hold a part of the batch, one of so many pieces; what is done about it."""
        self.events += 1
        if part.size > 1:
            more = self._known[_key(batch)] = min(2 * pieces, batch.size)
            said = f"tried again in {more} pieces"
        else:
            self._known[_key(batch)] = max(pieces, 1)
            self._known[_key(part)] = 0
            said = f"tried again without {part.cut_ids[0]}, which does not fit alone"
        if self.events % self._lower_after == 0:
            frames = part.features.shape[1]
            self.limit = min(self.limit, LOWERED * self._cost(part.size, frames))
            said += (
                f"; from now on no piece is larger than {LOWERED:g} of this one of {part.size} utterances of"
                f" {frames / 100:.1f} s"
            )
        note = {
            "events": self.events,
            "limit": None if self.limit == math.inf else self.limit,
            "cost": self._cost.__name__,
            "known": self._known,
            "settings": self._settings,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # whole also after a power cut: no run could begin with half of it
        write_whole(self._path, lambda file: file.write(json.dumps(note).encode()))
        return said


def _key(batch: Batch) -> str:
    return hashlib.blake2b("\n".join(sorted(batch.cut_ids)).encode(), digest_size=8).hexdigest()
