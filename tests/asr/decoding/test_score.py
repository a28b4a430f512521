from __future__ import annotations

import math

import numpy as np
import pytest

from asr.decoding.score import (
    ErrorCounts,
    Transcribed,
    bootstrap_interval,
    score,
    worst_utterances,
)


def test_the_line_has_icefalls_form():
    results = [Transcribed(f"utt-{i}", "NO YES NO YES NO YES NO YES", "NO YES NO YES NO YES NO YES") for i in range(29)]
    results.append(Transcribed("utt-29", "NO YES NO YES NO YES NO YES", "NO YES NO YES YES NO YES"))
    assert score(results).wer_line == "%WER 0.42% [1 / 240, 0 ins, 1 del, 0 sub ]"


def test_counts_by_kind_for_words_and_characters():
    found = score([Transcribed("a", "one two three", "one tow three four"), Transcribed("b", "five six", "six")])
    assert found.words == ErrorCounts(insertions=1, deletions=1, substitutions=1, ref_length=5)
    assert found.words.rate == pytest.approx(3 / 5)
    # without spaces: onetwothree -> onetowthreefour (2 + 4), fivesix -> six (4)
    assert found.chars.errors == 10
    assert found.chars.ref_length == 18
    assert (found.utterances, found.wrong_utterances) == (2, 2)


def test_only_whitespace_is_normalised():
    assert score([Transcribed("a", "  one \t two\n", "one two")]).words.errors == 0
    assert score([Transcribed("a", "One, two", "one two")]).words.substitutions == 1


def test_a_word_that_looks_like_the_mark_for_no_word_counts():
    assert score([Transcribed("a", "* a", "* a")]).words == ErrorCounts(0, 0, 0, 2)
    assert score([Transcribed("a", "* a", "a")]).words == ErrorCounts(0, 1, 0, 2)


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([], "%WER 0.00% [0 / 0, 0 ins, 0 del, 0 sub ]"),
        ([Transcribed("a", "", "")], "%WER 0.00% [0 / 0, 0 ins, 0 del, 0 sub ]"),
        ([Transcribed("a", "x y", "")], "%WER 100.00% [2 / 2, 0 ins, 2 del, 0 sub ]"),
        ([Transcribed("a", "", "x")], "%WER inf% [1 / 0, 1 ins, 0 del, 0 sub ]"),
        ([Transcribed("a", "", "x"), Transcribed("b", "y", "y")], "%WER 100.00% [1 / 1, 1 ins, 0 del, 0 sub ]"),
    ],
)
def test_empty_texts(results, line):
    found = score(results, replications=50)
    assert found.wer_line == line
    assert not math.isnan(found.interval.low) and not math.isnan(found.interval.high)


def test_interval_covers_the_true_rate_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    true_rate, covered = 0.1, 0
    lengths = generator.integers(3, 12, size=150)
    for trial in range(200):
        errors = generator.binomial(lengths, true_rate)
        interval = bootstrap_interval(errors, lengths, replications=400, seed=trial)
        covered += interval.low <= true_rate <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_agrees_with_the_normal_approximation():
    generator = np.random.default_rng(3)
    lengths = np.full(2000, 10)
    errors = generator.binomial(lengths, 0.2)
    interval = bootstrap_interval(errors, lengths, replications=4000, seed=0)
    spread = 1.96 * (errors / 10).std() / math.sqrt(2000)
    assert interval.low == pytest.approx((errors / 10).mean() - spread, abs=0.1 * spread)
    assert interval.high == pytest.approx((errors / 10).mean() + spread, abs=0.1 * spread)


def test_interval_is_seeded_and_of_one_block_whatever_the_size():
    errors, lengths = np.array([0, 1, 2, 0, 5]), np.array([3, 4, 5, 1, 5])
    assert bootstrap_interval(errors, lengths, seed=1) == bootstrap_interval(errors, lengths, seed=1)
    many = np.arange(3000) % 3  # several blocks of draws
    interval = bootstrap_interval(many, np.full(3000, 10), replications=1000, seed=1)
    assert interval.low < 0.1 < interval.high


def test_interval_of_one_kind_of_utterance_is_a_point():
    interval = bootstrap_interval(np.array([1, 1, 1]), np.array([4, 4, 4]), replications=100)
    assert (interval.low, interval.high) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("errors", "lengths", "options"),
    [([1], [1, 2], {}), ([1], [1], {"replications": 0}), ([1], [1], {"confidence": 1.0})],
)
def test_interval_refuses_wrong_input(errors, lengths, options):
    with pytest.raises(ValueError):
        bootstrap_interval(np.array(errors), np.array(lengths), **options)


def test_worst_utterances_are_aligned_and_ordered():
    results = [
        Transcribed("fine", "a b", "a b"),
        Transcribed("long", "one two three four five six seven", "one three forty five six seven"),
        Transcribed("short", "yes no", "no yes"),
        Transcribed("again", "yes no", "no yes"),
        Transcribed("one", "yes", "no"),
    ]
    worst = worst_utterances(results)
    assert [(w.cut_id, w.errors, w.ref_words) for w in worst] == [
        ("again", 2, 2),
        ("short", 2, 2),
        ("long", 2, 7),
        ("one", 1, 1),
    ]
    assert worst[2].ref_line == "one two three four  five six seven"
    assert worst[2].hyp_line == "one *   three forty five six seven"
    assert worst[2].pairs[:2] == [("one", "one"), ("two", "")]
    assert len(worst_utterances(results, count=1)) == 1
    assert worst_utterances([]) == []
