"""The float64 run that every method is held to: the yardstick, utterance by utterance, so that memory stays bounded."""

from __future__ import annotations

from pathlib import Path

import torch

from losses import log_probs, occupancy
from losses.bench.cases import make
from losses.bench.yardstick import yardstick_loss


def write_reference(name: str, threshold: float, vocab_size: int | None, path: Path) -> None:
    """Loss, gradients of the summed loss by enc, pred and weight, cells, and cells above the threshold, to a file."""
    case = make(name, vocab_size=vocab_size).to(torch.float64)
    gradients = [torch.zeros_like(x) for x in case.sources]
    total, cells, kept = 0.0, 0, 0
    for b in range(case.enc.shape[0]):
        one = case.utterance(b)
        sources = [x.detach().requires_grad_() for x in one.sources]
        enc, pred, weight = sources
        loss = yardstick_loss(enc, pred, weight, one.targets, one.enc_lens, one.target_lens).sum()
        enc, pred, weight = torch.autograd.grad(loss, sources)
        gradients[0][b, : enc.shape[1]] = enc[0]
        gradients[1][b, : pred.shape[1]] = pred[0]
        gradients[2] += weight
        total += loss.item()
        with torch.no_grad():
            logits = torch.tanh(one.enc[:, :, None] + one.pred[:, None]) @ one.weight.T
        lens = one.enc_lens, one.target_lens
        found = occupancy(*log_probs(logits, one.targets, *lens), *lens)
        taken = found.blank + torch.nn.functional.pad(found.label, (0, 1))
        cells += taken.numel()
        kept += int((taken > threshold).sum())
    torch.save({"loss": total, "gradients": gradients, "cells": cells, "kept_cells": kept}, path)
