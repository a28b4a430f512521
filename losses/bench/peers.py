"""Other packages' losses, called as their users call them; each is imported only when it is measured.

Full lattices: the joiner's logits are made in torch (in bfloat16 where that is asked for) and handed over in float32.
Pruned: simple loss, ranges, pruning, joiner on the pruned cells, pruned loss, as in the README of fast_rnnt.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from losses.bench.cases import Case

AM_ONLY_SCALE, LM_ONLY_SCALE = 0.0, 0.25
PRUNE_RANGE = 5
# largest gradient error relative to the largest entry: their lattices are in float32, which costs some 4e-5
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-3}

# name -> module that must import
PEERS = {
    "torchaudio": "torchaudio",
    "k2": "k2",
    "fast_rnnt": "fast_rnnt",
    "warprnnt_numba": "warprnnt_numba",
    "k2-pruned": "k2",
    "fast_rnnt-pruned": "fast_rnnt",
}


def available() -> list[str]:
    """The peers that import here; one that is installed and does not is named on stderr."""
    broken: dict[str, bool] = {}
    for module in dict.fromkeys(PEERS.values()):
        broken[module] = importlib.util.find_spec(module) is None
        if not broken[module]:
            done = subprocess.run([sys.executable, "-c", f"import torch, {module}"], capture_output=True, text=True)
            broken[module] = bool(done.returncode)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{module} is installed but does not import, so it is left out: {last}", file=sys.stderr)
    return [name for name, module in PEERS.items() if not broken[module]]


def loss_function(name: str, products: str) -> Callable[[Case], tuple[Tensor, dict[str, Any]]]:
    """Case -> summed loss, and what is known of it: bounds, prune_range, pruned and simple loss of a pruned one."""
    mixed = products == "bf16"

    def join(states: Tensor, case: Case) -> Tensor:
        with torch.autocast(states.device.type, torch.bfloat16, enabled=mixed):
            return (torch.tanh(states) @ case.weight.T).float()

    def full(case: Case) -> tuple[Tensor, dict[str, Any]]:
        logits = join(case.enc[:, :, None] + case.pred[:, None], case)
        targets, enc_lens, target_lens = (x.int() for x in (case.targets, case.enc_lens, case.target_lens))
        if name == "torchaudio":
            from torchaudio.functional import rnnt_loss

            return rnnt_loss(logits, targets, enc_lens, target_lens, blank=0, reduction="sum"), {}
        if name == "warprnnt_numba":
            from warprnnt_numba import RNNTLossNumba

            return RNNTLossNumba(blank=0, reduction="sum")(logits, targets, enc_lens, target_lens).sum(), {}
        return _rnnt_module(name).rnnt_loss(logits, case.targets, 0, _boundary(case), reduction="sum"), {}

    def pruned(case: Case) -> tuple[Tensor, dict[str, Any]]:
        assert case.am is not None and case.lm is not None
        module, boundary = _rnnt_module(name.removesuffix("-pruned")), _boundary(case)
        simple, (label_gradient, blank_gradient) = module.rnnt_loss_smoothed(
            lm=case.lm,
            am=case.am,
            symbols=case.targets,
            termination_symbol=0,
            lm_only_scale=LM_ONLY_SCALE,
            am_only_scale=AM_ONLY_SCALE,
            boundary=boundary,
            reduction="sum",
            return_grad=True,
        )
        ranges = module.get_rnnt_prune_ranges(
            px_grad=label_gradient, py_grad=blank_gradient, boundary=boundary, s_range=PRUNE_RANGE
        )
        enc, pred = module.do_rnnt_pruning(am=case.enc, lm=case.pred, ranges=ranges)
        logits = join(enc + pred, case)
        loss = module.rnnt_loss_pruned(
            logits=logits,
            symbols=case.targets,
            ranges=ranges,
            termination_symbol=0,
            boundary=boundary,
            reduction="sum",
        )
        info = {"pruned": float(loss), "simple": float(simple), "kept_cells": ranges.numel()}
        return loss + simple, {**info, "bounds": ranges[:, :, 0], "prune_range": ranges.shape[2]}

    return pruned if name.endswith("-pruned") else full


def _rnnt_module(name: str) -> ModuleType:
    if name == "k2":
        import k2

        return k2
    import fast_rnnt

    return fast_rnnt


def _boundary(case: Case) -> Tensor:
    """[B, 4] int64: first token, first frame, tokens, frames."""
    zeros = torch.zeros_like(case.enc_lens)
    return torch.stack([zeros, zeros, case.target_lens, case.enc_lens], 1)
