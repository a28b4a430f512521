"""The stages decode and score: each test set with each search, at each size of chunk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asr.config import Experiment
from asr.decoding.results import decoded_file, read_decoded, write_decoded, write_results
from asr.decoding.search import DecodingConfig
from asr.models.context import Milliseconds, chunk_list
from recipes.corpora.base import CorpusOptions
from recipes.engine import write_atomic
from recipes.launch import decode_on_processes

if TYPE_CHECKING:
    from recipes.stages import Recipe

EMISSION_PLOTS = 3
"""Worst test utterances whose emission posteriors are drawn."""
TABLE = "decode/wer-by-chunk.txt"


def chosen_chunks(given: str | None, experiment: Experiment, options: CorpusOptions) -> list[Milliseconds]:
    """What the test sets are decoded in, each once; the first is that of the last line of a run.

    Args:
        given: ``--decode-chunks``; None takes decoding.chunk_ms and, if training heard chunks, those of the corpus.

    Raises:
        UserError, ValueError: an entry is no multiple of 40 ms.
    """
    if given is not None:
        return chunk_list("--decode-chunks", given)
    heard = any(chunk != "full" for chunk in experiment.training.chunk_ms)
    return list(dict.fromkeys([experiment.decoding.chunk_ms, *(options.decode_chunks if heard else ())]))


def searches(experiment: Experiment) -> list[str]:
    """Greedy search, and the chosen one if that is another: both results are reported, the chosen one last."""
    return list(dict.fromkeys(["greedy", experiment.decoding.search]))


def decodings(experiment: Experiment, chunks: Sequence[Milliseconds]) -> dict[str, DecodingConfig]:
    """The settings of each result, by its folder in ``decode/``: searches in their order, chunks in theirs."""
    from asr.decoding.decode import context_name

    found = {}
    for search in searches(experiment):
        for chunk in chunks:
            settings: dict[str, Any] = {"search": search, "chunk_ms": chunk}
            config = dataclasses.replace(experiment.decoding, **settings)
            found[search + context_name(config)] = config
    return found


def decoded_files(experiment: Experiment, options: CorpusOptions, chunks: Sequence[Milliseconds]) -> list[str]:
    """All that decoding writes, pictures aside."""
    return [
        f"decode/{folder}/{decoded_file(name)}" for folder in decodings(experiment, chunks) for name in options.tests
    ]


def score_files(experiment: Experiment, options: CorpusOptions, chunks: Sequence[Milliseconds]) -> list[str]:
    """All that scoring writes."""
    parts = ("recogs-{}.txt", "errs-{}.txt", "wer-summary-{}.txt", "score-{}.json")
    files = [
        f"decode/{folder}/{part.format(name)}"
        for folder in decodings(experiment, chunks)
        for name in options.tests
        for part in parts
    ]
    return [*files, *([TABLE] if len(chunks) > 1 else [])]


def run_decode(recipe: Recipe) -> None:
    """Decodes the test sets."""
    from asr.decoding.decode import decode_and_score
    from asr.decoding.emission import worst_cuts, write_emissions
    from asr.decoding.load import load_for_decoding

    wanted = decodings(recipe.experiment, recipe.chunks)
    loaded = None if recipe.num_processes > 1 else load_for_decoding(recipe.path("train/average.pt"), recipe.device)
    for name in recipe.options.tests:
        cuts = recipe.cuts(name, features=True)
        for folder, decoding in wanted.items():
            out = recipe.path(f"decode/{folder}")
            plots = EMISSION_PLOTS if decoding.chunk_ms == recipe.chunks[0] else 0
            if loaded is None:
                decode_on_processes(recipe, name, out, decoding, plots)
                continue
            config = dataclasses.replace(loaded.config, decoding=decoding)
            report = decode_and_score(loaded.model, loaded.tokenizer, cuts, config, recipe.device, None, name)
            out.mkdir(parents=True, exist_ok=True)
            write_decoded(out, name, report.results)
            if plots:
                worst = worst_cuts(cuts, report.results, plots, config.training.errors_in)
                write_emissions(out, name, loaded.model, loaded.tokenizer, worst, config, recipe.device)
            print(f"  {name}, {folder}: {report.speed_line}", flush=True)


def run_score(recipe: Recipe) -> None:
    """Scores what was decoded and renews the training's report with it."""
    from asr.decoding.decode import setting_name
    from asr.training.report import write_report

    experiment = recipe.experiment
    print(f"  texts compared {experiment.scoring}", flush=True)
    for folder, decoding in decodings(experiment, recipe.chunks).items():
        for name in recipe.options.tests:
            found = write_results(
                recipe.path(f"decode/{folder}"),
                name,
                setting_name(decoding),
                read_decoded(recipe.path(f"decode/{folder}/{decoded_file(name)}")),
                errors_in=experiment.training.errors_in,
                scoring=experiment.scoring,
            )
            print(f"  {name}, {folder}: {found.lines[0]}; {found.interval_line}", flush=True)
    if len(recipe.chunks) > 1:
        table = chunk_table(recipe)
        write_atomic(recipe.path(TABLE), table + "\n")
        print("".join(f"  {line}\n" for line in table.splitlines()), end="", flush=True)
    else:
        recipe.path(TABLE).unlink(missing_ok=True)  # of an earlier run with several
    write_report(recipe.path("train"))


def chunk_table(recipe: Recipe) -> str:
    """Error rates in percent by search, chunk and test set, in Markdown; without a line end at its end."""
    from asr.decoding.latency_report import aligned_table
    from asr.decoding.score import rate_name

    counted = recipe.experiment.training.errors_in
    rows = [["search", "chunk, ms", *(f"{name}, %{rate_name(counted)}" for name in recipe.options.tests)]]
    for folder, decoding in decodings(recipe.experiment, recipe.chunks).items():
        rates = [read_score(recipe, folder, name)[counted]["rate"] for name in recipe.options.tests]
        cells = ["inf" if rate is None else f"{100 * rate:.2f}" for rate in rates]
        rows.append([decoding.search, str(decoding.chunk_ms), *cells])
    return aligned_table(rows, left=("search",))


def read_score(recipe: Recipe, folder: str, name: str) -> Any:
    """What `asr.decoding.results.score_to_dict` left of a test set."""
    return json.loads(recipe.path(f"decode/{folder}/score-{name}.json").read_text(encoding="utf-8"))


def print_decoded(recipe: Recipe) -> None:
    """Where transcripts and pictures are, and the error rates; the last line is that of the chosen search at the first
    chunk on the first test set."""
    tests, last = recipe.options.tests, recipe.experiment.decoding.search
    wanted = decodings(recipe.experiment, recipe.chunks)
    for folder, decoding in wanted.items():
        out = recipe.path(f"decode/{folder}")
        for name in tests:
            print(f"transcripts ({folder}): {out / f'recogs-{name}.txt'}, errors: {out / f'errs-{name}.txt'}")
        if decoding.chunk_ms == recipe.chunks[0]:
            for picture in sorted(out.glob("*.png")):
                print(f"plot: {picture}")
    if len(recipe.chunks) > 1:
        print(f"by chunk: {recipe.path(TABLE)}")
        print(chunk_table(recipe))
    for folder, decoding in wanted.items():
        if decoding.chunk_ms != recipe.chunks[0]:
            continue
        for name in reversed(tests):
            said = read_score(recipe, folder, name)["line"]
            search = decoding.search
            labels = [*([search] if search != last else []), *([name] if name != tests[0] else [])]
            print(": ".join([*labels, said]), flush=True)
