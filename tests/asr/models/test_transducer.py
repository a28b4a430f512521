"""Predictors, joiner, the whole model, and the presets."""

from __future__ import annotations

import pytest
import torch

from asr.config import from_dict
from asr.models.predictors import PREDICTORS, PredictorConfig
from asr.models.presets import PRESET_MILLIONS, PRESETS, REFERENCE_VOCAB_SIZE
from asr.models.transducer import LossConfig, Transducer, parameter_counts


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
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together.loss, together.transducer + 0.3 * together.ctc)


def test_ctc_weight_without_a_head_is_refused() -> None:
    model = Transducer(from_dict({"model": {"preset": "xs"}}).model, 7)
    with pytest.raises(ValueError, match="model.ctc=true"):
        model(*_batch(), LossConfig(ctc_weight=0.5))


def test_gradients_reach_every_parameter() -> None:
    experiment = from_dict(
        {"model": {"preset": "xs", "ctc": True}, "loss": {"ctc_weight": 0.3, "fastemit_lambda": 0.01}}
    )
    model = Transducer(experiment.model, 7)
    model(*_batch(), experiment.loss).loss.backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert silent == []


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
