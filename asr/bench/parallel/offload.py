"""Trains with AdamW's moments in memory and in a memory-mapped file, each in a process of its own: anonymous resident
memory, and the weights. Then both again under an RLIMIT_DATA halfway between what they took. One JSON object a run.

The bounds: equal weights to the bit; at least 90% of the moments' bytes leave anonymous memory; under the limit
training with the file goes through, and plain AdamW raises."""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from asr.bench.processes import alone
from asr.errors import UserError
from asr.models.presets import PRESETS
from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches
from asr.training.memory import status_bytes

LEAST_FREED = 0.9
# what has been freed is no longer counted
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="l")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the file is made; the system's folder for such by default")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a bound is broken."""
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        case = {"preset": args.preset, "steps": args.steps, "folder": folder, "limit_bytes": None}
        plain, mapped = (alone(__name__, {**case, "offload": kind}, ALLOCATOR) for kind in ("none", "file"))
        freed = (plain["anonymous_bytes"] - mapped["anonymous_bytes"]) / plain["moments_bytes"]
        mapped["freed"] = round(freed, 4)
        mapped["equal"] = plain["weights"] == mapped["weights"]
        limit = (plain["most_data_bytes"] + mapped["most_data_bytes"]) // 2
        bounded = [
            alone(__name__, {**case, "offload": kind, "limit_bytes": limit}, ALLOCATOR) for kind in ("none", "file")
        ]
    bounded[1]["equal"] = plain["weights"] == bounded[1]["weights"]
    for result in (plain, mapped, *bounded):
        print(json.dumps(result), flush=True)
    good = mapped["equal"] and freed >= LEAST_FREED
    good &= "optimizer's state" in (bounded[0]["error"] or "") and bounded[1]["error"] is None and bounded[1]["equal"]
    print(json.dumps({"preset": args.preset, "freed": mapped["freed"], "limit_bytes": limit, "within": good}))
    return int(not good)


def _measure(case: dict[str, Any]) -> None:
    settings = [f"memory.offload={case['offload']}", "training.ema_decay=0"]
    trainer = make_trainer(case["preset"], "fp32", 500, Path(case["folder"]), settings)
    trainer.model.train()
    batch = random_batch(1.0, 1.0, 3.0, 500, 80)
    bad = BadBatches(Path(case["folder"]), 0, 0, lambda **_: None, print)
    _pass(trainer.model, batch, trainer.experiment.loss)  # compiles kernels, which a limit would not forgive
    most, error = 0, None
    free, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (case["limit_bytes"] or free, hard))
    try:
        for _ in range(case["steps"]):
            trainer.step([batch], bad)
            most = max(most, status_bytes("VmData") or 0)
    except UserError as found:
        error = str(found)
    resource.setrlimit(resource.RLIMIT_DATA, (free, hard))
    entries = trainer.parallel.optimizer_state().values()
    weights = hashlib.blake2b(digest_size=16)
    for value in trainer.model.state_dict().values():
        weights.update(value.numpy().tobytes())
    result = {
        **{name: case[name] for name in ("preset", "offload", "limit_bytes")},
        "error": error,
        "weights": weights.hexdigest(),
        "moments_bytes": sum(x.nbytes for entry in entries for x in entry.values() if x.dim()),
        "anonymous_bytes": status_bytes("RssAnon"),
        "most_data_bytes": most,
    }
    print(json.dumps(result))


def _pass(model: Any, batch: Any, loss: Any) -> None:
    model(batch.features, batch.feature_lens, batch.targets, batch.target_lens, loss).loss.backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _measure(json.loads(sys.argv[1]))
