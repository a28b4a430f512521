"""Which number format the matrix products of a step use, of the whole model and of parts of it, and the scale of the
loss that keeps gradients within float16."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asr.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000  # steps without overflow, after which the scale doubles


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware on this device; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(wanted: str, device: torch.device) -> str:
    """ "auto" to "bf16" or "fp32"; anything else as it is."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_native_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass in this precision: weights and reductions stay float32."""
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=DTYPES[precision])


def override_precision(model: nn.Module, overrides: Mapping[str, str], device: torch.device) -> None:
    """Lets modules, by name, compute in a precision of their own; what they return is float32.

    Raises:
        UserError: no such module.
    """
    modules = dict(model.named_modules())
    for name, precision in overrides.items():
        if name not in modules or not name:
            names = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"training.precision_overrides: the model has no module {name!r}; it has {names}, and what is in them,"
                " like encoder.subsampling"
            )
        module = modules[name]
        module.forward = functools.partial(_run_in, precision, device, module.forward)  # type: ignore[method-assign]


def _run_in(precision: str, device: torch.device, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with autocast(precision, device):
        return _float32(forward(*_float32(args), **_float32(kwargs)))


def _float32(tree: Any) -> Any:
    """The same with its floating-point tensors in float32."""
    if isinstance(tree, Tensor):
        return tree.float() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {name: _float32(value) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_float32, tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map(_float32, tree))
    return tree


def next_scale(scale: float, good_steps: int, overflow: bool) -> tuple[float, int]:
    """Dynamic loss scaling (Micikevicius et al. 2018, sec. 3.2): the scale and the steps since it last changed, after a
    step. Overflow halves it, down to 1; it doubles after GROWTH_STEPS steps without."""
    if overflow:
        return max(scale / 2, 1.0), 0
    if good_steps + 1 >= GROWTH_STEPS:
        return scale * 2, 0
    return scale, good_steps + 1
