"""The float64 runs that methods are held to: the yardstick, utterance by utterance, so that memory stays bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losses import log_probs, occupancy
from losses.bench import trained
from losses.bench.cases import Case, Name, load
from losses.bench.yardstick import recursion, yardstick_loss

OUTSIDE = -1e30  # log-prob of a cell that pruning leaves out


def reference_path(folder: Path, name: str) -> Path:
    """Where a run keeps the float64 reference of a case."""
    return folder / f"{name}.reference.pt"


def write_reference(name: str, threshold: float, vocab_size: int | None, folder: Path) -> None:
    """Loss, gradients of the summed loss by enc, pred and weight, cells, and cells above the threshold, to a file.

    A trained case is trained first.
    """
    if Name(name).trained:
        trained.write(name, vocab_size, folder)
    case = load(name, folder, vocab_size).to(torch.float64)
    gradients = [torch.zeros_like(x) for x in case.sources]
    total, cells, kept = 0.0, 0, 0
    for b in range(case.enc.shape[0]):
        one = case.utterance(b)
        enc, pred, weight = sources = [x.detach().requires_grad_() for x in one.sources]
        loss = yardstick_loss(enc, pred, weight, one.targets, one.enc_lens, one.target_lens).sum()
        _add(gradients, torch.autograd.grad(loss, sources), b)
        total += loss.item()
        taken = cell_occupancy(one)
        cells += taken.numel()
        kept += int((taken > threshold).sum())
    found = {"loss": total, "gradients": gradients, "cells": cells, "kept_cells": kept}
    torch.save(found, reference_path(folder, name))


@torch.no_grad()
def cell_occupancy(one: Case) -> Tensor:
    """[1, T, U+1], probability that the alignment passes a cell of this utterance."""
    logits = torch.tanh(one.enc[:, :, None] + one.pred[:, None]) @ one.weight.T
    lens = one.enc_lens, one.target_lens
    found = occupancy(*log_probs(logits, one.targets, *lens), *lens)
    return found.blank + torch.nn.functional.pad(found.label, (0, 1))


def _add(gradients: list[Tensor], found: tuple[Tensor, ...], b: int) -> None:
    """Adds one utterance's gradients by enc, pred, weight and, where they are there, am and lm."""
    for i, (whole, part) in enumerate(zip(gradients, found, strict=True)):
        if i == 2:  # weight, the only one that utterances share
            whole += part
        else:
            whole[b, : part.shape[1]] = part[0]


def simple_log_probs(
    am: Tensor, lm: Tensor, targets: Tensor, lm_only_scale: float, am_only_scale: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of blank [1, T, U+1] and next label [1, T, U] of a trivial joiner, smoothed (Kuang et al. 2022).

    am [1, T, V], lm [1, U+1, V], targets [1, U] of one utterance without padding. The log-softmax of am + lm, of lm,
    and of am plus the log of the mean over u of softmax(lm), each times its scale, 1 - lm_only_scale - am_only_scale
    for the first.
    """
    both = (am[:, :, None] + lm[:, None]).log_softmax(-1)
    lm_only = lm.log_softmax(-1)[:, None]
    unigram = lm.softmax(-1).mean(1, keepdim=True).log()
    am_only = (am + unigram).log_softmax(-1)[:, :, None]
    mixed = (1 - lm_only_scale - am_only_scale) * both + lm_only_scale * lm_only + am_only_scale * am_only
    index = targets[:, None, :, None].expand(-1, am.shape[1], -1, 1)
    return mixed[..., 0], mixed[:, :, :-1].gather(3, index).squeeze(3)


def joiner_log_probs(enc: Tensor, pred: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of blank [1, T, U+1] and of the next label [1, T, U] of the joiner."""
    found = (torch.tanh(enc[:, :, None] + pred[:, None]) @ weight.T).log_softmax(-1)
    index = targets[:, None, :, None].expand(-1, enc.shape[1], -1, 1)
    return found[..., 0], found[:, :, :-1].gather(3, index).squeeze(3)


def pruned_reference(
    case: Case, bounds: Tensor, prune_range: int, lm_only_scale: float, am_only_scale: float
) -> dict[str, Any]:
    """ "pruned" and "simple" loss, summed over utterances, and "gradients" of both together by the five sources.

    bounds int64 [B, T]: frame t of utterance b keeps the columns bounds[b, t] <= u < bounds[b, t] + prune_range; other
    cells have probability 0. float64, whatever the case's dtype.
    """
    exact = case.to(torch.float64)
    gradients = [torch.zeros_like(x) for x in exact.sources]
    totals = {"pruned": 0.0, "simple": 0.0}
    for b in range(exact.enc.shape[0]):
        one = exact.utterance(b)
        enc, pred, weight, am, lm = sources = [x.detach().requires_grad_() for x in one.sources]
        lens = one.enc_lens, one.target_lens
        blank, label = joiner_log_probs(enc, pred, weight, one.targets)
        begin = bounds[b, : enc.shape[1]][None, :, None]
        columns = torch.arange(pred.shape[1])
        outside = (columns < begin) | (columns >= begin + prune_range)
        blank = blank.masked_fill(outside, OUTSIDE)
        label = label.masked_fill(outside[:, :, :-1], OUTSIDE)
        pruned = recursion(blank, label, *lens).sum()
        simple = recursion(*simple_log_probs(am, lm, one.targets, lm_only_scale, am_only_scale), *lens).sum()
        _add(gradients, torch.autograd.grad(pruned + simple, sources), b)
        totals["pruned"] += pruned.item()
        totals["simple"] += simple.item()
    return {**totals, "gradients": gradients}
