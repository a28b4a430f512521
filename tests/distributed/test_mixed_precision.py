"""The joiner and its losses under FSDP2's MixedPrecisionPolicy, which hands them weights in bfloat16."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from asr.models.transducer import build_model
from asr.training.parallel import whole
from asr.training.ranks import Ranks
from losses import LOSSES
from tests.asr.training.runs import NO_DROPOUT, experiment
from tests.distributed.processes import together

SIZES = (3, 9, 4)  # B, T, U


def losses_of(method: str, cast: bool) -> dict[str, torch.Tensor]:
    """Loss and gradients, in float32, or with weights and inputs in bfloat16 from shares."""
    torch.manual_seed(0)
    config = experiment(*NO_DROPOUT, f"loss.method={method}", "loss.prune_range=3")
    model = build_model(config, 7)
    torch.nn.init.normal_(model.joiner.out.bias)
    batch, frames, tokens = SIZES
    enc = torch.randn(batch, frames, model.encoder.dim, requires_grad=True)
    targets = torch.randint(1, 7, (batch, tokens))
    enc_lens, target_lens = torch.tensor([9, 7, 5]), torch.tensor([4, 3, 2])
    seen = {}
    if cast:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model.joiner, mp_policy=policy)
        project = model.joiner.project_encoder
        model.joiner.project_encoder = lambda x: seen.setdefault("dtype", project(x))
    out = model.transducer_loss(enc, enc_lens, targets, target_lens, config.loss)
    loss = out.loss if out.simple_loss is None else out.loss + out.simple_loss
    loss.backward()
    if cast:
        assert seen["dtype"].dtype == torch.bfloat16
    gradients = {name: p.grad for name, p in model.joiner.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "enc": enc.grad, **deepcopy(whole(gradients))}


def _compare(ranks: Ranks, out: Path) -> None:
    for method in LOSSES:
        exact, rounded = losses_of(method, False), losses_of(method, True)
        assert exact.keys() == rounded.keys()
        assert float(rounded["loss"]) == pytest.approx(float(exact["loss"]), rel=1e-2), method
        for name, gradient in rounded.items():
            assert gradient.dtype == torch.float32, (method, name)
            difference = (gradient - exact[name]).norm() / exact[name].norm()
            assert difference < 5e-2, (method, name, float(difference))
    (out / str(ranks.rank)).touch()


def test_losses_of_bfloat16_weights(tmp_path: Path) -> None:
    together(2, _compare, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
