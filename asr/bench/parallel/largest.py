"""The largest batch that the memory of a GPU holds, by loss and vocabulary, and its speed: one step of the trainer on
random features, tried with more and more audio until it does not fit. One JSON object each.

A card with less memory than this one: --memory 24GB takes no more than that."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from asr.bench.processes import together
from asr.errors import UserError
from asr.training.benchmark import make_trainer, random_batch
from asr.training.faults import BadBatches
from asr.training.pieces import free_memory
from asr.training.ranks import Ranks
from losses import LOSSES
from losses.memory import parse_limit

FIRST_S = 200.0
STEP = 0.95
"""A size that does not fit is lowered by this much, so the result is at most 5% below the largest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--preset", default="l")
    parser.add_argument("--methods", default=",".join(LOSSES), help="losses, with commas between")
    parser.add_argument("--vocab-sizes", default="500,5000", help="V, with commas between")
    parser.add_argument("--memory", default="24GB", help="of the card that is imagined")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--utterance-s", type=float, default=12.0)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0."""
    methods = args.methods.split(",")
    if unknown := [m for m in methods if m not in LOSSES]:
        raise UserError(f"--methods {unknown[0]} is no loss; there are {', '.join(LOSSES)}")
    sizes = args.vocab_sizes.split(",")
    if unknown := [v for v in sizes if not v.isdigit() or int(v) < 2]:
        raise UserError(f"--vocab-sizes {unknown[0]} is no size of a vocabulary")
    try:
        memory = parse_limit(args.memory)
    except ValueError as error:
        raise UserError(str(error).replace("memory_limit=", "--memory ")) from None
    if not torch.cuda.is_available():
        raise UserError("the largest batch is that of a GPU, and torch sees none")
    total = torch.cuda.mem_get_info()[1]
    if memory > total:
        raise UserError(f"--memory {args.memory} is more than this card has, {total / 1e9:.0f}GB")
    for vocab_size in sizes:
        for method in methods:
            together(1, "cuda", _measure, vars(args), method, int(vocab_size), memory / total)
    return 0


def _measure(ranks: Ranks, device: str, args: dict[str, Any], method: str, vocab_size: int, fraction: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the context of CUDA itself is not torch's
        torch.cuda.set_per_process_memory_fraction(fraction)
        free_memory()
        settings = [f"loss.method={method}", "memory.lower_after=1000"]
        trainer = make_trainer(args["preset"], args["precision"], vocab_size, folder, settings, device, ranks)
        trainer.model.train()

        def step(audio_s: float) -> tuple[bool, float]:
            """Whether the batch fits, and the seconds that a step takes."""
            batch = random_batch(audio_s, args["utterance_s"], 3.0, vocab_size, 80)
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            trainer.step([batch], BadBatches(folder, 0, 0, lambda **_: None, lambda text: None))
            torch.cuda.synchronize()
            return trainer.stepper.pieces.of(batch) == 1, time.perf_counter() - begin

        peaks = []
        for audio_s in (FIRST_S, FIRST_S, 2 * FIRST_S):  # the first one also brings the optimizer's state
            if not step(audio_s)[0]:
                raise UserError(f"not even {audio_s:.0f} s of audio fit into {args['memory']}")
            peaks.append(torch.cuda.max_memory_allocated())
        per_second = (peaks[2] - peaks[1]) / FIRST_S
        available = fraction * torch.cuda.mem_get_info()[1]
        audio_s = (available - peaks[1]) / per_second + FIRST_S
        while not step(audio_s)[0] or not (again := step(audio_s))[0]:
            free_memory()
            audio_s *= STEP
        step_s = again[1]
        result = {key: args[key] for key in ("preset", "precision", "memory", "utterance_s")}
        result |= {"vocab_size": vocab_size, "method": method, "largest_batch_audio_s": round(audio_s)}
        result |= {"step_s": round(step_s, 2), "audio_hours_per_hour": round(audio_s / step_s)}
        print(json.dumps({**result, "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6)}), flush=True)
