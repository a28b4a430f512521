"""Optimizer state in a file that is mapped into memory instead of in memory (the last tier of Rajbhandari et al. 2021,
ZeRO-Infinity): its pages are the file's, and the system writes them out and takes them away where memory is short."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.errors import UserError
from asr.training.shares import is_share, own_part

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNMENT = 64


def map_moments(optimizer: torch.optim.Optimizer, path: Path) -> dict[Tensor, dict[str, Tensor]]:
    """Lets an optimizer keep both moments of the weights of this process, or of its shares, in a file at ``path``.

    Results are the same to the bit. The file has no name once this returns: nothing is left of it when the process
    ends, however that is.

    Returns:
        by weight, the moments by name, also of weights that have had no step yet: state that is loaded belongs there.

    Raises:
        UserError: weights that are not in CPU memory; no room in the folder.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if away := next((p.device for p in weights if p.device.type != "cpu"), None):
        raise UserError(
            f"memory.offload=file keeps optimizer state for weights in CPU memory, and they are on {away}; choose "
            "--device cpu, or memory.offload=cpu with parallel.zero=3 and several processes"
        )
    sizes = [-(-own_part(p).nbytes // ALIGNMENT) * ALIGNMENT for p in weights]
    memory = _map(path, len(MOMENTS) * sum(sizes))
    places: dict[Tensor, dict[str, Tensor]] = {}
    start = 0
    for p, size in zip(weights, sizes, strict=True):
        places[p] = {name: _tensor(memory, start + i * size, p) for i, name in enumerate(MOMENTS)}
        start += len(MOMENTS) * size

    def begin(*_: Any) -> None:
        """What AdamW begins with at a weight's first step; ScaledAdam adds two numbers."""
        for p, moments in places.items():
            if p.grad is not None and not optimizer.state[p]:
                for moment in moments.values():
                    own_part(moment).zero_()
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    optimizer.register_step_pre_hook(begin)
    return places


def _map(path: Path, size: int) -> mmap.mmap:
    """Memory of a file that is made for it and has no name any more."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UserError(
            f"memory.offload=file needs {size / 2**20:.0f} MiB in {path.parent}, where {free / 2**20:.0f} MiB are "
            "free; choose another output folder, or memory.offload=none"
        )
    with open(path, "w+b") as file:
        path.unlink()
        os.posix_fallocate(file.fileno(), 0, size)  # a page without room on the disk would kill the process later
        return mmap.mmap(file.fileno(), size)


def _tensor(memory: mmap.mmap, start: int, like: Tensor) -> Tensor:
    """A tensor with its place in the file, shared out as another is. Each has a storage of its own: checkpoints hold
    no more than it."""
    local = own_part(like)
    if local.numel() == 0:  # a weight with fewer rows than processes
        return torch.zeros_like(like)
    flat = torch.frombuffer(memory, dtype=local.dtype, count=local.numel(), offset=start)
    own = flat.as_strided(local.shape, local.stride())
    if not is_share(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
