"""Finds the process of a run that hangs while the others wait for it, names it with its stack, and ends all.

A process that waits has entered a collective operation which the hung one has not: when none has made progress for too
long, the one that has entered the fewest is hung. Each process counts its own in a thread and posts the number in the
store where the processes have met, which the threads of all of them read. A number that rises is progress: steps,
validation and shared tensors need no marks of their own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from asr.training.ranks import Ranks
from asr.training.trainer_config import ParallelConfig

STACK_WAIT_S = 3.0  # for the stack of a hung process to be written
END_WAIT_S = 10.0  # for the process that found it to speak before the others end
PATIENCE = 0.9  # of the time after which collective operations give up


@dataclass(frozen=True)
class State:
    """What a process tells of itself: it is not watched while ``limit_s`` is 0."""

    beat: int
    collectives: int
    limit_s: float
    where: str


@dataclass
class Seen:
    """When a state last changed, by the clock of the process that reads it."""

    progress: float
    beat: float


def collectives() -> int:
    """How many collective operations this process has entered, in all groups of processes."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(
        group._get_backend(device)._get_sequence_number_for_group()
        for group in groups
        for device in group._device_types
    )


def find_hung(states: list[State], seen: list[Seen], now: float, hang_s: float) -> list[int]:
    """Ranks that hang; empty while someone may still make progress.

    Processes that are silent (stopped, or in a call that lets no other thread run) hang for sure, whatever they were
    at; else those that have entered the fewest collective operations do.
    """
    watched = [rank for rank, state in enumerate(states) if state.limit_s]
    silent = [rank for rank in watched if now - seen[rank].beat >= hang_s / 2]
    limits = {rank: hang_s if rank in silent else states[rank].limit_s for rank in watched}
    # of any: one that has waited for long enters nothing either until the others let it go on
    progress = max((seen[rank].progress for rank in watched), default=now)
    stalled = [rank for rank in watched if now - progress >= limits[rank]]
    fewest = min((states[rank].collectives for rank in watched), default=0)
    return [r for r in stalled if r in silent] or [r for r in stalled if states[r].collectives == fewest]


class Watchdog:
    """Watches the processes of a run between `start` and `stop`; alone, or with hang_timeout_s=0, it does nothing.

    Args:
        ranks: the processes.
        config: of the limits.
        folder: receives rank-N.txt with the stacks of all threads of a hung process.
    """

    def __init__(self, ranks: Ranks, config: ParallelConfig, folder: Path):
        self.ranks, self.config, self.folder = ranks, config, folder
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._limit_s = config.hang_timeout_s
        self._beat_s = min(1.0, config.hang_timeout_s / 10)
        self._where = f"{socket.gethostname()}, process {os.getpid()}"
        if ranks.store is not None:  # reads wait until there is something to read
            self._post(ranks.store, State(0, 0, 0.0, self._where))

    def start(self) -> None:
        """Begins to watch."""
        if self.ranks.store is None or not self.config.hang_timeout_s:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stop.clear()
        # a connection of its own: that of the main thread may be taken by an operation that waits
        own = self.ranks.store.clone()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._watch, args=(own,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch on this process; the others go on without it."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(END_WAIT_S)
        self._thread = None
        with suppress(OSError):  # there are stacks in it, or files of the others
            self.folder.rmdir()

    @contextmanager
    def patience(self) -> Iterator[None]:
        """For work of unknown length in which this process enters no collective operation, such as writing files."""
        self._limit_s = max(self.config.hang_timeout_s, PATIENCE * self.config.timeout_s)
        try:
            yield
        finally:
            self._limit_s = self.config.hang_timeout_s

    def _post(self, store: dist.Store, state: State) -> None:
        store.set(f"hang {self.ranks.rank}", json.dumps(asdict(state)))

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self, store: dist.Store) -> None:
        hidden = self._stack_file(self.ranks.rank)
        try:
            with open(hidden, "w", encoding="utf-8") as file:
                self._beats(store, file.fileno())
        except RuntimeError:  # the store is gone, with the run
            pass
        finally:
            faulthandler.cancel_dump_traceback_later()
            hidden.unlink(missing_ok=True)

    def _beats(self, store: dist.Store, stack: int) -> None:
        keys = [f"hang {rank}" for rank in range(self.ranks.size)]
        old: list[State] = []
        seen: list[Seen] = []
        beat, looked, progress, count = 0, time.monotonic(), time.monotonic(), -1
        while not self._stop.is_set():
            beat, now, entered, limit_s = beat + 1, time.monotonic(), collectives(), self._limit_s
            if entered != count:
                progress, count = now, entered
            # by a thread that needs no interpreter: this one cannot run while the main thread is in some foreign calls
            faulthandler.dump_traceback_later(max(limit_s - (now - progress), 2 * self._beat_s), file=stack)
            self._post(store, State(beat, count, limit_s, self._where))
            states = [State(**json.loads(text)) for text in store.multi_get(keys)]
            now = time.monotonic()
            if not old or now - looked > self.config.hang_timeout_s / 2:  # stopped itself, it knows nothing of others
                seen = [Seen(now, now) for _ in states]
            for state, before, when in zip(states, old, seen, strict=False):
                if (state.collectives, state.limit_s) != (before.collectives, before.limit_s):
                    when.progress = now
                if state.beat != before.beat:
                    when.beat = now
            old, looked = states, now
            self._judge(store, states, find_hung(states, seen, now, self.config.hang_timeout_s), stack)
            self._stop.wait(self._beat_s)
        self._post(store, State(beat + 1, count, 0.0, self._where))

    def _judge(self, store: dist.Store, states: list[State], hung: list[int], stack: int) -> None:
        """Ends this process if one hangs; the first that finds it speaks for all."""
        mine = json.dumps([self.ranks.rank, hung])
        if hung:
            verdict = store.compare_set("hung", "", mine).decode()
        elif store.check(["hung"]):
            verdict = store.get("hung").decode()
        else:
            return
        try:
            speaker, ranks = json.loads(verdict)
            if self.ranks.rank in ranks:
                faulthandler.dump_traceback(file=stack)
            if self.ranks.rank == speaker:
                for rank in ranks:
                    self._say(rank, states[rank])
                store.set("hung, said", "")
            else:
                deadline = time.monotonic() + END_WAIT_S
                while not store.check(["hung, said"]) and time.monotonic() < deadline:
                    time.sleep(0.05)
        finally:
            os._exit(1)  # the main thread may be where no exception reaches it

    def _say(self, rank: int, state: State) -> None:
        text = (
            f"error: rank {rank} of {self.ranks.size} ({state.where}) hangs while the others wait "
            f"(parallel.hang_timeout_s={self.config.hang_timeout_s:g}); "
        )
        hidden, deadline = self._stack_file(rank), time.monotonic() + STACK_WAIT_S
        while not (hidden.exists() and hidden.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        if hidden.exists() and hidden.stat().st_size:
            time.sleep(0.1)  # to its last line
            path = hidden.replace(self.folder / f"rank-{rank}.txt")
            text += f"it is in {innermost(path.read_text(encoding='utf-8'))}; all its stacks: {path}"
        else:
            text += "it does not run at all (stopped, or its machine is out of reach), so there is no stack of it"
        os.write(2, f"{text}\n".encode())  # the main thread may hold the lock of sys.stderr

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f".rank-{rank}"


def innermost(stacks: str, count: int = 3) -> str:
    """The last calls of the main thread, which faulthandler writes as the last of all threads."""
    main = stacks.rpartition("(most recent call first)")[2]
    calls = re.findall(r'File "(.*)", line (\d+) in (.*)', main)[:count]
    return " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in calls)
