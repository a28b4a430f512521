"""The optimizers and their schedules, learning rates by part of the model, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asr.cli.guard import nearest
from asr.errors import CheckpointError, UserError
from asr.training.scaled_adam import ScaledAdam, ScaledAdamConfig
from asr.training.shares import own_part


@dataclass
class EdenConfig:
    """Where the schedule "eden" begins to fall, by steps and by epochs: both slow it down at once.

    Args:
        steps: alpha_step, after which the learning rate begins to fall with the steps.
        epochs: alpha_epoch, after which it begins to fall with the epochs.
        start: alpha_start, the fraction of lr that the rise begins at.
    """

    steps: float = 7500.0
    epochs: float = 3.5
    start: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.eden.{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 <= self.start <= 1:
            raise ValueError(f"optim.eden.start={self.start} is outside [0, 1]")


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        name: "adamw" (Loshchilov and Hutter 2019), or "scaled_adam" (Yao et al. 2023), whose steps are in proportion to
            each tensor's scale, so that lr is relative to it: 0.045 in the paper, with the schedule "eden".
        lr: peak learning rate.
        lr_scales: parts of the model whose learning rate is multiplied by a number, like {encoder: 0.1,
            encoder.blocks.0: 0.01}; of several that hold a parameter, the longest name counts.
        warmup_steps: steps of linear rise from 0, or of "eden" from lr * eden.start, to lr.
        schedule: after the rise: "cosine" falls to lr * final_lr_ratio at the end of the run; "noam" falls with the
            inverse square root of the step (Vaswani et al. 2017, eq. 3, scaled to peak at lr); "eden" falls with the
            inverse square root of steps and of epochs (Yao et al. 2023); "constant" stays.
        final_lr_ratio: last learning rate of "cosine" as a fraction of lr.
        eden: of the schedule "eden".
        weight_decay: AdamW's, decoupled; on matrices only, never on biases, norms and embeddings.
        betas: decay of the moments.
        eps: added to the root of the second moments.
        scaled_adam: of the optimizer "scaled_adam".
        clip_grad_norm: gradients are scaled down to this global norm; 0 is off.
    """

    name: Literal["adamw", "scaled_adam"] = "adamw"
    lr: float = 2e-3
    lr_scales: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 200
    schedule: Literal["cosine", "noam", "eden", "constant"] = "cosine"
    final_lr_ratio: float = 0.02
    eden: EdenConfig = field(default_factory=EdenConfig)
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    scaled_adam: ScaledAdamConfig = field(default_factory=ScaledAdamConfig)
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
        for part, scale in self.lr_scales.items():
            if not 0 < scale < math.inf:
                raise ValueError(
                    f"optim.lr_scales.{part}={scale} must be above 0 and finite; training.freeze leaves a part as it is"
                )


def learning_rate(config: OptimConfig, step: int, progress: float, epoch: int = 0) -> float:
    """Learning rate of a step.

    "eden", with t the step from 1 on and e the epoch from 0 on::

        lr ((t^2 + steps^2) / steps^2)^-1/4 ((e^2 + epochs^2) / epochs^2)^-1/4 linear(start, warmup_steps, t)

    Args:
        config: schedule.
        step: optimizer steps taken before this one.
        progress: fraction of the run's audio (or steps, where those are limited) consumed before this step, in [0, 1].
        epoch: epochs that were ended before this step.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * rise
    if config.schedule == "noam":
        return config.lr * min(rise, math.sqrt(max(config.warmup_steps, 1) / (step + 1)))
    if config.schedule == "eden":
        eden = config.eden
        by_steps = (((step + 1) / eden.steps) ** 2 + 1) ** -0.25
        by_epochs = ((epoch / eden.epochs) ** 2 + 1) ** -0.25
        return config.lr * by_steps * by_epochs * (eden.start + (1 - eden.start) * rise)
    fall = config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * rise * fall


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that checkpoints have, whatever the model's parts are wrapped in."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, nn.Parameter)}


def lr_scales(model: nn.Module, scales: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The factor of each parameter's learning rate.

    Raises:
        UserError: a name is no part of the model.
    """
    named = _named(model)
    parts = {name[:end] for name in named for end, sign in enumerate(name + ".") if sign == "."}
    if unknown := [name for name in scales if name not in parts]:
        largest = ", ".join(name for name, _ in model.named_children())
        raise UserError(
            f"optim.lr_scales has {unknown[0]!r}, which is no part of the model{nearest(unknown[0], parts)}; "
            f"its parts: {largest}"
        )
    by_length = sorted(scales, key=len, reverse=True)
    return {
        value: next((scales[part] for part in by_length if f"{name}.".startswith(f"{part}.")), 1.0)
        for name, value in named.items()
    }


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with the factor ``lr_scale`` of its learning rate.

    AdamW's have two of each: matrices decay; biases, norms and embeddings do not.

    Raises:
        UserError: a name in ``optim.lr_scales`` is no part of the model.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    scale_of = lr_scales(model, config.lr_scales)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for scale in dict.fromkeys((1.0, *config.lr_scales.values())):
        decays = (config.weight_decay, 0.0) if config.name == "adamw" else (0.0,)
        groups |= {(scale, decay): [] for decay in decays}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = config.name == "adamw" and parameter.dim() > 1 and id(parameter) not in embeddings
            groups[scale_of[parameter], config.weight_decay if decayed else 0.0].append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), params in groups.items()
        if params
    ]


def optimizer_kind(config: OptimConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of the optimizer, and what it takes besides the groups."""
    common = {"lr": config.lr, "betas": (config.betas[0], config.betas[1]), "eps": config.eps}
    if config.name == "scaled_adam":
        return ScaledAdam, {**common, "config": config.scaled_adam}
    return torch.optim.AdamW, {**common, "fused": True}


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`."""
    kind, arguments = optimizer_kind(config)
    return kind(parameter_groups(model, config), **arguments)


def check_state(state: Mapping[str, Mapping[str, Any]], config: OptimConfig, path: Path) -> None:
    """Refuses the optimizer state of a checkpoint, by name of the parameter, that another optimizer has left.

    Raises:
        CheckpointError: which one.
    """
    scaled = any("scale_exp_avg" in entry for entry in state.values())
    if state and scaled != (config.name == "scaled_adam"):
        name = "scaled_adam" if scaled else "adamw"
        raise CheckpointError(
            f"checkpoint {path} has the state of optim.name={name}, and this run's is {config.name}; go on with {name},"
            " or begin a training of its own with --init-from"
        )


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
        averages, weights = ([own_part(tree[name]) for name in self._floats] for tree in (self.weights, current))
        torch._foreach_lerp_(averages, weights, weight)

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(weights[name])
