"""The yardstick is right, the cases are what they say, and the command prints what it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import LOSSES, transducer_loss
from losses.bench import __main__ as command
from losses.bench import grid, measure, peers, reference, run, sweep, trained
from losses.bench.cases import CASES, SHAPES, Case, Name, load, make
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


@pytest.mark.parametrize("name", [c for c in CASES if c != "headline" and "trained" not in c])
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


def test_names_of_cases() -> None:
    case = make("3x9x4x20-full")
    assert case.enc_lens.tolist() == [9] * 3 and case.target_lens.tolist() == [4] * 3 and case.cells == 3 * 9 * 5
    first = make("6x9x4x20-first")
    assert first.enc.shape == (4, 9, 512) and torch.equal(first.enc, make("6x9x4x20").enc[:4])
    for name in ("Q", "8x9x4", "M-half", "", "M-first-full"):
        with pytest.raises(ValueError, match="does not exist"):
            Name(name)
    with pytest.raises(ValueError, match="trained"):
        load("tiny-trained", None)


def test_the_trivial_joiner_changes_no_other_tensor() -> None:
    without, with_it = make("tiny"), make("tiny", simple=True)
    assert with_it.am is not None and with_it.am.shape == (2, 20, 50)
    assert with_it.lm is not None and with_it.lm.shape == (2, 6, 50)
    for a, b in zip(without.sources, with_it.sources[:3], strict=True):
        assert torch.equal(a, b)


def test_json_lines(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    methods = [m for m in ("yardstick", "batched", "samplewise", "fused", "pruned") if m in ("yardstick", *LOSSES)]
    arguments = ["--case", "tiny", "--method", ",".join(methods), "--samples", "1", "--threads", "1"]
    assert command.main([*arguments, "--allow-load", "--json", "--out", str(tmp_path / "new" / "out")]) == 0
    lines = capfd.readouterr().out
    results = [json.loads(line) for line in lines.splitlines()]
    expected = [(m, "bf16") for m in methods if m != "yardstick"] + [(m, "fp32") for m in methods]
    assert [(r["method"], r["products"]) for r in results] == expected
    for result in results:
        assert set(result) >= KEYS
        assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]
        if result["method"] != "pruned":
            assert abs(result["loss"] / results[0]["loss"] - 1) < 1e-2
        if result["method"] != "yardstick":
            assert result["kept_cells"] <= result["cells"] == 160
        else:
            assert result["kept_cells"] == 2 * 20 * 6
    assert (tmp_path / "new" / "out" / "results.jsonl").read_text() == lines
    assert is_png(tmp_path / "new" / "out" / "cases.png")


def test_the_yardstick_runs_once_whatever_the_products() -> None:
    for products, expected in (("bf16", ["fp32"]), ("fp32", ["fp32"]), ("bf16,fp32", ["fp32"])):
        chosen = command.parse(["--method", "yardstick", "--products", products])
        assert [p for _, p in run.pairs(chosen)] == expected


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def small_run(tmp_path: Path, *arguments: str) -> run.Run:
    tmp_path.joinpath("out").mkdir()
    common = ["--samples", "1", "--threads", "1", "--allow-load", "--out", str(tmp_path / "out")]
    return run.Run(command.parse([*common, "--products", "bf16", *arguments]), tmp_path)


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "M", (2, 20, 5, 50))
    chosen = small_run(tmp_path, "--method", "fused", "--sweep", "T", "--values", "10,30")
    rows = sweep.sweep(chosen, "T")
    assert [(r["T"], r["case"]) for r in rows] == [(10, "2x10x5x50"), (30, "2x30x5x50")] and not chosen.failed
    assert rows[0]["cells"] < rows[1]["cells"] and rows[1]["shape"] == [2, 30, 5, 50, 512]
    assert is_png(tmp_path / "out" / "sweep_T.png")


def test_linearity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "M", (2, 20, 5, 50))
    chosen = small_run(
        tmp_path, "--linearity", "--values", "50,60", "--batches", "2,4,6", "--lengths", "10x4,20x4,30x4"
    )

    def measured(case: str, method: str, products: str, samples: int | None = None) -> run.Result:
        found, size = make(case), int(case.removesuffix("-full").split("x")[3])
        result = {"case": case, "method": method, "products": products, "cells": found.cells}
        return {**result, "kept_cells": found.cells**2, "peak_mb": float(size)}

    def in_turns(rows: list[run.Result]) -> None:
        for result in rows:
            result["median_ms"] = 2.0 + 0.5 * result["cells"]

    monkeypatch.setattr(chosen, "measure", measured)
    monkeypatch.setattr(chosen, "in_turns", in_turns)
    by_batch, by_length, memory = sweep.linearity(chosen)
    assert by_length["cells_range"] == [100, 300] and by_batch["cells_range"][0] == make("2x20x5x50").cells
    for line in (by_batch, by_length):
        assert line["r2"] == 1 and line["r2_by_cells_and_kept_cells"] == 1
        assert line["us_per_cell"] == 500 and line["intercept_ms"] == 2
    assert memory["peak_mb_by_vocab_size"] == {50: 50.0, 60: 60.0}
    for name in ("batches", "lengths"):
        assert is_png(tmp_path / "out" / f"linearity_{name}_bf16.png")


def test_cases_are_timed_in_turns(tmp_path: Path) -> None:
    chosen = small_run(tmp_path, "--samples", "2")
    row = {"method": "fused", "products": "bf16"}
    rows = [{"case": "1x10x4x50", **row}, {"case": "2x20x4x50", **row, "error": "wrong"}, {"case": "2x30x4x50", **row}]
    chosen.in_turns(rows)
    for result in (rows[0], rows[2]):
        assert 0 < result["min_ms"] <= result["median_ms"] <= result["max_ms"]
    assert rows[1] == {"case": "2x20x4x50", **row, "error": "wrong"}
    broken = [{"case": "nothing", **row}]
    chosen.in_turns(broken)
    assert "nothing does not exist" in broken[0]["error"]


def test_a_line_is_fitted() -> None:
    assert sweep.fit([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3, 1))
    assert sweep.fit([0, 1, 2], [0, 1, 0])[2] == pytest.approx(0)
    x, z = [1, 2, 3, 5], [4, 1, 3, 9]
    assert sweep.fit_two(x, z, [7 + 2 * a - b for a, b in zip(x, z, strict=True)]) == pytest.approx(1)
    assert sweep.fit_two(x, [1, 1, 1, 1], [0, 1, 0, 1]) == pytest.approx(sweep.fit(x, [0, 1, 0, 1])[2])


def test_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(case: str, method: str, products: str, *flags: str, samples: int | None = None) -> run.Result:
        batch = int(case.split("x")[0])
        found = {"gradient_errors": [0.0], "torch": "", "cpu": ""}
        if samples == 0:  # 100 + 10 * batch, with a step that the small batches do not show
            return {**found, "total_mb": 100 + 10 * batch + (50 if batch > 80 else 0)}
        return {**found, "median_ms": 3.0 * batch}

    chosen = small_run(tmp_path, "--grid")
    monkeypatch.setattr(chosen, "child", child)
    monkeypatch.setattr(chosen, "prepare", lambda case: None)
    rows = grid.grid(chosen, {1: (25, 4)}, limit_mb=1000)
    assert [r["method"] for r in rows] == ["batched", "samplewise", "fused"]
    for result in rows:
        assert result["tried"][0] == (88, 1030) and (result["largest_batch"], result["total_mb"]) in result["tried"]
        assert 82 <= result["largest_batch"] <= 85 and 970 <= result["total_mb"] <= 1000
        assert result["timed_batch"] == 16 and result["ms_per_utterance"] == 3
        assert result["intercept_mb"] == pytest.approx(100) and result["mb_per_utterance"] == pytest.approx(10)
    assert is_png(tmp_path / "out" / "grid.png")


def test_the_first_utterances_stand_for_a_heavy_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAVY", 0)
    monkeypatch.setitem(SHAPES, "headline", (6, 20, 5, 50))
    chosen = small_run(tmp_path, "--method", "fused")
    result = chosen.measure("6x20x5x50-full", "fused", "bf16")
    assert result["checked_on"] == "first 4 utterances" and len(result["gradient_errors"]) == 3
    assert result["median_ms"] > 0 and result["cells"] == 6 * 20 * 6 and "error" not in result
    monkeypatch.setattr(run, "LARGEST_LOGITS", 1)
    assert "makes logits of over" in chosen.measure("6x20x5x50-full", "yardstick", "fp32")["error"]
    monkeypatch.setattr(chosen, "check", lambda *_: {"error": "a gradient is off"})
    assert "median_ms" not in chosen.measure("6x20x5x50-full", "fused", "bf16")


def test_a_step_under_load_is_measured_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("tiny")
    reads = iter([(2.0, 0.3), (3.0, 0.01)])
    monkeypatch.setattr(measure.Watch, "read", lambda _: next(reads))
    loss = measure.loss_function("fused", "fp32", 0.0)
    peak = measure.Peak(0, 0.0, {}, 1.0, 0.5)
    assert measure.once(case, loss, peak._replace(load=0.01), False) == ([1.0], 0.01)
    assert measure.once(case, loss, peak, True) == ([1.0], 0.5)
    assert measure.once(case, loss, peak, False) == ([3.0], 0.01)
    monkeypatch.setattr(measure.Watch, "read", lambda _: (2.0, 0.3))
    assert measure.once(case, loss, peak, False) == ([], 0.3)


def test_trained_case(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        reference.write_reference("tiny-trained", 1e-6, None, tmp_path)
    finally:
        torch.set_num_threads(before)
    case, exact = load("tiny-trained", tmp_path, simple=True), torch.load(tmp_path / "tiny-trained.reference.pt")
    assert exact["loss"] / int(case.target_lens.sum()) < 1.05 * trained.NATS_PER_TOKEN
    untrained = make("tiny")
    kept = [
        sum(int((reference.cell_occupancy(c.utterance(b)) > 1e-6).sum()) for b in range(2)) for c in (untrained, case)
    ]
    assert kept[1] == exact["kept_cells"] < 0.6 * kept[0]
    again = make("tiny", simple=True)
    trained.train(again)
    assert torch.allclose(again.enc, case.enc) and not torch.equal(again.enc, untrained.enc)
    # am points at the trained joiner's best alignment: a token or blank of each frame stands out
    assert case.am is not None and case.am[0].max(-1).values.min() > trained.SIMPLE - 2


def test_error_by_threshold(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--case", "tiny", "--method", "fused", "--products", "fp32", "--threads", "1", "--error-by-threshold"]
    assert command.main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["error_by_threshold"]
    assert list(found) == [f"{x:g}" for x in measure.THRESHOLDS]
    assert found["0"] < 1e-5 and found["1e-06"] < 1e-5 < found["0.01"]
    assert command.main(arguments) == 0
    assert "1e-06" in capfd.readouterr().out


def measured(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> run.Result:
    arguments = ["--case", "tiny", "--method", method, "--products", "fp32", "--threads", "1", "--samples", "1"]
    monkeypatch.setattr(measure, "timed", lambda *_: pytest.fail("timed"))
    before = torch.get_num_threads()
    try:
        return measure.measure(measure.parser().parse_args([*arguments, "--threshold", "0", "--folder", str(folder)]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: int) -> None:
    reference.write_reference("tiny", 0.0, None, tmp_path)
    right = measure.loss_function

    def wrong(*arguments) -> measure.Loss:
        def loss(case: Case) -> tuple[Tensor, measure.Info]:
            total, info = right(*arguments)(case)
            x = case.sources[source].flatten()[5]
            return total + 0.01 * (x - x.detach()), info

        return loss

    monkeypatch.setattr(measure, "loss_function", wrong)
    result = measured("fused", tmp_path, monkeypatch)
    assert "not timed" in str(result["error"]) and result["median_ms"] is None


def exhaustive(one: Case, bounds: list[int], prune_range: int) -> float:
    """-log of the sum over all alignments of one utterance that stay within the ranges, each walked on its own."""
    with torch.no_grad():
        blank, label = reference.joiner_log_probs(one.enc, one.pred, one.weight, one.targets)
    frames, columns = blank.shape[1:]

    def walk(t: int, u: int) -> float:
        if not bounds[t] <= u < bounds[t] + prune_range:
            return 0.0
        stay = math.exp(blank[0, t, u])
        stay *= float(u == columns - 1) if t == frames - 1 else walk(t + 1, u)
        return stay + (math.exp(label[0, t, u]) * walk(t, u + 1) if u < columns - 1 else 0.0)

    return -math.log(walk(0, 0))


def test_the_pruned_reference_sums_the_alignments_within_the_ranges() -> None:
    case = make("2x5x3x7", simple=True).to(torch.float64)
    case.enc_lens, case.target_lens = torch.tensor([5, 4]), torch.tensor([3, 2])
    bounds = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, 99]])
    found = reference.pruned_reference(case, bounds, 2, 0.25, 0.1)
    expected = sum(exhaustive(case.utterance(b), bounds[b].tolist(), 2) for b in range(2))
    assert found["pruned"] == pytest.approx(expected, rel=1e-12)
    whole = reference.pruned_reference(case, torch.zeros_like(bounds), 4, 0.0, 0.0)
    assert whole["pruned"] == pytest.approx(
        float(yardstick_loss(*case.sources[:3], case.targets, case.enc_lens, case.target_lens).sum()), rel=1e-12
    )
    assert [g.shape for g in found["gradients"]] == [x.shape for x in case.sources]
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found["gradients"])
    assert not found["gradients"][0][1, 4:].any() and not found["gradients"][4][1, 3:].any()


@pytest.mark.parametrize(("lm_only", "am_only"), [(0.25, 0.0), (0.1, 0.3)])
def test_simple_log_probs(lm_only: float, am_only: float) -> None:
    case = make("1x4x3x6-full", simple=True).to(torch.float64)
    assert case.am is not None and case.lm is not None
    blank, label = reference.simple_log_probs(case.am, case.lm, case.targets, lm_only, am_only)
    am, lm = case.am[0].numpy(), case.lm[0].numpy()

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum())

    mean = np.exp(np.stack([log_softmax(x) for x in lm])).mean(0)
    for t in range(4):
        for u in range(4):
            mixed = (1 - lm_only - am_only) * log_softmax(am[t] + lm[u]) + lm_only * log_softmax(lm[u])
            mixed = mixed + am_only * log_softmax(am[t] + np.log(mean))
            assert float(blank[0, t, u]) == pytest.approx(mixed[0])
            if u < 3:
                assert float(label[0, t, u]) == pytest.approx(mixed[int(case.targets[0, u])])


@pytest.mark.skipif("pruned" not in LOSSES, reason="there is no method pruned")
def test_pruned_is_held_to_the_reference_of_its_own_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "timed", lambda *_: ([1.0], 0.0))
    arguments = ["--case", "tiny", "--method", "pruned", "--products", "fp32", "--threads", "1", "--samples", "0"]
    before = torch.get_num_threads()
    try:
        given = measure.parser().parse_args([*arguments, "--threshold", "0", "--folder", str(tmp_path)])
        result = measure.measure(given)
        assert "error" not in result and len(result["gradient_errors"]) == 5
        right = measure.pruned_reference

        def shifted(case: Case, bounds: Tensor, *rest) -> run.Result:
            return right(case, (bounds - 1).clamp_(min=0), *rest)

        monkeypatch.setattr(measure, "pruned_reference", shifted)
        assert "not timed" in str(measure.measure(given)["error"])
    finally:
        torch.set_num_threads(before)


def test_peers_that_do_not_import_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(peers, "PEERS", {"a": "no_such_module", "b": "json", "b-pruned": "json", "c": "antigravity_"})
    assert peers.available() == ["b", "b-pruned"]
    monkeypatch.setattr(peers, "PEERS", {"b": "json"})
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="OSError: x"))
    assert peers.available() == [] and "json is installed but does not import" in capsys.readouterr().err


@pytest.mark.parametrize("name", peers.available())
def test_peers(name: str) -> None:
    case = make("tiny", simple=name.endswith("pruned"))
    loss, info = peers.loss_function(name, "fp32")(case)
    arguments = case.enc, case.pred, case.weight, case.targets, case.enc_lens, case.target_lens
    if name.endswith("pruned"):
        exact = reference.pruned_reference(case, info["bounds"], info["prune_range"], 0.25, 0.0)
        assert float(loss) == pytest.approx(exact["pruned"] + exact["simple"], rel=1e-4)
    else:
        assert float(loss) == pytest.approx(float(yardstick_loss(*arguments).sum()), rel=1e-4)


def test_samples_under_load_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.0, 0.5, 0.01, 0.06, 0.02, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(measure, "sample", lambda case, loss: ([1.0], next(loads)))
    times, load = measure.timed(make("tiny"), lambda case: case.enc.sum(), 2, False)
    assert (times, load) == ([1.0, 1.0], 0.02)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--method", "magic"])
    assert "--method magic does not exist; choose from: yardstick, batched" in capsys.readouterr().err
    for arguments in (
        ["--case", "Q"],
        ["--sweep", "J"],
        ["--sweep", "T", "--values", "1,b"],
        ["--grid", "--linearity"],
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)


def test_loss_function_is_that_of_the_method() -> None:
    case = make("tiny")
    expected = transducer_loss(*case.sources, None, case.targets, case.enc_lens, case.target_lens, reduction="sum").loss
    for method in ("yardstick", "batched", "samplewise", "fused"):
        loss, _ = measure.loss_function(method, "fp32", 0.0)(case)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
