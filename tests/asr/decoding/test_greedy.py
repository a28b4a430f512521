from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.decoding import SEARCHES, DecodingConfig, Hypothesis, greedy
from tests.asr.decoding.fake import TableTransducer, TinyTransducer, random_batch


def frame_by_frame(model: TinyTransducer, enc: torch.Tensor, length: int, max_symbols: int) -> Hypothesis:
    """The textbook loop: one utterance, one frame, one symbol at a time."""
    found = Hypothesis([], [], 0.0)
    state = model.predictor.init_state(1, enc.device)
    for t in range(length):
        for _ in range(max_symbols):
            enc_p = model.joiner.project_encoder(enc[None, t])
            pred_p = model.joiner.project_predictor(model.predictor.output(state))
            log_probs = model.joiner.logits(enc_p, pred_p).log_softmax(-1)[0]
            symbol = int(log_probs.argmax())
            found.score += float(log_probs[symbol])
            if symbol == 0:
                break
            found.tokens.append(symbol)
            found.frames.append(t)
            found.confidences.append(float(log_probs[symbol].exp()))
            state = model.predictor.step(torch.tensor([symbol]), state)
    return found


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(0, 23), min_size=1, max_size=5),
    max_symbols=st.integers(1, 4),
    window=st.integers(1, 9),
    blank_bias=st.sampled_from([-4.0, 0.0, 1.0, 3.0, 50.0]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_frame_by_frame_loop(lens, max_symbols, window, blank_bias, seed):
    if max(lens) == 0:
        lens[0] = 1
    model = TinyTransducer(blank_bias=blank_bias, seed=seed)
    enc, enc_lens = random_batch(lens, seed=seed)
    found = greedy(model, enc, enc_lens, DecodingConfig(max_symbols_per_frame=max_symbols), window=window)
    with torch.no_grad():
        expected = [frame_by_frame(model, enc[b], n, max_symbols) for b, n in enumerate(lens)]
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.frames == other.frames
        assert one.score == pytest.approx(other.score, abs=1e-9)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-9)


def test_random_models_emit_something():
    """The comparison above would mean little on models that only say blank."""
    enc, enc_lens = random_batch([20, 15])
    found = [h for seed in range(20) for h in greedy(TinyTransducer(seed=seed), enc, enc_lens, DecodingConfig())]
    assert min(len(h.tokens) for h in found) < 8
    assert max(len(h.tokens) for h in found) > 12


def test_more_symbols_a_frame_find_two_tokens_on_one_frame():
    table = torch.full((2, 3, 3), 0.01)
    table[0, 0, 1] = table[0, 1, 2] = 0.98  # frame 0: token 1, then token 2
    table[0, 2, 0] = table[1, :, 0] = 0.98  # then blanks
    enc = torch.arange(2.0).view(1, 2, 1)
    model = TableTransducer(table)
    one = greedy(model, enc, torch.tensor([2]), DecodingConfig())[0]
    several = greedy(model, enc, torch.tensor([2]), DecodingConfig(max_symbols_per_frame=3))[0]
    assert one.tokens == [1]
    assert (several.tokens, several.frames) == ([1, 2], [0, 0])


def test_empty_inputs():
    model = TinyTransducer()
    config = DecodingConfig()
    assert greedy(model, torch.zeros(0, 4, 6), torch.zeros(0, dtype=torch.int64), config) == []
    no_frames = greedy(model, torch.zeros(2, 0, 6), torch.zeros(2, dtype=torch.int64), config)
    assert no_frames == [Hypothesis([], [], 0.0), Hypothesis([], [], 0.0)]
    all_padding = greedy(model, torch.full((1, 3, 6), torch.nan, dtype=torch.float64), torch.tensor([0]), config)
    assert all_padding == [Hypothesis([], [], 0.0)]


@pytest.mark.parametrize(
    ("enc_shape", "lens", "window", "message"),
    [
        ((2, 4), [4, 4], 8, "enc must be"),
        ((2, 4, 6), [4], 8, "enc_lens must be"),
        ((2, 4, 6), [4, 5], 8, "T=4"),
        ((2, 4, 6), [4, -1], 8, "-1..4"),
        ((2, 4, 6), [4, 4], 0, "window=0"),
    ],
)
def test_wrong_inputs_are_named(enc_shape, lens, window, message):
    enc = torch.zeros(enc_shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        greedy(TinyTransducer(), enc, torch.tensor(lens), DecodingConfig(), window=window)


@pytest.mark.parametrize("field", ["max_symbols_per_frame", "beam", "batch_duration_s"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"decoding.{field}=0 must be at least"):
        DecodingConfig(**{field: 0})


def test_configuration_names_the_searches_of_the_table():
    assert set(get_args(get_type_hints(DecodingConfig)["search"])) == set(SEARCHES)
