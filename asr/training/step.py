"""One optimizer step: forward and backward passes of its batches, those that break it left out, the update."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asr.config import Experiment
from asr.data.batch import Batch
from asr.errors import StartAgain, UserError
from asr.models.context import Context, Milliseconds, context
from asr.models.transducer import TransducerLosses
from asr.training.faults import BadBatches
from asr.training.memory import Computing
from asr.training.optim import WeightAverage, learning_rate
from asr.training.parallel import Parallel
from asr.training.pieces import NOT_COMPILED, STAND_IN_FRAMES, Pieces, free_memory, is_out_of_memory, split, stand_in
from asr.training.precision import FIRST_SCALE, autocast, next_scale
from asr.training.ranks import Ranks

SUMS = ("loss", "transducer_loss", "simple_loss", "ctc_loss")


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
    loss_scale: float = FIRST_SCALE
    good_steps: int = 0


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
        pieces: in how many pieces each batch is computed.

    ``computing`` calls what computes; ``say`` and ``record`` take what is said and recorded of steps that memory
    did not hold; ``rate`` gives the learning rate, as `learning_rate` of a configuration.
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
        pieces: Pieces,
    ):
        self.experiment, self.config = experiment, experiment.training
        self.parallel, self.ranks, self.device = parallel, ranks, device
        self.precision, self.ema, self.total_s, self.pieces = precision, ema, total_s, pieces
        self.computing = Computing()
        self.say: Callable[[str], None] = print
        self.record: Callable[..., None] = lambda **_: None
        self.rate: Callable[[int, float, int], float] = partial(learning_rate, experiment.optim)
        self.progress = Progress()

    def _contexts(self) -> list[Context]:
        """Drawn for a step, so that its batches may be spread over processes or accumulation; each batch has a pass
        with each of them."""

        def draw(name: str, values: list[Milliseconds]) -> Milliseconds:
            return values[seed_of(self.experiment.seed, name, self.progress.step) % len(values)]

        if self.done() < self.config.chunks_from:
            return [context("full", "full")]
        chunks, both = self.config.chunk_ms, self.config.dual_mode
        drawn = draw("chunk", [chunk for chunk in chunks if chunk != "full"] if both else chunks)
        contexts = [context(drawn, draw("left context", self.config.left_context_ms))]
        return [context("full", "full"), *contexts] if both else contexts

    def _count(self, batches: list[Batch]) -> int:
        by_tokens = self.config.normalize == "tokens"
        return sum(int(b.target_lens.sum()) if by_tokens else b.size for b in batches)

    def done(self) -> float:
        """Fraction of the run that lies behind, by the limit that will end it."""
        by_steps = self.progress.step / self.config.max_steps if self.config.max_steps else 0.0
        return max(by_steps, self.progress.consumed_s / self.total_s)

    def _forward(self, batch: Batch, heard: Context, done: float) -> TransducerLosses:
        batch = batch.to(self.device, non_blocking=True)
        with autocast(self.precision, self.device):
            losses: TransducerLosses = self.parallel.forward(
                batch.features,
                batch.feature_lens,
                batch.targets,
                batch.target_lens,
                self.experiment.loss,
                *heard,
                done=done,
            )
        return losses

    def step(self, batches: list[Batch], bad: BadBatches, own: int | None = None) -> dict[str, Any]:
        """One optimizer step over ``batches`` of each process; returns what metrics.jsonl records of it.

        The summed loss is divided by the count over all batches of all processes that are used, so that accumulation
        and several processes equal one large batch of them. Where the loss is not finite on one process, all leave out
        the batch that they compute at the time, since what they compute together needs all of them. A batch that memory
        does not hold is computed in pieces, which are batches of their own in all of this.

        Args:
            batches: as many on each process.
            bad: takes what is skipped.
            own: so many of the batches, the first, count; the others stand in for batches that are not there.

        Raises:
            TooManyBadBatches: more were skipped than the configuration allows.
            UserError: memory does not hold a batch of several processes that wait for each other, or the optimizer's
                state; what a restarted run has to know of the batch is on disk.
        """
        progress, model = self.progress, self.parallel.model
        real = len(batches) if own is None else own
        audio_s = sum(sum(b.durations_s) for b in batches[:real])
        done = self.done()
        lr = self.rate(progress.step, done, progress.epoch)
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        while True:
            self.parallel.optimizer.zero_grad(set_to_none=True)
            rounds, count = self._rounds(batches, real)
            tried = _Attempt()
            if self._gradients(rounds, count, done, tried):
                break
            free_memory()
        for batch, reason in tried.skipped:
            bad.skip(batch, progress.step + 1, reason)
        used = [self._count(tried.used), len(_distinct(tried.used)), len(tried.skipped), audio_s, real]
        sizes = sum(b.size for b in batches[:real])
        used_count, used_batches, skipped, audio_s, real_batches, size, *sums = self.ranks.sum(
            [*used, sizes, *tried.sums.values()]
        )
        if not used_batches:  # stand-ins alone: gradients of 0 are no step
            tried.kept = 0
        bad.skipped(round(skipped))
        norm = self._update(tried, max(count, 1) / max(used_count, 1), bad, used_batches)
        progress.step += 1
        progress.batch += round(real_batches)
        progress.consumed_s += audio_s
        progress.bad_batches = bad.count
        averages: dict[str, Any] = {
            name: value / max(used_count, 1) if tried.kept else math.nan
            for name, value in zip(tried.sums, sums, strict=True)
        }
        if model.joiner.simple is None:
            averages["simple_loss"] = None
        if self.experiment.loss.ctc_weight == 0:
            averages["ctc_loss"] = None
        record = {**averages, "lr": lr, "grad_norm": norm, "batch_seconds": audio_s, "batch_size": round(size)}
        return {**record, "loss_scale": progress.loss_scale} if self.precision == "fp16" else record

    def _rounds(self, batches: list[Batch], real: int) -> tuple[list[_Round], int]:
        """What is computed one after the other, as much on each process, and the count that the loss is divided by."""
        rows = self.ranks.rows([self.pieces.of(batch) for batch in batches])
        contexts = self._contexts()
        rounds = []
        for number, batch in enumerate(batches):
            agreed = max(1, *(round(row[number]) for row in rows))
            parts = split(batch, agreed)
            for piece in range(agreed):
                here = piece < len(parts)
                left_out = here and self.pieces.of(parts[piece]) == 0
                part = parts[piece] if here and not left_out else stand_in(batch)
                counts = here and number < real and not left_out
                lost = parts[piece] if left_out and number < real else None
                rounds += [
                    _Round(number, piece, agreed, batch, part, counts, lost, mode, heard)
                    for mode, heard in enumerate(contexts)
                ]
        return rounds, round(self.ranks.sum([self._count([turn.part for turn in rounds if turn.counts])])[0])

    def _gradients(self, rounds: list[_Round], count: int, done: float, tried: _Attempt) -> bool:
        """Adds up the gradients of all rounds; False if memory did not hold one and the step has to begin again."""
        progress, ranks = self.progress, self.ranks
        scale = ranks.size * (progress.loss_scale if self.precision == "fp16" else 1.0) / max(count, 1)
        tried.rounds = len(rounds)
        for number, turn in enumerate(rounds):
            if turn.left_out is not None and turn.mode == 0:
                tried.skipped.append((turn.left_out, "does not fit in memory"))
            # what is random depends on the step and the batch's place in it alone: a resumed run needs no generator
            # state, and several processes draw what one would draw
            micro = turn.number * ranks.size + ranks.rank
            piece = (turn.piece,) if turn.piece or turn.mode else ()
            mode = (turn.mode,) if turn.mode else ()
            torch.manual_seed(seed_of(self.experiment.seed, "step", progress.step, micro, *piece, *mode))
            last = number + 1 == len(rounds)
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                losses = self._tried(turn, partial(self._forward, turn.part, turn.heard, done))
                finite = losses is None or bool(torch.isfinite(losses.loss))
                broken, over = ranks.sum([not finite, losses is None])
                if over:
                    losses = None
                    free_memory()
                if over or (broken and last):
                    self._close_pass(turn, done)
                if over:
                    return False
                assert losses is not None
                if broken:
                    if turn.counts and not finite and not any(turn.part is batch for batch, _ in tried.skipped):
                        tried.skipped.append((turn.part, f"non-finite loss {losses.loss.item()}"))
                    continue
                # gradients are averaged over processes, and those of a stand-in are 0
                loss = losses.loss * (scale * turn.counts)
                if self._tried(turn, partial(_backward, loss), alone=True) is None:
                    return False
            tried.kept += 1
            if turn.counts:
                tried.used.append(turn.part)
                for name, value in zip(tried.sums, losses, strict=True):
                    tried.sums[name] += 0.0 if value is None else value.item()
        return True

    def _close_pass(self, turn: _Round, done: float) -> None:
        """Passes of next to nothing, where the last batch of a step has no backward pass, which engines wait for since
        its forward pass: to average whole gradients over processes, or to give up the weights that were gathered, which
        would hide the shares and their gradients from the optimizer's step, and its new weights from the next one."""
        if self.ranks.size > 1:
            # in the thread that computes: see `Computing`
            self.computing.call(lambda: (self._forward(stand_in(turn.batch), turn.heard, done).loss * 0.0).backward())

    def _tried(self, turn: _Round, compute: Callable[[], Any], alone: bool = False) -> Any:
        """What it returns; None if memory did not suffice, and the batch is to be computed in more pieces.

        Several processes can begin the step again where none waits for another within: before the backward pass, and
        with whole weights.

        Raises:
            StartAgain: they cannot.
            UserError: there is nothing smaller to try.
        """
        try:
            return self.computing.call(compute)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        if reason == NOT_COMPILED:
            self.computing.renew()
        step, ids = self.progress.step + 1, turn.batch.cut_ids
        if turn.left_out is not None:
            raise UserError(f"out of memory ({reason}) for {STAND_IN_FRAMES / 100} s of audio; the model is too large")
        done = self.pieces.ran_out(turn.batch, turn.part, turn.agreed)
        self.record(step=step, cut_ids=ids, pieces=turn.agreed, done=done)
        text = (
            f"step {step}: out of memory ({reason}); batch of {turn.batch.size} utterances {done}; utterances:"
            f" {', '.join(ids)}"
        )
        if self.ranks.size > 1 and (alone or self.parallel.sharded):
            raise StartAgain(f"rank {self.ranks.rank}: {text}; the run has to start again from its newest checkpoint")
        self.say(f"warning: {text}")
        return None

    def _update(self, tried: _Attempt, share: float, bad: BadBatches, used_batches: float) -> float:
        """Clips the gradients and takes the optimizer's step, unless they are not finite; their norm.

        Args:
            tried: how they came about.
            share: what they are multiplied by if batches were skipped, each divided by the count of all.
            bad: takes what is skipped.
            used_batches: number of batches in the gradients, of all processes.
        """
        progress, optim = self.progress, self.experiment.optim
        scale = progress.loss_scale if self.precision == "fp16" else 1.0
        factor = (share if 0 < tried.kept < tried.rounds else 1.0) / scale
        if factor != 1.0:
            self.parallel.scale_gradients(factor)
        norm = self.parallel.clip_grad_norm(optim.clip_grad_norm or math.inf)
        overflow = not math.isfinite(norm)
        if tried.kept and overflow and scale == 1.0:
            for batch in _distinct(tried.used):
                bad.skip(batch, progress.step + 1, f"non-finite gradient norm {norm}")
            bad.skipped(round(used_batches))
        elif tried.kept and not overflow:
            try:
                self.parallel.optimizer.step()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    "out of memory for the optimizer's state; share it out with parallel.zero=2 on several processes, "
                    "or keep it in a file with memory.offload=file"
                ) from None
            if self.ema is not None:
                self.ema.update(self.parallel.model, progress.step)
        if self.precision == "fp16" and tried.kept:
            progress.loss_scale, progress.good_steps = next_scale(progress.loss_scale, progress.good_steps, overflow)
        return norm


