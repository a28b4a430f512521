"""Tensors of which each process holds a part: PyTorch's DTensor, whose import takes a second that a run of one process
need not wait for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_share(x: Any) -> TypeIs[DTensor]:
    """Whether it is this process's part of a tensor. Where there is one, its class has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def own_part(x: Any) -> Tensor:
    """What this process has of a tensor that several share; a tensor of one process as it is. Without a gradient."""
    own: Tensor = (x.to_local() if is_share(x) else x).detach()
    return own
