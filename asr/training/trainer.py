"""The training loop: batches in, checkpoints and metrics out; resumes to the bit."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asr import checkpoint
from asr.checkpoint_folder import split
from asr.config import Experiment, dump
from asr.data.batch import Batch
from asr.data.loader import BatchLoader, DataConfig, eval_loader, explain_dead_worker, train_loader
from asr.data.packed_cuts import durations_of, mean_share
from asr.decoding.score import rate_name
from asr.environment import cpu
from asr.errors import CheckpointError, Terminated, UserError
from asr.models.transducer import build_model, parameter_counts
from asr.training.activations import checkpoint_activations
from asr.training.faults import BadBatches, Termination
from asr.training.fine_tuning import begin_with, freeze
from asr.training.memory_plan import plan_memory
from asr.training.metrics import MetricsWriter, ProgressLine, clock
from asr.training.optim import WeightAverage, check_state
from asr.training.parallel import Parallel, fill, whole
from asr.training.pieces import Pieces
from asr.training.precision import override_precision, resolve_precision
from asr.training.ranks import SAVED, Ranks
from asr.training.step import Progress, Stepper, seed_of
from asr.training.train_data import TrainData
from asr.training.validation import Validation, validate
from asr.training.watchdog import Watchdog

if TYPE_CHECKING:
    from asr.training.sharded_checkpoint import FolderSaver


@dataclass
class TrainResult:
    """How a run ended: reason "finished" or "terminated" (SIGTERM, also after the last step), newest checkpoint."""

    reason: str
    step: int
    epoch: int
    checkpoint: Path | None
    best: Validation | None


def _epoch_seconds(cuts: Any, config: DataConfig) -> float:
    """Audio of one epoch: stored features hold every speed and copy already, on the fly they multiply the cuts."""
    seconds = float((durations_of(cuts) * mean_share(cuts)).sum())
    if config.features.storage == "stored":
        return seconds
    return seconds * config.augment.copies * sum(1 / factor for factor in config.augment.speed_factors)


class Trainer:
    """One run in one folder.

    Args:
        experiment: resolved configuration; saved as config.yaml and in every checkpoint.
        data: cuts and tokenizer.
        out_dir: receives checkpoints/, best.pt, metrics.jsonl, tensorboard/, bad_batches/.
        device: "cpu", "cuda" or "cuda:N".
        command: the command line, for the report.
        ranks: the processes of the run; all of them make a Trainer, and call its methods together. The first writes.
        resumed: whether ``resume`` follows, so that the weights to begin with do not matter.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: TrainData,
        out_dir: Path,
        device: str,
        command: str | None = None,
        ranks: Ranks | None = None,
        resumed: bool = False,
    ):
        self.experiment = experiment
        self.ranks = ranks or Ranks()
        self.config = experiment.training
        self.data = data
        self.out_dir = Path(out_dir)
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")
        self.command = command or shlex.join(sys.argv)
        self.precision = resolve_precision(self.config.precision, self.device)
        if experiment.parallel.gather != "fp32" and experiment.parallel.gather != self.precision:
            raise UserError(
                f"parallel.gather={experiment.parallel.gather} needs products of that format, training.precision is "
                f"{self.precision} here; set both to bf16, or leave gather at fp32"
            )
        self.checkpoints = self.out_dir / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.line = ProgressLine(quiet=not self.ranks.first)
        torch.manual_seed(seed_of(experiment.seed, "weights"))
        stats = data.stats
        self.model = build_model(
            experiment,
            data.tokenizer.vocab_size,
            None if stats is None else torch.as_tensor(stats.mean),
            None if stats is None else torch.as_tensor(stats.scale),
            data.tokenizer.spelling() if experiment.loss.ctc_targets == "characters" else None,
        ).to(self.device)
        if self.config.init_from is not None and not resumed:
            begin_with(self.model, Path(self.config.init_from), experiment, data.tokenizer, self.line.say)
        # before parts are wrapped, which changes their names, and before their memory is measured
        freeze(self.model, self.config.freeze)
        override_precision(self.model, self.config.precision_overrides, self.device)
        memory = plan_memory(
            experiment,
            self.model,
            data.train_cuts,
            data.tokenizer,
            self.ranks,
            self.device,
            self.precision,
            self.line.say,
        )
        self._decoding_s = memory.decoding_s
        checkpoint_activations(self.model.encoder, memory.modes)
        # a CTC head without its loss has no gradient
        unused = self.model.ctc_head is not None and experiment.loss.ctc_weight == 0
        self.parallel = Parallel(
            self.model,
            experiment.parallel,
            experiment.optim,
            self.ranks,
            unused,
            memory.offload,
            self.out_dir / f"optimizer-rank{self.ranks.rank}",
        )
        self.saver: FolderSaver | None = None
        if self.ranks.size > 1:
            from asr.training.sharded_checkpoint import FolderSaver

            self.saver = FolderSaver(
                self.ranks, self.config.keep_last, experiment.parallel.timeout_s, lambda text: self.line.say(text)
            )
        self.ema = WeightAverage(self.model, self.config.ema_decay) if self.config.ema_decay > 0 else None
        total_s = self.config.max_epochs * _epoch_seconds(data.train_cuts, experiment.data)
        if total_s <= 0:
            raise UserError("the training cuts are empty; run prepare and features, and look at bad_rows.txt")
        suffix = f"-rank{self.ranks.rank}" if self.ranks.size > 1 else ""
        parts = (experiment.model, experiment.loss, experiment.memory, experiment.parallel)
        settings = repr((*parts, self.precision, self.config.precision_overrides, self.device.type, self.ranks.size))
        folder, lower_after = self.out_dir / "memory", experiment.memory.lower_after
        pieces = Pieces(folder, lower_after, suffix=suffix, settings=settings)
        if memory.pieces is not None:
            costs, limit = memory.pieces
            pieces = Pieces(folder, lower_after, costs.cost, limit, suffix, settings)
        self.stepper = Stepper(
            replace(experiment, loss=memory.loss),
            self.parallel,
            self.ranks,
            self.device,
            self.precision,
            self.ema,
            total_s,
            pieces,
        )
        self.watchdog = Watchdog(self.ranks, experiment.parallel, self.out_dir / "hangs")

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.stepper.progress

    def step(self, batches: list[Batch], bad: BadBatches, own: int | None = None) -> dict[str, Any]:
        """One optimizer step, see `Stepper.step`."""
        return self.stepper.step(batches, bad, own)

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes the next step checkpoint, then removes old ones; a failure in between loses nothing.

        One process writes a file. Several begin to write a folder together and go on; `FolderSaver` says what fails.
        Any number goes on from either.
        """
        progress = self.progress
        ema = None if self.ema is None else self.ema.weights
        payload = checkpoint.make_payload(
            self.model.state_dict(),
            self.experiment,
            self.data.tokenizer,
            step=progress.step,
            epoch=progress.epoch,
            training={"optimizer": self.parallel.optimizer_state(), "ema": ema, "progress": dict(vars(progress))},
        )
        if self.saver is None:
            path = self.checkpoints / checkpoint.step_name(progress.step)
            checkpoint.atomic_save(payload, path)
            checkpoint.prune(self.checkpoints, self.config.keep_last)
        else:
            path = self.checkpoints / checkpoint.step_name(progress.step, "")
            self.saver.save(payload, path)
        return path

    def _save_in_time(self) -> Path:
        with self.watchdog.patience():
            return self.save()

    def _saved(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            OSError: it could not be written.
        """
        if self.saver is not None:
            with self.watchdog.patience():
                self.saver.close()

    def resume(self, path: Path) -> None:
        """Continues exactly after the step that ``path`` was written at.

        Raises:
            CheckpointError: unreadable, of another model or tokenizer, or without optimizer state.
        """
        if path.is_dir():
            self.ranks.from_first(lambda: checkpoint.verify(path))
        found = checkpoint.outline(path)
        if "training" not in found:
            raise CheckpointError(f"{path} holds weights only; resume from a checkpoint in checkpoints/")
        checkpoint.check_weights(self.model, found["model"], f"checkpoint {path}")
        if foreign := found["training"]["optimizer"].keys() - found["model"].keys():
            raise CheckpointError(
                f"checkpoint {path} has optimizer state of {min(foreign)}, which is no parameter; it is of another"
                " version of the toolkit: go on with that one, or begin a training of its own (--resume none)"
            )
        check_state(found["training"]["optimizer"], self.experiment.optim, path)
        if checkpoint.tokenizer_of(found).to_state() != self.data.tokenizer.to_state():
            raise CheckpointError(
                f"checkpoint {path} was trained with another tokenizer of the same size; pass that one"
            )
        state: dict[str, Any] = {"optimizer": self.parallel.new_optimizer_state(found["training"]["optimizer"])}
        averaged = found["training"]["ema"] is not None
        if self.ema is not None and averaged:
            state["ema"] = self.ema.weights
        _, tensors = split({"model": self.model.state_dict(), "training": state})
        fill(tensors, path, found)
        if self.ema is not None and not averaged:  # turned on later: starts from these weights
            self.ema.load(self.model.state_dict())
        if self.saver is not None:
            self.saver.resumed(path)
        self.stepper.progress = Progress(**found["training"]["progress"])
        self.line.say(f"resumed from {path}: epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}")

    # -- validation ---------------------------------------------------------------------------------------------------

    def validate(self, metrics: MetricsWriter, stop: Termination) -> Validation:
        """Validates the averaged weights where there are any, and keeps them as best.pt when they are.

        Each process takes its share of the cuts.

        Raises:
            Terminated: SIGTERM came; nothing was recorded.
        """
        weights = self.parallel.weights() if self.ema is None else whole(self.ema.weights)
        result = self._judge(weights, metrics, stop)
        progress = self.progress
        if result.rank < (progress.best_errors, progress.best_loss):
            before = progress.best_errors, progress.best_loss
            progress.best_errors, progress.best_loss = result.rank
            try:
                with self.watchdog.patience():
                    self.ranks.from_first(lambda: self._save_best(weights))
            except OSError as error:
                if self.saver is None:
                    raise
                progress.best_errors, progress.best_loss = before  # what best.pt is of
                reason = error.strerror or error
                self.line.say(f"error: {self.out_dir / 'best.pt'} is not written: {reason}; training goes on")
        return result

    def _judge(self, weights: dict[str, Tensor], metrics: MetricsWriter, stop: Termination) -> Validation:
        with torch.device("meta"):  # neither drawn nor copied: the model is made of the weights themselves
            model = build_model(self.experiment, self.data.tokenizer.vocab_size)
        model.load_state_dict(weights, assign=True)
        loader = eval_loader(
            self.data.valid_cuts,
            self.data.tokenizer,
            self.experiment.data,
            max_duration_s=self._decoding_s,
            rank=self.ranks.rank,
            size=self.ranks.size,
        )
        batches = self._together(loader, stop)
        result = self.stepper.computing.call(
            partial(validate, model, batches, self.data.tokenizer, self.experiment, self.device, ranks=self.ranks)
        )
        progress = self.progress
        metrics.write(
            "valid",
            step=progress.step,
            epoch=progress.epoch,
            time_s=progress.time_s,
            loss=result.loss,
            wer=result.wer,
            errors=result.errors,
            words=result.words,
        )
        rate = rate_name(self.config.errors_in)
        self.line.say(
            f"epoch {progress.epoch}: validation loss {result.loss:.4f} a token, {rate} {100 * result.wer:.2f}%"
            f" [{result.errors} / {result.words}]{self._part(result.utterances)}"
        )
        return result

    def _part(self, utterances: int) -> str:
        given = self.data.num_valid or utterances
        return f" on {utterances} of {given} utterances" if given != utterances else ""

    def _together(self, loader: BatchLoader, stop: Termination) -> Iterator[Batch]:
        """The same batches, with a look for signals after each: a pass over many of them outlasts the grace of most
        schedulers. A process whose share is used up looks on with the others."""
        batches = iter(loader)
        while self.ranks.any((batch := next(batches, None)) is not None):
            if batch is not None:
                yield batch
            self._check(stop)

    def _save_best(self, weights: dict[str, Tensor]) -> None:
        payload = checkpoint.make_payload(
            weights, self.experiment, self.data.tokenizer, step=self.progress.step, epoch=self.progress.epoch
        )
        checkpoint.atomic_save(payload, self.out_dir / "best.pt")

    # -- the loop -----------------------------------------------------------------------------------------------------

    def batches_of_epoch(self) -> Iterator[tuple[list[Batch], int]]:
        """Batches of this process for each step, and how many of them count."""
        loader: BatchLoader = train_loader(
            self.data.train_cuts,
            self.data.tokenizer,
            self.experiment.data,
            seed=self.experiment.seed,
            epoch=self.progress.epoch,
            skip_batches=self.progress.batch,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            size=self.ranks.size,
        )
        batches, left = iter(loader), loader.own
        while group := list(islice(batches, self.config.accumulation)):
            yield group, min(left, len(group))
            left -= len(group)

    def _finished(self) -> bool:
        # at the step limit an epoch may still have to be closed with its validation
        closed = self.progress.batch == 0
        return self.progress.epoch >= self.config.max_epochs or (closed and self._at_step_limit())

    def _at_step_limit(self) -> bool:
        return bool(self.config.max_steps) and self.progress.step >= self.config.max_steps

    def run(self, stop: Termination) -> TrainResult:
        """Trains to the end, or until ``stop``; either way the newest state is on disk afterwards."""
        metrics = self._begin() if self.ranks.first else MetricsWriter(None, False)
        # files are as the first process leaves them before any other looks
        self.ranks.wait()
        say = self.line.say if self.ranks.first else lambda text: print(f"rank {self.ranks.rank}: {text}", flush=True)
        self.stepper.say = say
        self.stepper.record = lambda **fields: metrics.write("out_of_memory", **fields)
        bad = BadBatches(
            self.out_dir / "bad_batches",
            self.config.max_bad_batches,
            self.progress.bad_batches,
            lambda **fields: metrics.write("bad_batch", **fields),
            say,
            f"-rank{self.ranks.rank}" if self.ranks.size > 1 else "",
        )
        saved = next(reversed(checkpoint.step_checkpoints(self.checkpoints)), None)
        reason, best = "failed", None
        self.watchdog.start()
        try:
            while not self._finished():
                self._epoch(bad, metrics, stop)
                best = self._close_epoch(metrics, stop) or best
                saved = self._save_in_time()
            self._saved()
            reason = "finished"
        except Terminated:
            saved = self._save_in_time()
            self._saved()
            reason = "terminated"
            signal_name = "interrupted" if stop.interrupted else "SIGTERM"
            self.line.say(f"{signal_name}: saved {saved}; continue with --resume auto")
        except RuntimeError as error:
            # torch reports a killed data worker from a signal handler, wherever the main process happens to be
            explained = explain_dead_worker(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.watchdog.stop()
            metrics.write("end", step=self.progress.step, reason=reason, time_s=self.progress.time_s)
            metrics.close()
            if self.saver is not None:
                self.saver.wait()  # also where the run failed: processes that end would leave it half-written
        return TrainResult(reason, self.progress.step, self.progress.epoch, saved, best)

    def _begin(self) -> MetricsWriter:
        """Readies the folder for what this run writes, and says what begins."""
        for path in checkpoint.set_aside_later(self.checkpoints, self.progress.step):
            self.line.say(f"warning: a checkpoint of a later step than this run's is set aside as {path}")
        best_path = self.out_dir / "best.pt"
        if self.progress.step == 0 and best_path.is_file():  # another run's; averaging would take it for a candidate
            best_path.replace(best_path.with_name("best.pt.old"))
        (self.out_dir / "config.yaml").write_text(dump(self.experiment), encoding="utf-8")
        metrics = MetricsWriter(self.out_dir, self.config.tensorboard, self.progress.step, self.line.say)
        counts = parameter_counts(self.model)
        metrics.write(
            "start",
            command=self.command,
            parameters=counts["total"],
            device=str(self.device),
            torch=torch.__version__,
            precision=self.precision,
            processes=self.ranks.size,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            machine=f"{cpu()['model']}, {os.cpu_count()} cores",
            train_cuts=len(self.data.train_cuts),
            seed=self.experiment.seed,
        )
        parts = ", ".join(f"{name} {value:,}" for name, value in counts.items() if name != "total")
        if frozen := sum(p.numel() for p in self.model.parameters() if not p.requires_grad):
            parts += f"; {frozen:,} more are frozen"
        self.line.say(
            f"{counts['total']:,} parameters ({parts}), precision {self.precision}, device {self.device}"
            + (f", {self.ranks.size} processes, zero {self.experiment.parallel.zero}" if self.ranks.size > 1 else "")
        )
        parallel = self.experiment.parallel
        if self.ranks.size == 1 and parallel.zero:
            self.line.say(f"parallel.zero={parallel.zero} shares out nothing: this run has one process")
        return metrics

    def _check(self, stop: Termination) -> None:
        """Raises Terminated on all processes if a signal has come to one.

        One that comes while they ask each other is kept for the next time, since the others do not know of it.
        """
        if self.ranks.any(stop.requested):
            stop.requested = True
            raise Terminated

    def _epoch(self, bad: BadBatches, metrics: MetricsWriter, stop: Termination) -> None:
        """The rest of the current epoch, or up to the step limit.

        Raises:
            Terminated: SIGTERM came; the state is that after a whole step.
        """
        self._check(stop)
        if self._at_step_limit():
            return
        self.model.train()
        progress = self.progress
        mark = time.monotonic()
        window_s, window_audio_s, window_wait_s = 0.0, 0.0, 0.0
        for batches, own in self.batches_of_epoch():
            wait_s = time.monotonic() - mark
            record = self.step(batches, bad, own)
            now = time.monotonic()
            progress.time_s += now - mark
            window_s, window_wait_s, mark = window_s + now - mark, window_wait_s + wait_s, now
            window_audio_s += record["batch_seconds"]
            speed = window_audio_s / max(window_s, 1e-9)
            if progress.step % self.config.log_every_steps == 0:
                metrics.write(
                    "train",
                    step=progress.step,
                    epoch=progress.epoch,
                    batch=progress.batch,
                    time_s=progress.time_s,
                    **record,
                    audio_s_per_s=speed,
                    data_wait_fraction=window_wait_s / max(window_s, 1e-9),
                )
                window_s, window_audio_s, window_wait_s = 0.0, 0.0, 0.0
            left_s = (1 / max(self.stepper.done(), 1e-9) - 1) * progress.time_s
            self.line.show(
                f"epoch {progress.epoch + 1}/{self.config.max_epochs} step {progress.step} loss {record['loss']:.3f}"
                f" lr {record['lr']:.1e} norm {record['grad_norm']:.2f} {speed:.0f} audio s/s ETA {clock(left_s)}"
            )
            self._check(stop)
            if self.saver is not None:
                self.saver.poll()
            if self._at_step_limit():
                break
            if progress.step % self.config.checkpoint_every_steps == 0:
                self._save_in_time()
                mark = time.monotonic()
        self._check(stop)

    def _close_epoch(self, metrics: MetricsWriter, stop: Termination) -> Validation | None:
        """Counts the epoch as done, with its validation if one is due; on SIGTERM it stays open for the resumed run."""
        progress = self.progress
        open_at = progress.epoch, progress.batch
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if progress.epoch % self.config.valid_every_epochs and not self._finished():
            return None
        try:
            return self.validate(metrics, stop)
        except Terminated:
            progress.epoch, progress.batch = open_at
            raise


def find_resume(resume: str, out_dir: Path, say: Any = print) -> Path | None:
    """The checkpoint that ``--resume`` means: "auto" the newest whole one, "none" nothing, else a path.

    Raises:
        CheckpointError: "auto", and there are checkpoints, but none is whole.
    """
    if resume == "none":
        return None
    if resume == "auto":
        folder = Path(out_dir) / "checkpoints"
        newest = checkpoint.newest_good(folder, say)
        if newest is None and checkpoint.step_checkpoints(folder):
            raise CheckpointError(f"all checkpoints in {folder} are damaged; --resume none starts anew")
        return newest
    return Path(resume)


def train(
    experiment: Experiment,
    data: TrainData,
    out_dir: Path,
    *,
    resume: str = "auto",
    device: str = "cpu",
    command: str | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Trains in ``out_dir`` and writes report.html there.

    Args:
        experiment: resolved configuration.
        data: cuts, tokenizer and feature statistics.
        out_dir: may hold an earlier part of the same run.
        resume: "auto" goes on from the newest whole checkpoint of ``out_dir`` if there is one; "none" starts anew; else
            the path of a step checkpoint.
        device: "cpu" or "cuda[:N]", this process's own.
        command: the command line that the report shows.
        ranks: the processes of the run, of `ranks.started`; each of them calls this.

    Raises:
        UserError: no training cuts, a checkpoint of another model, too many bad batches, no such device.
        KeyboardInterrupt: after Ctrl-C, once the state is saved and the report written.
    """
    from asr.training.report import write_report

    ranks = ranks or Ranks()
    line = ProgressLine(quiet=not ranks.first)

    def find_start() -> Path | None:
        # who takes the place of killed processes goes on from what they saved, wherever they had begun
        wanted = "auto" if ranks.noted_before(SAVED) else resume
        return find_resume(wanted, Path(out_dir), line.say)

    start = ranks.from_first(find_start)
    trainer = Trainer(experiment, data, Path(out_dir), device, command, ranks, resumed=start is not None)
    if start is not None:
        trainer.resume(start)
    with Termination() as stop:
        try:
            result = trainer.run(stop)
        finally:
            # a run that failed needs its report most
            if ranks.first:
                write_report(Path(out_dir))
    if stop.interrupted:
        raise KeyboardInterrupt
    return replace(result, reason="terminated") if stop.requested else result
