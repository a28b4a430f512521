"""The train stage on several processes: `asr train` under torchrun, from the same files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from asr.config import dump
from asr.errors import Terminated, UserError
from asr.training.ranks import torchrun
from recipes.engine import StageStopped, write_atomic

if TYPE_CHECKING:
    from recipes.stages import Recipe

RESTARTS = 3  # after the loss of a process
GRACE_S = 120.0  # for the processes to save when the run is told to stop


def torchrun_command(recipe: Recipe, settings: Path) -> list[str]:
    """The command line that trains on recipe.num_processes processes of this machine."""
    files = {
        "--config": settings,
        "--train-cuts": recipe.path("data/features/cuts_train.jsonl.gz"),
        "--valid-cuts": recipe.path("data/features/cuts_valid.jsonl.gz"),
        "--tokenizer": recipe.path("tokenizer/tokenizer.json"),
        "--feature-stats": recipe.path("data/features/stats.json"),
        "--out-dir": recipe.path("train"),
    }
    words = [word for name, path in files.items() for word in (name, str(path))]
    return torchrun(recipe.num_processes, RESTARTS, *words, "--device", recipe.device)


def train_on_processes(recipe: Recipe) -> None:
    """Trains; goes on from the newest checkpoint of the folder if there is one.

    Raises:
        StageStopped: SIGTERM, with the state saved.
        KeyboardInterrupt: Ctrl-C, with the state saved.
        UserError: the processes failed; what they printed says why.
    """
    recipe.path("train").mkdir(parents=True, exist_ok=True)
    settings = recipe.path("train/settings.yaml")
    write_atomic(settings, dump(recipe.experiment))
    threads = max(1, (os.cpu_count() or 1) // recipe.num_processes)  # of each process; torchrun would give it one
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    process = subprocess.Popen(torchrun_command(recipe, settings), env=environment)
    try:
        code = process.wait()
    except (Terminated, KeyboardInterrupt) as stop:
        process.terminate()  # torchrun hands it on to its processes, which save
        process.wait(GRACE_S)
        if isinstance(stop, KeyboardInterrupt):
            raise
        raise StageStopped(f"SIGTERM, saved in {recipe.path('train/checkpoints')}") from None
    if code:
        raise UserError(f"training on {recipe.num_processes} processes ended with {code}; the reason is printed above")
