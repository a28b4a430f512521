"""Kernels per device. Autograd and the public API live elsewhere.

Common arguments: `lengths`, a checked losses.shapes.Lengths; padding may hold anything and is not read. All tensors are
on one device and contiguous (logits may have any strides). Half precision is computed in float32.

A lattice kernel module has one function:

    forward_backward(blank, label, lengths, modified, occupancies) -> (nll, blank_occ, label_occ)
        blank [B, T, U+1], label [B, T, U]: log-probs, float32 or float64
        modified: topology with one symbol a frame;  occupancies: False skips the second pass; both are then None
        nll float64 [B] = -log P(targets), accumulated in float64;  blank_occ, label_occ: probability that the alignment
        takes the blank or label transition of a cell, shape and dtype of blank and label; 0 in the padding and where
        below exp(LOG_FLOOR[dtype]). Without a possible alignment nll is inf and the occupancies are NaN

A logits kernel module has DTYPES, the dtypes of logits that it takes, and two functions:

    gather(logits, targets, lengths, blank, normalize) -> (blank_lp, label_lp, normalizer)
        logits [B, T, U+1, V], targets int64 [B, U];  float32, or float64 for float64 logits: log-probs of blank [B, T,
        U+1] and next label [B, T, U], log-normaliser [B, T, U+1] or None with normalize=False; 0 in the padding
    gradient(logits, targets, normalizer, blank_occ, label_occ, upstream, lengths, blank, clamp) -> gradient
        shape and dtype of logits, 0 in the padding: (softmax * (blank_occ + label_occ) - blank_occ at blank - label_occ
        at the next label), clamped to [-clamp, clamp] when clamp > 0, times upstream [B]. Without normalizer: no
        softmax term. Entries below about GRADIENT_FLOOR times upstream are 0

A packed kernel module works on any cells [N] of joiner inputs enc [B * T, J] and pred [B * (U+1), J], given by the
index of each cell's row of both. It has DTYPES, sizes in bytes (TILE of logits and hidden states at a time, GROUP of
logits of utterances taken together, CACHE of a group's logits that are kept for the gradient where two groups are
taken at a time, CACHE_OF_ONE otherwise, CHUNK of gradients by the logits), LEAST_TILE in cells by bytes of a number,
and

    parallel() -> context that gives a number of threads
    start(tasks, threads) -> wait: call each of the tasks in any order, all of them before wait() returns
    shares(size, threads, most) -> slices of range(size), at most so long, to be handed to the threads
    width(vocab_size, dtype) -> columns of logits in dtype, at least vocab_size, that products are fast with
    readable(x) -> enc, pred, weight or bias in a dtype that `hidden` and `scores` read, a copy where x's is not
    estimates(dtype) -> dtype whose products are so much faster that they may tell which cells count, or None
    hidden(enc, pred, rows, columns, activation, out): out [N, J] = activation(enc[rows] + pred[columns])
    scores(enc, pred, rows, columns, activation, weight, bias, labels, blank, out, logits): for half precision, hidden
        and the logits [N] of blank and next label (0 where none is left) from hidden states that are not rounded
    pack(weight, rows) -> the weight as `linear` likes it for x of about so many rows
    linear(x, weight, bias, out) -> x @ weight.T + bias, in out where that is not None; weight packed or not
    gather(logits, labels, blank, out): logits [N, V], labels int64 [N], -1 where none is left; out is log-probs of
        blank and next label (0 where none is left) and log-normaliser, [N] each, float32, or float64 for float64 logits
    normalize(logits, vocab_size, labels, blank, out): the same where out brings the logits of blank and label, which
        count instead of those in logits [N, width]; there the two are lost
    gradient(logits, vocab_size, at, labels, blank, normalizer, blank_lp, label_lp, blank_occ, label_occ, scale, clamp,
        out) -> sum over cells [V]. Cell n has logits[at[n]], but at blank and label the log-probs count; out [N, width]
        is the gradient as above times scale [N], in the dtype of logits, 0 beyond vocab_size
    add(gradient, hidden, first, rows, columns, activation, enc_gradient, pred_gradient): adds the gradient [N, W] by
        columns first..first+W of hidden [N, J], through the activation, to the rows of enc_gradient and pred_gradient

The optional peers "torchaudio" and "k2" are lattice kernels only: where one of them is asked for, kernels of the other
kinds are those that the device has by default, and what it cannot do in the lattice is an error, never done by another.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import torch

from losses.shapes import check_choice

# name -> module of each kind of kernel; imported when first used, so that a machine without the compiler of one backend
# can use another
BACKENDS: dict[str, dict[str, str]] = {
    "numba": {  # CPU
        "lattice": "losses.backends.numba_lattice",
        "logits": "losses.backends.numba_logits",
        "packed": "losses.backends.numba_packed",
    },
    "torch": {  # any device
        "lattice": "losses.backends.torch_lattice",
        "logits": "losses.backends.torch_logits",
        "packed": "losses.backends.torch_packed",
    },
    "torchaudio": {"lattice": "losses.backends.torchaudio_lattice"},  # CPU and CUDA; "regular" in float32
    "k2": {"lattice": "losses.backends.k2_lattice"},  # CPU and CUDA; both topologies in float64
}

# Optional packages that a backend of the same name is made of, and how each is installed.
INSTALL = {
    "torchaudio": "install the torchaudio that was built for this torch, from the same index (CPU or CUDA)",
    "k2": "install the wheel that was built for this torch (https://k2-fsa.github.io/k2/installation)",
}

# What is rarer or smaller means nothing, but would fill the gradients with denormal numbers, over which a matrix
# product takes up to 150 times as long.
LOG_FLOOR = {torch.float32: -57.0, torch.float64: -345.0}
GRADIENT_FLOOR = {torch.float32: 1e-25, torch.float64: 1e-150}


def load(
    kind: Literal["lattice", "logits", "packed"], backend: str | None, device: torch.device, dtype: torch.dtype
) -> ModuleType:
    """The kernel module of a backend by name; None takes numba on CPU (float16 logits: torch) and torch elsewhere.

    A backend that was asked for and cannot be used is an error: ValueError for a wrong name, device or dtype,
    ImportError when it is not installed. A peer without kernels of this kind is imported all the same, so that its
    absence shows before any work is done, and the device's default is given.
    """
    if backend is not None:
        check_choice("backend", backend, tuple(BACKENDS))
    if backend in INSTALL:
        _check_peer(backend)
    if backend is None or kind not in BACKENDS[backend]:
        backend = "numba" if device.type == "cpu" and dtype != torch.float16 else "torch"
    if backend == "numba" and (device.type != "cpu" or dtype == torch.float16):
        raise ValueError(
            f"backend='numba' runs on cpu and not in float16, the input is {dtype} on {device}; use 'torch'"
        )
    try:
        return importlib.import_module(BACKENDS[backend][kind])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("losses"):
            raise
        raise ImportError(
            f"backend {backend!r} needs {error.name}: pip install {error.name}, or pass backend='torch'",
            name=error.name,
        ) from error


def _check_peer(name: str) -> None:
    """Import an optional package, or say how to get it."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of another torch or CUDA
        raise ImportError(
            f"backend {name!r} needs {name}, which cannot be imported ({error}): {INSTALL[name]}; "
            "or use backend='torch', which needs nothing more",
            name=name,
        ) from error
