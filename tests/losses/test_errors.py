"""Wrong arguments: one ValueError that names the argument, the value, the limit and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from losses import LOSSES, TransducerLossOptions, backends, lattice_loss, rnnt_loss, transducer_loss

B, T, U, V, J = 4, 10, 6, 7, 5


def joint() -> dict[str, Any]:
    """Good arguments of transducer_loss."""
    return {
        "enc": torch.zeros(B, T, J),
        "pred": torch.zeros(B, U + 1, J),
        "weight": torch.zeros(V, J),
        "bias": torch.zeros(V),
        "targets": torch.ones(B, U, dtype=torch.int64),
        "enc_lens": torch.full((B,), T),
        "target_lens": torch.full((B,), U),
    }


def changed(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name][index] = value

    return change


def replaced(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(values)


def simple(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Arguments of method "pruned"."""
    am, lm = values.pop("am", torch.zeros(B, T, V)), values.pop("lm", torch.zeros(B, U + 1, V))
    return replaced(method="pruned", simple=(am, lm), **values)


JOINT = [
    (changed("target_lens", 3, 9),
     r"^target_lens\[3\]=9 exceeds targets\.shape\[1\]=6; pass targets padded to \[B, U\]$"),
    (changed("target_lens", 1, -2), r"target_lens\[1\]=-2 is below 0; pass 0 or more"),
    (changed("enc_lens", 2, 11), r"enc_lens\[2\]=11 exceeds enc\.shape\[1\]=10; pass enc padded to the longest"),
    (changed("enc_lens", 0, 0), r"enc_lens\[0\]=0 is below 1; leave the utterance out"),
    (changed("targets", (1, 2), 0), r"targets\[1, 2\]=0 is the blank id"),
    (changed("targets", (1, 2), 7),
     r"targets\[1, 2\]=7 is outside of 0\.\.6; pass token ids below the vocabulary size 7"),
    (changed("targets", (0, 5), -1), r"targets\[0, 5\]=-1 is outside of 0\.\.6"),
    (replaced(enc=[1.0]), r"enc is a list; pass a torch\.Tensor of shape \[B, T, J\]"),
    (replaced(enc=torch.zeros(T, J)), r"enc has shape \[10, 5\]; pass enc of shape \[B, T, J\]"),
    (replaced(enc=torch.zeros(B, T, J, dtype=torch.int64)), r"enc is int64; pass one of: float64, float32"),
    (replaced(pred=torch.zeros(B, U, J)), r"pred\.shape\[1\]=6 differs from targets\.shape\[1\]\+1=7"),
    (replaced(pred=torch.zeros(B, U + 1, 3)), r"pred\.shape\[2\]=3 differs from enc\.shape\[2\]=5"),
    (replaced(pred=torch.zeros(2, U + 1, J)), r"pred\.shape\[0\]=2 differs from enc\.shape\[0\]=4"),
    (replaced(pred=torch.zeros(B, U + 1, J).double()), r"pred is float64 but enc is float32; cast pred"),
    (replaced(pred=torch.zeros(B, U + 1, J, device="meta")), r"pred is on meta but enc is on cpu"),
    (replaced(weight=torch.zeros(V, 4)), r"weight\.shape\[1\]=4 differs from enc\.shape\[2\]=5; pass weight \[V, J\]"),
    (replaced(weight=torch.zeros(V)), r"weight has shape \[7\]; pass weight of shape \[V, J\]"),
    (replaced(bias=torch.zeros(3)), r"bias\.shape\[0\]=3 differs from weight\.shape\[0\]=7"),
    (replaced(bias=torch.zeros(V).half()), r"bias is float16 but enc is float32"),
    (replaced(targets=torch.ones(B, U)), r"targets is float32; pass one of: int32, int64"),
    (replaced(targets=torch.ones(3, U, dtype=torch.int64)), r"targets\.shape\[0\]=3 differs from enc\.shape\[0\]=4"),
    (replaced(targets=torch.ones(B * U, dtype=torch.int64)),
     r"targets has shape \[24\]; pass targets of shape \[B, U\]"),
    (replaced(targets=torch.ones(B, U, dtype=torch.int64, device="meta")), r"targets is on meta but enc is on cpu"),
    (replaced(enc_lens=torch.full((B,), 2.0)), r"enc_lens is float32; pass one of: int32, int64"),
    (replaced(enc_lens=[T] * B), r"enc_lens is a list; pass a torch\.Tensor of shape \[B\]"),
    (replaced(enc_lens=torch.full((3,), T)), r"enc_lens\.shape\[0\]=3 differs from the batch size B=4"),
    (replaced(target_lens=torch.full((B, 1), U)), r"target_lens has shape \[4, 1\]; pass target_lens of shape \[B\]"),
    (replaced(blank=7), r"blank=7 is not a token id; pass an int from -7 to 6"),
    (replaced(blank=1.5), r"blank=1\.5 is not a token id"),
    (replaced(blank=-6), r"targets\[0, 0\]=1 is the blank id"),
    (replaced(method="exact"), r"method='exact' does not exist; choose one of: batched, samplewise, fused"),
    (replaced(activation="gelu"), r"activation='gelu' does not exist; choose one of: tanh, relu"),
    (replaced(topology="diagonal"),
     r"topology='diagonal' does not exist; choose one of: regular, modified, constrained"),
    (replaced(reduction="max"), r"reduction='max' does not exist; choose one of: none, sum, mean, mean-per-token"),
    (replaced(topology="modified", enc_lens=torch.tensor([10, 10, 5, 10])),
     r"target_lens\[2\]=6 exceeds enc_lens\[2\]=5: topology 'modified' emits at most one token a frame"),
    (replaced(simple=(torch.zeros(1), torch.zeros(1))), r"simple is not used by method 'fused'"),
    (changed("enc", (2, 3, 1), float("nan")), r"enc\[2\]\[3\]\[1\]=nan is not finite; leave the utterance out"),
    (changed("pred", (1, 0, 4), float("inf")), r"pred\[1\]\[0\]\[4\]=inf is not finite"),
    (changed("weight", (6, 0), float("-inf")), r"weight\[6\]\[0\]=-inf is not finite"),
    (changed("bias", 5, float("nan")), r"bias\[5\]=nan is not finite"),
    (replaced(method="pruned"), r"method 'pruned' needs simple=\(am \[B, T, V\], lm \[B, U\+1, V\]\)"),
    (simple(am=torch.zeros(B, T, V + 1)), r"simple am\.shape\[2\]=8 differs from weight\.shape\[0\]=7"),
    (simple(am=torch.zeros(B, T - 1, V)), r"simple am\.shape\[1\]=9 differs from enc\.shape\[1\]=10"),
    (simple(lm=torch.zeros(B, U, V)), r"simple lm\.shape\[1\]=6 differs from targets\.shape\[1\]\+1=7"),
    (simple(lm=torch.zeros(B, U + 1, V).double()), r"simple lm is float64 but simple am is float32"),
    (simple(am=torch.full((B, T, V), float("nan"))), r"simple am\[0\]\[0\]\[0\]=nan is not finite"),
    (simple(enc_lens=torch.tensor([1, 10, 10, 10])),
     r"prune_range=5 cannot reach the last of target_lens\[0\]=6 tokens in enc_lens\[0\]=1 frames; pass prune_range=7"),
    (simple(options=TransducerLossOptions(fastemit_lambda=0.1)),
     r"fastemit_lambda=0\.1 is not defined for method 'pruned': FastEmit is defined on the whole lattice"),
    (simple(options=TransducerLossOptions(alignment_power=2.0)), r"alignment_power=2\.0 is not defined for method"),
    (simple(options=TransducerLossOptions(clamp=1.0)), r"clamp=1\.0 is not defined for method 'pruned'"),
    (replaced(topology="constrained", options=TransducerLossOptions(fastemit_lambda=0.1)),
     r"fastemit_lambda=0\.1 is not defined for topology 'constrained'"),
    (replaced(memory_limit="many"), r"memory_limit='many' is not a size; pass a number with one of B, KB, MB"),
    (replaced(memory_limit=0), r"memory_limit=0 is not a size above 0; pass None for no limit"),
    (replaced(memory_limit=10), r"memory_limit=10: the smallest limit that fits is .*iB, mostly for .*; pass that"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), JOINT, ids=[m[:40] for _, m in JOINT])
