"""Kernels per device. Autograd and the public API live elsewhere.

A lattice backend is a module with one function:

    forward_backward(blank, label, lengths, modified, occupancies) -> (nll, blank_occ, label_occ)
        blank [B, T, U+1], label [B, T, U]: log-probs, contiguous, float32 or float64, one device; padding may hold anything
        lengths: losses.shapes.Lengths, already checked;  modified: topology with one symbol a frame
        occupancies: False skips the second pass; both occupancies are then None
        nll float64 [B] = -log P(targets);  blank_occ, label_occ: probability that the alignment takes the blank or label
        transition of a cell, shape and dtype of blank and label; 0 in the padding and where below exp(LOG_FLOOR[dtype]).
        Without a possible alignment nll is inf and the occupancies are NaN
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from losses.shapes import Lengths, check_choice

# name -> module; imported when first used, so that a machine without one backend's compiler can use another
BACKENDS: dict[str, str] = {
    "numba": "losses.backends.numba_lattice",  # CPU
    "torch": "losses.backends.torch_lattice",  # any device
}
# Rarer transitions mean nothing; they would only bring denormal numbers, which slow down what follows, into the gradients.
LOG_FLOOR = {torch.float32: -57.0, torch.float64: -345.0}

DEFAULT_BACKENDS = {"cpu": "numba"}  # other devices: torch


class ForwardBackward(Protocol):
    """The function of a lattice backend; see the head of this file."""

    def __call__(
        self, blank: Tensor, label: Tensor, lengths: Lengths, modified: bool, occupancies: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


def choose(backend: str | None, device: torch.device) -> str:
    """The name of the backend to use: as asked for, else the default of the device."""
    if backend is None:
        return DEFAULT_BACKENDS.get(device.type, "torch")
    check_choice("backend", backend, tuple(BACKENDS))
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend='numba' runs on cpu, the log-probs are on {device}; use backend='torch'")
    return backend


def load(backend: str) -> ForwardBackward:
    """forward_backward of a backend by name. Raises ImportError with the remedy when its compiler is not installed."""
    function: Callable = _module(backend).forward_backward
    return function


def _module(backend: str):
    try:
        return importlib.import_module(BACKENDS[backend])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("losses"):
            raise
        raise ImportError(
            f"backend {backend!r} needs {error.name}: pip install {error.name}, or pass backend='torch'", name=error.name
        ) from error
