"""Opens a manifest of so many synthetic entries in a process of its own: seconds, memory above what the process had,
time to reach one cut, and seconds to plan the batches of an epoch. One JSON object; exit status 1 above a limit."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from asr.bench.processes import alone

SPEAKERS = 2000
WORDS = "the of and to a in that he was it his i with as is had for you not be her on at by which have or from".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--entries", type=int, default=300000)
    parser.add_argument("--suffix", default=".jsonl.gz", choices=(".jsonl", ".jsonl.gz"))
    parser.add_argument("--limit-s", type=float, default=5.0, help="to open it")
    parser.add_argument("--limit-mb", type=float, default=200.0, help="above the process, in 10^6 bytes")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when it took more time or memory than the limits."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"cuts{args.suffix}"
        _write(path, args.entries)
        result = alone("asr.bench.data.manifest", {"path": str(path)})
        size_mb = round(path.stat().st_size / 1e6, 1)
    print(json.dumps({"entries": args.entries, "file_mb": size_mb, **result}))
    return int(result["open_s"] > args.limit_s or result["open_mb"] > args.limit_mb)


def _write(path: Path, entries: int) -> None:
    """A manifest as ``prepare`` writes it for LibriSpeech: utterances of about 12 s with 33 words."""
    generator = np.random.default_rng(0)
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else open(path, "w") as file:
        for number in range(entries):
            samples = int(16000 * generator.uniform(2.0, 17.0))
            seconds, speaker = samples / 16000, number % SPEAKERS
            cut_id = f"{speaker}-{number // SPEAKERS}-{number:06d}"
            text = " ".join(generator.choice(WORDS, max(1, round(2.7 * seconds)))).upper()
            audio = f"/corpora/LibriSpeech/train-clean-360/{speaker}/{number // SPEAKERS}/{cut_id}.flac"
            supervision: dict[str, Any] = {
                "id": cut_id,
                "recording_id": cut_id,
                "start": 0.0,
                "duration": seconds,
                "channel": 0,
            }
            recording: dict[str, Any] = {"id": cut_id, "sources": [{"type": "file", "channels": [0], "source": audio}]}
            recording |= {"sampling_rate": 16000, "num_samples": samples, "duration": seconds, "channel_ids": [0]}
            cut: dict[str, Any] = {"id": cut_id, "start": 0, "duration": seconds, "channel": 0}
            cut["supervisions"] = [supervision | {"text": text, "language": "English", "speaker": str(speaker)}]
            file.write(json.dumps({**cut, "recording": recording, "type": "MonoCut"}) + "\n")


def _measure(path: str) -> dict[str, Any]:
    import torch

    from asr.data.loader import DataConfig
    from asr.data.packed_cuts import ExpandedCuts, PackedCuts
    from asr.data.plan import plan_epoch
    from asr.training.memory import return_freed_memory, used_bytes

    before = used_bytes(torch.device("cpu"))
    begin = time.perf_counter()
    cuts = PackedCuts.open(path)
    open_s = time.perf_counter() - begin
    return_freed_memory()
    after = used_bytes(torch.device("cpu"))
    numbers = np.random.default_rng(0).integers(0, len(cuts), 1000).tolist()
    begin = time.perf_counter()
    for number in numbers:
        cuts[number]
    reach_ms = 1e3 * (time.perf_counter() - begin) / len(numbers)
    config = DataConfig()
    begin = time.perf_counter()
    batches = plan_epoch(ExpandedCuts(cuts, config.augment).durations_s, config, seed=0, epoch=0)
    plan_s = time.perf_counter() - begin
    result = {"open_s": round(open_s, 2), "open_mb": round((after - before) / 1e6, 1), "reach_ms": round(reach_ms, 3)}
    return {**result, "plan_s": round(plan_s, 1), "batches": len(batches)}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1])["path"])))
