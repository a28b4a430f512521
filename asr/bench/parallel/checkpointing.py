"""What the encoder keeps for the backward pass in each mode of activation checkpointing, and the time of a forward and
backward pass of the whole model, loss included, all modes in turns on the same batch. One JSON object a mode.

The bounds: gradients equal to those of "none" to the bit; "full" keeps at most 1/15 and takes at most 1.4 times as
long."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from asr.config import load_experiment
from asr.data.batch import Batch
from asr.errors import UserError
from asr.models.presets import PRESETS
from asr.models.transducer import LossConfig, Transducer, build_model
from asr.training.activations import MODES, checkpoint_activations, saved_bytes
from asr.training.benchmark import random_batch
from asr.training.memory import keep_freed_memory
from asr.training.precision import autocast, resolve_precision

LEAST_RATIO, MOST_TIME = 15.0, 1.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--presets", default="s,m", help="with commas between")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    parser.add_argument("--audio-s", type=float, default=100.0, help="audio seconds in the batch")
    parser.add_argument("--utterance-s", type=float, default=6.0, help="mean length of an utterance in seconds")
    parser.add_argument("--steps", type=int, default=10, help="timed passes of each mode; medians are printed")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a mode is out of its bounds."""
    presets = args.presets.split(",")
    if unknown := [p for p in presets if p not in PRESETS]:
        raise UserError(f"--presets {unknown[0]} is no preset; there are {', '.join(PRESETS)}")
    if args.steps < 1 or min(args.audio_s, args.utterance_s) <= 0:
        raise UserError("--steps must be at least 1, --audio-s and --utterance-s above 0")
    keep_freed_memory()
    batch = random_batch(args.audio_s, args.utterance_s, 3.0, 500, 80)
    results = [result for preset in presets for result in _measure(preset, batch, args)]
    return int(not all(result["within"] for result in results))


def _measure(preset: str, batch: Batch, args: argparse.Namespace) -> list[dict[str, Any]]:
    experiment = load_experiment(None, [f"model.preset={preset}"])
    precision = resolve_precision(args.precision, torch.device("cpu"))
    torch.manual_seed(0)
    plain = build_model(experiment, 500).train()
    models = {mode: copy.deepcopy(plain) for mode in MODES}
    kept, seconds, gradients = {}, {mode: [] for mode in MODES}, {}  # type: ignore[var-annotated]
    for mode, model in models.items():
        checkpoint_activations(model.encoder, [mode] * (1 + len(model.encoder.blocks)))
        kept[mode] = _encoder_bytes(model, batch, precision)
    for number in range(1 + args.steps):
        for mode, model in models.items():
            model.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            gradients[mode] = _gradients(model, batch, experiment.loss, precision)
            if number:  # the first compiles
                seconds[mode].append(time.perf_counter() - begin)
    results = []
    for mode in MODES:
        ratio = kept["none"] / kept[mode]
        slower = statistics.median(a / b for a, b in zip(seconds[mode], seconds["none"], strict=True))
        pairs = zip(gradients[mode], gradients["none"], strict=True)
        equal = all(torch.equal(left, right) for left, right in pairs)
        results.append(
            {
                "preset": preset,
                "precision": precision,
                "checkpointing": mode,
                "encoder_bytes": kept[mode],
                "less": round(ratio, 2),
                "step_ms": round(1e3 * statistics.median(seconds[mode]), 1),
                "times": round(slower, 3),
                "equal": equal,
                "within": equal and (mode != "full" or (ratio >= LEAST_RATIO and slower <= MOST_TIME)),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def _encoder_bytes(model: Transducer, batch: Batch, precision: str) -> int:
    def forward() -> Tensor:
        with autocast(precision, torch.device("cpu")):
            return model.encode(batch.features, batch.feature_lens)[0]

    return saved_bytes(forward)


def _gradients(model: Transducer, batch: Batch, loss: LossConfig, precision: str) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout
    with autocast(precision, torch.device("cpu")):
        losses = model(batch.features, batch.feature_lens, batch.targets, batch.target_lens, loss)
    losses.loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
