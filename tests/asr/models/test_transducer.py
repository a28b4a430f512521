"""Predictors, joiner, the whole model, and the presets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from asr.config import Experiment, from_dict
from asr.models import joiner
from asr.models.joiner import SimpleJoiner
from asr.models.predictors import PREDICTORS, PredictorConfig
from asr.models.presets import PRESET_MILLIONS, PRESETS, REFERENCE_VOCAB_SIZE
from asr.models.transducer import LossConfig, Transducer, build_model, parameter_counts
from losses import LOSSES, TransducerLossOptions


@pytest.mark.parametrize("kind", list(PREDICTORS))
@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_steps_equal_the_whole_sequence(kind: str, context_size: int) -> None:
    torch.manual_seed(1)
    config = PredictorConfig(kind=kind, dim=16, context_size=context_size, num_layers=2)
    predictor = PREDICTORS[kind](config, 11).eval()
    targets = torch.randint(1, 11, (3, 7))
    whole = predictor(targets)
    state = predictor.init_state(3, "cpu")
    outs = [predictor.output(state)]
    for u in range(7):
        state = predictor.step(targets[:, u], state)
        outs.append(predictor.output(state))
    torch.testing.assert_close(torch.stack(outs, 1), whole, atol=1e-6, rtol=0)


def test_start_context_embeds_missing_tokens_as_zeros() -> None:
    predictor = PREDICTORS["stateless"](PredictorConfig(dim=8), 5).eval()
    with torch.no_grad():
        before = predictor.output(predictor.init_state(1))
        predictor.embedding.weight[-1] += 100  # what an id of -1 would read if it were not masked
        torch.testing.assert_close(predictor.output(predictor.init_state(1)), before, atol=0, rtol=0)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_their_nominal_size(name: str) -> None:
    experiment = from_dict({"model": {"preset": name}})
    with torch.device("meta"):
        model = Transducer(experiment.model, REFERENCE_VOCAB_SIZE)
    total = parameter_counts(model)["total"]
    assert abs(total / 1e6 / PRESET_MILLIONS[name] - 1) < 0.02, total


def _batch() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    features = torch.randn(2, 91, 80)
    features[1, 63:] = float("nan")
    targets = torch.tensor([[1, 2, 3, 4], [5, 1, 0, 0]])
    return features, torch.tensor([91, 63]), targets, torch.tensor([4, 2])


@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_batch_loss_is_the_sum_of_its_utterances(kind: str) -> None:
    experiment = from_dict(
        {"model": {"preset": "xs", "ctc": True, "predictor": {"kind": kind}}, "loss": {"ctc_weight": 0.3}}
    )
    model = Transducer(experiment.model, 7).eval()
    features, feature_lens, targets, target_lens = _batch()
    together = model(features, feature_lens, targets, target_lens, experiment.loss)
    alone = [
        model(features[b : b + 1, : feature_lens[b]], feature_lens[b : b + 1], targets[b : b + 1, : target_lens[b]],
              target_lens[b : b + 1], experiment.loss)
        for b in range(2)
    ]  # fmt: skip
    assert together.simple is None
    for name in ("loss", "transducer", "ctc"):
        parts = [getattr(losses, name) for losses in alone]
        torch.testing.assert_close(getattr(together, name), sum(parts), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together.loss, together.transducer + 0.3 * together.ctc)


def test_ctc_weight_without_a_head_is_refused() -> None:
    model = Transducer(from_dict({"model": {"preset": "xs"}}).model, 7)
    with pytest.raises(ValueError, match="model.ctc=true"):
        model(*_batch(), LossConfig(ctc_weight=0.5))


SPELLING = [[], [1], [2], [1, 2], [2, 2], [2, 1, 1], []]


def test_ctc_writes_the_characters_of_the_tokens() -> None:
    """As by a loop over utterances and tokens; what stands in the padding does not count."""
    experiment = _experiment("fused", ctc_targets="characters")
    model = build_model(experiment, 7, spelling=SPELLING).eval()
    features, feature_lens, targets, target_lens = _batch()
    targets = torch.where(torch.arange(targets.size(1)) < target_lens[:, None], targets, 3)
    found = model(features, feature_lens, targets, target_lens, experiment.loss).ctc
    log_probs = model.ctc_log_probs(model.encode(features, feature_lens)[0])
    enc_lens = model.encode(features, feature_lens)[1]
    expected = torch.zeros(())
    for b, row in enumerate(targets.tolist()):
        letters = [letter for token in row[: target_lens[b]] for letter in SPELLING[token]]
        expected = expected + torch.nn.functional.ctc_loss(
            log_probs[b], torch.tensor(letters), enc_lens[b : b + 1], torch.tensor([len(letters)]), reduction="sum"
        )
    assert found is not None and float(found.detach()) > 1
    torch.testing.assert_close(found, expected)
    assert "spelling" not in model.state_dict()
    with pytest.raises(ValueError, match="spelling of the tokens"):
        build_model(experiment, 7)(*_batch(), experiment.loss)


def _experiment(method: str, **loss: Any) -> Experiment:
    return from_dict({"model": {"preset": "xs", "ctc": True}, "loss": {"method": method, "ctc_weight": 0.3, **loss}})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", list(LOSSES))
def test_gradients_reach_every_parameter(method: str, precision: str) -> None:
    experiment = _experiment(method, prune_range=3, **({} if method == "pruned" else {"fastemit_lambda": 0.01}))
    model = build_model(experiment, 7)
    assert (model.joiner.simple is not None) == (method == "pruned")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(*_batch(), experiment.loss).loss.backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert silent == []


def test_exact_methods_give_equal_losses_and_gradients() -> None:
    torch.manual_seed(0)
    model = build_model(_experiment("fused"), 7).eval()
    found = {}
    for method in ("batched", "samplewise", "fused"):
        model.zero_grad()
        losses = model(*_batch(), _experiment(method).loss)
        losses.loss.backward()
        found[method] = losses.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    loss, gradients = found.pop("batched")
    for method, (other, others) in found.items():
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0, msg=method)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                others[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=f"{method} {name}"
            )


@pytest.mark.parametrize(("warmup", "done", "simple_scale", "pruned_scale"), [
    (0.2, 0.0, 1.0, 0.1), (0.2, 0.1, 0.7, 0.55), (0.2, 0.2, 0.4, 1.0), (0.2, 1.0, 0.4, 1.0), (0.0, 0.0, 0.4, 1.0),
])  # fmt: skip
def test_the_loss_turns_from_the_simple_to_the_pruned_one(
    warmup: float, done: float, simple_scale: float, pruned_scale: float
) -> None:
    experiment = _experiment("pruned", simple_loss_scale=0.4, simple_warmup=warmup)
    assert experiment.loss.scales(done) == pytest.approx((simple_scale, pruned_scale))
    losses = build_model(experiment, 7).eval()(*_batch(), experiment.loss, done=done)
    assert losses.simple is not None and losses.ctc is not None and float(losses.simple.detach()) > 1
    expected = simple_scale * losses.simple + pruned_scale * losses.transducer + 0.3 * losses.ctc
    torch.testing.assert_close(losses.loss, expected)


@torch.no_grad()
def test_a_range_of_all_columns_prunes_nothing_and_a_narrow_one_is_above() -> None:
    torch.manual_seed(0)
    model = build_model(_experiment("pruned"), 7).eval()
    found = {r: model(*_batch(), _experiment("pruned", prune_range=r).loss) for r in (2, 5)}
    exact = model(*_batch(), _experiment("fused").loss)
    torch.testing.assert_close(found[5].transducer, exact.transducer, rtol=1e-6, atol=0)
    assert float(found[2].transducer) > float(exact.transducer) + 1e-3
    torch.testing.assert_close(found[2].simple, found[5].simple)
    smooth = model(*_batch(), _experiment("pruned", lm_only_scale=0.0).loss)
    assert abs(float(smooth.simple) - float(found[5].simple)) > 1e-3


def test_the_simple_loss_teaches_encoder_and_predictor_too() -> None:
    experiment = _experiment("pruned")
    model = build_model(experiment, 7)
    simple = model(*_batch(), experiment.loss).simple
    assert simple is not None
    simple.backward()
    taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    others = {n for n, _ in model.named_parameters() if n.startswith("ctc_head") or n.startswith("joiner.")}
    simple_names = {n for n in others if n.startswith("joiner.simple.")}
    assert len(simple_names) == 4
    assert taught == {n for n, _ in model.named_parameters()} - others | simple_names


def test_pruning_needs_the_trivial_joiner() -> None:
    model = Transducer(from_dict({"model": {"preset": "xs"}}).model, 7)
    with pytest.raises(ValueError, match="loss.method=pruned needs a model .* simple_joiner=True"):
        model(*_batch(), LossConfig(method="pruned"))


def test_the_trivial_joiner_is_counted_apart() -> None:
    plain, pruned = (parameter_counts(build_model(_experiment(method), 7)) for method in ("fused", "pruned"))
    assert pruned.pop("simple") == 2 * (64 + 1) * 7
    assert pruned.pop("total") - plain.pop("total") == 2 * (64 + 1) * 7
    assert pruned == plain and "simple" not in plain


def test_an_untrained_trivial_joiner_says_blank_nine_times_in_ten_with_either_side() -> None:
    torch.manual_seed(0)
    model = build_model(_experiment("pruned"), 50).eval()
    enc, _ = model.encode(*_batch()[:2])
    assert model.joiner.simple is not None
    with torch.no_grad():
        am, lm = model.joiner.simple(enc, model.predictor(_batch()[2]))
    prior = lm[:1].softmax(-1).mean(1, keepdim=True).log()
    for logits in (am[:1, :, None] + lm[:1, None], lm[:1], am[:1] + prior):
        assert 0.8 < float(logits.softmax(-1)[..., 0].mean()) < 0.95
    bound = SimpleJoiner.INITIAL_SCALE / 64**0.5
    for layer in (model.joiner.simple.am, model.joiner.simple.lm):
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_shaping_acts_from_its_fraction_of_the_run_on() -> None:
    loss = LossConfig(shaping_from=0.5, delay_penalty=0.003, alignment_power=2.0, fastemit_lambda=0.01, clamp=0.5)
    for done, delay_penalty, alignment_power in ((0.0, 0.0, 1.0), (0.49, 0.0, 1.0), (0.5, 0.003, 2.0), (1.0, 0.003, 2)):
        options = loss.options(done)
        assert (options.delay_penalty, options.alignment_power) == (delay_penalty, alignment_power)
        assert (options.fastemit_lambda, options.clamp) == (0.01, 0.5)


def test_every_option_of_the_loss_is_passed_on() -> None:
    changed = {"fastemit_lambda": 0.01, "delay_penalty": 0.002, "alignment_power": 2.0, "clamp": 0.5,
               "occupancy_threshold": 0.1, "prune_range": 7, "lm_only_scale": 0.5, "am_only_scale": 0.125}  # fmt: skip
    options = LossConfig(**changed).options()
    default = TransducerLossOptions()
    assert {name: getattr(options, name) for name in changed} == changed
    assert all(getattr(default, name) != value for name, value in changed.items())
    assert {entry.name for entry in dataclasses.fields(default)} == {*changed, "backend"}


def test_the_memory_limit_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = joiner.transducer_loss
    monkeypatch.setattr(
        joiner, "transducer_loss", lambda *args, memory_limit, **more: seen.append(memory_limit) or real(*args, **more)
    )
    model = build_model(_experiment("fused"), 7)
    for loss in (_experiment("fused").loss, _experiment("fused", memory_limit="500MB").loss):
        model(*_batch(), loss)
    assert seen == [None, "500MB"]


def test_context_dropout_hides_whole_contexts_while_training_only() -> None:
    config = PredictorConfig(dim=8, dropout=0.0, context_dropout=0.5)
    predictor = PREDICTORS["stateless"](config, 5)
    targets = torch.tensor([[1, 2, 3]]).repeat(64, 1)
    torch.manual_seed(0)
    seen = {tuple(row.flatten().tolist()) for row in predictor(targets)}
    assert len(seen) == 2  # with its context, or without all of it
    hidden = predictor._embed(torch.full((1, 4, 2), -1)).flatten()
    assert tuple(hidden.tolist()) in seen
    assert len({tuple(row.flatten().tolist()) for row in predictor.eval()(targets)}) == 1
    with pytest.raises(ValueError, match="needs kind=stateless"):
        PredictorConfig(kind="lstm", context_dropout=0.5)
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        PredictorConfig(context_dropout=1.0)


def test_an_untrained_model_says_blank_nine_times_in_ten() -> None:
    experiment = from_dict({"model": {"preset": "xs", "ctc": True}})
    torch.manual_seed(0)
    model = Transducer(experiment.model, 50).eval()
    features, feature_lens, *_ = _batch()
    enc, _ = model.encode(features, feature_lens)
    blank = model.ctc_log_probs(enc).exp()[..., 0]
    assert 0.7 < blank.mean() < 0.98
