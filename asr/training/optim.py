"""AdamW, its schedules, gradient clipping, and the moving average of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        lr: peak learning rate.
        warmup_steps: steps of linear rise from 0 to lr.
        schedule: after the rise: "cosine" falls to lr * final_lr_ratio at the end of the run; "noam" falls with the
            inverse square root of the step (Vaswani et al. 2017, eq. 3, scaled to peak at lr); "constant" stays.
        final_lr_ratio: last learning rate of "cosine" as a fraction of lr.
        weight_decay: decoupled (Loshchilov and Hutter 2019); on matrices only, never on biases, norms and embeddings.
        betas: AdamW's.
        eps: AdamW's.
        clip_grad_norm: gradients are scaled down to this global norm; 0 is off.
    """

    lr: float = 2e-3
    warmup_steps: int = 200
    schedule: Literal["cosine", "noam", "constant"] = "cosine"
    final_lr_ratio: float = 0.02
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    clip_grad_norm: float = 5.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("weight_decay", "clip_grad_norm"):
            # a negative norm to clip to would turn the gradient round
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be at least 0 and finite; 0 is off")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optim.final_lr_ratio={self.final_lr_ratio} is outside [0, 1]")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps} must be at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1)")


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        config: schedule.
        step: optimizer steps taken before this one.
        progress: fraction of the run's audio (or steps, where those are limited) consumed before this step, in [0, 1].
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * rise
    if config.schedule == "noam":
        return config.lr * min(rise, math.sqrt(max(config.warmup_steps, 1) / (step + 1)))
    fall = config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * rise * fall


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups: matrices decay; biases, norms and embeddings do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 and id(parameter) not in embeddings else plain).append(parameter)
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw_arguments(config: OptimConfig) -> dict[str, Any]:
    """What AdamW takes besides the groups."""
    return {"lr": config.lr, "betas": (config.betas[0], config.betas[1]), "eps": config.eps, "fused": True}


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), **adamw_arguments(config))


class WeightAverage:
    """Exponential moving average of all floating-point weights; of weights that processes share, each its part.

    The decay rises as (1 + step) / (10 + step) up to its final value, so that early averages follow the model.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._floats = [name for name, value in self.weights.items() if value.is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        current = model.state_dict()
        averages, weights = ([_own_part(tree[name]) for name in self._floats] for tree in (self.weights, current))
        torch._foreach_lerp_(averages, weights, weight)

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(weights[name])


def _own_part(weight: Tensor) -> Tensor:
    """What this process has of a weight that several share; a weight of one process as it is."""
    return weight.detach().to_local() if hasattr(weight, "to_local") else weight.detach()  # type: ignore[no-any-return, attr-defined]
