"""ScaledAdam: Adam whose steps are in proportion to the scale of each tensor, which is learnt besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asr.training.shares import is_share, own_part


@dataclass
class ScaledAdamConfig:
    """What ScaledAdam takes besides the learning rate, betas and eps.

    Args:
        eta: learning rate of the scales as a fraction of lr.
        min_rms: a tensor of a smaller root mean square (RMS) moves as if it had this one, and its scale only grows.
        max_rms: no learnt scale takes a tensor beyond this RMS.
        max_growth: most that one step changes a scale, as a fraction of it.
        scalar_lr: learning rate of parameters of one number, which plain Adam moves, as a fraction of lr.
    """

    eta: float = 0.1
    min_rms: float = 1e-5
    max_rms: float = 3.0
    max_growth: float = 0.1
    scalar_lr: float = 0.1

    def __post_init__(self) -> None:
        for name in ("min_rms", "max_rms", "scalar_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.scaled_adam.{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"optim.scaled_adam.eta={self.eta} must be at least 0 and finite; 0 learns no scales")
        if not 0 < self.max_growth < 1:
            raise ValueError(f"optim.scaled_adam.max_growth={self.max_growth} is outside (0, 1)")
        if self.min_rms >= self.max_rms:
            raise ValueError(
                f"optim.scaled_adam.min_rms={self.min_rms} must be below optim.scaled_adam.max_rms={self.max_rms}"
            )


class ScaledAdam(torch.optim.Optimizer):
    """Yao et al. 2023, "Zipformer", the section on ScaledAdam and Algorithm 1 of its appendix.

    With theta a tensor of N numbers, g its gradient, t the step from 1 on, alpha the learning rate, and products and
    quotients element by element::

        m_t = beta1 m_{t-1} + (1 - beta1) g_t            v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        r_{t-1} = RMS[theta_{t-1}]                       c_t = sqrt(1 - beta2^t) / (1 - beta1^t)
        Delta'_t = -alpha_t r_{t-1} c_t m_t / (sqrt(v_t) + eps)

        h_t = sum over elements of g_t theta_{t-1}
        n_t = beta1 n_{t-1} + (1 - beta1) h_t            w_t = beta2 w_{t-1} + (1 - beta2) h_t^2
        Delta'_{t,r} = -eta alpha_t c_t n_t / (sqrt(w_t) + eps) theta_{t-1}

        theta_t = theta_{t-1} + Delta'_t + Delta'_{t,r}

    Limits on both parts, and Adam for parameters of one number, are those of `ScaledAdamConfig`. There is no weight
    decay: scales are learnt. Of a tensor that several processes share, RMS and h go over all of it; all of them must
    take the step together.

    Args:
        params: parameters or groups of them; float32.
        lr: alpha; relative to the scale of each tensor.
        betas: beta1 and beta2.
        eps: of both quotients.
        config: eta and the limits.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        config: ScaledAdamConfig | None = None,
    ):
        self.config = config or ScaledAdamConfig()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Moves all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            tensors = [p for p in moved if p.numel() > 1]
            scalars = [p for p in moved if p.numel() == 1]
            for p in moved:
                self._begin(p)
            if moved:
                torch._foreach_add_([self.state[p]["step"] for p in moved], 1)
            if tensors:
                self._move(group, tensors, *self._scales(group, tensors))
            if scalars:
                self._move(group, scalars, [self.config.scalar_lr] * len(scalars), [0.0] * len(scalars))
        return loss

    def _begin(self, p: Tensor) -> None:
        """State of 0 at a parameter's first step; moments that are there already, in a file, stay where they are."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if p.numel() > 1 and "scale_exp_avg" not in state:
            for name in ("scale_exp_avg", "scale_exp_avg_sq"):
                state[name] = torch.zeros((), dtype=torch.float32, device=p.device)

    def _column(self, params: Sequence[Tensor], name: str) -> Tensor:
        """A number of each parameter's state, float64 [parameters]."""
        return torch.stack([self.state[p][name] for p in params]).double()

    def _second_corrections(self, group: dict[str, Any], params: Sequence[Tensor]) -> Tensor:
        """sqrt(1 - beta2^t) of each parameter, float64 [parameters]."""
        corrections: Tensor = (1 - group["betas"][1] ** self._column(params, "step")).sqrt()
        return corrections

    def _scales(self, group: dict[str, Any], params: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Of each tensor: r within its limits, and the relative change of its scale, by which Delta'_{t,r} moves it."""
        config, (beta1, beta2) = self.config, group["betas"]
        values, gradients = [own_part(p) for p in params], [own_part(p.grad) for p in params]
        squares = torch.stack(torch._foreach_norm(values)).double() ** 2
        products = torch.stack([(g * x).sum() for g, x in zip(gradients, values, strict=True)]).double()
        squares, h = _over_shares(torch.stack((squares, products)), params[0])
        count = torch.tensor([p.numel() for p in params], dtype=torch.float64, device=h.device)
        rms = (squares / count).sqrt()
        n = beta1 * self._column(params, "scale_exp_avg") + (1 - beta1) * h
        w = beta2 * self._column(params, "scale_exp_avg_sq") + (1 - beta2) * h**2
        for name, column in (("scale_exp_avg", n), ("scale_exp_avg_sq", w)):
            torch._foreach_copy_([self.state[p][name] for p in params], list(column.float().unbind()))
        c = self._second_corrections(group, params) / (1 - beta1 ** self._column(params, "step"))
        growth = -config.eta * group["lr"] * c * n / (w.sqrt() + group["eps"])
        growth = torch.where(rms < config.min_rms, growth.clamp(min=0.0), growth)
        growth = torch.minimum(growth, config.max_rms / rms - 1).clamp(-config.max_growth, config.max_growth)
        r, s = torch.stack((rms.clamp(min=config.min_rms), growth)).tolist()
        return r, s

    def _move(
        self, group: dict[str, Any], params: Sequence[Tensor], r: Sequence[float], growth: Sequence[float]
    ) -> None:
        """Both parts of the step: ``r`` scales Delta'_t, ``growth`` times theta is Delta'_{t,r}.

        Written as AdamW's step, for which torch has one kernel: its learning rate is alpha r, its decay takes
        theta_{t-1} to (1 + growth) theta_{t-1}, and c m / (sqrt(v) + eps) is its quotient of corrected moments with eps
        / sqrt(1 - beta2^t).
        """
        beta1, beta2 = group["betas"]
        eps = (group["eps"] / self._second_corrections(group, params)).tolist()
        for p, scale, change, below in zip(params, r, growth, eps, strict=True):
            state, rate = self.state[p], group["lr"] * scale
            tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            values, gradient, m, v = ([own_part(x)] for x in tensors)
            if values[0].numel() == 0:  # a weight with fewer rows than processes
                continue
            torch._fused_adamw_(
                values,
                gradient,
                m,
                v,
                [],
                [state["step"]],
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=-change / rate if rate else 0.0,
                eps=below,
                amsgrad=False,
                maximize=False,
            )


def _over_shares(sums: Tensor, like: Tensor) -> Tensor:
    """Sums over the shares of tensors that are shared out as ``like``; those of a whole tensor as they are."""
    if not is_share(like):
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if place.is_shard() else Replicate() for place in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements, run_check=False).full_tensor()
