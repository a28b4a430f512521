"""Word and character errors, their confidence interval, and the utterances that went worst.

Texts are compared as they are: split at whitespace, nothing else is normalised (no case folding, no punctuation
removal). Character errors compare the characters of those words without the spaces between them, as icefall does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import kaldialign
import numpy as np

# Stands for "no word" in alignments. Words come from splitting at whitespace, so none of them can be equal to it.
NO_WORD = " "

ErrorUnit = Literal["words", "characters"]
"""What errors are counted in: as ``training.errors_in``, characters for texts without spaces."""


@dataclass(frozen=True)
class Transcribed:
    """Reference and hypothesis of one utterance, as plain text."""

    cut_id: str
    ref: str
    hyp: str


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn the references into the hypotheses, and the number of reference words (or characters)."""

    insertions: int
    deletions: int
    substitutions: int
    ref_length: int

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors per reference word; without reference words 0 if there are no errors, else infinity."""
        return float(_rate(np.array(self.errors), np.array(self.ref_length)))

    def __str__(self) -> str:
        """As Kaldi and icefall write it: ``0.42% [1 / 240, 0 ins, 1 del, 0 sub ]``."""
        edits = f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub ]"
        return f"{self.rate:.2%} [{self.errors} / {self.ref_length}, {edits}"


@dataclass(frozen=True)
class Interval:
    """Bounds of an error rate, as fractions."""

    low: float
    high: float
    replications: int


@dataclass(frozen=True)
class Score:
    """What scoring found. ``errors_in`` says which of the two rates is the result; ``interval`` (95% confidence) is its
    own."""

    words: ErrorCounts
    chars: ErrorCounts
    interval: Interval
    utterances: int
    wrong_utterances: int
    errors_in: ErrorUnit = "words"

    @property
    def counts(self) -> ErrorCounts:
        """Those of the result."""
        return self.chars if self.errors_in == "characters" else self.words

    @property
    def wer_line(self) -> str:
        return f"%WER {self.words}"

    @property
    def cer_line(self) -> str:
        return f"%CER {self.chars}"

    @property
    def lines(self) -> tuple[str, str, str]:
        """The result, its interval, and the other rate."""
        first, other = self.wer_line, self.cer_line
        if self.errors_in == "characters":
            first, other = other, first
        return first, self.interval_line, other

    @property
    def interval_line(self) -> str:
        bounds = f"[{self.interval.low:.2%}, {self.interval.high:.2%}]"
        drawn = f"{self.interval.replications} bootstrap replications over {self.utterances} utterances"
        return f"95% confidence interval of the {rate_name(self.errors_in)} {bounds} ({drawn})"


@dataclass(frozen=True)
class WorstUtterance:
    """An utterance with errors. ``pairs`` aligns (reference, hypothesis); "" stands where one has no word. Words may be
    characters.

    ``ref_line`` and ``hyp_line`` show the same in two lines of a fixed-width font: word under word, ``*`` for no word.
    """

    cut_id: str
    errors: int
    ref_words: int
    pairs: list[tuple[str, str]]
    ref_line: str
    hyp_line: str


def words_of(text: str) -> list[str]:
    return text.split()


def chars_of(text: str) -> list[str]:
    return list("".join(text.split()))


def units_of(text: str, errors_in: ErrorUnit) -> list[str]:
    """What is compared: words, or characters."""
    return chars_of(text) if errors_in == "characters" else words_of(text)


def rate_name(errors_in: str) -> str:
    """WER or CER."""
    return "CER" if errors_in == "characters" else "WER"


def errors_name(errors_in: str) -> str:
    """word errors or character errors."""
    return "character errors" if errors_in == "characters" else "word errors"


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (reference, hypothesis) of least edit distance; ``NO_WORD`` for the missing side of an edit."""
    return [(str(r), str(h)) for r, h in kaldialign.align(list(ref), list(hyp), NO_WORD)]


def count_errors(pairs: Iterable[tuple[str, str]]) -> ErrorCounts:
    insertions = deletions = substitutions = length = 0
    for ref, hyp in pairs:
        length += ref != NO_WORD
        if ref == NO_WORD:
            insertions += 1
        elif hyp == NO_WORD:
            deletions += 1
        else:
            substitutions += ref != hyp
    return ErrorCounts(insertions, deletions, substitutions, length)


def total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    rows = [(c.insertions, c.deletions, c.substitutions, c.ref_length) for c in counts]
    return ErrorCounts(*(sum(column) for column in zip(*rows, strict=True))) if rows else ErrorCounts(0, 0, 0, 0)


def text_errors(refs: Iterable[str], hyps: Iterable[str], errors_in: ErrorUnit = "words") -> ErrorCounts:
    """Of texts and what was heard of them, all together.

    Raises:
        ValueError: not as many of the ones as of the others.
    """
    pairs = zip(refs, hyps, strict=True)
    return total(count_errors(align(units_of(ref, errors_in), units_of(hyp, errors_in))) for ref, hyp in pairs)


