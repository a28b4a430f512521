"""``asr score``: score again what ``asr decode`` wrote, after other changes to the texts."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Score decoded-*.jsonl files of asr decode, or of anybody, and print the word error rate."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="lines of JSON with id, ref and hyp: decoded-NAME.jsonl"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. scoring.case=lower; repeatable"
    )
    parser.add_argument("--characters", action="store_true", help="count characters, for texts without spaces")
    parser.add_argument("--out-dir", type=Path, help="folder for recogs, errs and wer-summary files; none if not given")


def run(args: argparse.Namespace) -> int:
    from asr.config import load_experiment
    from asr.decoding.normalise import normalised
    from asr.decoding.results import read_decoded, write_results
    from asr.decoding.score import ErrorUnit, score
    from asr.errors import UserError

    if other := [text for text in args.set if not text.startswith("scoring")]:
        raise UserError(f"{other[0]!r}: only scoring.* can be set here (asr train --help-keys lists the settings)")
    names = [path.stem.removeprefix("decoded-") for path in args.files]
    twice = [str(path) for path, name in zip(args.files, names, strict=True) if names.count(name) > 1]
    if args.out_dir is not None and twice:
        raise UserError(f"--out-dir {args.out_dir} has one place for {' and '.join(twice)}; score them apart")
    scoring = load_experiment(None, args.set).scoring
    errors_in: ErrorUnit = "characters" if args.characters else "words"
    for path, name in zip(args.files, names, strict=True):
        results = read_decoded(path)
        if not results:
            raise UserError(f"{path} holds no utterances")
        if args.out_dir is None:
            found = score(normalised(results, scoring), errors_in=errors_in)
        else:
            found = write_results(args.out_dir, name, path.stem, results, errors_in=errors_in, scoring=scoring)
        print(f"{path}: texts compared {scoring}")
        for line in reversed(found.lines):
            print(line)
    return 0
