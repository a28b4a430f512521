"""Length of a run, its checkpoints, its precision, its processes, and the choice of the weights that decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from asr.errors import UserError
from asr.models.context import Milliseconds, check_chunk, check_left_context
from losses.memory import parse_limit


@dataclass
class TrainingConfig:
    """How long training goes on and what it leaves behind.

    Args:
        max_epochs: passes over the training cuts.
        max_steps: stops after this many optimizer steps; 0 is no such limit.
        accumulation: batches whose gradients are added up before a step.
        normalize: what a step's summed loss is divided by, counted over all its batches: "tokens" or "utterances".
        precision: of matrix products: "fp32", "bf16", "fp16" (both autocast; the latter with a scaled loss), or "auto":
            bf16 where the device computes it natively, else fp32. Weights, their gradients and the lattice are float32.
        precision_overrides: of modules by name, like {encoder.subsampling: fp32}.
        chunk_ms: chunks of the attention, one drawn for each step: multiples of 40 ms, or full for full context.
            Frames of a chunk see each other and what lies before it. With several, one model decodes at any of them,
            and at those between. What is given twice is drawn twice as often.
        left_context_ms: how far the frames of a chunk see back beyond it, one drawn for each step with a chunk:
            multiples of 40 ms, or full.
        chunks_from: fraction of the run with full context alone, before chunks are drawn.
        dual_mode: a step hears each batch twice, with full context and with one of the chunks, and takes the mean of
            both losses (Yu et al. 2021, "Dual-mode ASR", without its distillation); a step takes twice as long.
        init_from: checkpoint whose weights training begins with; none for new ones. With another tokenizer, tokens of
            the same symbol keep their rows. A run that is resumed does not need it.
        freeze: parts of the model that keep their weights, by name, like [encoder.subsampling, predictor].
        ema_decay: decay of the exponential moving average of the weights; 0 is off.
        log_every_steps: steps between two lines of metrics.
        valid_every_epochs: epochs between two validations.
        errors_in: what validation counts, and so what weights are chosen by: words, or characters for texts without
            spaces.
        checkpoint_every_steps: steps between two checkpoints; each epoch also ends with one.
        keep_last: newest checkpoints that are kept.
        max_bad_batches: batches with a non-finite loss or gradient that are skipped before the run stops.
        tensorboard: also write TensorBoard events.
    """

    max_epochs: int = 30
    max_steps: int = 0
    accumulation: int = 1
    normalize: Literal["tokens", "utterances"] = "tokens"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    precision_overrides: dict[str, Literal["fp32", "bf16", "fp16"]] = field(default_factory=dict)
    chunk_ms: list[Milliseconds] = field(default_factory=lambda: ["full", "full", 160, 320, 640, 1280])
    left_context_ms: list[Milliseconds] = field(default_factory=lambda: ["full", 2560, 5120])
    chunks_from: float = 0.0
    dual_mode: bool = False
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    ema_decay: float = 0.999
    log_every_steps: int = 10
    valid_every_epochs: int = 1
    errors_in: Literal["words", "characters"] = "words"
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
        for name, check in (("chunk_ms", check_chunk), ("left_context_ms", check_left_context)):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"training.{name}={values} needs at least one value, such as full")
            for value in values:
                check(f"training.{name}", value)
        if not 0.0 <= self.chunks_from < 1.0:
            raise ValueError(
                f"training.chunks_from={self.chunks_from} is outside [0, 1); 0 draws chunks from the start"
            )
        if self.dual_mode and all(value == "full" for value in self.chunk_ms):
            raise ValueError(f"training.dual_mode needs a chunk besides full in training.chunk_ms={self.chunk_ms}")


@dataclass
class ParallelConfig:
    """How training is spread over the processes that torchrun starts; one process alone needs none of it.

    Args:
        zero: what is shared out instead of repeated on each process: 0 nothing (DDP), 1 optimizer state, 2 gradients
            too, 3 weights too.
        replicas: of zero 2 and 3: groups of processes, each of which holds the whole model between them (HSDP); as a
            rule the number of machines, since gathered weights then stay within a machine. Divides the number of
            processes.
        gather: number format in which zero 2 and 3 send the weights of encoder blocks to each other: "bf16" halves what
            is sent; shares, gradients and their sums stay float32. Needs training.precision bf16.
        timeout_s: seconds that a process waits for the others before it gives up.
        hang_timeout_s: seconds without progress after which a process that the others wait for is named with its stack,
            and all are ended; longer than any step, also the first, which compiles. Writing a checkpoint may take 0.9
            timeout_s. 0 is off.
        tensor: processes that share each layer; only 1 exists.
        pipeline: processes that share the layers; only 1 exists.
        time: processes that share an utterance; only 1 exists.
    """

    zero: Literal[0, 1, 2, 3] = 0
    replicas: int = 1
    gather: Literal["fp32", "bf16"] = "fp32"
    timeout_s: float = 1800.0
    hang_timeout_s: float = 600.0
    tensor: int = 1
    pipeline: int = 1
    time: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "time"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} does not exist yet; leave it at 1 and share out weights "
                    "with parallel.zero=3"
                )
        if self.replicas < 1:
            raise ValueError(f"parallel.replicas={self.replicas} must be at least 1")
        if self.replicas > 1 and self.zero < 2:
            raise ValueError(
                f"parallel.replicas={self.replicas} needs gradients that are shared out, parallel.zero=2 or 3; "
                f"zero={self.zero} repeats them on every process: leave replicas at 1"
            )
        if self.gather != "fp32" and self.zero < 2:
            raise ValueError(
                f"parallel.gather={self.gather} is about weights that are shared out, parallel.zero=2 or 3; zero="
                f"{self.zero} sends none: leave it at fp32"
            )
        if not self.timeout_s > 0:
            raise ValueError(f"parallel.timeout_s={self.timeout_s} must be above 0")
        if not 0 <= self.hang_timeout_s <= self.timeout_s:
            nearest = 0 if self.hang_timeout_s < 0 else self.timeout_s
            raise ValueError(
                f"parallel.hang_timeout_s={self.hang_timeout_s} is outside [0, {self.timeout_s}], up to "
                f"parallel.timeout_s; the nearest that does is {nearest} (0 is off)"
            )

    def check(self, size: int, offload: str = "none") -> None:
        """Refuse what so many processes cannot do, also with ``memory.offload``.

        Raises:
            UserError: which value, and the nearest that they can.
        """
        if offload == "cpu" and (size == 1 or self.zero < 2):
            raise UserError(
                f"memory.offload=cpu moves what several processes share out with parallel.zero=2 or 3; this run has "
                f"{size} process{'es' if size > 1 else ''} and zero={self.zero}: "
                + ("set parallel.zero=3" if size > 1 else "choose memory.offload=file, or start several with torchrun")
            )
        if offload == "file" and self.zero == 1:
            raise UserError(
                "memory.offload=file does not go with parallel.zero=1, whose optimizer moves state between processes; "
                "set parallel.zero=2"
            )
        if size > 1 and size % self.replicas:
            nearest = max(n for n in range(1, self.replicas) if size % n == 0)
            raise UserError(
                f"parallel.replicas={self.replicas} does not divide the {size} processes of this run; the nearest "
                f"that does is {nearest}"
            )


@dataclass
class MemoryConfig:
    """What a step keeps in memory, and what it computes again instead.

    Args:
        limit: memory of each process, such as "8GiB": on CPU what is resident, without the pages of files; on CUDA what
            torch allocates. Before training starts, batches in pieces, the loss's own limit, checkpointing and offload
            are tried on the longest utterance, and what takes the least time within the limit is chosen; null is none.
        checkpointing: of the encoder (Chen et al. 2016): "none" keeps all; "selective" keeps the results of matrix
            products, convolutions and attention, and computes norms, activations and dropout again; "full" keeps what
            enters each block, and computes the rest again, block by block; "budget" gives each block one of these.
            Gradients are the same to the bit.
        activation_budget: of "budget": fraction of what the encoder keeps with "none", above 0 and at most 1. Each mode
            is measured at the start, and those that take the least time within it are chosen.
        offload: "cpu" keeps the shares of weights, gradients and optimizer state in CPU memory (parallel.zero 2 and 3
            of several processes); "file" keeps the optimizer's moments in a memory-mapped file in the output folder, of
            which the system takes out of memory what it needs room for. Results are the same to the bit.
        lower_after: a batch that memory does not hold is split and tried again; after every so many of those, larger
            pieces than it did hold are not tried any more.
    """

    limit: str | None = None
    checkpointing: Literal["none", "selective", "full", "budget"] = "none"
    activation_budget: float = 0.5
    offload: Literal["none", "cpu", "file"] = "none"
    lower_after: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.activation_budget <= 1:
            raise ValueError(f"memory.activation_budget={self.activation_budget} is outside (0, 1]; 1 keeps all")
        if self.limit is not None:
            try:
                parse_limit(self.limit)
            except ValueError as error:
                raise ValueError(f"memory.limit: {str(error).removeprefix('memory_limit=')}") from None
        if self.lower_after < 1:
            raise ValueError(f"memory.lower_after={self.lower_after} must be at least 1")


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
