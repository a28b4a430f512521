"""DATA/preflight.html: the findings about somebody's own recordings, and what their training has to expect."""

from __future__ import annotations

import base64
import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from html import escape
from pathlib import Path

import numpy as np

from asr.config import Experiment
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.errors import UserError
from losses.memory import text_of
from recipes.corpora.base import Prepared
from recipes.corpora.preflight import SHOWN, Preflight

PAGE = "preflight.html"
SHOWN_ON_PAGE = 200
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "h1{font-size:1.5em}h2{font-size:1.1em;margin-top:1.6em}img{max-width:100%}"
    "summary{cursor:pointer}.warning{color:#a00000;font-weight:bold}p.names{overflow-wrap:anywhere;color:#555}"
)


def write_page(prepared: Prepared, found: Preflight, experiment: Experiment, device: str) -> list[str]:
    """Writes the page, one file without references to others, and returns what the training has to expect.

    Args:
        prepared: the cuts.
        found: about their recordings.
        experiment: how they are to be trained.
        device: where.
    """
    outlook, warnings, tokenizer = _spelling(prepared, experiment)
    memory, short = expected_memory(prepared, experiment, tokenizer, device)
    outlook, warnings = [*outlook, memory], [*warnings, *short]
    name = escape(experiment.name)
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}: pre-flight report</title>',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\"><style>{_STYLE}</style></head><body><h1>{name}: pre-flight report</h1>",
        *(f'<p class="warning">{escape(line)}</p>' for line in warnings),
        "<h2>Sets</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in found.sizes),
        f"<li>{len(prepared.bad_rows)} of {prepared.num_rows} rows left out, see bad_rows.txt</li>",
        "</ul><h2>Durations</h2>",
        f'<img alt="histogram of durations" src="data:image/png;base64,{_histogram(found.durations_s)}">',
        "<h2>Training</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in outlook),
        "</ul><h2>Findings</h2>",
        *(_finding(what, names) for what, names in found.findings),
        "</body></html>\n",
    ]
    path = prepared.data_dir / PAGE
    path.write_text("\n".join(parts), encoding="utf-8")
    return [*outlook, *(f"warning: {line}" for line in warnings), f"pre-flight report: {path}"]


def _finding(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_ON_PAGE} more, see preflight.txt" if len(names) > SHOWN_ON_PAGE else ""
    text = escape(", ".join(names[:SHOWN_ON_PAGE]) + more)
    state = " open" if len(names) <= SHOWN else ""
    return f'<details{state}><summary>{escape(what)}: {len(names)}</summary><p class="names">{text}</p></details>'


def _spelling(prepared: Prepared, experiment: Experiment) -> tuple[list[str], list[str], Tokenizer | None]:
    """Lines, warnings, and the tokenizer that the training texts make."""
    texts = {split: [cut.supervisions[0].text for cut in prepared.load(split)] for split in prepared.cuts}
    try:
        tokenizer = Tokenizer.train(texts["train"], experiment.tokenizer)
    except UserError as error:
        return [], [f"the training texts make no tokenizer: {error}"], None
    lines = [f"tokenizer: {experiment.tokenizer.kind}, {tokenizer.vocab_size} tokens with blank"]
    warnings = []
    for split, every in texts.items():
        reasons = []
        for text in every:
            try:
                tokenizer.encode(text)
            except UnknownToken as error:
                reasons.append(str(error))
        if not reasons:
            continue
        lines.append(f"{split}: {len(reasons)} of {len(every)} texts have no spelling, the first: {reasons[0]}")
        if split == "valid" and len(reasons) == len(every):
            warnings.append(
                "the tokenizer cannot spell any validation text, so no weights can be chosen and training would stop: "
                f"{reasons[0]}; choose another tokenizer.kind, or validation texts in the symbols of training"
            )
    return lines, warnings, tokenizer


def expected_memory(
    prepared: Prepared, experiment: Experiment, tokenizer: Tokenizer | None, device: str
) -> tuple[str, list[str]]:
    """A line about the largest step of the training, measured in a process of its own, and warnings."""
    from asr.data.packed_cuts import PackedCuts
    from asr.training.memory_plan import longest_utterance

    if tokenizer is None:
        return "peak memory: not known without a tokenizer", []
    cuts = [cut for cut in PackedCuts.open(prepared.cuts["train"]) if _spells(tokenizer, cut.supervisions[0].text)]
    if not cuts:
        return "peak memory: not known, no training text has a spelling", []
    longest = longest_utterance(cuts, tokenizer, experiment.data)
    if experiment.data.features.storage == "stored":  # of the slowest speed, which is not there yet
        slowest = min(1.0, *experiment.data.augment.speed_factors)
        longest = round(longest[0] / slowest), longest[1]
    # spawned: it must not inherit threads, and what it does to its allocator goes with it
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            peak, static, free = pool.submit(_measure, experiment, tokenizer.vocab_size, longest, device).result()
        except (MemoryError, BrokenProcessPool):
            return "peak memory: more than there is", [
                f"there is too little memory to train an utterance of {longest[0] / 100:.1f} s: set memory.limit, "
                "leave out long recordings, or choose a smaller model"
            ]
        except UserError as error:
            return f"peak memory: not known ({error})", []
    batch = f"{max(longest[0] / 100, experiment.data.max_duration_s):.0f} s, longest utterance {longest[0] / 100:.1f} s"
    line = f"peak memory of training: about {text_of(peak)} on {device}, pages of files aside, of which "
    line += f"{text_of(static)} always, in the largest batch ({batch}), preset {experiment.model.preset}; "
    line += f"{text_of(free)} are free"
    if experiment.memory.limit is not None:
        return f"{line}; held to memory.limit={experiment.memory.limit}", []
    if peak <= free:
        return line, []
    return line, [
        f"training may need {text_of(peak)} of memory and {text_of(free)} are free: set memory.limit, or lower "
        f"data.max_duration_s={experiment.data.max_duration_s:g}"
    ]


def _spells(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text))
    except UnknownToken:
        return False


def _measure(
    experiment: Experiment, vocab_size: int, longest: tuple[int, int], device: str
) -> tuple[float, float, float]:
    """Bytes at the peak, always, and free now."""
    import torch

    from asr.training.memory_plan import expected_peak

    free = float(torch.cuda.mem_get_info(device)[0]) if device != "cpu" else _available()
    return *expected_peak(experiment, vocab_size, longest, torch.device(device)), free


def _available() -> float:
    """Memory that programs can still take, in bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _histogram(durations_s: dict[str, list[float]]) -> str:
    """A PNG in base64: how long the utterances of each set are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    longest = max((max(values, default=0.0) for values in durations_s.values()), default=0.0) or 1.0
    bins = np.linspace(0, longest, 41).tolist()
    axes.hist(list(durations_s.values()), bins, stacked=True, label=list(durations_s))
    axes.set_xlabel("seconds")
    axes.set_ylabel("utterances")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return base64.b64encode(picture.getvalue()).decode("ascii")
