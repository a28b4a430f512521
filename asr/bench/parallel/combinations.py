"""Trains with each combination of ZeRO stage, loss, precision, accumulation and checkpointing on 2 and 4 processes, and
compares the weights after some steps of plain SGD to those of one process that takes as many batches a step. Preset xs
on utterances of 0.8 to 1.8 s, dropout on, SpecAugment off. One JSON object a combination, then a summary."""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from asr.bench.processes import read_data, together, write_data
from asr.config import load_experiment
from asr.training.faults import BadBatches
from asr.training.parallel import whole
from asr.training.ranks import Ranks
from asr.training.trainer import Trainer

LR = 0.05
BATCHES = 4  # of each step, of all processes
SETTINGS = [
    "tokenizer.kind=word",
    "model.preset=xs",
    "data={num_workers: 0, max_duration_s: 3, num_buckets: 2}",
    "data.augment={speed_factors: [1.0], volume_db: 0, noise_prob: 0}",
    "data.spec_augment.prob=0",
    "training={precision: fp32, tensorboard: false, ema_decay: 0}",
    "optim={schedule: constant, warmup_steps: 0}",
    f"optim.lr={LR}",
]
BOUNDS = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""Of the largest difference of a weight with fp32, of the relative one of a step's loss with the others."""


def combinations() -> list[dict[str, Any]]:
    """What is compared."""
    plain: dict[str, Any] = {
        "nproc": 2,
        "zero": 0,
        "replicas": 1,
        "method": "fused",
        "precision": "fp32",
        "batches": BATCHES,
        "checkpointing": "none",
        "normalize": "tokens",
        "gather": "fp32",
    }
    changes: list[dict[str, Any]] = []
    for zero in range(4):
        changes += [{"zero": zero, "method": method} for method in ("fused", "pruned", "samplewise", "batched")]
        changes += [{"zero": zero, "precision": "bf16"}, {"zero": zero, "nproc": 4}]
    for zero in (0, 3):
        changes += [{"zero": zero, "checkpointing": mode} for mode in ("selective", "full")]
        changes += [{"zero": zero, "batches": 2}, {"zero": zero, "precision": "fp16"}]
        changes += [{"zero": zero, "normalize": "utterances"}]
        changes += [{"zero": zero, "nproc": 4, "method": "pruned"}]
    for zero in (2, 3):
        changes += [{"zero": zero, "precision": "bf16", "gather": "bf16"}]
        changes += [{"zero": zero, "nproc": 4, "replicas": 2, "method": method} for method in ("fused", "pruned")]
    changes += [{"zero": 3, "nproc": 4, "replicas": 2, "checkpointing": "full", "precision": "bf16"}]
    return [{**plain, **change} for change in changes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--nproc", type=int, choices=(2, 4), help="only the combinations of so many processes")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a combination is out of its bound."""
    cases = [case for case in combinations() if args.nproc in (None, case["nproc"])]
    good, worst = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = write_data(folder, [0.8 + 0.05 * (7 * n % 20) for n in range(40)], SETTINGS)
        alone = {_key(_alone(case)): _alone(case) for case in cases}
        together(1, "cpu", _train, list(alone.values()), args.steps, cuts, folder / "alone")
        for size in sorted({case["nproc"] for case in cases}):
            here = [case for case in cases if case["nproc"] == size]
            together(size, "cpu", _train, here, args.steps, cuts, folder / "many")
        for case in cases:
            result = _compare(folder / "alone" / _key(_alone(case)), folder / "many" / _key(case))
            bound = BOUNDS[case["precision"]]
            within = result["weights" if case["precision"] == "fp32" else "loss"] <= bound
            good, worst = good + within, max(worst, result["weights"] * (case["precision"] == "fp32"))
            print(json.dumps({**case, **result, "bound": bound, "within": within}), flush=True)
    print(json.dumps({"within": good, "combinations": len(cases), "steps": args.steps, "worst_fp32_weight": worst}))
    return int(good < len(cases))


def _alone(case: dict[str, Any]) -> dict[str, Any]:
    """The same in one process: in float32 products where they are compared by their loss alone."""
    return {**case, "nproc": 1, "zero": 0, "replicas": 1, "checkpointing": "none", "gather": "fp32"}


def _key(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


def _train(ranks: Ranks, device: str, cases: list[dict[str, Any]], steps: int, cuts: Path, out: Path) -> None:
    for case in cases:
        settings = [
            *SETTINGS,
            f"parallel={{zero: {case['zero']}, replicas: {case['replicas']}, gather: {case['gather']}}}",
            f"loss.method={case['method']}",
            f"training.precision={case['precision']}",
            f"training.normalize={case['normalize']}",
            f"training.accumulation={case['batches'] // ranks.size or 1}",
            f"memory.checkpointing={case['checkpointing']}",
        ]
        trainer = Trainer(load_experiment(None, settings), read_data(cuts), out / _key(case), device, "", ranks)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.parallel.optimizer = (
            ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=LR)
            if case["zero"] == 1
            else torch.optim.SGD(parameters, lr=LR)
        )
        trainer.progress.loss_scale = 256.0  # a first one that does not overflow
        trainer.model.train()
        bad = BadBatches(out, 0, 0, lambda **_: None, print)
        records = [trainer.step(batches, bad, own) for batches, own in islice(trainer.batches_of_epoch(), steps)]
        if len(records) < steps:
            raise ValueError(f"{len(records)} steps in an epoch; --steps {steps}")
        weights = whole(trainer.model.state_dict())
        if ranks.first:
            torch.save({"weights": weights, "losses": [r["loss"] for r in records]}, out / _key(case) / "end.pt")


def _compare(alone: Path, many: Path) -> dict[str, float]:
    left, right = (torch.load(path / "end.pt", weights_only=True) for path in (alone, many))
    weights = max(float((left["weights"][name] - w).abs().max()) for name, w in right["weights"].items())
    pairs = zip(left["losses"], right["losses"], strict=True)
    return {"weights": weights, "loss": max(abs(a - b) / abs(a) for a, b in pairs)}
