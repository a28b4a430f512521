"""The learning-rate range test (Smith 2017, "Cyclical learning rates", section 3.3): a short training whose learning
rate grows from step to step shows where the loss begins to fall, where it is least, and where the training diverges."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from asr.atomic import write_whole
from asr.config import Experiment
from asr.errors import UserError
from asr.training.faults import BadBatches
from asr.training.trainer import TrainData, Trainer

BROKEN = 4.0  # times the least smoothed loss: the training has diverged
LEAST_FALL = 0.02  # of the first smoothed loss: with less, the loss has not fallen
BELOW_LEAST = 10.0  # a rate that is kept for long breaks a training that it helps for some steps


@dataclass(frozen=True)
class RangeConfig:
    """How the learning rate grows.

    Args:
        steps: optimizer steps from the first learning rate to the last; fewer are taken if the training diverges.
        first: learning rate of the first step.
        last: learning rate of the last step.
    """

    steps: int = 200
    first: float = 1e-6
    last: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise UserError(f"--steps {self.steps} is too few for a curve; pass at least 10")
        if not 0 < self.first < self.last < math.inf:
            raise UserError(f"--first {self.first} must be above 0 and below --last {self.last}, which must be finite")

    def rate(self, step: int) -> float:
        """Learning rate of a step from 0 on: from each to the next the same factor."""
        return float(self.first * (self.last / self.first) ** (step / (self.steps - 1)))


@dataclass(frozen=True)
class RangeResult:
    """Learning rates that a curve shows.

    Args:
        suggestion: a tenth of ``lowest``, by a rule of thumb. Where the loss falls fastest is no better guide here: the
            first fall, of a model that learns to emit blanks, needs next to no learning rate.
        fastest: where the smoothed loss falls fastest, before it is least.
        lowest: where the smoothed loss is least.
    """

    suggestion: float
    fastest: float
    lowest: float


@dataclass(frozen=True)
class RangeCurve:
    """What a range test has seen.

    Args:
        rates: learning rate of each step.
        losses: of each step, per token or utterance as the training has it; not finite where it broke.
        window: steps that the smoothing goes over.
        diverged: whether it ended before its last learning rate.
    """

    rates: list[float]
    losses: list[float]
    window: int
    diverged: bool

    @property
    def smoothed(self) -> list[float]:
        """The exponential moving average of the finite losses, begun without a bias to 0."""
        return smooth(self.losses, self.window)

    @property
    def found(self) -> RangeResult | None:
        """What the curve says; None if the smoothed loss never falls."""
        smoothed = self.smoothed
        lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
        if smoothed[0] - smoothed[lowest] <= LEAST_FALL * abs(smoothed[0]):
            return None
        # over a window, since each step is of other utterances
        falls = {end: smoothed[end] - smoothed[max(0, end - self.window)] for end in range(1, lowest + 1)}
        end = min(falls, key=falls.__getitem__)
        fastest = self.rates[(max(0, end - self.window) + end) // 2]
        return RangeResult(self.rates[lowest] / BELOW_LEAST, fastest, self.rates[lowest])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average over about ``window`` values, without a bias to 0; passes over what is not finite."""
    decay = 1 - 1 / max(1, window)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight if weight else math.inf)
    return result


