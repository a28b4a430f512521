"""Decode a set of cuts that have references, and score the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lhotse import CutSet
from lhotse.cut import Cut

from asr.data.batch import Batch
from asr.data.loader import eval_loader, transcript
from asr.data.manifests import load_cuts
from asr.data.tokenizer import Tokenizer
from asr.decoding import SEARCHES
from asr.decoding.results import write_decoded, write_results
from asr.decoding.score import Score, Transcribed, score, words_of
from asr.decoding.search import DecodingConfig, Hypothesis
from asr.errors import UserError
from asr.training.ranks import Ranks
from losses.backends.threads import map_in_threads

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment


@dataclass(frozen=True)
class Decoded(Transcribed):
    """One utterance of a test set with what the search found; ``duration_s`` is without the silent tail."""

    hypothesis: Hypothesis
    duration_s: float


@dataclass(frozen=True)
class DecodeReport:
    """What ``decode_and_score`` found; ``seconds`` is the wall time of reading, encoding and searching."""

    results: list[Decoded]
    score: Score
    seconds: float

    @property
    def audio_s(self) -> float:
        return sum(result.duration_s for result in self.results)

    @property
    def speed_line(self) -> str:
        times = self.audio_s / self.seconds if self.seconds > 0 else 0.0
        spent = f"{self.seconds:.1f} s ({times:.0f} times real time)"
        return f"{len(self.results)} utterances, {self.audio_s:.1f} s of audio in {spent}"


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def decode_features(
    model: Any, features: torch.Tensor, feature_lens: torch.Tensor, config: DecodingConfig
) -> list[Hypothesis]:
    """Encode and search one batch: ``features [B, T, F]``, ``feature_lens [B]``, on the model's device."""
    enc, enc_lens = model.encode(features, feature_lens, *config.context)
    return SEARCHES[config.search](model, enc, enc_lens, config)


def decode_batch(model: Any, tokenizer: Tokenizer, batch: Batch, config: DecodingConfig) -> list[Decoded]:
    """Decode one batch that is on the model's device."""
    hypotheses = decode_features(model, batch.features, batch.feature_lens, config)
    rows = zip(batch.cut_ids, batch.texts, hypotheses, batch.durations_s, strict=True)
    return [
        Decoded(cut_id, text, tokenizer.decode(found.tokens), found, duration_s)
        for cut_id, text, found, duration_s in rows
    ]


def decode_cuts(
    model: Any,
    tokenizer: Tokenizer,
    cuts: CutSet,
    config: Experiment,
    device: str | torch.device = "cpu",
    ranks: Ranks | None = None,
) -> list[Decoded]:
    """Decode every cut once.

    Args:
        model: a transducer on ``device``; it decodes in evaluation mode and is left in the mode that it came in.
        tokenizer: of the model.
        cuts: with audio, or stored features if the configuration says so; the references may hold any characters.
        config: ``data.features`` and ``decoding`` are used.
        device: where the model is.
        ranks: of several processes each decodes its share; all call this.

    Returns:
        One entry per cut, sorted by cut id; of several processes on the first, and nothing on the others.
    """
    results: list[Decoded] = []
    ranks = ranks or Ranks()
    # whole batches side by side keep cores busier than one batch whose operations and search are spread over them
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    limit_s = config.decoding.batch_duration_s / threads
    # Without a tokenizer: the references are compared as text, so words that it cannot spell are no reason to fail.
    loader = eval_loader(cuts, None, config.data, max_duration_s=limit_s, rank=ranks.rank, size=ranks.size)
    with evaluation_mode(model):
        for found in map_in_threads(
            lambda batch: decode_batch(model, tokenizer, batch.to(device), config.decoding), loader, threads
        ):
            results += found
    return sorted(ranks.gather(results), key=lambda result: result.cut_id)


def decode_and_score(
    model: Any,
    tokenizer: Tokenizer,
    cuts: CutSet,
    config: Experiment,
    device: str | torch.device = "cpu",
    out_dir: Path | None = None,
    name: str = "test",
    ranks: Ranks | None = None,
    decode: Callable[..., list[Decoded]] = decode_cuts,
) -> DecodeReport:
    """Decode, score, and write the result files of ``asr.decoding.results`` into ``out_dir`` (None: write nothing).

    What errors are counted in is ``config.training.errors_in``.

    Of several processes all call this, and the first scores and writes: on the others the report is empty. ``decode``
    is called with the arguments of ``decode_cuts``.

    Raises:
        UserError: there are no cuts.
        OSError: a file cannot be written.
    """
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows before the work, not after
    start = time.perf_counter()
    results = decode(model, tokenizer, cuts, config, device, ranks)
    seconds = time.perf_counter() - start
    if ranks is not None and not ranks.first:
        return DecodeReport([], score([]), seconds)
    if not results:
        raise UserError(f"there are no utterances in the {name} set; nothing to decode")
    errors_in = config.training.errors_in
    if out_dir is None:
        return DecodeReport(results, score(results, errors_in=errors_in), seconds)
    write_decoded(out_dir, name, results)
    setting = setting_name(config.decoding)
    found = write_results(out_dir, name, setting, results, errors_in=errors_in, scoring=config.scoring)
    return DecodeReport(results, found, seconds)


def setting_name(config: DecodingConfig) -> str:
    """How a summary names a search: with the settings that it depends on."""
    if config.search == "greedy":
        return f"greedy-max-symbols-{config.max_symbols_per_frame}{context_name(config)}"
    return f"{config.search}-beam-{config.beam}{context_name(config)}"


def context_name(config: DecodingConfig) -> str:
    """What names of folders and settings add for a chunk: ``-chunk-320-left-5120``, in ms; nothing for full context."""
    return "" if config.chunk_ms == "full" else f"-chunk-{config.chunk_ms}-left-{config.left_context_ms}"


def read_cuts(path: Path) -> CutSet:
    """A cut manifest with references, whole in memory.

    Raises:
        UserError: the file is absent, is no cut manifest, holds no cuts, or there is no reference word in all of it.
    """
    if not path.is_file():
        raise UserError(f"cut manifest {path} does not exist")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        cuts = load_cuts(path)
    else:
        try:
            cuts = CutSet.from_cuts(_only_cuts(CutSet.from_file(path)))
        except Exception as error:  # lhotse, gzip and json each raise their own
            raise UserError(f"{path} is no readable cut manifest: {' '.join(str(error).split())[:200]}") from None
        if not len(cuts):
            raise UserError(f"cut manifest {path} holds no cuts")
    if not any(words_of(transcript(cut)) for cut in cuts):
        # scored all the same, a search that finds nothing would be reported as one without errors
        raise UserError(
            f"there are no reference words in {path}, so nothing can be scored; add supervisions with text, or use "
            f"`asr transcribe`"
        )
    return cuts


def _only_cuts(items: Iterable[Any]) -> Iterator[Cut]:
    for item in items:
        if not isinstance(item, Cut):
            raise ValueError(f"it holds {type(item).__name__} entries, not cuts")
        yield item
