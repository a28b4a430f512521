"""Length of a run, its checkpoints, its precision, and the choice of the weights that decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainingConfig:
    """How long training goes on and what it leaves behind.

    Args:
        max_epochs: passes over the training cuts.
        max_steps: stops after this many optimizer steps; 0 is no such limit.
        accumulation: batches whose gradients are added up before a step.
        normalize: what a step's summed loss is divided by, counted over all its batches: "tokens" or "utterances".
        precision: "fp32", "bf16" (autocast), or "auto": bf16 where the device computes it natively, else fp32.
        chunk_frames: chunk sizes in encoder frames of 40 ms, one drawn for each batch; 0 is full context.
        ema_decay: decay of the exponential moving average of the weights; 0 is off.
        log_every_steps: steps between two lines of metrics.
        valid_every_epochs: epochs between two validations.
        checkpoint_every_steps: steps between two checkpoints; each epoch also ends with one.
        keep_last: newest checkpoints that are kept.
        max_bad_batches: batches with a non-finite loss or gradient that are skipped before the run stops.
        tensorboard: also write TensorBoard events.
    """

    max_epochs: int = 30
    max_steps: int = 0
    accumulation: int = 1
    normalize: Literal["tokens", "utterances"] = "tokens"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    chunk_frames: list[int] = field(default_factory=lambda: [0])
    ema_decay: float = 0.999
    log_every_steps: int = 10
    valid_every_epochs: int = 1
    checkpoint_every_steps: int = 500
    keep_last: int = 5
    max_bad_batches: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        every = ("log_every_steps", "valid_every_epochs", "checkpoint_every_steps")
        for name in ("max_epochs", "accumulation", *every, "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "max_bad_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 0")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"training.ema_decay={self.ema_decay} is outside [0, 1); 0 turns it off")
        if not self.chunk_frames or min(self.chunk_frames) < 0:
            raise ValueError(f"training.chunk_frames={self.chunk_frames} needs at least one size of 0 or more")


@dataclass
class AverageConfig:
    """Which candidates are scored on the validation cuts; the best one is kept.

    Args:
        last: for each N, the mean of the weights of the N newest checkpoints (fewer if there are fewer).
        ema: the moving average of the newest checkpoint.
        best: the weights that were best in a validation during training.
    """

    last: list[int] = field(default_factory=lambda: [1, 3])
    ema: bool = True
    best: bool = True

    def __post_init__(self) -> None:
        if self.last and min(self.last) < 1:
            raise ValueError(f"average.last={self.last} must hold numbers of at least 1; [] leaves these means out")
