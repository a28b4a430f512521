"""Loss and word errors on held-out cuts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from kaldialign import edit_distance

from asr.data.batch import Batch
from asr.data.tokenizer import Tokenizer
from asr.decoding import SEARCHES
from asr.decoding.decode import evaluation_mode
from asr.decoding.score import units_of
from asr.models.transducer import LossConfig, Transducer
from asr.training.ranks import Ranks

if TYPE_CHECKING:  # asr.config imports asr.training
    from asr.config import Experiment


@dataclass
class Validation:
    """loss: transducer loss per token (nats); errors, words: of greedy or the configured search, with
    ``training.errors_in`` characters counted as words; utterances: how many that is on."""

    loss: float
    errors: int
    words: int
    utterances: int = 0

    @property
    def wer(self) -> float:
        """Errors per reference word, as a fraction."""
        return self.errors / self.words if self.words else math.nan

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: word errors first, the loss between equals. A non-finite loss is worst of all."""
        return (self.errors, self.loss) if math.isfinite(self.loss) else (math.inf, math.inf)


@torch.inference_mode()
def validate(
    model: Transducer,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    experiment: Experiment,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Validation:
    """One pass over ``batches``; the model's mode is restored afterwards.

    Of several processes each has its share of the batches, and all get the result over all.
    """
    total, tokens, errors, words, utterances = 0.0, 0, 0, 0, 0
    decoding = experiment.decoding
    search = SEARCHES[decoding.search]
    split = partial(units_of, errors_in=experiment.training.errors_in)
    options = LossConfig(topology=experiment.loss.topology)
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            enc, enc_lens = model.encode(batch.features, batch.feature_lens, *decoding.context)
            total += float(model.transducer_loss(enc, enc_lens, batch.targets, batch.target_lens, options).loss)
            tokens += int(batch.target_lens.sum())
            utterances += len(batch.texts)
            for text, hypothesis in zip(batch.texts, search(model, enc, enc_lens, decoding), strict=True):
                reference = split(text)
                errors += edit_distance(reference, split(tokenizer.decode(hypothesis.tokens)))["total"]
                words += len(reference)
    total, *counts = (ranks or Ranks()).sum([total, tokens, errors, words, utterances])
    tokens, errors, words, utterances = map(round, counts)
    return Validation(total / max(tokens, 1), errors, words, utterances)
