"""The one place where ``--device`` becomes a device."""

from __future__ import annotations

from asr.errors import UserError


def resolve_device(name: str) -> str:
    """``auto`` to "cuda" or "cpu"; other names are checked and returned.

    Raises:
        UserError: not a device name, or a CUDA device that this machine does not have.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdigit()):
        raise UserError(f"--device {name} is unknown; valid: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"only {count} CUDA devices" if count else "no usable CUDA device"
            raise UserError(f"--device {name}: this machine has {found}; use --device cpu")
    return name
