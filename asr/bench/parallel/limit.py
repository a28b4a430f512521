"""Trains a preset without a limit of memory, and again within fractions of what that took: what was chosen, the most
that was used, and the loss of each step compared. Each run is a process of its own. One JSON object a run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asr.bench.processes import write_data
from asr.errors import UserError

EVERY_S = 0.002  # between two looks at the memory of a run
SETTINGS = [
    "tokenizer.kind=word",
    "data={num_workers: 0, num_buckets: 2}",
    "data.augment={speed_factors: [1.0], volume_db: 0, noise_prob: 0}",
    "data.spec_augment.prob=0",
    # what is random in a step is not the same for a batch and for its pieces
    "model={encoder: {dropout: 0}, predictor: {dropout: 0}}",
    "training={precision: fp32, max_epochs: 1, log_every_steps: 1, tensorboard: false}",
    # a step of AdamW turns the rounding of a gradient near 0 into a whole one, unless eps is above it
    "optim.eps=1e-3",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="s")
    parser.add_argument("--fractions", default="0.75,0.5,0.25", help="of what the run without a limit took")
    parser.add_argument("--audio-s", type=float, default=600.0, help="audio seconds in a batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a run took more than its limit, or its loss differs by more than 1e-5."""
    try:
        fractions = [float(x) for x in args.fractions.split(",")]
    except ValueError:
        raise UserError(f"--fractions {args.fractions} must be numbers with commas between, like 0.75,0.5") from None
    if not all(0 < x <= 1 for x in fractions) or args.steps < 1 or args.audio_s <= 0:
        raise UserError("--fractions must be in (0, 1], --steps at least 1, --audio-s above 0")
    settings = [*SETTINGS, f"model.preset={args.preset}", f"data.max_duration_s={args.audio_s}", *args.set]
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(4, int(args.steps * args.audio_s / 10))
        cuts = write_data(folder, [6.0 + 0.4 * (7 * n % 20) for n in range(count)], settings)
        settings.append(f"training.max_steps={args.steps}")
        free = _run(cuts, folder / "free", settings)
        print(json.dumps({"limit_mb": None, **free}), flush=True)
        for fraction in fractions:
            limit = int(fraction * free["used_mb"] * 1e6)
            kept = _run(cuts, folder / f"limit-{fraction}", [*settings, f'memory.limit="{limit}B"'])
            pairs = zip(free["losses"], kept["losses"], strict=True)
            difference = max(abs(a - b) / abs(a) for a, b in pairs)
            within = kept["used_mb"] * 1e6 <= limit and difference <= 1e-5
            failed |= not within
            result = {"fraction": fraction, "limit_mb": limit / 1e6, **kept, "loss_difference": difference}
            print(json.dumps({**result, "within": within}), flush=True)
    return int(failed)


def _run(cuts: Path, out: Path, settings: list[str]) -> dict[str, Any]:
    words = ["--device", "cpu", "--out-dir", str(out), "--train-cuts", str(cuts), "--valid-cuts", str(cuts)]
    command = [sys.executable, "-m", "asr.cli.train", *words, *(f"--set={setting}" for setting in settings)]
    out.mkdir()
    with open(out / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        used = 0
        while process.poll() is None:
            used = max(used, _resident(process.pid))
            time.sleep(EVERY_S)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise UserError(f"a run ended with {process.returncode}: {text.strip().splitlines()[-1]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    return {
        "used_mb": used / 1e6,
        "losses": [step["loss"] for step in steps],
        "step_s": steps[-1]["batch_seconds"] / steps[-1]["audio_s_per_s"],
        "chosen": next((line for line in text.splitlines() if line.startswith("memory.limit=")), None),
    }


def _resident(pid: int) -> int:
    """Bytes of a process that are no pages of files."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:"))
