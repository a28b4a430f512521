"""Result files in the form of icefall: recogs-*.txt, errs-*.txt, wer-summary-*.txt; and one file for programs.

The text of recogs and errs files is that of icefall's ``store_transcripts`` and ``write_error_stats``, so that scripts
which read those files read ours.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from asr.atomic import write_whole
from asr.decoding.normalise import ScoringConfig, normalised
from asr.decoding.score import (
    NO_WORD,
    ErrorCounts,
    ErrorUnit,
    Score,
    Transcribed,
    align,
    count_errors,
    rate_name,
    score,
    total,
    units_of,
)
from asr.errors import UserError

MARK = "*"  # "no word" in the errs file


def write_results(
    out_dir: Path,
    name: str,
    setting: str,
    results: Sequence[Transcribed],
    *,
    errors_in: ErrorUnit = "words",
    scoring: ScoringConfig | None = None,
    seed: int = 0,
) -> Score:
    """Score ``results``; write ``recogs-NAME.txt``, ``errs-NAME.txt``, ``wer-summary-NAME.txt``, ``score-NAME.json``.

    Args:
        out_dir: created if it is absent.
        name: of the test set.
        setting: what the summary names: the search and its parameters.
        results: in any order; the files are sorted by utterance id.
        errors_in: what the summary leads with, and what stands as words in recogs and errs files.
        scoring: what is done to the texts before; all files have them so.
        seed: of the bootstrap.

    Raises:
        OSError: when a file cannot be written.
    """
    scoring = scoring or ScoringConfig()
    ordered = normalised(sorted(results, key=lambda result: result.cut_id), scoring)
    found = score(ordered, errors_in=errors_in, seed=seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    store_transcripts(out_dir / f"recogs-{name}.txt", ordered, errors_in)
    with open(out_dir / f"errs-{name}.txt", "w", encoding="utf-8") as file:
        write_error_stats(file, ordered, errors_in)
    write_summary(out_dir / f"wer-summary-{name}.txt", setting, found, scoring)
    description = json.dumps({**score_to_dict(found, setting), "texts": str(scoring)}, indent=2)
    (out_dir / f"score-{name}.json").write_text(description + "\n", encoding="utf-8")
    return found


def decoded_file(name: str) -> str:
    """Of a test set: what `write_decoded` wrote."""
    return f"decoded-{name}.jsonl"


def write_decoded(out_dir: Path, name: str, results: Sequence[Transcribed]) -> None:
    """A line of JSON for each utterance, sorted by id: id, ref and hyp as they are, to be scored in any way."""
    lines = [
        json.dumps({"id": one.cut_id, "ref": one.ref, "hyp": one.hyp}, ensure_ascii=False)
        for one in sorted(results, key=lambda one: one.cut_id)
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    write_whole(out_dir / decoded_file(name), lambda file: file.write(data))


def read_decoded(path: Path) -> list[Transcribed]:
    """What `write_decoded` wrote.

    Raises:
        UserError: no such file, or a line of something else.
    """
    found = []
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                entry = json.loads(line)
                if not (isinstance(entry["ref"], str) and isinstance(entry["hyp"], str)):
                    raise TypeError
                found.append(Transcribed(str(entry["id"]), entry["ref"], entry["hyp"]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}:{number}: not a line with id, ref and hyp, as asr decode writes them") from None
    return found


def score_to_dict(found: Score, setting: str) -> dict[str, Any]:
    """For JSON: rates are fractions; one that is infinite (errors without reference words) is null."""

    def finite(value: float) -> float | None:
        return value if value != float("inf") else None

    def counts(errors: ErrorCounts) -> dict[str, Any]:
        return {
            "rate": finite(errors.rate),
            "errors": errors.errors,
            "ref_length": errors.ref_length,
            "insertions": errors.insertions,
            "deletions": errors.deletions,
            "substitutions": errors.substitutions,
        }

    bounds = {"low": finite(found.interval.low), "high": finite(found.interval.high)}
    interval = bounds | {"replications": found.interval.replications}
    return {
        "setting": setting,
        "line": found.lines[0],
        "errors_in": found.errors_in,
        "wer_line": found.wer_line,
        "cer_line": found.cer_line,
        "words": counts(found.words),
        "characters": counts(found.chars),
        f"{rate_name(found.errors_in).lower()}_95_percent_interval": interval
        | {"replications": found.interval.replications},
        "utterances": found.utterances,
        "wrong_utterances": found.wrong_utterances,
    }


def store_transcripts(path: Path, results: Sequence[Transcribed], errors_in: ErrorUnit = "words") -> None:
    """Two lines an utterance: ``ID:<tab>ref=['A', 'B']`` and ``ID:<tab>hyp=['A', 'B']``."""
    with open(path, "w", encoding="utf-8") as file:
        for result in results:
            file.write(f"{result.cut_id}:\tref={units_of(result.ref, errors_in)}\n")
            file.write(f"{result.cut_id}:\thyp={units_of(result.hyp, errors_in)}\n")


def write_summary(path: Path, setting: str, found: Score, scoring: ScoringConfig) -> None:
    """icefall's table (``settings<tab>WER``, or CER, in percent), then lines with counts, confidence interval, the
    other rate, and what was done to the texts."""
    rate = float(f"{100 * found.counts.rate:.2f}")
    table = f"settings\t{rate_name(found.errors_in)}\n{setting}\t{rate}\n"
    path.write_text("\n".join([table, *found.lines, f"texts compared {scoring}", ""]), encoding="utf-8")


def write_error_stats(file: TextIO, results: Sequence[Transcribed], errors_in: ErrorUnit = "words") -> None:
    """Totals, each utterance with its errors marked, and errors counted by word (or character)."""
    alignments = [(r.cut_id, align(units_of(r.ref, errors_in), units_of(r.hyp, errors_in))) for r in results]
    counts = total(count_errors(pairs) for _, pairs in alignments)
    correct = sum(ref == hyp for _, pairs in alignments for ref, hyp in pairs)
    lines = [
        f"%{rate_name(errors_in)} = {100 * counts.rate:.2f}",
        f"Errors: {counts.insertions} insertions, {counts.deletions} deletions, {counts.substitutions} substitutions,"
        f" over {counts.ref_length} reference {errors_in} ({correct} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:,"
        " PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
    ]
    lines += [f"{cut_id}:\t{marked_errors(pairs)}" for cut_id, pairs in alignments]
    pairs = [pair for _, one in alignments for pair in one]
    substituted = Counter((ref, hyp) for ref, hyp in pairs if ref != hyp and NO_WORD not in (ref, hyp))
    deleted = Counter(ref for ref, hyp in pairs if hyp == NO_WORD)
    inserted = Counter(hyp for ref, hyp in pairs if ref == NO_WORD)
    lines += ["", "SUBSTITUTIONS: count ref -> hyp"]
    lines += [f"{n}   {ref} -> {hyp}" for n, (ref, hyp) in _most_first(substituted)]
    lines += ["", "DELETIONS: count ref"] + [f"{n}   {word}" for n, word in _most_first(deleted)]
    lines += ["", "INSERTIONS: count hyp"] + [f"{n}   {word}" for n, word in _most_first(inserted)]
    lines += ["", "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp"] + _word_lines(pairs)
    file.write("\n".join(lines) + "\n")


def marked_errors(pairs: Sequence[tuple[str, str]]) -> str:
    """``A (B C->D) E (F->*)``: correct words as they are, runs of errors together, ``*`` for a side without words."""
    parts = []
    for is_error, run in groupby(pairs, key=lambda pair: pair[0] != pair[1]):
        group = list(run)
        if is_error:
            sides = (" ".join(pair[side] for pair in group if pair[side] != NO_WORD) or MARK for side in (0, 1))
            parts.append("({}->{})".format(*sides))
        else:
            parts += [ref for ref, _ in group]
    return " ".join(parts)


def _most_first(counts: Counter[Any]) -> list[tuple[int, Any]]:
    return sorted(((n, key) for key, n in counts.items()), reverse=True)


def _word_lines(pairs: Sequence[tuple[str, str]]) -> list[str]:
    correct: Counter[str] = Counter()
    in_ref: Counter[str] = Counter()
    in_hyp: Counter[str] = Counter()
    errors: defaultdict[str, int] = defaultdict(int)
    for ref, hyp in pairs:
        if ref == hyp:
            correct[ref] += 1
        for word, side in ((ref, in_ref), (hyp, in_hyp)):
            if word != NO_WORD:
                side[word] += 1
                errors[word] += ref != hyp
    order = sorted(((n, word) for word, n in errors.items()), reverse=True)
    return [f"{word}   {correct[word]} {n} {in_ref[word]} {in_hyp[word]}" for n, word in order]
