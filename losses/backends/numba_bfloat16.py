"""bfloat16 in compiled loops: through its bits, since neither numpy nor numba has the type.

Kernels of other files may use these two, against the rule in threads.py: what bits mean does not change.
"""

# Compiled code: an intrinsic is called without the context that its definition takes.
# mypy: disable-error-code="call-arg"

from __future__ import annotations

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

# dtype -> numpy's name of it; bfloat16 as its bits
TYPES = {torch.float64: "<f8", torch.float32: "<f4", torch.bfloat16: "<i2"}


class _Memory:
    """The memory of a tensor, as numpy's array interface describes it; an array made of it keeps it alive."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.__array_interface__ = {
            "version": 3,
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.itemsize for stride in x.stride()),
            "typestr": TYPES[x.dtype],
        }


def number_array(x: Tensor) -> np.ndarray:
    """The memory of x; bfloat16 as int16, which `load_number` and `store_number` understand.

    Not by x.numpy(), after which a storage can never be resized: sharded training frees the storage of a weight that it
    has gathered, and would fail.
    """
    if not x.numel():
        return np.empty(tuple(x.shape), TYPES[x.dtype])
    return np.asarray(_Memory(x))


def _integer(context, value):
    return context.get_constant(types.int32, value)


@intrinsic
def load_number(typing_context, value):
    """A logit as a number: bfloat16 (its bits as int16) becomes float32, others stay."""
    if not isinstance(value, types.Integer):
        return value(value), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        wide = builder.zext(arguments[0], context.get_value_type(types.int32))
        shifted = builder.shl(wide, _integer(context, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(types.int16), generate


@intrinsic
def store_number(typing_context, value, like):
    """Inverse of `load_number` for an array of the type of `like`; rounds to nearest even, NaN stays NaN."""
    if not isinstance(like, types.Integer):
        return like(like, like), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], context.get_value_type(types.int32))
        odd = builder.and_(builder.lshr(bits, _integer(context, 16)), _integer(context, 1))
        half = builder.add(odd, _integer(context, 0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), _integer(context, 16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(is_nan, _integer(context, 0x7FC0), rounded)
        return builder.trunc(chosen, context.get_value_type(types.int16))

    return types.int16(types.float32, types.int16), generate
