"""Several processes of one run on this machine, and the data that measurements train on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.multiprocessing
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from asr.config import load_experiment
from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.features import compute_features
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from asr.training.ranks import Ranks, rank_device, started
from asr.training.trainer import TrainData

WORDS = "ONE TWO THREE FOUR".split()


def together(size: int, device: str, function: Callable[..., None], *arguments: Any) -> None:
    """Calls function(ranks, device, *arguments) in so many processes, one alone in this one; an error in one is raised.

    On CPU each has its share of the cores.
    """
    if size == 1:
        function(Ranks(), device, *arguments)
        return
    context = start(size, device, function, *arguments)
    while not context.join():
        pass


def start(
    size: int, device: str, function: Callable[..., None], *arguments: Any, start_method: str = "spawn"
) -> torch.multiprocessing.ProcessContext:
    """Begins to call function(ranks, device, *arguments) in so many processes, started as multiprocessing names it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _child, (size, port, device, function, arguments), nprocs=size, join=False, start_method=start_method
    )
    assert context is not None
    return context


def _child(
    rank: int, size: int, port: int, device: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(size)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    with started(device, 300.0) as ranks:
        function(ranks, rank_device(device, ranks), *arguments)


def alone(module: str, arguments: dict[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``python -m module JSON`` prints as its last line, also JSON: memory is measured in processes of their own.

    Raises:
        UserError: it failed, with the end of what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise UserError(f"{module} {arguments} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_data(folder: Path, durations_s: list[float], settings: list[str]) -> Path:
    """Cuts of noise with two words a second, and their features; the path of the cuts."""
    generator = np.random.default_rng(0)
    cuts = []
    for number, seconds in enumerate(durations_s):
        path = folder / f"{number:03d}.wav"
        cuts.append(write_cut(path, 0.1 * generator.standard_normal(int(seconds * SAMPLE_RATE_HZ)), generator))
    config = load_experiment(None, settings).data
    path = folder / "cuts.jsonl.gz"
    compute_features(CutSet.from_cuts(cuts), folder / "features", config.features, None, 0).to_file(path)
    return path


def write_cut(path: Path, samples: np.ndarray, generator: np.random.Generator) -> MonoCut:
    """A recording of samples [N] at 16 kHz, with two words a second that are drawn."""
    soundfile.write(path, samples, SAMPLE_RATE_HZ)
    recording = Recording.from_file(path)
    text = " ".join(generator.choice(WORDS, max(1, round(2 * recording.duration))))
    supervision = SupervisionSegment(path.stem, recording.id, 0.0, recording.duration, text=text)
    return MonoCut(path.stem, 0.0, recording.duration, 0, recording=recording, supervisions=[supervision])


def word_tokenizer() -> Tokenizer:
    """Of the words that such cuts have."""
    return Tokenizer.train([" ".join(WORDS)], TokenizerConfig("word"))


def read_data(path: Path) -> TrainData:
    """What `write_data` wrote, for training and validation both."""
    cuts = CutSet.from_file(path).to_eager()
    return TrainData(cuts, cuts, word_tokenizer())
