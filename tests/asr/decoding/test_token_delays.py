"""Delays of single utterances, from alignments and hypotheses that are written down."""

from __future__ import annotations

import math

import pytest
import torch

from asr.decoding import Hypothesis
from asr.decoding.emission import _lattice_log_probs
from asr.decoding.token_delays import Reference, Spread, align_references, available_ms, right_tokens, token_delays
from losses import viterbi_alignment
from tests.asr.decoding.corpus import tokenizer
from tests.asr.decoding.scripted import ScriptedTransducer
from tests.asr.decoding.test_real_model import make_model

A, B, C, SPACE = 1, 2, 3, 4


@pytest.mark.parametrize(
    ("frame", "chunk_ms", "duration_s", "expected_ms"),
    [
        (0, 40, 9.0, 77.5),
        (0, 160, 9.0, 197.5),
        (3, 160, 9.0, 197.5),
        (4, 160, 9.0, 357.5),
        (4, 160, 0.3575, 357.5),
        (4, 160, 0.3, 300.0),  # nothing follows, so nothing is waited for
        (7, 320, 9.0, 357.5),
        (8, 320, 9.0, 677.5),
        (8, "full", 9.0, 9000.0),
    ],
)
def test_when_the_audio_is_there(frame, chunk_ms, duration_s, expected_ms):
    assert available_ms(frame, chunk_ms, duration_s) == pytest.approx(expected_ms)


def test_delays_of_right_tokens_only():
    """Reference a b c a: b is heard as c, an a is inserted before c."""
    reference = Reference([A, B, C, A], [2, 5, 9, 12])
    found = Hypothesis([A, C, A, C, A], [3, 6, 8, 11, 11], 0.0)
    delays = token_delays(reference, found, tokenizer(), 160, 9.0)
    # right: a at 3 for 2, c at 11 for 9, a at 11 for 12; chunks of 4 frames end at frame 4, 12 and 12
    assert delays.emission == [40.0, 80.0, -40.0]
    assert delays.perceived == [197.5 - 80, 517.5 - 360, 517.5 - 480]
    assert delays.first_partial == 197.5 - 80


def test_a_space_is_no_text_and_a_wrong_word_is():
    reference = Reference([A, B], [2, 5])
    delays = token_delays(reference, Hypothesis([SPACE, C], [1, 9], 0.0), tokenizer(), 160, 9.0)
    assert delays.emission == [] and delays.perceived == []
    assert delays.first_partial == 517.5 - 80
    for tokens in ([], [SPACE]):
        silent = token_delays(reference, Hypothesis(tokens, [1] * len(tokens), 0.0), tokenizer(), 160, 9.0)
        assert silent.first_partial is None and silent.emission == []


@pytest.mark.parametrize(
    ("reference", "found", "expected"),
    [
        ([], [], []),
        ([1], [], []),
        ([], [1], []),
        ([1, 2, 3], [1, 2, 3], [(0, 0), (1, 1), (2, 2)]),
        ([1, 2, 3], [1, 3], [(0, 0), (2, 1)]),
        ([1, 2, 3], [4, 1, 2, 5, 3], [(0, 1), (1, 2), (2, 4)]),
        ([1, 12], [11, 2], []),  # tokens are compared as tokens, not as characters
    ],
)
def test_right_tokens(reference, found, expected):
    assert right_tokens(reference, found) == expected


def test_spread():
    found = Spread.of([float(value) for value in range(11)] + [100.0])
    assert (found.count, found.mean, found.median) == (12, 155 / 12, 5.5)
    assert found.p90 == pytest.approx(9.9)
    assert found.later(5.0) == Spread(12, 155 / 12 + 5, 10.5, found.p90 + 5)
    empty = Spread.of([])
    assert empty.count == 0 and all(math.isnan(value) for value in (empty.mean, empty.median, empty.p90))


def test_alignment_of_a_model_that_is_sure():
    """Also of tokens that it does not emit; "regular" allows several tokens a frame."""
    model = ScriptedTransducer({43: [(A, 3), (B, 6)], 23: [(C, 0)]})
    enc, lens = model.encode(torch.zeros(4, 43, 80), torch.tensor([43, 23, 43, 23]))
    targets = [[A, B], [C], [], [A] * 6]
    modified = align_references(model, enc, lens, targets, "modified")
    assert modified == [Reference([A, B], [3, 6]), Reference([C], [0]), None, None]
    regular = align_references(model, enc, lens, targets, "regular")
    assert regular[:3] == modified[:3]
    assert regular[3] is not None and len(regular[3].frames) == 6
    assert align_references(model, enc, lens, [[], [], [], []], "modified") == [None] * 4


@pytest.mark.parametrize("topology", ["modified", "regular"])
def test_alignment_in_a_batch_is_that_of_each_alone(topology):
    model = make_model(blank_bias=1.0)
    features = torch.randn(3, 203, 80, generator=torch.Generator().manual_seed(0)) * 3 - 8
    targets = [[A, B, C, A, A, B, C], [B], [C, SPACE, A, B]]
    with torch.inference_mode():
        enc, lens = model.encode(features, torch.tensor([203, 91, 150]))
        found = align_references(model, enc, lens, targets, topology)
        for row, (one, tokens) in enumerate(zip(found, targets, strict=True)):
            count = int(lens[row])
            blank, label = _lattice_log_probs(model, enc[row, :count], tokens)
            sizes = torch.tensor([count]), torch.tensor([len(tokens)])
            alone = viterbi_alignment(blank[None], label[None], *sizes, topology=topology)
            assert one == Reference(tokens, alone.frames[0].tolist())
