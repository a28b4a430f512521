"""Kills a worker with SIGKILL at a random moment of a small run, in each of many trials, and compares the weights that
the run ends with to those of a run in peace, bit for bit. One JSON object a trial, then a summary."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from asr.checkpoint import read, step_checkpoints
from asr.config import load_experiment
from asr.data.features import compute_features
from asr.errors import UserError
from asr.training.launch import torchrun

WORDS = "ONE TWO THREE FOUR".split()
RATE_HZ = 16_000
SETTINGS = [
    "tokenizer.kind=word",
    "model.preset=xs",
    "data={num_workers: 0, max_duration_s: 4, num_buckets: 2}",
    "data.augment={speed_factors: [1.0], volume_db: 0, noise_prob: 0}",
    "training={max_epochs: 6, precision: fp32, checkpoint_every_steps: 3, tensorboard: false}",
]
WAIT_S = 300.0  # for a run to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="processes of the run")
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the workers that are killed")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a trial ended otherwise."""
    if args.trials < 1 or args.nproc < 2:
        raise UserError(f"--trials {args.trials} must be at least 1, --nproc {args.nproc} at least 2")
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        begin = time.monotonic()
        if start(args, folder, "peace").wait(WAIT_S):
            raise UserError(f"the run in peace failed: {(folder / 'peace.log').read_text(encoding='utf-8')[-2000:]}")
        length_s = time.monotonic() - begin
        good = 0
        for trial in range(args.trials):
            result = one_trial(args, folder, trial, chance, length_s)
            good += result["equal"]
            print(json.dumps(result), flush=True)
    print(json.dumps({"equal": good, "trials": args.trials, "nproc": args.nproc, "zero": args.zero, "run_s": length_s}))
    return int(good < args.trials)


def one_trial(args: argparse.Namespace, folder: Path, trial: int, chance: random.Random, length_s: float) -> dict:
    """A run with a kill somewhere in it."""
    name = f"trial-{trial}"
    begin = time.monotonic()
    process = start(args, folder, name)
    moment_s, worker = chance.uniform(0.1, 0.95) * length_s, chance.randrange(args.nproc)
    while time.monotonic() < begin + moment_s or len(children(process.pid)) < args.nproc:
        if process.poll() is not None:
            break
        time.sleep(0.01)
    steps = len(step_checkpoints(folder / name / "checkpoints"))
    victims = children(process.pid)
    if len(victims) == args.nproc:
        os.kill(victims[worker], signal.SIGKILL)
    try:
        code = process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    newest = (step_checkpoints(folder / run / "checkpoints")[-1:] for run in ("peace", name))
    left, right = (read(paths[0])["model"] if paths else {} for paths in newest)
    equal = code == 0 and left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return {
        "trial": trial,
        "killed": len(victims) == args.nproc,
        "moment_s": round(moment_s, 2),
        "worker": worker,
        "checkpoints_then": steps,
        "exit_code": code,
        "equal": equal,
        "run_s": round(time.monotonic() - begin, 1),
    }


def start(args: argparse.Namespace, folder: Path, name: str) -> subprocess.Popen:
    """Training under torchrun, with its output in folder / name.log."""
    cuts = str(folder / "cuts.jsonl.gz")
    words = ["--device", "cpu", "--out-dir", str(folder / name), "--train-cuts", cuts, "--valid-cuts", cuts]
    words += [f"--set={setting}" for setting in (*SETTINGS, f"parallel.zero={args.zero}")]
    command = torchrun(args.nproc, 3, "train", *words)
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    """Processes that a process has started and that run the training."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        return [int(x) for x in found if b"asr.cli.train" in Path(f"/proc/{x}/cmdline").read_bytes()]
    except OSError:  # one of them is gone
        return []


def write_data(folder: Path) -> None:
    """Twenty cuts of noise with a few words each, and their features."""
    generator = np.random.default_rng(0)
    cuts = []
    for number in range(20):
        seconds = 0.8 + 0.05 * (7 * number % 20)
        path = folder / f"{number:02d}.wav"
        soundfile.write(path, 0.1 * generator.standard_normal(int(seconds * RATE_HZ)), RATE_HZ)
        recording = Recording.from_file(path)
        text = " ".join(generator.choice(WORDS, 2))
        supervision = SupervisionSegment(path.stem, recording.id, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(path.stem, 0.0, recording.duration, 0, recording=recording, supervisions=[supervision]))
    config = load_experiment(None, SETTINGS).data
    compute_features(CutSet.from_cuts(cuts), folder / "features", config.features, None, 0).to_file(
        folder / "cuts.jsonl.gz"
    )
