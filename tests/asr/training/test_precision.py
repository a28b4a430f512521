"""Number formats of products: of the whole model, of parts of it, and the scale of the loss in float16."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from asr.data.loader import train_loader
from asr.errors import UserError
from asr.training.precision import FIRST_SCALE, GROWTH_STEPS, next_scale
from asr.training.trainer import TrainData, Trainer
from losses import LOSSES
from tests.asr.training.runs import NO_DROPOUT, TOKENIZER, experiment, make_trainer, newest, records, run
from tests.asr.training.test_trainer import allow


def gradients(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def one_step(data: TrainData, out: Path, *settings: str) -> tuple[dict, torch.Tensor]:
    config = experiment(*NO_DROPOUT, "optim.clip_grad_norm=0", *settings)
    trainer = make_trainer(config, data, out)
    batch = next(iter(train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0)))
    trainer.progress.loss_scale = 256.0  # the first, 65536, is for runs to find their own from
    record = trainer.step([batch], allow(trainer))
    return record, gradients(trainer)


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_float32(data: TrainData, tmp_path: Path, precision: str, method: str) -> None:
    record, gradient = one_step(data, tmp_path / "half", f"training.precision={precision}", f"loss.method={method}")
    expected, exact = one_step(data, tmp_path / "fp32", f"loss.method={method}")
    # "pruned" finds its ranges in a lattice of rounded numbers
    assert record["loss"] == pytest.approx(expected["loss"], rel=3e-3 if method == "pruned" else 1e-3)
    assert gradient.dtype == torch.float32 and not torch.equal(gradient, exact)
    # float16 has 11 bits, bfloat16 8
    assert float((gradient - exact).norm() / exact.norm()) < {"bf16": 3e-2, "fp16": 3e-3}[precision]


def test_parts_compute_in_a_precision_of_their_own(data: TrainData, tmp_path: Path) -> None:
    _, exact = one_step(data, tmp_path)
    errors = {}
    for name, overrides in {
        "all": "{}",
        "none": "{encoder: fp32, predictor: fp32, joiner: fp32}",
        "joiner": "{joiner: fp32}",
        "block": "{joiner: fp32, predictor: fp32, encoder.subsampling: fp32, encoder.blocks.0: fp32}",
    }.items():
        settings = ["training.precision=bf16", f"training.precision_overrides={overrides}"]
        record, gradient = one_step(data, tmp_path, *settings)
        errors[name] = float((gradient - exact).norm())
        assert math.isfinite(record["loss"])
    assert errors["none"] == errors["block"] == 0.0 < errors["joiner"] < errors["all"]
    # within parts that are computed again too, where they have the same name
    part = ["training.precision=bf16", "training.precision_overrides={encoder.blocks.0.ff1: fp32}"]
    kept, again = (one_step(data, tmp_path, *part, f"memory.checkpointing={mode}")[1] for mode in ("none", "full"))
    assert torch.equal(kept, again) and 0.0 < float((kept - exact).norm()) != errors["all"]
    # and the other way round
    _, gradient = one_step(data, tmp_path, "training.precision_overrides={joiner: bf16}")
    assert 0.0 < float((gradient - exact).norm()) < errors["all"]
    with pytest.raises(UserError, match="no module 'decoder'; it has encoder, predictor, joiner"):
        one_step(data, tmp_path, "training.precision_overrides={decoder: fp32}")


def test_the_scale_follows_overflow() -> None:
    assert next_scale(1024.0, 5, True) == (512.0, 0)
    assert next_scale(1.0, 5, True) == (1.0, 0)
    assert next_scale(1024.0, 5, False) == (1024.0, 6)
    assert next_scale(1024.0, GROWTH_STEPS - 1, False) == (2048.0, 0)


def test_a_step_that_overflows_halves_the_scale_and_changes_nothing_else(data: TrainData, tmp_path: Path) -> None:
    config = experiment(*NO_DROPOUT, "training.precision=fp16")
    trainer = make_trainer(config, data, tmp_path)
    batches = list(train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0))
    trainer.progress.loss_scale = 2.0**40
    before = [p.clone() for p in trainer.model.parameters()]
    bad = allow(trainer)
    record = trainer.step(batches[:1], bad)
    assert not math.isfinite(record["grad_norm"]) and record["loss_scale"] == 2.0**39 and bad.count == 0
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    trainer.progress.loss_scale = 2.0**10
    record = trainer.step(batches[:1], bad)
    assert math.isfinite(record["grad_norm"]) and record["loss_scale"] == 2.0**10 and trainer.progress.good_steps == 1
    assert any(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_the_scale_is_in_the_checkpoint(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.precision=fp16", "training.max_epochs=1")
    steps = [r["loss_scale"] for r in records(tmp_path, "train")]
    progress = newest(tmp_path)["training"]["progress"]
    since = next((i for i, scale in enumerate(reversed(steps)) if scale != steps[-1]), len(steps))
    changed = since < len(steps) or steps[-1] != FIRST_SCALE  # the step that overflowed does not count
    assert progress["loss_scale"] == steps[-1] and progress["good_steps"] == since - changed


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_batch_is_left_out(data: TrainData, tmp_path: Path, accumulation: int) -> None:
    """Also where no gradient is left that the scale could be taken out of."""
    config = experiment(*NO_DROPOUT, "training.precision=fp16")
    trainer, expected = (make_trainer(config, data, tmp_path / name) for name in ("bad", "expected"))
    bad, *good = islice(train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0), accumulation)
    bad.features[:] = math.nan
    allowed = allow(trainer, 1)
    record = trainer.step([*good, bad], allowed)
    assert allowed.count == 1 and math.isnan(record["loss"]) == (not good)
    if good:
        assert record["loss"] == pytest.approx(expected.step(good, allow(expected))["loss"], rel=1e-3)
        torch.testing.assert_close(gradients(trainer), gradients(expected), rtol=1e-2, atol=1e-4)