def measure_range(
    experiment: Experiment, data: TrainData, out_dir: Path, config: RangeConfig, device: str = "cpu"
) -> RangeCurve:
    """Trains new weights, or those of ``training.init_from``, with a growing learning rate; keeps none of them.

    Schedule and limits of the configuration do not matter; its optimizer, batches and ``optim.lr_scales`` do.

    Args:
        experiment: resolved configuration.
        data: of training; nothing is validated.
        out_dir: holds a hidden folder meanwhile.
        config: how the learning rate grows.
        device: "cpu" or "cuda[:N]".

    Raises:
        UserError: what a training would refuse.
    """
    training = replace(experiment.training, ema_decay=0.0, max_steps=0)
    with TemporaryDirectory(prefix=".lr-range-", dir=out_dir) as name:
        trainer = Trainer(replace(experiment, training=training), data, Path(name), device)
        trainer.stepper.rate = lambda step, *_: config.rate(step)
        trainer.stepper.say = trainer.line.say
        window = max(1, config.steps // 20)
        rates: list[float] = []
        losses: list[float] = []
        for record in _records(trainer, config.steps):
            rates.append(record["lr"])
            losses.append(record["loss"])
            smoothed = smooth(losses, window)
            trainer.line.show(f"step {len(losses)}/{config.steps} loss {losses[-1]:.3f} lr {rates[-1]:.1e}")
            if not math.isfinite(losses[-1]) or smoothed[-1] > BROKEN * min(smoothed):
                break
    if not any(map(math.isfinite, losses)):
        raise UserError(
            f"the loss is not finite at --first {config.first} already; pass a smaller one, or look at the cuts"
        )
    return RangeCurve(rates, losses, window, len(losses) < config.steps)


def _records(trainer: Trainer, steps: int) -> Iterator[dict[str, Any]]:
    """So many steps, over as many epochs as they take."""
    # the first bad batch ends the test anyway
    bad = BadBatches(trainer.out_dir / "bad_batches", steps, 0, lambda **_: None, lambda _: None)
    trainer.model.train()
    while True:
        for batches, own in trainer.batches_of_epoch():
            yield trainer.step(batches, bad, own)
            if trainer.progress.step >= steps:
                return
        trainer.progress.epoch, trainer.progress.batch = trainer.progress.epoch + 1, 0


def range_text(curve: RangeCurve) -> str:
    """What the curve suggests, in a line."""
    if curve.found is None:
        return (
            f"the loss does not fall between {curve.rates[0]:.1e} and {curve.rates[-1]:.1e}: pass another --first or "
            "--last, or more --steps"
        )
    found = curve.found
    end = f"the training diverges at {curve.rates[-1]:.1e}" if curve.diverged else "the training does not diverge"
    return (
        f"optim.lr={found.suggestion:.1e} suggested, a tenth of {found.lowest:.1e}, where the loss is least; it falls "
        f"fastest at {found.fastest:.1e}, and {end}"
    )


def range_figure(curve: RangeCurve) -> Figure:
    """Loss against the learning rate. Drawn through matplotlib's objects, as ``emission_figure``."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color="C0", alpha=0.35, linewidth=1, label="each step")
    axes.plot(curve.rates, curve.smoothed, color="C0", label="smoothed")
    if curve.found is not None:
        for number, (name, rate) in enumerate(asdict(curve.found).items(), 1):
            axes.axvline(rate, color=f"C{number}", linestyle="--", label=f"{name}, {rate:.1e}")
    finite = [value for value in curve.losses if math.isfinite(value)]
    axes.set_ylim(0.9 * min(finite), 1.05 * max(curve.smoothed))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def write_range(out_dir: Path, curve: RangeCurve, experiment: Experiment, command: str) -> None:
    """Writes ``lr_range.json`` and ``lr_range.png``; what does not exist or is not finite is null in JSON."""
    points = [
        {"step": number, "lr": lr, "loss": loss if math.isfinite(loss) else None, "smoothed": mean}
        for number, (lr, loss, mean) in enumerate(zip(curve.rates, curve.losses, curve.smoothed, strict=True), 1)
    ]
    content = {
        **dict.fromkeys(("suggestion", "fastest", "lowest")),
        **(asdict(curve.found) if curve.found else {}),
        "diverged": curve.diverged,
        "smoothed_over_steps": curve.window,
        "optimizer": experiment.optim.name,
        "seed": experiment.seed,
        "command": command,
        "points": points,
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(out_dir / "lr_range.json", lambda file: file.write(text.encode()))
    write_whole(out_dir / "lr_range.png", lambda file: range_figure(curve).savefig(file, format="png", dpi=120))
