"""`--nodes` of a recipe: several machines, here two commands on one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from asr.bench.kills import children
from asr.training import launch
from asr.training.launch import Nodes, torchrun
from recipes import cli
from tests.distributed.test_recipe import ROOT, command, events

NODES = ["--nodes", "2", "--master", "127.0.0.1:29500"]


class Machines:
    """The same command on each of two."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"{rank}.log" for rank in range(2)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            options = ["--nproc", "1", "--nodes", "2", "--node-rank", str(rank), "--master", place, *words]
            with open(path, "w", encoding="utf-8") as log:
                self.processes.append(
                    subprocess.Popen(command(folder, *options), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                )

    def end(self) -> list[str]:
        """What they said; they must have ended well."""
        try:
            codes = [process.wait(120) for process in self.processes]
        finally:
            for process in self.processes:
                process.terminate()
        texts = [path.read_text(encoding="utf-8") for path in self.logs]
        assert codes == [0, 0], "\n----\n".join(texts)
        return texts


def wait_for_steps(folder: Path, machines: Machines) -> None:
    metrics = folder / "exp" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text(encoding="utf-8")):
        assert all(process.poll() is None for process in machines.processes) and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path) -> None:
    """A signal to the first stops both with a checkpoint; then both go on, and a lost process comes back."""
    words = ["--set", "training.max_epochs=10", "--set", "training.checkpoint_every_steps=1", "--stop-stage", "average"]
    machines = Machines(tmp_path, *words)
    wait_for_steps(tmp_path, machines)
    machines.processes[0].send_signal(signal.SIGTERM)
    first, second = machines.end()
    assert "stopped: SIGTERM, saved in" in first
    stopped = events(tmp_path)[-1]
    assert stopped["reason"] == "terminated" and stopped["step"] > 0
    assert [e for e in events(tmp_path) if e["kind"] == "start"][-1]["processes"] == 2

    machines = Machines(tmp_path, *words)
    while len(starts := [e for e in events(tmp_path) if e["kind"] == "start"]) < 2:
        assert all(process.poll() is None for process in machines.processes)
        time.sleep(0.05)
    agents = Path(f"/proc/{machines.processes[1].pid}/task/{machines.processes[1].pid}/children").read_text().split()
    worker = [child for agent in agents for child in children(int(agent))]
    os.kill(worker[0], signal.SIGKILL)
    first, second = machines.end()
    assert len(starts) == 2 and len([e for e in events(tmp_path) if e["kind"] == "start"]) == 3
    assert "resumed from" in first + second
    assert "average: done" in first and "stage" not in second
    steps = [e["step"] for e in events(tmp_path) if e["kind"] == "train"]
    assert sorted(set(steps)) == list(range(1, steps[-1] + 1)) and events(tmp_path)[-1]["reason"] == "finished"

    # nothing is left to do
    first, second = Machines(tmp_path, *words).end()
    assert "train: up to date" in first and "training has finished already" in second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes 0 is too few; pass at least 1"),
        (["--nodes", "2"], "--nodes 2 needs --master HOST:PORT"),
        (["--nodes", "2", "--master", "here"], "such as 10.0.0.1:29500; it is here"),
        (["--nodes", "2", "--master", "here:99999"], "it is here:99999"),
        ([*NODES, "--node-rank", "2"], "--node-rank 2 is outside 0 to 1, of --nodes 2"),
        (["--node-rank", "1"], "--node-rank and --master are of several machines; pass --nodes too"),
        ([*NODES, "--nproc", "2", "--set", "parallel={zero: 2, replicas: 3}"], "does not divide the 4 processes"),
    ],
)
def test_nonsense_is_refused(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert cli.main(["yesno", "--exp-dir", str(tmp_path), "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_settings_than_those_of_the_first_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "settings.yaml").write_text("seed: 3\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as first:
        master = f"127.0.0.1:{first.getsockname()[1]}"
        words = ["--exp-dir", str(tmp_path), "--device", "cpu", "--nodes", "2", "--node-rank", "1", "--master", master]
        assert cli.main(["yesno", *words]) == 2
    error = capsys.readouterr().err
    assert "of machine 0 has other settings than this command; pass the same" in error and error.count("\n") == 1


def test_machines_that_do_not_meet_are_one_line(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        assert launch.main(torchrun(1, 1, "train", nodes=Nodes(2, 0, master))[3:]) == 1
    error = capsys.readouterr().err
    assert "error: the machines did not meet: " in error and "pass a --master with a free one" in error


def test_a_machine_without_the_train_stage_has_nothing_to_do(tmp_path: Path, capsys) -> None:
    words = ["yesno", "--exp-dir", str(tmp_path), "--device", "cpu", *NODES, "--node-rank", "1", "--stage", "decode"]
    assert cli.main(words) == 0
    assert "takes part in training only, which is not among these stages" in capsys.readouterr().out
