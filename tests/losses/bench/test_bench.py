"""The yardstick is right, the cases are what they say, and the command prints what it promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from losses import transducer_loss
from losses.bench import __main__ as command
from losses.bench import measure
from losses.bench.cases import CASES, SHAPES, make
from losses.bench.yardstick import yardstick_loss
from tests.losses import problems

KEYS = {
    "case", "method", "backend", "products", "threads", "median_ms", "min_ms", "max_ms", "peak_mb", "loss",
    "kept_cells", "torch", "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", list(problems.REGULAR))
def test_the_yardstick_equals_the_reference(name: str) -> None:
    problem = problems.make("regular", name, padding=0)
    with torch.no_grad():
        problem.bias.zero_()
        for b, tokens in enumerate(problem.target_lens.tolist()):
            problem.targets[b, tokens:] = 1
        for x in problem.parameters[:2]:
            x.nan_to_num_(0.5)
    enc, pred, weight, _, *rest = problem.arguments()
    loss = yardstick_loss(enc, pred, weight, *rest)
    gradients = torch.autograd.grad(loss, [enc, pred, weight], problem.upstream)
    expected = problem.expected()
    problems.assert_close(loss, expected.nll)
    for found, wanted in zip(gradients, (expected.enc, expected.pred, expected.weight), strict=True):
        problems.assert_close(found, wanted)


@pytest.mark.parametrize("name", [c for c in CASES if c != "headline"])
def test_cases(name: str) -> None:
    case = make(name)
    if name in SHAPES:
        batch, frames, tokens, vocab_size = SHAPES[name]
        assert case.enc.shape == (batch, frames, 512) and case.pred.shape == (batch, tokens + 1, 512)
        assert case.weight.shape == (vocab_size, 512)
        for lens, most in ((case.enc_lens, frames), (case.target_lens, tokens)):
            assert lens.max() == most and lens.min() >= most // 2
    else:
        assert case.enc.shape[0] * case.enc.shape[1] <= 10_000
        assert case.enc_lens.max() == case.enc.shape[1] and case.target_lens.max() == case.targets.shape[1]
        assert 250 < case.enc_lens.float().mean() < 390 and 50 < case.target_lens.float().mean() < 85
    assert case.targets.min() > 0
    again = make(name)
    assert all(torch.equal(a, b) for a, b in zip(case.sources, again.sources, strict=True))


def test_librispeech_lens_have_the_stated_distribution() -> None:
    from losses.bench.cases import LIBRISPEECH_FRAMES, LIBRISPEECH_TOKENS

    level = (np.arange(100_000) + 0.5) / 100_000
    for table, mean, ninetieth in ((LIBRISPEECH_FRAMES, 318, 416), (LIBRISPEECH_TOKENS, 68, 93)):
        values = np.interp(level, *table)
        assert abs(values.mean() - mean) < 0.02 * mean
        assert round(np.quantile(values, 0.9)) == ninetieth


def test_json_lines(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--case", "tiny", "--method", "yardstick,batched,samplewise,fused", "--samples", "1", "--threads", "1"]
    assert command.main([*arguments, "--allow-load", "--json"]) == 0
    results = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(r["method"], r["products"]) for r in results] == [
        ("batched", "bf16"), ("samplewise", "bf16"), ("fused", "bf16"),
        ("yardstick", "fp32"), ("batched", "fp32"), ("samplewise", "fp32"), ("fused", "fp32"),
    ]  # fmt: skip
    for result in results:
        assert set(result) >= KEYS
        assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]
        assert abs(result["loss"] / results[0]["loss"] - 1) < 1e-2


def test_error_by_threshold(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--case", "tiny", "--method", "fused", "--products", "fp32", "--threads", "1", "--error-by-threshold"]
    assert command.main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["error_by_threshold"]
    assert list(found) == [f"{x:g}" for x in measure.THRESHOLDS]
    assert found["0"] < 1e-5 and found["1e-06"] < 1e-5 < found["0.01"]
    assert command.main(arguments) == 0
    assert "1e-06" in capfd.readouterr().out


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    case = make("tiny")
    exact = {"loss": 0.0, "gradients": [torch.ones_like(x).double() for x in case.sources], "cells": 1, "kept_cells": 1}
    torch.save(exact, tmp_path / "reference.pt")
    arguments = ["--case", "tiny", "--method", "fused", "--products", "fp32", "--threads", "1", "--samples", "1"]
    arguments += ["--threshold", "0", "--reference", str(tmp_path / "reference.pt")]
    before = torch.get_num_threads()
    monkeypatch.setattr(measure, "timed", lambda *_: pytest.fail("timed"))
    try:
        result = measure.measure(measure.parser().parse_args(arguments))
    finally:
        torch.set_num_threads(before)
    assert "not timed" in str(result["error"]) and result["median_ms"] is None


def test_samples_under_load_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.0, 0.5, 0.01, 0.06, 0.02, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(measure, "sample", lambda case, loss: ([1.0], next(loads)))
    times, load = measure.timed(make("tiny"), lambda case: case.enc.sum(), 2, False)
    assert (times, load) == ([1.0, 1.0], 0.02)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--method", "magic"])
    assert "--method magic does not exist; choose from: yardstick, batched" in capsys.readouterr().err


def test_loss_function_is_that_of_the_method() -> None:
    case = make("tiny")
    expected = transducer_loss(*case.sources, None, case.targets, case.enc_lens, case.target_lens, reduction="sum").loss
    for method in ("yardstick", "batched", "samplewise", "fused"):
        assert float(measure.loss_function(method, "fp32", 0.0)(case)) == pytest.approx(float(expected), rel=1e-5)