def score(
    results: Sequence[Transcribed], *, errors_in: ErrorUnit = "words", replications: int = 10_000, seed: int = 0
) -> Score:
    """Score a test set.

    Args:
        results: one per utterance; empty references, empty hypotheses and an empty list are allowed.
        errors_in: what the result counts, and with it the confidence interval and the wrong utterances.
        replications: bootstrap samples for the confidence interval, at least 1.
        seed: of the bootstrap.
    """
    words = [count_errors(align(words_of(r.ref), words_of(r.hyp))) for r in results]
    chars = [count_errors(align(chars_of(r.ref), chars_of(r.hyp))) for r in results]
    counted = chars if errors_in == "characters" else words
    errors = np.array([c.errors for c in counted], dtype=np.int64)
    lengths = np.array([c.ref_length for c in counted], dtype=np.int64)
    interval = bootstrap_interval(errors, lengths, replications=replications, seed=seed)
    return Score(total(words), total(chars), interval, len(results), int((errors > 0).sum()), errors_in)


def bootstrap_interval(
    errors: np.ndarray, ref_lengths: np.ndarray, *, replications: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Confidence interval of an error rate by resampling utterances (Bisani & Ney 2004, "Bootstrap estimates for
    confidence intervals in ASR performance evaluation", section 2).

    Utterances, not words, are drawn, with replacement: errors within one utterance depend on each other. The interval
    lies between the (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of the drawn error rates.

    Args:
        errors: integers ``[N]``, edits of each utterance.
        ref_lengths: integers ``[N]``, reference words of each utterance.
        replications: number of drawn test sets, at least 1.
        seed: the same seed draws the same test sets.
        confidence: in (0, 1).

    Raises:
        ValueError: when the arrays differ in shape, or a number is out of range.
    """
    if errors.shape != ref_lengths.shape or errors.ndim != 1:
        raise ValueError(f"errors {errors.shape} and ref_lengths {ref_lengths.shape} must both be [N]; pass one each")
    if replications < 1 or not 0 < confidence < 1:
        raise ValueError(f"replications={replications} must be at least 1, confidence={confidence} in (0, 1)")
    count = len(errors)
    if count == 0:
        return Interval(0.0, 0.0, replications)
    generator = np.random.default_rng(seed)
    both = np.stack([errors, ref_lengths], axis=1)  # [N, 2]
    sums = np.empty((replications, 2), dtype=np.int64)
    block = max(1, 1_000_000 // count)  # bounds the memory of the draws to about 30 MB
    for start in range(0, replications, block):
        draws = generator.integers(0, count, size=(min(block, replications - start), count))
        sums[start : start + len(draws)] = both[draws].sum(axis=1)
    # inverted_cdf picks a drawn value: it neither interpolates nor stumbles over infinity (sets without words).
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(_rate(sums[:, 0], sums[:, 1]), bounds, method="inverted_cdf")
    return Interval(float(low), float(high), replications)


def worst_utterances(
    results: Sequence[Transcribed], count: int = 10, errors_in: ErrorUnit = "words"
) -> list[WorstUtterance]:
    """The utterances with errors, worst first: by number of errors, then error rate, then id; at most ``count``."""
    found = []
    for result in results:
        pairs = align(units_of(result.ref, errors_in), units_of(result.hyp, errors_in))
        counts = count_errors(pairs)
        if counts.errors:
            found.append((-counts.errors, -counts.rate, result.cut_id, pairs, counts))
    found.sort(key=lambda row: row[:3])
    return [_worst(cut_id, pairs, counts) for _, _, cut_id, pairs, counts in found[:count]]


def _worst(cut_id: str, pairs: list[tuple[str, str]], counts: ErrorCounts) -> WorstUtterance:
    shown = [(ref.replace(NO_WORD, "*"), hyp.replace(NO_WORD, "*")) for ref, hyp in pairs]
    widths = [max(len(ref), len(hyp)) for ref, hyp in shown]
    lines = (
        " ".join(pair[side].ljust(width) for pair, width in zip(shown, widths, strict=True)).rstrip() for side in (0, 1)
    )
    plain = [(ref.replace(NO_WORD, ""), hyp.replace(NO_WORD, "")) for ref, hyp in pairs]
    return WorstUtterance(cut_id, counts.errors, counts.ref_length, plain, *lines)


def _rate(errors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Errors per reference word, elementwise; x / 0 is infinity and 0 / 0 is 0."""
    without_words = np.where(errors > 0, np.inf, 0.0)
    return np.where(lengths > 0, errors / np.maximum(lengths, 1), without_words)