def test_transducer_loss(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments = joint()
    assert transducer_loss(**arguments).loss.isfinite()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        transducer_loss(**arguments)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_options_out_of_range(value: float) -> None:
    for name in ("fastemit_lambda", "delay_penalty", "clamp"):
        with pytest.raises(ValueError, match=f"{name}=.* is not a number from 0 up"):
            TransducerLossOptions(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune_range": 1}, "prune_range=1 is below 2; published values are 5 to 10"),
        ({"lm_only_scale": 1.5}, "lm_only_scale=1.5 is not from 0 to 1"),
        ({"am_only_scale": -0.1}, "am_only_scale=-0.1 is not from 0 to 1"),
        ({"lm_only_scale": 0.6, "am_only_scale": 0.6}, "lm_only_scale=0.6 and am_only_scale=0.6 sum to more than 1"),
        ({"occupancy_threshold": 1.0}, "occupancy_threshold=1.0 is not from 0 to 1"),
        ({"alignment_power": 0.0}, "alignment_power=0.0 is not a number above 0"),
    ],
)
def test_other_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransducerLossOptions(**values)


@pytest.mark.parametrize("method", list(LOSSES))
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_without_the_check_wrong_tokens_spoil_their_utterance_only(method: str, reduction: str) -> None:
    arguments = joint() | {"method": method, "check_values": False, "reduction": reduction}
    for name in ("enc", "pred", "weight"):
        arguments[name] = torch.randn_like(arguments[name])
    if method == "pruned":
        simple()(arguments)
    good = transducer_loss(**arguments).info["utterance_loss"]
    assert good.isfinite().all()
    for wrong in (0, -3, V, 10**9):
        arguments["targets"][1, 2] = wrong
        found = transducer_loss(**arguments)
        assert not found.loss.isfinite().all()
        assert found.info["utterance_loss"][1].isnan()
        assert torch.equal(found.info["utterance_loss"][[0, 2, 3]], good[[0, 2, 3]])