def _distinct(batches: list[Batch]) -> list[Batch]:
    """Each once, however many passes it had."""
    return list({id(batch): batch for batch in batches}.values())


def _backward(loss: Tensor) -> bool:
    loss.backward()
    return True


@dataclass
class _Round:
    """One forward and backward pass of this process.

    Args:
        number: of the batch in the step.
        piece: number of the piece of the batch.
        agreed: pieces of each batch of the round.
        batch: the whole batch.
        part: what is computed.
        counts: whether it does; if not, it stands in for what is not there.
        left_out: an utterance that is known not to fit, which the part stands in for.
        mode: number of the pass over this piece: with ``training.dual_mode`` there are two.
        heard: chunk and left context of the pass.
    """

    number: int
    piece: int
    agreed: int
    batch: Batch
    part: Batch
    counts: bool
    left_out: Batch | None
    mode: int
    heard: Context


@dataclass
class _Attempt:
    """What the rounds of a step came to on this process.

    Args:
        sums: of the losses.
        used: what is in the gradients.
        skipped: what is not, and why.
        kept: rounds in which nothing was skipped; 0 where none of them had a batch that counts.
        rounds: all of them.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    used: list[Batch] = field(default_factory=list)
    skipped: list[tuple[Batch, str]] = field(default_factory=list)
    kept: int = 0
    rounds: int = 0
