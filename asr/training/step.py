"""One optimizer step: forward and backward passes of its batches, those that break it left out, the update."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from asr.config import Experiment
from asr.data.batch import Batch
from asr.models.transducer import TransducerLosses
from asr.training.faults import BadBatches
from asr.training.optim import WeightAverage, learning_rate
from asr.training.parallel import Parallel
from asr.training.precision import autocast
from asr.training.ranks import Ranks


@dataclass
class Progress:
    """Where a run stands; saved with the weights, so that a resumed run takes the very next batch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    consumed_s: float = 0.0
    time_s: float = 0.0
    bad_batches: int = 0
    best_errors: float = math.inf
    best_loss: float = math.inf


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class Stepper:
    """Takes steps of a run.

    Args:
        experiment: its configuration.
        parallel: the model and its optimizer.
        ranks: the processes; all of them step together.
        device: where the model is.
        precision: of products, resolved.
        ema: moving average of the weights, if there is one.
        total_s: audio seconds of the whole run, all epochs.
    """

    def __init__(
        self,
        experiment: Experiment,
        parallel: Parallel,
        ranks: Ranks,
        device: torch.device,
        precision: str,
        ema: WeightAverage | None,
        total_s: float,
    ):
        self.experiment, self.config = experiment, experiment.training
        self.parallel, self.ranks, self.device = parallel, ranks, device
        self.precision, self.ema, self.total_s = precision, ema, total_s
        self.progress = Progress()

    def _chunk_frames(self, micro: int) -> int:
        sizes = self.config.chunk_frames
        return sizes[seed_of(self.experiment.seed, "chunk", self.progress.step, micro) % len(sizes)]

    def _count(self, batches: list[Batch]) -> int:
        by_tokens = self.config.normalize == "tokens"
        return sum(int(b.target_lens.sum()) if by_tokens else b.size for b in batches)

    def done(self) -> float:
        """Fraction of the run that lies behind, by the limit that will end it."""
        by_steps = self.progress.step / self.config.max_steps if self.config.max_steps else 0.0
        return max(by_steps, self.progress.consumed_s / self.total_s)

    def _forward(self, batch: Batch, micro: int, done: float) -> TransducerLosses:
        with autocast(self.precision, self.device):
            losses: TransducerLosses = self.parallel.forward(
                batch.features,
                batch.feature_lens,
                batch.targets,
                batch.target_lens,
                self.experiment.loss,
                self._chunk_frames(micro),
                done=done,
            )
        return losses

    def step(self, batches: list[Batch], bad: BadBatches, own: int | None = None) -> dict[str, Any]:
        """One optimizer step over ``batches`` of each process; returns what metrics.jsonl records of it.

        The summed loss is divided by the count over all batches of all processes that are used, so that accumulation
        and several processes equal one large batch of them. Where the loss is not finite on one process, all leave out
        the batch that they compute at the time, since what they compute together needs all of them.

        Args:
            batches: as many on each process.
            bad: takes what is skipped.
            own: so many of the batches, the first, count; the others stand in for batches that are not there.
        """
        progress, optim, ranks, model = self.progress, self.experiment.optim, self.ranks, self.parallel.model
        real = batches if own is None else batches[:own]
        audio_s = sum(sum(b.durations_s) for b in real)
        totals = ranks.sum([self._count(real), audio_s, len(real), sum(b.size for b in real)])
        count, audio_s = round(totals[0]), totals[1]
        done = self.done()
        lr = learning_rate(optim, progress.step, done)
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = lr
        self.parallel.optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "transducer_loss": 0.0, "simple_loss": 0.0, "ctc_loss": 0.0}
        used: list[Batch] = []
        kept = 0  # rounds in which nothing was skipped
        for number, batch in enumerate(batches):
            # what is random depends on the step and the batch's place in it alone: a resumed run needs no generator
            # state, and several processes draw what one would draw
            micro = number * ranks.size + ranks.rank
            torch.manual_seed(seed_of(self.experiment.seed, "step", progress.step, micro))
            counts = number < len(real)
            losses = self._forward(batch.to(self.device, non_blocking=True), micro, done)
            finite = bool(torch.isfinite(losses.loss))
            broken, bad_ones = ranks.sum([not finite, counts and not finite])
            if broken:
                if counts and not finite:
                    bad.skip(batch, progress.step + 1, f"non-finite loss {losses.loss.item()}")
                bad.skipped(round(bad_ones))
                continue
            # gradients are averaged over processes, and those of a stand-in are 0
            (losses.loss * (ranks.size * counts / max(count, 1))).backward()
            kept += 1
            if counts:
                used.append(batch)
                for name, value in zip(sums, losses, strict=True):
                    sums[name] += 0.0 if value is None else value.item()
        used_count, used_batches, *all_sums = ranks.sum([self._count(used), len(used), *sums.values()])
        if 0 < kept < len(batches):  # each was divided by the count of all: those that were skipped too
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(max(count, 1) / max(used_count, 1))
        norm = self.parallel.clip_grad_norm(optim.clip_grad_norm or math.inf)
        if kept and not math.isfinite(norm):
            for batch in used:
                bad.skip(batch, progress.step + 1, f"non-finite gradient norm {norm}")
            bad.skipped(round(used_batches))
        elif kept:
            self.parallel.optimizer.step()
            if self.ema is not None:
                self.ema.update(model, progress.step)
        progress.step += 1
        progress.batch += round(totals[2])
        progress.consumed_s += audio_s
        progress.bad_batches = bad.count
        averages: dict[str, Any] = {
            name: value / max(used_count, 1) if kept else math.nan for name, value in zip(sums, all_sums, strict=True)
        }
        if model.joiner.simple is None:
            averages["simple_loss"] = None
        if self.experiment.loss.ctc_weight == 0:
            averages["ctc_loss"] = None
        return {
            **averages,
            "lr": lr,
            "grad_norm": norm,
            "batch_seconds": audio_s,
            "batch_size": round(totals[3]),
        }
