"""`memory`: before training starts, the choice of what keeps it within a limit, by trying on the model itself.

What counts of `memory.limit` is the resident memory of the process on CPU, without the pages of files, which the system
takes back when it needs room; on CUDA the memory allocated by torch. A step takes a part that is always there (weights,
gradients, optimizer state, moving average) and one that grows with the piece of a batch that is computed at a time; the
latter is measured, for the longest utterance and for several of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from asr.config import Experiment
from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.batch import Batch
from asr.data.fbank import FRAME_SHIFT_MS, num_feature_frames
from asr.data.loader import DataConfig
from asr.data.packed_cuts import JoinedCuts, PackedCuts, durations_of
from asr.data.tokenizer import Tokenizer
from asr.errors import UserError
from asr.models.transducer import LossConfig, Transducer, build_model
from asr.training.activations import MODES, checkpoint_activations, measure, total_bytes, within_budget
from asr.training.memory import keep_freed_memory, peak_bytes_of, return_freed_memory, used_bytes
from asr.training.pieces import free_memory, is_out_of_memory
from asr.training.precision import autocast, resolve_precision
from asr.training.ranks import Ranks
from losses.memory import parse_limit, text_of

MARGIN = 0.05  # of the limit: what allocators leave free between blocks, batches that wait to be computed
LOSS_SHARE = 0.25  # of what a piece may take, for the loss where it is held to a limit of its own
FRAMES_PER_S = 1000 / FRAME_SHIFT_MS
PROBE_FRAMES = 4000  # of the second measurement: enough that it stands out


@dataclass(frozen=True)
class Costs:
    """Bytes of a forward and backward pass over a batch."""

    fixed: float
    per_frame: float

    def cost(self, size: int, frames: int) -> float:
        """Of so many utterances, padded to so many feature frames."""
        return self.fixed + size * frames * self.per_frame


@dataclass(frozen=True)
class MemoryPlan:
    """How a run keeps to its settings of memory.

    Args:
        modes: of checkpointing, of each part of the encoder.
        offload: where the optimizer's state is.
        loss: the objective, with its own limit.
        pieces: what a piece of a batch costs, and the most that it may; None without a limit.
        decoding_s: most audio in a batch of validation.
    """

    modes: list[str]
    offload: str
    loss: LossConfig
    pieces: tuple[Costs, float] | None
    decoding_s: float


def plan_memory(
    experiment: Experiment,
    model: Transducer,
    cuts: Any,
    tokenizer: Tokenizer,
    ranks: Ranks,
    device: torch.device,
    precision: str,
    say: Callable[[str], None],
) -> MemoryPlan:
    """What the configuration says, or what it leaves to be chosen here; the latter is said.

    Args:
        experiment: its configuration.
        model: on its device, whole and not yet wrapped; left without gradients.
        cuts: of training.
        tokenizer: of their texts.
        ranks: the processes; all of them must call this.
        device: where the model is.
        precision: of products, resolved.
        say: prints a line.

    Raises:
        UserError: nothing keeps to the budget or the limit; names the smallest that can be kept to.
    """
    memory, parts = experiment.memory, 1 + len(model.encoder.blocks)
    if device.type == "cpu" and memory.limit is None:
        keep_freed_memory()
    if memory.limit is not None:
        longest = longest_utterance(cuts, tokenizer, experiment.data)
        try:
            plan, text = _within_limit(_Probe(experiment, model, longest, ranks, device, precision))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"memory.limit={memory.limit} is more than there is: not even the longest utterance, "
                f"{longest[0] / FRAMES_PER_S:.1f} s, with everything computed again, fits in the memory of {device}; "
                "leave out such long ones, or choose a smaller model"
            ) from None
        model.zero_grad(set_to_none=True)
        free_memory()
        say(text)
        return plan
    modes: list[str] = [memory.checkpointing] * parts
    if memory.checkpointing == "budget":
        modes, text = _within_budget(experiment, model, cuts, ranks, partial(autocast, precision, device))
        say(text)
    return MemoryPlan(modes, memory.offload, experiment.loss, None, experiment.decoding.batch_duration_s)


def _within_budget(
    experiment: Experiment,
    model: Transducer,
    cuts: Any,
    ranks: Ranks,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[list[str], str]:
    """Modes as the first process measures them on a full batch of utterances as long as the longest."""
    most_s = experiment.data.max_duration_s
    plain = cuts if isinstance(cuts, PackedCuts | JoinedCuts) else list(cuts)
    longest_s = min(most_s, _longest_s(float(durations_of(plain).max(initial=0.0)), experiment.data) or most_s)
    size = int(most_s // longest_s)
    frames = max(7, num_feature_frames(math.ceil(longest_s * SAMPLE_RATE_HZ), experiment.data.features))
    chosen: tuple[list[str], str] = ranks.from_first(
        lambda: within_budget(
            measure(model.encoder, size, frames, context),
            len(model.encoder.blocks),
            experiment.memory.activation_budget,
        )
    )
    return chosen


def _within_limit(probe: _Probe) -> tuple[MemoryPlan, str]:
    """The choice that takes the least time and keeps to ``memory.limit``, and a line about it.

    In this order, since each costs more time than the one before: batches in pieces, down to one utterance; the loss's
    own limit; checkpointing; the optimizer's state in a file. All processes choose by the most that one of them needs.
    """
    experiment, frames = probe.experiment, probe.longest[0]
    limit = parse_limit(experiment.memory.limit)
    least = math.inf
    modes = MODES[MODES.index(_given(experiment)) :]
    given = experiment.memory.offload
    file_can = experiment.parallel.zero != 1 and probe.device.type == "cpu"
    for offload in dict.fromkeys((given, "file" if file_can else given)):
        static = probe.static(offload)
        room = (1 - MARGIN) * limit - static
        for mode in modes:
            for share in (None, LOSS_SHARE):
                bound = None if share is None else int(share * room)
                if room <= 0 and (mode != modes[-1] or bound is not None):
                    continue  # of the last mode the need is told
                costs = probe.costs(mode, bound, room)
                need = costs.cost(1, frames)
                least = min(least, (static + need) / (1 - MARGIN))
                if need <= room:
                    loss = experiment.loss
                    if bound is not None:
                        loss = replace(loss, memory_limit=text_of(bound))
                    most_s = min(experiment.decoding.batch_duration_s, room / costs.per_frame / FRAMES_PER_S)
                    plan = MemoryPlan([mode] * len(probe.parts), offload, loss, (costs, room), most_s)
                    return plan, _said(experiment, plan, static, frames)
    if least == math.inf:  # of all that could be tried
        raise MemoryError
    raise UserError(
        f"memory.limit={experiment.memory.limit} does not hold this training: the smallest limit that holds the longest"
        f" utterance, {frames / FRAMES_PER_S:.1f} s, with everything computed again"
        f"{' and the optimizer state in a file' if file_can else ''}, is {text_of(1.02 * least)}"
    )


def _given(experiment: Experiment) -> str:
    mode = experiment.memory.checkpointing
    return mode if mode in MODES else "none"


def _said(experiment: Experiment, plan: MemoryPlan, static: float, frames: int) -> str:
    assert plan.pieces is not None
    (costs, room), memory = plan.pieces, experiment.memory
    most = max(1, int(experiment.data.max_duration_s * FRAMES_PER_S // frames))  # of the longest, in a batch
    pieces = next((n for n in range(1, most) if costs.cost(-(-most // n), frames) <= room), most)
    parts = [f"batches in up to {pieces} pieces" if pieces > 1 else "whole batches"]
    parts += [f"checkpointing {plan.modes[0]}"] if plan.modes[0] != _given(experiment) else []
    parts += [f"the loss within {plan.loss.memory_limit}"] if plan.loss != experiment.loss else []
    parts += [f"optimizer state: {plan.offload}"] if plan.offload != memory.offload else []
    return (
        f"memory.limit={memory.limit}: {', '.join(parts)}; {text_of(static)} are always there; of the {text_of(room)}"
        f" left a batch of {experiment.data.max_duration_s:g} s would take {text_of(costs.cost(most, frames))}, its"
        f" longest utterance alone {text_of(costs.cost(1, frames))}"
    )


def expected_peak(
    experiment: Experiment, vocab_size: int, longest: tuple[int, int], device: torch.device
) -> tuple[float, float]:
    """What one process is expected to hold during the largest step that the configuration allows, without a limit.

    Measured on a new model for one utterance and for several of the longest, and extended to a batch of
    ``data.max_duration_s``. Settings of the allocator change: call it in a process of its own.

    Args:
        experiment: its configuration.
        vocab_size: tokens, blank included.
        longest: feature frames and tokens of the longest utterance.
        device: where training is to be.

    Returns:
        Bytes of all, and of what is always there.

    Raises:
        UserError: this system does not tell how much memory a process has.
        MemoryError: there is not enough to measure it.
    """
    # tokens of four characters, about what word pieces of English have
    model = build_model(experiment, vocab_size, spelling=[[1, 2, 1, 2]] * vocab_size).to(device)
    precision = resolve_precision(experiment.training.precision, device)
    probe = _Probe(experiment, model, longest, Ranks(), device, precision)
    static = probe.static(experiment.memory.offload)
    costs = probe.costs(_given(experiment), None, math.inf)
    frames = max(longest[0], round(experiment.data.max_duration_s * FRAMES_PER_S))
    total = static + costs.cost(1, frames)
    if not math.isfinite(total):
        raise MemoryError
    return total, static


class _Probe:
    """Measures on the model what its training takes."""

    def __init__(
        self,
        experiment: Experiment,
        model: Transducer,
        longest: tuple[int, int],
        ranks: Ranks,
        device: torch.device,
        precision: str,
    ):
        self.experiment, self.model, self.longest = experiment, model, longest
        self.ranks, self.device, self.precision = ranks, device, precision
        if device.type == "cpu":
            return_freed_memory()  # else what one attempt has left is not counted in the next
        self.parts = [model.encoder.subsampling, *model.encoder.blocks]
        model.train()
        saved = measure(model.encoder, 1, longest[0], partial(autocast, precision, device))
        self._saved = {mode: total_bytes(saved, [mode] * len(self.parts)) for mode in MODES}
        with self._mode("full"):
            self._run(_batch(1, longest, model, device), experiment.loss)  # compiles, and makes gradients
            free_memory()
            self.base = used_bytes(device)
            self._least = self._peak(1, experiment.loss)
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    @contextmanager
    def _mode(self, mode: str) -> Iterator[None]:
        stem, *blocks = self.parts
        checkpoint_activations(self.model.encoder, [mode] * len(self.parts))
        try:
            yield
        finally:
            self.model.encoder.subsampling = stem
            for number, block in enumerate(blocks):
                self.model.encoder.blocks[number] = block

    def static(self, offload: str) -> float:
        """Bytes that are always there: what is now, the gradients among it, and what comes with the optimizer."""
        config, size = self.experiment.parallel, self.ranks.size
        share = {level: 1 / (size // config.replicas) if config.zero >= level else 1.0 for level in (1, 2, 3)}
        weights, gradients, state = share[3], share[2], share[1]
        if offload == "cpu" and self.device.type != "cpu":
            weights = gradients = state = 0.0
        total = self.base - 2 * self.weights + self.weights * (weights + gradients)
        if self.experiment.training.ema_decay > 0:
            total += self.weights * weights
        if offload != "file":
            total += 2 * self.weights * state
        if weights < 1:  # gathered: the largest unit that is, and the one after it
            total += 2 * max(_bytes(part) for part in (*self.parts, self.model.predictor, self.model.joiner))
        if size > 1:  # a checkpoint is written from a copy
            total += self.weights * (weights + 2 * state + (weights if self.experiment.training.ema_decay > 0 else 0))
        return max(row[0] for row in self.ranks.rows([total]))

    def costs(self, mode: str, loss_limit: int | None, room: float) -> Costs:
        """Of pieces. What would take more room than there is is not tried, but judged by what the encoder saves."""
        loss = self.experiment.loss
        if loss_limit is not None:
            loss = replace(loss, memory_limit=text_of(loss_limit))
        frames = self.longest[0]
        one = self._least + self._saved[mode] - self._saved["full"]
        several, more = max(2, PROBE_FRAMES // frames), math.inf
        if one <= room or mode == "full":
            with self._mode(mode):
                one = self._peak(1, loss)
                if several * one <= room:
                    more = self._peak(several, loss)
        # all processes choose alike
        rows = self.ranks.rows([one, more])
        one, more = max(row[0] for row in rows), max(row[1] for row in rows)
        if more == math.inf:
            return Costs(0.0, one / frames)
        per_frame = max(more - one, 0.1 * one) / ((several - 1) * frames)
        return Costs(max(0.0, one - per_frame * frames), per_frame)

    def _peak(self, size: int, loss: LossConfig) -> float:
        batch = _batch(size, self.longest, self.model, self.device)
        try:
            return float(peak_bytes_of(self.device, lambda: self._run(batch, loss)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            free_memory()

    def _run(self, batch: Batch, loss: LossConfig) -> None:
        # the mask of chunks takes memory, of any chunks the same
        chunk_frames = 8 if set(self.experiment.training.chunk_ms) != {"full"} else 0
        with autocast(self.precision, self.device):
            losses: Any = self.model(
                batch.features, batch.feature_lens, batch.targets, batch.target_lens, loss, chunk_frames
            )
        losses.loss.backward()


def _bytes(part: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in part.parameters())


def _batch(size: int, longest: tuple[int, int], model: Transducer, device: torch.device) -> Batch:
    frames, tokens = longest
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(size, frames, model.config.num_mel_bins, generator=generator),
        torch.full((size,), frames),
        torch.randint(1, model.vocab_size, (size, tokens), generator=generator),
        torch.full((size,), tokens),
        [],
        [],
        [],
    ).to(device)


def _longest_s(cut_s: float, config: DataConfig) -> float:
    """Seconds of the longest utterance, at the slowest speed, with silence and joined, of those of the longest cut."""
    augment = config.augment
    # stored features are of all speeds already
    slowest = 1.0 if config.features.storage == "stored" else min(1.0, *augment.speed_factors)
    silence_s = (max(augment.pad_front_ms, default=0.0) + max(augment.pad_behind_ms, default=0.0)) / 1000
    alone_s = cut_s / slowest + silence_s
    if augment.concat_prob == 0:
        return alone_s
    return max(alone_s, min(2 * alone_s, augment.concat_max_s, config.max_duration_s))


def longest_utterance(cuts: Any, tokenizer: Tokenizer, config: DataConfig) -> tuple[int, int]:
    """Feature frames and tokens of the longest utterance, by the hundred longest cuts; with silence, and joined."""
    plain = cuts if isinstance(cuts, PackedCuts | JoinedCuts) else list(cuts)
    longest = [plain[number] for number in np.argsort(-durations_of(plain), kind="stable")[:100].tolist()]
    frames = num_feature_frames(math.ceil(_longest_s(longest[0].duration, config) * SAMPLE_RATE_HZ), config.features)
    tokens = max((len(tokenizer.encode(p.text)) for cut in longest for p in cut.supervisions if p.text), default=1)
    tokens = 2 * tokens + 1 if config.augment.concat_prob > 0 else tokens
    return frames, max(1, min(tokens, (frames - 3) // 4))  # "modified" spends a frame on each