def test_padding_is_not_checked() -> None:
    arguments = joint()
    arguments["enc_lens"][1], arguments["target_lens"][2] = 4, 3
    arguments["enc"][1, 4:], arguments["pred"][2, 4:] = torch.nan, torch.inf
    arguments["targets"][2, 3:] = -7
    assert transducer_loss(**arguments).loss.isfinite()


def test_large_values_are_finite() -> None:
    """Their sum is not."""
    arguments = joint()
    arguments["enc"][:] = 3e38
    assert transducer_loss(**arguments).loss.isfinite()


def logits() -> dict[str, Any]:
    return {
        "logits": torch.zeros(B, T, U + 1, V),
        "targets": torch.ones(B, U, dtype=torch.int32),
        "logit_lengths": torch.full((B,), T, dtype=torch.int32),
        "target_lengths": torch.full((B,), U, dtype=torch.int32),
    }


LOGITS = [
    (changed("logit_lengths", 1, 12), r"logit_lengths\[1\]=12 exceeds logits\.shape\[1\]=10"),
    (changed("target_lengths", 1, 7), r"target_lengths\[1\]=7 exceeds targets\.shape\[1\]=6"),
    (changed("targets", (2, 0), 6), r"targets\[2, 0\]=6 is the blank id"),
    (replaced(logits=torch.zeros(B, T, V)), r"logits has shape \[4, 10, 7\]; pass logits of shape \[B, T, U\+1, V\]"),
    (replaced(logits=torch.zeros(B, T, U, V)), r"logits\.shape\[2\]=6 differs from targets\.shape\[1\]\+1=7"),
    (
        replaced(reduction="mean-per-token"),
        r"reduction='mean-per-token' does not exist; choose one of: none, mean, sum",
    ),
    (replaced(blank=-8), r"blank=-8 is not a token id"),
]


@pytest.mark.parametrize(("change", "message"), LOGITS, ids=[m[:40] for _, m in LOGITS])
def test_rnnt_loss(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments = logits()
    assert rnnt_loss(**arguments).isfinite()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        rnnt_loss(**arguments)


def log_probs() -> dict[str, Any]:
    return {
        "blank_log_probs": torch.zeros(B, T, U + 1),
        "label_log_probs": torch.zeros(B, T, U),
        "enc_lens": torch.full((B,), T),
        "target_lens": torch.full((B,), U),
    }


LATTICE = [
    (replaced(label_log_probs=torch.zeros(B, T, U + 1)), r"label_log_probs\.shape\[2\]=7 differs from blank_.*-1=6"),
    (replaced(label_log_probs=torch.zeros(B, 3, U)), r"label_log_probs\.shape\[1\]=3 differs from"),
    (changed("enc_lens", 0, 99), r"enc_lens\[0\]=99 exceeds blank_log_probs\.shape\[1\]=10"),
    (changed("target_lens", 0, 99), r"target_lens\[0\]=99 exceeds label_log_probs\.shape\[2\]=6"),
    (replaced(backend="cuda"), r"backend='cuda' does not exist; choose one of: numba, torch"),
    (replaced(topology="looped"), r"topology='looped' does not exist"),
]


@pytest.mark.parametrize(("change", "message"), LATTICE, ids=[m[:40] for _, m in LATTICE])
def test_lattice_loss(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments = log_probs()
    assert lattice_loss(**arguments).isfinite().all()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        lattice_loss(**arguments)


def test_autocast_allows_mixed_dtypes() -> None:
    arguments = joint()
    arguments["enc"] = arguments["enc"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert transducer_loss(**arguments).loss.isfinite()


def test_padding_of_targets_is_not_checked() -> None:
    arguments = joint()
    arguments["target_lens"][:] = 3
    arguments["targets"][:, 3:] = -100
    assert transducer_loss(**arguments).loss.isfinite()


def test_a_backend_that_is_not_installed_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in ("losses.backends.numba_lattice", "losses.backends.threads"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match="backend 'numba' needs numba: pip install numba, or pass backend='torch'"):
        lattice_loss(**log_probs())
    assert lattice_loss(**log_probs(), backend="torch").isfinite().all()


def test_a_backend_that_cannot_take_the_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend='numba' runs on cpu and not in float16"):
        backends.load("logits", "numba", torch.device("cpu"), torch.float16)
