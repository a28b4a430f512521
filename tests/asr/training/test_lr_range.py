"""The learning-rate range test: its curve, what it reads from one, and that it leaves nothing else behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from asr.cli.main import main
from asr.errors import UserError
from asr.training.faults import BadBatches
from asr.training.lr_range import RangeConfig, RangeCurve, measure_range, range_text, smooth, write_range
from asr.training.trainer import TrainData
from tests.asr.training.runs import SETTINGS, TOKENIZER, experiment, make_trainer


def curve_of(rates: list[float], losses: list[float], window: int = 1) -> RangeCurve:
    return RangeCurve(rates, losses, window, False)


def test_rates_grow_by_the_same_factor() -> None:
    config = RangeConfig(steps=13, first=1e-6, last=1.0)
    rates = [config.rate(step) for step in range(13)]
    assert rates == pytest.approx([10 ** (-6 + step / 2) for step in range(13)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 9}, "--steps 9 is too few"),
        ({"first": 0.0}, "first 0.0 must be above 0 and below --last 1.0"),
        ({"first": 0.1, "last": 0.1}, "--first 0.1 must be above 0 and below --last 0.1"),
        ({"last": math.inf}, "below --last inf, which must be finite"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RangeConfig(**values)


def test_smoothing_has_no_bias_and_passes_over_what_is_not_finite() -> None:
    assert smooth([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    # weights 1/4 and 3/4 * 1/4, divided by their sum
    assert smooth([8.0, 1.0], 4) == pytest.approx([8.0, (0.1875 * 8 + 0.25 * 1) / 0.4375])
    assert smooth([8.0, math.nan, 1.0], 4) == pytest.approx([8.0, 8.0, (0.1875 * 8 + 0.25 * 1) / 0.4375])
    assert smooth([5.0, 7.0, 6.0], 1) == [5.0, 7.0, 6.0]


def test_what_a_curve_suggests() -> None:
    rates = [10.0**power for power in range(-6, 2)]
    found = curve_of(rates, [9.0, 9.0, 8.5, 5.0, 3.0, 2.5, 4.0, 30.0]).found
    # the step with 1e-4 makes the loss of the next one
    assert found is not None and (found.fastest, found.lowest) == (1e-4, 1e-1)
    assert found.suggestion == pytest.approx(1e-2)
    # what falls after a break is no place to train
    found = curve_of(rates, [9.0, 8.0, 7.0, 6.9, 50.0, 60.0, 20.0, 8.0]).found
    assert found is not None and (found.fastest, found.lowest) == (1e-6, 1e-3)


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    curve = curve_of([1e-3, 1e-2, 1e-1], [2.0, 1.99, 5.0])
    assert curve.found is None and "does not fall between 1.0e-03 and 1.0e-01: pass another --first" in range_text(
        curve
    )


def test_the_losses_are_those_of_steps_with_these_rates(data: TrainData, tmp_path: Path) -> None:
    """Over several epochs, with the configured optimizer and its learning rates by part, and nothing left behind."""
    config = RangeConfig(steps=12, first=1e-4, last=1e-2)
    settings = experiment("optim={schedule: noam, weight_decay: 0, lr_scales: {encoder: 0.5}}", "training.max_steps=2")
    curve = measure_range(settings, data, tmp_path, config)
    assert list(tmp_path.iterdir()) == [] and not curve.diverged
    assert curve.rates == pytest.approx([config.rate(step) for step in range(12)])
    again = measure_range(settings, data, tmp_path, config)
    assert again == curve

    # the first epoch with an AdamW made by hand
    trainer = make_trainer(experiment("training.ema_decay=0"), data, tmp_path / "hand")
    encoder = list(trainer.model.encoder.parameters())
    others = [*trainer.model.predictor.parameters(), *trainer.model.joiner.parameters()]
    groups = [{"params": encoder, "lr_scale": 0.5}, {"params": others}]
    trainer.parallel.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    rates = iter(curve.rates)
    trainer.stepper.rate = lambda *_: next(rates)
    trainer.model.train()
    bad = BadBatches(trainer.out_dir, 0, 0, lambda **_: None, print)
    expected = [trainer.step(batches, bad, own)["loss"] for batches, own in trainer.batches_of_epoch()]
    assert len(expected) < 12  # the curve had a second epoch
    assert curve.losses[: len(expected)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("last", [1e4, 1e25])
def test_it_ends_where_the_training_diverges(last: float, data: TrainData, tmp_path: Path) -> None:
    curve = measure_range(experiment(), data, tmp_path, RangeConfig(steps=20, first=1e-2, last=last))
    assert curve.diverged and len(curve.losses) < 20
    assert not math.isfinite(curve.losses[-1]) or curve.losses[-1] > 2 * min(curve.losses)
    write_range(tmp_path, curve, experiment(), "asr lr-range")
    points = json.loads((tmp_path / "lr_range.json").read_text())["points"]
    assert len(points) == len(curve.losses) and points[0]["loss"] == curve.losses[0]


def test_the_command_writes_two_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    out = tmp_path / "out"
    words = ["--train-cuts", str(folder / "cuts_train.jsonl.gz"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    words += ["--out-dir", str(out), "--steps", "10", "--first", "1e-4", "--last", "0.1", "--device", "cpu"]
    assert main(["lr-range", *words, "--set", "optim.name=scaled_adam"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert {path.name for path in out.iterdir()} - {"bad_rows.txt"} == {"lr_range.json", "lr_range.png"}
    found = json.loads((out / "lr_range.json").read_text())
    assert found["optimizer"] == "scaled_adam" and [point["step"] for point in found["points"]] == list(range(1, 11))
    assert [point["lr"] for point in found["points"]] == pytest.approx(list(np.geomspace(1e-4, 0.1, 10)))
    assert said.endswith("lr_range.png") and ("optim.lr=" in said) == (found["suggestion"] is not None)
    picture = imread(out / "lr_range.png")
    assert picture.shape[:2] == (540, 960) and float(picture[..., :3].std()) > 0.01
    assert main(["lr-range", *words, "--steps", "3"]) == 2
    assert "error: --steps 3 is too few" in capsys.readouterr().err


def test_random_numbers_elsewhere_do_not_matter(data: TrainData, tmp_path: Path) -> None:
    config = RangeConfig(steps=10, first=1e-4, last=1e-2)
    torch.manual_seed(1)
    first = measure_range(experiment(), data, tmp_path, config)
    torch.manual_seed(2)
    assert measure_range(experiment(), data, tmp_path, config) == first
    assert measure_range(experiment("seed=5"), data, tmp_path, config) != first
