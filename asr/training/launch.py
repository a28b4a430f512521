"""Several processes of one command, started with torchrun; run as a module, it is torchrun with a shorter report."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asr.errors import Terminated, UserError

REFUSED = 2  # exit code of what the user can mend: the next try would end with the same
GRACE_S = 120.0  # for the processes to save when the run is told to stop


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, which of them this is, and HOST:PORT at which the first is found."""

    count: int = 1
    rank: int = 0
    master: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--nodes {self.count} is too few; pass at least 1")
        if self.count == 1 and (self.rank or self.master):
            raise UserError("--node-rank and --master are of several machines; pass --nodes too, or leave them out")
        if not 0 <= self.rank < self.count:
            raise UserError(f"--node-rank {self.rank} is outside 0 to {self.count - 1}, of --nodes {self.count}")
        port = self.master.rpartition(":")[2]
        if self.count > 1 and not (self.place[0] and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(
                f"--nodes {self.count} needs --master HOST:PORT, the first machine as the others reach it and a free "
                f"port there, such as 10.0.0.1:29500{f'; it is {self.master}' if self.master else ''}"
            )

    @property
    def place(self) -> tuple[str, int]:
        """Host and port of the first."""
        host, _, port = self.master.rpartition(":")
        return host, int(port) if port.isdecimal() else 0

    def words(self) -> list[str]:
        """What torchrun is told of them."""
        if self.count == 1:
            return ["--standalone"]
        # unlike the static backend, this one lets all start anew together when one machine has lost a process
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.master}", "--rdzv-id=train"]
        return [f"--nnodes={self.count}", *rendezvous, f"--rdzv-conf=is_host={int(self.rank == 0)}"]


def check_processes(processes: int, device: str) -> None:
    """Refuse a number of processes that a machine, or a device that ``resolve_device`` gave, has no place for.

    Raises:
        UserError: which number, and what to change.
    """
    import torch

    if processes < 1:
        raise UserError(f"--nproc {processes} is too few; pass at least 1")
    if processes == 1 or not device.startswith("cuda"):
        return
    if device != "cuda":
        raise UserError(
            f"--nproc {processes} on the one --device {device}; pass --device cuda, of which each takes one"
        )
    if processes > torch.cuda.device_count():
        raise UserError(
            f"--nproc {processes} is more than the {torch.cuda.device_count()} CUDA devices of this machine; pass "
            f"--nproc {torch.cuda.device_count()}"
        )


def torchrun(processes: int, restarts: int, command: str, *words: str, nodes: Nodes | None = None) -> list[str]:
    """The command that runs `asr COMMAND` with these words on so many processes of each machine, this one's part.

    After the loss of a process all start anew, at most so often.
    """
    start = [sys.executable, "-m", "asr.training.launch", *(nodes or Nodes()).words()]
    return [*start, f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", f"asr.cli.{command}", *words]


def run_processes(processes: int, restarts: int, command: str, *words: str, nodes: Nodes | None = None) -> int:
    """Runs `asr COMMAND` on so many processes of each machine, this one's part; its exit code.

    Raises:
        Terminated, KeyboardInterrupt: the processes were told, and have ended.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)  # of each process; torchrun would give it one
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    process = subprocess.Popen(torchrun(processes, restarts, command, *words, nodes=nodes), env=environment)
    try:
        return process.wait()
    except (Terminated, KeyboardInterrupt):
        process.terminate()  # torchrun hands it on to its processes, which save
        process.wait(GRACE_S)
        raise


def _agent() -> type[Any]:
    """torchrun's agent of one machine, which says in a line what it does after a loss, and does not repeat refusals."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):  # type: ignore[misc]
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if not result.is_failed():
                return result
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            # the agent itself ends the others with SIGTERM
            codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
            if set(codes.values()) == {REFUSED}:
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                lost = " and ".join(f"rank {rank} {_ended(code)}" for rank, code in sorted(codes.items()))
                number = worker_group.spec.max_restarts - self._remaining_restarts + 1
                again = f"all start anew at the newest checkpoint ({number} of {worker_group.spec.max_restarts} times)"
                print(f"warning: {lost}; {again}", file=sys.stderr, flush=True)
            return result

    return Agent


def _ended(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def main(words: Sequence[str]) -> int:
    """torchrun with these words; the exit code of the process that failed first, which has said why."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    # what it reports of each process it stops, and of each end, is said in a line here
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    api.LocalElasticAgent = _agent()  # type: ignore[misc]
    try:
        run.main(list(words))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        reason = error.__cause__ or error
        taken = "EADDRINUSE" in str(reason)  # on the first machine, which listens there
        remedy = "; that port is taken: pass a --master with a free one on all machines" if taken else ""
        print(f"error: the machines did not meet: {reason}{remedy}", file=sys.stderr)
        return 1
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"error: rank {rank} (process {failure.pid}) {_ended(failure.exitcode)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
