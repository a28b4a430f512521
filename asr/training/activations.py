"""Which activations of the encoder are kept for the backward pass, and which are computed again there (Chen et al.
2016), part by part: its subsampling, and each of its blocks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from asr.errors import UserError
from asr.models.layers.attention import Positions
from asr.models.layers.rotary import rotary_tables

MODES = ("none", "selective", "full")
_OPERATORS = torch.ops.aten
# whose results "selective" keeps: matrix products, convolutions, attention
KEPT = [
    _OPERATORS.mm.default,
    _OPERATORS.addmm.default,
    _OPERATORS.bmm.default,
    _OPERATORS.baddbmm.default,
    _OPERATORS.convolution.default,
    _OPERATORS._scaled_dot_product_flash_attention_for_cpu.default,
    _OPERATORS._scaled_dot_product_flash_attention.default,
    _OPERATORS._scaled_dot_product_efficient_attention.default,
    _OPERATORS._scaled_dot_product_cudnn_attention.default,
]


def checkpointed(part: nn.Module, mode: str) -> nn.Module:
    """The part itself with "none", else wrapped; names in the state dict stay."""
    if mode == "none":
        return part
    if mode == "full":
        return checkpoint_wrapper(part)
    return checkpoint_wrapper(part, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def checkpoint_activations(encoder: Any, modes: Sequence[str]) -> None:
    """Applies a mode to each part of an encoder, in place: the first to its subsampling, the others to its blocks.

    Gradients stay the same to the bit: what is random in a part is drawn again from the same state of torch's
    generator.
    """
    subsampling, *blocks = modes
    encoder.subsampling = checkpointed(encoder.subsampling, subsampling)
    for number, (block, mode) in enumerate(zip(encoder.blocks, blocks, strict=True)):
        encoder.blocks[number] = checkpointed(block, mode)


class _Allocations(TorchDispatchMode):
    """Notes the memory of all that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (memory := x.untyped_storage())._cdata not in given:  # no view
                self.found[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        return out


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass has allocated and that live on for its backward pass, its result left out.

    Memory that is still there is counted, whoever holds it: "selective" keeps results outside of the graph, where
    hooks of saved tensors would not see them.
    """
    with _Allocations() as allocations:
        out = forward()
    left = {place: nbytes for place, (memory, nbytes) in allocations.found.items() if not memory.expired()}
    left.pop(out.untyped_storage()._cdata, None)
    return sum(left.values())


@dataclass(frozen=True)
class Cost:
    """Of one part in one mode: what it keeps for the backward pass, and the time of its passes forward and back."""

    saved_bytes: int
    seconds: float


Costs = dict[str, tuple[Cost, Cost]]
"""By mode, of the subsampling and of one block."""


def measure(encoder: Any, size: int, frames: int, autocast: Callable[[], AbstractContextManager[Any]]) -> Costs:
    """Costs of an encoder's parts for a batch of random features [size, frames, F], by running them.

    Neither gradients nor torch's generator are touched, and never more than one part is in memory.
    """
    device = encoder.feature_mean.device
    costs = {}
    with torch.random.fork_rng():
        features = torch.randn(size, frames, encoder.feature_mean.numel(), device=device)
        with torch.no_grad(), autocast():
            hidden = encoder.subsampling(features)
        hidden.requires_grad_()
        angles = rotary_tables(0, hidden.shape[1], encoder.dim // encoder.config.num_heads, device)
        positions = Positions(None, *angles)
        for mode in MODES:
            stem = nn.Sequential(checkpointed(encoder.subsampling, mode), encoder.dropout)
            block = checkpointed(encoder.blocks[0], mode)
            costs[mode] = _cost(autocast, stem, features), _cost(autocast, block, hidden, positions)
    return costs


def _cost(autocast: Callable[[], AbstractContextManager[Any]], part: nn.Module, x: Tensor, *others: Any) -> Cost:
    def forward() -> Tensor:
        with autocast():
            out: Tensor = part(x.clone(), *others)
        return out

    def both() -> float:
        begin = time.perf_counter()
        out = forward()
        if out.requires_grad:  # not of a frozen part that hears what needs no gradient
            trained: list[Tensor] = [p for p in part.parameters() if p.requires_grad]
            torch.autograd.grad(out, trained or [x], torch.ones_like(out))
        if out.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    both()  # compiles kernels, and makes what blocks share
    return Cost(saved_bytes(forward), statistics.median(both() for _ in range(3)))


def total_bytes(costs: Costs, modes: Sequence[str]) -> int:
    """What an encoder keeps with these modes of its parts."""
    subsampling, *blocks = modes
    return costs[subsampling][0].saved_bytes + sum(costs[mode][1].saved_bytes for mode in blocks)


def choose_modes(costs: Costs, blocks: int, limit: float) -> list[str] | None:
    """The modes, of the subsampling and of so many blocks, that take the least time and keep at most ``limit`` bytes;
    None where nothing keeps as little.

    Blocks that keep more come last: the backward pass is through with them before others compute theirs again.
    """

    def lost_s(part: int, mode: str) -> float:
        return max(0.0, costs[mode][part].seconds - costs["none"][part].seconds)  # the rest is noise

    found: tuple[float, list[str]] | None = None
    for stem, fulls, selectives in product(MODES, range(blocks + 1), range(blocks + 1)):
        modes = [stem, *["full"] * fulls, *["selective"] * selectives]
        modes += ["none"] * (blocks + 1 - len(modes))
        if len(modes) > blocks + 1 or total_bytes(costs, modes) > limit:
            continue
        seconds = lost_s(0, stem) + sum(lost_s(1, mode) for mode in modes[1:])
        if found is None or seconds < found[0]:
            found = seconds, modes
    return None if found is None else found[1]


def within_budget(costs: Costs, blocks: int, budget: float) -> tuple[list[str], str]:
    """The modes that keep this fraction of what "none" keeps, and a sentence about them.

    Raises:
        UserError: less than the encoder can keep; names the smallest budget.
    """
    everything = total_bytes(costs, ["none"] * (blocks + 1))
    modes = choose_modes(costs, blocks, budget * everything)
    if modes is None:
        least = min(total_bytes(costs, [stem, *[mode] * blocks]) for stem in MODES for mode in MODES) / everything
        raise UserError(
            f"memory.activation_budget={budget} is less than the encoder keeps with everything computed again; the "
            f"smallest budget for this model and batch is {math.ceil(1e3 * least) / 1e3:.3f}"
        )
    kept = total_bytes(costs, modes)
    counts = ", ".join(f"{modes[1:].count(mode)} {mode}" for mode in MODES if mode in modes[1:])
    return modes, (
        f"checkpointing within memory.activation_budget={budget}: blocks {counts}; subsampling {modes[0]}; the encoder "
        f"keeps {kept / 2**20:.1f} MiB of {everything / 2**20:.1f} MiB ({kept / everything:.3f}), in the least time"
    )
