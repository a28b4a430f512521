"""Which number format the matrix products of a step use."""

from __future__ import annotations

import contextlib

import torch


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
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
