"""What a smaller chunk costs and gains: errors against delays, for one or several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import CutSet

from asr.data.features import load_samples
from asr.data.loader import eval_loader
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.decoding.compute_time import chunk_compute_ms
from asr.decoding.decode import evaluation_mode
from asr.decoding.greedy import greedy
from asr.decoding.load import load_for_decoding
from asr.decoding.score import ErrorCounts, ErrorUnit, text_errors, total
from asr.decoding.search import DecodingConfig
from asr.decoding.token_delays import Delays, Reference, Spread, align_references, token_delays
from asr.errors import UserError
from asr.models.context import Milliseconds, check_left_context, chunk_list

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment

TIMED_UTTERANCES = 5
"""Recordings on which the computing time of a chunk is measured."""


@dataclass(frozen=True)
class ChunkLatency:
    """What a model does with one chunk size.

    counts: errors of the whole set, also of utterances that could not be aligned.
    emission, perceived: see ``Delays``; over the tokens of the reference that were recognised right.
    first_partial: see ``Delays``, plus ``compute_ms``; over the utterances that have a text.
    compute_ms: see ``chunk_compute_ms``.
    """

    chunk_ms: Milliseconds
    counts: ErrorCounts
    emission: Spread
    perceived: Spread
    first_partial: Spread
    compute_ms: float


@dataclass(frozen=True)
class LatencyRun:
    """One checkpoint: a row for each chunk, smallest first."""

    label: str
    checkpoint: Path
    rows: list[ChunkLatency]


@dataclass(frozen=True)
class LatencyReport:
    """All checkpoints on one set; delays count from the alignment of the first checkpoint.

    aligned, aligned_tokens: the references that have an alignment, and the tokens in them.
    errors_in: what errors are counted in.
    """

    runs: list[LatencyRun]
    utterances: int
    aligned: int
    aligned_tokens: int
    left_context_ms: Milliseconds
    errors_in: ErrorUnit = "words"


def parse_chunks(text: str) -> list[Milliseconds]:
    """``160,320,full`` as chunks in ms, smallest first and full last, each once.

    Raises:
        UserError: an entry is no multiple of 40 ms.
    """
    return sorted(chunk_list("--chunks", text), key=lambda chunk: float("inf") if chunk == "full" else chunk)


def measure_checkpoints(
    checkpoints: Sequence[Path],
    labels: Sequence[str],
    cuts: CutSet,
    chunks: Sequence[Milliseconds],
    left_context_ms: int,
    device: str = "cpu",
    overrides: Sequence[str] = (),
) -> LatencyReport:
    """Decodes the cuts at each chunk with each checkpoint, and times it.

    Times of the reference tokens are those of the first checkpoint, for all of them: a model that was trained to emit
    early would do so on an alignment of its own too, and its gain would not show.

    Args:
        checkpoints: one or more, with the same tokenizer.
        labels: what reports call them; empty for the names of their folders.
        cuts: with references, at least one of which can be aligned; the first few need their recordings.
        chunks: of ``parse_chunks``.
        left_context_ms: how far chunks hear back; a multiple of 40.
        device: a name that ``asr.device.resolve_device`` gave.
        overrides: as for ``load_for_decoding``; but search, chunk and left context are set here.

    Raises:
        UserError: labels that do not match, different tokenizers or ``training.errors_in``, no reference that can be
            aligned, audio that cannot be read; and what ``load_for_decoding`` raises.
    """
    check_left_context("--left-context-ms", left_context_ms)
    for text in overrides:
        if text.split("=")[0] in ("decoding.search", "decoding.chunk_ms", "decoding.left_context_ms"):
            raise UserError(f"--set {text}: latency is that of greedy search at --chunks with --left-context-ms")
    names = label_checkpoints(checkpoints, labels)
    loaded = [load_for_decoding(path, device, "greedy", overrides) for path in checkpoints]
    for name, other in zip(names, loaded, strict=True):
        if other.tokenizer != loaded[0].tokenizer:
            raise UserError(f"{names[0]} and {name} have different tokenizers; measure them one by one")
    units = [one.config.training.errors_in for one in loaded]
    for name, unit in zip(names, units, strict=True):
        if unit != units[0]:
            raise UserError(
                f"{names[0]} counts errors in {units[0]} and {name} in {unit} (training.errors_in); measure them "
                "one by one"
            )
    recordings = [load_samples(cut) for cut in list(cuts)[:TIMED_UTTERANCES]]
    references: dict[str, Reference] | None = None
    runs = []
    for name, path, one in zip(names, checkpoints, loaded, strict=True):
        settings: list[dict[str, Any]] = [{"chunk_ms": chunk, "left_context_ms": left_context_ms} for chunk in chunks]
        decodings = [replace(one.config.decoding, **setting) for setting in settings]
        rows, references = measure_latency(
            one.model, one.tokenizer, cuts, one.config, decodings, device, recordings, references
        )
        runs.append(LatencyRun(name, path, rows))
    assert references is not None
    tokens = sum(len(reference.tokens) for reference in references.values())
    return LatencyReport(runs, len(cuts), len(references), tokens, left_context_ms, units[0])


def label_checkpoints(checkpoints: Sequence[Path], labels: Sequence[str]) -> list[str]:
    """A different name for each checkpoint.

    Raises:
        UserError: there are labels, but not one for each; two are equal; a checkpoint is given twice.
    """
    if labels and len(labels) != len(checkpoints):
        raise UserError(
            f"{len(labels)} --label for {len(checkpoints)} --checkpoint; pass one for each, in the same order, or none"
        )
    if not labels:
        folders = [path.resolve().parent for path in checkpoints]
        labels = [folder.parent.name if folder.name == "train" else folder.name for folder in folders]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in checkpoints]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label!r} stands for several checkpoints; give each a --label of its own")
    return list(labels)


@torch.inference_mode()
def measure_latency(
    model: Any,
    tokenizer: Tokenizer,
    cuts: CutSet,
    config: Experiment,
    decodings: Sequence[DecodingConfig],
    device: str | torch.device = "cpu",
    recordings: Sequence[np.ndarray] = (),
    references: dict[str, Reference] | None = None,
) -> tuple[list[ChunkLatency], dict[str, Reference]]:
    """Delays and errors of one model at several chunks.

    Tokens and frames are those of whole utterances under the mask of the chunks, which are those of a stream
    (``StreamingRecognizer``), and are computed many at a time.

    Args:
        model: a transducer on ``device``; it is left in the mode that it came in.
        tokenizer: of the model.
        cuts: with references. One that the tokenizer cannot spell, or with more tokens than frames, has no delays.
        config: ``data``, ``loss.topology`` and ``training.errors_in`` are used.
        decodings: one for each chunk; greedy search.
        device: where the model is.
        recordings: for ``chunk_compute_ms``; without any, computing takes no time.
        references: by cut id, of an earlier call that is the measure of this one too; None aligns by this model with
            full context.

    Returns:
        A row for each chunk, and the references.

    Raises:
        UserError: no reference can be aligned.
    """
    found: list[list[Delays]] = [[] for _ in decodings]
    errors: list[list[ErrorCounts]] = [[] for _ in decodings]
    known = {} if references is None else references
    unit = config.training.errors_in
    loader = eval_loader(cuts, None, config.data, max_duration_s=decodings[0].batch_duration_s)
    with evaluation_mode(model):
        for batch in loader:
            batch = batch.to(device)
            whole, lens = model.encode(batch.features, batch.feature_lens)
            if references is None:
                targets = [_spell(tokenizer, text) for text in batch.texts]
                aligned = align_references(model, whole, lens, targets, config.loss.topology)
                known |= {i: one for i, one in zip(batch.cut_ids, aligned, strict=True) if one is not None}
            for decoding, delays, counts in zip(decodings, found, errors, strict=True):
                enc = whole
                if decoding.chunk_ms != "full":
                    enc, _ = model.encode(batch.features, batch.feature_lens, *decoding.context)
                hypotheses = greedy(model, enc, lens, decoding)
                for cut_id, text, one, duration_s in zip(
                    batch.cut_ids, batch.texts, hypotheses, batch.durations_s, strict=True
                ):
                    counts.append(text_errors([text], [tokenizer.decode(one.tokens)], unit))
                    if cut_id in known:
                        delays.append(token_delays(known[cut_id], one, tokenizer, decoding.chunk_ms, duration_s))
        if not known:
            raise UserError(
                "no reference can be aligned: the tokenizer cannot spell them, or they have more tokens than frames; "
                "is this the checkpoint for these cuts?"
            )
        rows = []
        for decoding, delays, counts in zip(decodings, found, errors, strict=True):
            spent_ms = chunk_compute_ms(model, tokenizer, config, decoding, recordings, device) if recordings else 0.0
            rows.append(_row(decoding.chunk_ms, delays, total(counts), spent_ms))
    return rows, known


def _row(chunk_ms: Milliseconds, delays: Sequence[Delays], counts: ErrorCounts, compute_ms: float) -> ChunkLatency:
    first = [one.first_partial for one in delays if one.first_partial is not None]
    return ChunkLatency(
        chunk_ms,
        counts,
        Spread.of([delay for one in delays for delay in one.emission]),
        Spread.of([delay for one in delays for delay in one.perceived]),
        Spread.of(first).later(compute_ms),
        compute_ms,
    )


def _spell(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UnknownToken:
        return []
