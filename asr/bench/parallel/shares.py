"""Bytes of weights, gradients and optimizer state on each process, and its resident memory, by ZeRO stage and number of
processes, in relation to one process. Batches are tiny: what is measured is the model. One JSON object a case.

The bounds: what a stage shares out, within 5% of its part; with zero 3, resident memory at most 0.60 on 2 and 0.40 on 4
processes. "anonymous" is resident memory without the pages of files, "peak" the most that is resident in a step."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from asr.bench.processes import alone, together
from asr.errors import UserError
from asr.models.presets import PRESETS
from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches
from asr.training.memory import peak_bytes_of, status_bytes, used_bytes
from asr.training.ranks import Ranks

# glibc gives large blocks back to the system, and threads share the places of small ones
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
KINDS = ("parameters", "gradients", "optimizer")
SHARED = {0: (), 1: ("optimizer",), 2: ("gradients", "optimizer"), 3: KINDS}
NAMES = tuple(f"{name}_bytes" for name in (*KINDS, "resident", "anonymous", "peak"))
RESIDENT = {2: 0.60, 4: 0.40}
STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="xxl")
    parser.add_argument("--nproc", default="2,4", help="numbers of processes, with commas between")
    parser.add_argument("--zero", default="0,1,2,3", help="stages, with commas between")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a case is out of its bounds."""
    try:
        sizes, zeros = ([int(x) for x in text.split(",")] for text in (args.nproc, args.zero))
    except ValueError:
        raise UserError(f"--nproc {args.nproc} and --zero {args.zero} must be numbers, like 2,4") from None
    if not set(zeros) <= set(SHARED) or min(sizes) < 2:
        raise UserError(f"--zero {args.zero} must be of 0, 1, 2, 3, and --nproc {args.nproc} at least 2")
    one = _case(args.preset, 1, 0)
    print(json.dumps(one), flush=True)
    failed = False
    for zero in zeros:
        for size in sizes:
            many = _case(args.preset, size, zero)
            for name in NAMES:
                many[name.replace("bytes", "ratio")] = round(many[name] / one[name], 4)
            good = all(abs(many[f"{kind}_ratio"] * size - 1) <= 0.05 for kind in SHARED[zero])
            if zero == 3:
                good &= many["resident_ratio"] <= RESIDENT.get(size, 1.0)
            failed |= not good
            print(json.dumps({**many, "within": good}), flush=True)
    return int(failed)


def _case(preset: str, size: int, zero: int) -> dict[str, Any]:
    return alone(__name__, {"preset": preset, "nproc": size, "zero": zero}, ALLOCATOR)


def _measure(ranks: Ranks, device: str, case: dict[str, Any]) -> None:
    """Prints the largest numbers of all processes after some steps, and the most that the last step had resident."""
    with tempfile.TemporaryDirectory() as name:
        settings = [f"parallel.zero={case['zero']}"]
        trainer = make_trainer(case["preset"], "fp32", 500, Path(name), settings, device, ranks)
        trainer.model.train()
        batch = random_batch(1.0, 1.0, 3.0, 500, 80)
        bad = BadBatches(Path(name), 0, 0, lambda **_: None, print)
        for _ in range(STEPS - 1):
            trainer.step([batch], bad)
        before = status_bytes("VmRSS") or 0
        peak = before + peak_bytes_of(trainer.device, lambda: trainer.step([batch], bad))
        weights = list(trainer.model.parameters())
        state = [x for entry in trainer.parallel.optimizer_state().values() for x in entry.values()]
        found = [
            _bytes(weights),
            _bytes([p.grad for p in weights if p.grad is not None]),
            _bytes(state),
            status_bytes("VmRSS") or 0,
            used_bytes(trainer.device),
            peak,
        ]
    rows = ranks.rows(found)
    if ranks.first:
        most = (int(max(values)) for values in zip(*rows, strict=True))
        print(json.dumps({**case, **dict(zip(NAMES, most, strict=True))}))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


if __name__ == "__main__":
    CASE = json.loads(sys.argv[1])
    together(CASE["nproc"], "cpu", _measure, CASE)
