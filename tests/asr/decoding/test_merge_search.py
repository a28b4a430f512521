from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.decoding import DecodingConfig, Hypothesis, greedy, modified_beam_search
from tests.asr.decoding.fake import TableTransducer, TinyTransducer, random_batch


def all_alignments(model: TinyTransducer, enc: torch.Tensor, length: int) -> dict[tuple[int, ...], list[tuple]]:
    """Every alignment with one symbol or blank a frame: tokens -> [(log-prob, frames, token log-probs)]."""
    found = defaultdict(list)
    cache: dict[tuple[int, ...], torch.Tensor] = {}

    def log_probs(t: int, tokens: tuple[int, ...]) -> torch.Tensor:
        if tokens not in cache:
            state = model.predictor.init_state(1, enc.device)
            for token in tokens:
                state = model.predictor.step(torch.tensor([token]), state)
            cache[tokens] = model.joiner.project_predictor(model.predictor.output(state))
        return model.joiner.logits(model.joiner.project_encoder(enc[None, t]), cache[tokens]).log_softmax(-1)[0]

    for symbols in itertools.product(range(model.vocab_size), repeat=length):
        tokens: tuple[int, ...] = ()
        total, frames, emitted = 0.0, [], []
        for t, symbol in enumerate(symbols):
            value = float(log_probs(t, tokens)[symbol])
            total += value
            if symbol:
                tokens += (symbol,)
                frames.append(t)
                emitted.append(value)
        found[tokens].append((total, frames, emitted))
    return found


def log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


@settings(max_examples=25, deadline=None)
@given(
    lens=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    blank_bias=st.sampled_from([0.0, 1.5, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_wide_beam_equals_the_sum_over_all_alignments(lens, blank_bias, seed):
    if max(lens) == 0:
        lens[0] = 2
    model = TinyTransducer(vocab_size=3, blank_bias=blank_bias, seed=seed)
    enc, enc_lens = random_batch(lens, seed=seed)
    # 2 tokens, at most 5 frames: at most 1 + 2 + ... + 32 = 63 sequences
    found = modified_beam_search(model, enc, enc_lens, DecodingConfig(beam=64))
    for b, length in enumerate(lens):
        with torch.no_grad():
            alignments = all_alignments(model, enc[b], length)
        sums = {tokens: log_sum([total for total, _, _ in paths]) for tokens, paths in alignments.items()}
        winner = max(sums, key=lambda tokens: sums[tokens])
        assert found[b].tokens == list(winner)
        assert found[b].score == pytest.approx(sums[winner], abs=1e-9)
        _, frames, emitted = max(alignments[winner])
        assert found[b].frames == frames
        assert found[b].confidences == pytest.approx([math.exp(v) for v in emitted], abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(beam=st.integers(1, 6), blank_bias=st.sampled_from([-2.0, 0.0, 2.0]), seed=st.integers(0, 10_000))
def test_equals_a_plain_search_with_a_dictionary(beam, blank_bias, seed):
    """A narrow beam: hypotheses die and come back, and must still be merged."""
    model = TinyTransducer(vocab_size=4, blank_bias=blank_bias, seed=seed)
    lens = [9, 12, 4]
    enc, enc_lens = random_batch(lens, seed=seed)
    found = modified_beam_search(model, enc, enc_lens, DecodingConfig(beam=beam))
    for b, length in enumerate(lens):
        hyps: dict[tuple[int, ...], float] = {(): 0.0}
        for t in range(length):
            candidates: dict[tuple[int, ...], list[float]] = defaultdict(list)
            for tokens, score in hyps.items():
                with torch.no_grad():
                    state = model.predictor.init_state(1, enc.device)
                    for token in tokens:
                        state = model.predictor.step(torch.tensor([token]), state)
                    pred_p = model.joiner.project_predictor(model.predictor.output(state))
                    enc_p = model.joiner.project_encoder(enc[b : b + 1, t])
                    values = model.joiner.logits(enc_p, pred_p).log_softmax(-1)[0]
                for symbol, value in enumerate(values.tolist()):
                    candidates[tokens + (symbol,) if symbol else tokens].append(score + value)
            sums = {tokens: log_sum(scores) for tokens, scores in candidates.items()}
            hyps = dict(sorted(sums.items(), key=lambda item: -item[1])[:beam])
        winner = max(hyps, key=lambda tokens: hyps[tokens])
        assert found[b].tokens == list(winner)
        assert found[b].score == pytest.approx(hyps[winner], abs=1e-9)


def test_finds_the_token_that_greedy_deletes():
    """One emission spread over three frames: 0.37 at each, under blank's 0.6, and still 1 - 0.6^3 = 0.78 in all."""
    table = torch.full((5, 2, 3), 0.005)
    table[:, :, 0] = 0.99
    table[1:4, 0] = torch.tensor([0.6, 0.37, 0.03])
    enc, enc_lens = torch.arange(5.0).view(1, 5, 1), torch.tensor([5])
    model = TableTransducer(table)
    deleted = greedy(model, enc, enc_lens, DecodingConfig())[0]
    kept = modified_beam_search(model, enc, enc_lens, DecodingConfig(beam=8))[0]
    assert deleted.tokens == []
    assert kept.tokens == [1]
    assert kept.frames == [1]
    spread = 0.99 * (0.37 * 0.99**2 + 0.6 * 0.37 * 0.99 + 0.6**2 * 0.37) * 0.99
    at_either_end = 0.005 * 0.99**4 + 0.99 * 0.6**3 * 0.005
    assert math.exp(kept.score) == pytest.approx(spread + at_either_end, rel=1e-5)


def test_batch_does_not_matter():
    model = TinyTransducer(seed=3)
    enc, enc_lens = random_batch([14, 3, 0, 9])
    config = DecodingConfig(beam=3)
    together = modified_beam_search(model, enc, enc_lens, config)
    for b in range(4):
        alone = modified_beam_search(model, enc[b : b + 1], enc_lens[b : b + 1], config)[0]
        assert (alone.tokens, alone.frames) == (together[b].tokens, together[b].frames)
        assert alone.score == pytest.approx(together[b].score, abs=1e-9)
    assert together[2] == Hypothesis([], [], 0.0)


def test_beam_of_one_never_merges_and_still_ends():
    enc, enc_lens = random_batch([30])
    found = modified_beam_search(TinyTransducer(blank_bias=-6.0), enc, enc_lens, DecodingConfig(beam=1))[0]
    assert len(found.tokens) == len(found.frames) == len(found.confidences) > 20


def test_empty_inputs():
    config = DecodingConfig()
    assert modified_beam_search(TinyTransducer(), torch.zeros(0, 4, 6), torch.zeros(0, dtype=torch.int64), config) == []
    empty = modified_beam_search(TinyTransducer(), torch.zeros(1, 0, 6), torch.zeros(1, dtype=torch.int64), config)
    assert empty == [Hypothesis([], [], 0.0)]


def test_several_symbols_a_frame_are_refused():
    enc = torch.zeros(1, 2, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="max_symbols_per_frame=2"):
        modified_beam_search(TinyTransducer(), enc, torch.tensor([2]), DecodingConfig(max_symbols_per_frame=2))
