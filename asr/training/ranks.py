"""The processes of one run, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import gc
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asr.errors import UserError

LONG_S = 24 * 3600.0
"""How long processes wait for each other where each may have hours of work; torchrun ends all when one is lost."""
SAVED = "saved"
"""What processes note, once there is a checkpoint, for those that may have to go on in their place."""
NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run; one alone without torchrun. ``store`` holds what several tell each other."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.rank == 0

    def rows(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each process, as many on all, in float64; all of them must call it."""
        if self.size == 1:
            return [list(values)]
        rows = list(torch.empty(self.size, len(values), dtype=torch.float64))
        dist.all_gather(rows, torch.tensor(values, dtype=torch.float64))
        return [row.tolist() for row in rows]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; all of them must call it."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(x) for x in total]

    def any(self, value: bool) -> bool:
        """Whether it is true on one of the processes; all of them must call it."""
        return self.sum([float(value)])[0] > 0

    def gather(self, values: list[Any]) -> list[Any]:
        """Those of all processes, by rank, on the first; nothing on the others. Pickled; all of them must call it."""
        if self.size == 1:
            return values
        parts: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(values, parts, dst=0)
        return [value for part in parts or [] for value in part]

    def wait(self) -> None:
        """Wait for all processes."""
        self.any(False)  # something has to be sent: a sum of nothing waits for no one

    def note(self, name: str) -> None:
        """Tells the processes that torchrun may start in the place of these; one alone has none."""
        if self.store is not None:
            for store in (self.store, self.store.underlying_store):  # type: ignore[attr-defined]
                store.set(name, "")

    def noted_before(self, name: str) -> bool:
        """Whether processes noted it in whose place these were started."""
        if self.store is None or self.store.check([name]):
            return False
        return bool(self.store.underlying_store.check([name]))  # type: ignore[attr-defined]

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What the function returns on the first process, which alone calls it, or the error that it raises there.

        All processes must call this, and wait for the first. The result is pickled.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except BaseException as error:  # the others wait: they must hear of it, whatever it is
                outcome[1] = error
        failed = outcome[1]
        try:
            dist.broadcast_object_list(outcome, src=0)
        except Exception:
            if failed is not None:
                raise failed from None
            raise
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _variables() -> dict[str, str]:
    """What torchrun has set."""
    values = {
        "RANK": os.environ.get("RANK"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
        "MASTER_PORT": os.environ.get("MASTER_PORT"),
    }
    return {name: value for name, value in values.items() if value is not None}


def place(environment: Mapping[str, str] | None = None) -> Ranks:
    """Where torchrun has put this process; alone if it was started without.

    Raises:
        UserError: variables of torchrun are there in part, or are no such numbers.
    """
    found = _variables() if environment is None else environment
    if "WORLD_SIZE" not in found and "RANK" not in found:
        return Ranks()
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise UserError(
            f"{', '.join(missing)} are not set, though WORLD_SIZE or RANK is; start several processes with torchrun"
        )
    try:
        ranks = Ranks(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"]))
        port = int(found["MASTER_PORT"])
    except ValueError:
        numbers = ", ".join(f"{name}={found[name]}" for name in NEEDED)
        raise UserError(f"{numbers}: all but MASTER_ADDR must be whole numbers, as torchrun sets them") from None
    if not (0 <= ranks.rank < ranks.size and ranks.local_rank >= 0):
        raise UserError(f"RANK={ranks.rank} is not below WORLD_SIZE={ranks.size}; start with torchrun")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port; start with torchrun --standalone, or with a --master-port")
    return ranks


def rank_device(device: str, ranks: Ranks) -> str:
    """The device of this process: "cuda" of several processes is the one of their local number."""
    if device != "cuda" or ranks.size == 1:
        return device
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"


@contextmanager
def one_speaks(ranks: Ranks) -> Iterator[None]:
    """Of errors in several processes only the first passes: others are the same, or follow from its end."""
    try:
        yield
    except Exception as error:
        if ranks.store is None:
            raise
        # the exit code tells torchrun's agent whether another try may help: of errors as in asr.cli.guard it does not
        code = getattr(error, "exit_code", 2) if isinstance(error, (ValueError, OSError)) else 1
        rank, code_of_first = ranks.store.compare_set("failed", "", f"{ranks.rank} {code}").decode().split()
        if int(rank) == ranks.rank:
            raise
        # this process may be seen to end before the first, so it says what the first says
        raise SystemExit(int(code_of_first)) from None


def _meet(store: dist.Store, ranks: Ranks, timeout_s: float) -> dist.Store:
    """The part of a store that only the processes alive now know of, once all of them are there.

    torchrun starts all processes anew after the loss of one, in the store that the lost ones used, where what they
    left would lead the new ones astray. Its count of restarts cannot tell them apart: each machine counts those that
    its own processes caused. So the first process names the meeting, each other writes its own name there, and who
    is greeted by it is in the meeting of the living.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if ranks.first:
        store.set("meeting", own)
        names = [store.get(f"{own}/{rank}").decode() for rank in range(1, ranks.size)]
        store.set(f"{own}/greeted", " ".join(names))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        meeting = store.get("meeting").decode()
        store.set(f"{meeting}/{ranks.rank}", own)
        if store.check([f"{meeting}/greeted"]) and own in store.get(f"{meeting}/greeted").decode():
            return dist.PrefixStore(meeting, store)
        time.sleep(0.02)
    raise RuntimeError(f"the first of {ranks.size} processes was not met within {timeout_s:g} s")


@contextmanager
def started(device: str, timeout_s: float) -> Iterator[Ranks]:
    """The processes of the run, able to talk to each other within."""
    ranks = place()
    if ranks.size == 1:
        yield ranks
        return
    # Imported later, its functions would keep the group as the default of an argument, beyond the end: the interpreter
    # would shut down with gloo's threads alive, which now and then aborts the process after all of its work.
    importlib.import_module("torch.distributed.nn.functional")
    timeout = timedelta(seconds=timeout_s)
    # the agent of torchrun may keep the store, else the first process does
    serves = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks.size, serves, timeout=timeout
    )
    own = _meet(store, ranks, timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=own,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timeout,
    )
    try:
        yield replace(ranks, store=own)
    finally:
        dist.destroy_process_group()
        gc.collect()  # a model that has its gradients summed is in a cycle, and has the group too
