"""Goes on in the middle of an epoch: seconds from the start of a process to its first batch, and whether the next 100
batches, their cuts and their samples, are those of a process that was not interrupted. One JSON object.

Batches are bounded by lattice cells, and two workers compute features on the fly with the default augmentation, speeds
included. What training does besides (building the model, reading the checkpoint) does not depend on the batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from asr.bench.data.corpus import write_corpus
from asr.bench.processes import alone, word_tokenizer
from asr.config import load_experiment
from asr.data.loader import train_loader
from asr.data.manifests import save_cuts
from asr.training.train_data import load_train_data

COMPARED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--entries", type=int, default=300000, help="cuts of the manifest, of about 12 s")
    parser.add_argument("--batch", type=int, default=5000, help="batches before")
    parser.add_argument("--batch-s", type=float, default=30.0, help="audio seconds of a batch")
    parser.add_argument("--cells", type=int, default=20000, help="lattice cells of a batch")
    parser.add_argument("--limit-s", type=float, default=10.0)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when it took longer than the limit or the batches differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = write_corpus(folder, args.entries, 12.0)
        save_cuts(cuts, folder / "train.jsonl.gz")
        save_cuts(cuts[:10], folder / "valid.jsonl.gz")
        asked: dict[str, Any] = {"folder": name, "batch_s": args.batch_s, "cells": args.cells}
        whole = alone("asr.bench.data.resume", {**asked, "skip": 0, "upto": args.batch, "begun": time.time()})
        resumed = alone("asr.bench.data.resume", {**asked, "skip": args.batch, "upto": 0, "begun": time.time()})
    same = whole["batches"] == resumed["batches"] and len(whole["batches"]) == COMPARED
    result = {"entries": args.entries, "batch": args.batch, "first_start_s": whole["first_s"]}
    result |= {"resume_s": resumed["first_s"], "load_s": resumed["load_s"], "plan_s": resumed["plan_s"]}
    print(json.dumps({**result, "compared": len(resumed["batches"]), "same": same}))
    return int(not same or resumed["first_s"] > args.limit_s)


def _measure(folder: str, batch_s: float, cells: int, skip: int, upto: int, begun: float) -> dict[str, Any]:
    out = Path(folder)
    experiment = load_experiment(
        None,
        [
            "data.features.storage=on_the_fly",
            "tokenizer.kind=word",
            "data.num_workers=2",
            f"data.max_duration_s={batch_s}",
            f"data.max_lattice_cells={cells}",
        ],
    )
    tokenizer = word_tokenizer()
    begin = time.perf_counter()
    data = load_train_data(experiment, out / "train.jsonl.gz", out / "valid.jsonl.gz", tokenizer, None, out / "train")
    loaded = time.perf_counter()
    loader = train_loader(data.train_cuts, tokenizer, experiment.data, seed=0, epoch=0, skip_batches=skip)
    planned = time.perf_counter()
    batches = iter(loader)
    first = next(batches)
    first_s = time.time() - begun
    digests = []
    for number, batch in enumerate(islice(_and(first, batches), upto + COMPARED)):
        if number >= upto:
            sound = hashlib.sha256(batch.features.numpy().tobytes()).hexdigest()
            digests.append([batch.cut_ids, sound])
    del batches
    return {"first_s": round(first_s, 2), "load_s": round(loaded - begin, 2), "plan_s": round(planned - loaded, 2)} | {
        "batches": digests
    }


def _and(first: Any, rest: Any) -> Any:
    yield first
    yield from rest


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
