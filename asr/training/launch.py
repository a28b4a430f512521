"""Several processes of one command, started with torchrun; run as a module, it is torchrun with a shorter report."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from asr.errors import Terminated, UserError

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
        process.wait(GRACE_S + 30.0)  # it ends those that take longer
        raise


def main(words: Sequence[str]) -> int:
    """torchrun with these words; the exit code of the process that failed first, which has said why."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if "--shutdown-timeout" in run.get_args_parser().format_help():  # torch 2.11 may leave them its 30 s
        words = [f"--shutdown-timeout={round(GRACE_S)}", *words]
    if "--max-restarts=0" in words:  # what follows from the one error that ends all
        logging.disable(logging.ERROR)
    try:
        run.main(list(words))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        print(f"error: the machines did not meet: {error.__cause__ or error}", file=sys.stderr)
        return 1
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
