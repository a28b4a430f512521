"""A model of a preset for measurements of decoding: random weights that emit as many tokens as speech has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from asr.config import Experiment, load_experiment
from asr.data.fbank import Fbank, pad_tail
from asr.data.tokenizer import BLANK, SPACE, Tokenizer
from asr.decoding.decode import decode_features
from asr.models.transducer import Transducer, build_model

VOCAB_SIZE = 500
TOKENS_PER_S = 3.0


def model_of(
    preset: str, settings: Sequence[str], samples: Sequence[np.ndarray]
) -> tuple[Transducer, Tokenizer, Experiment]:
    """The model, a tokenizer of 500 words, and the configuration with ``settings``.

    The bias of blank is set by bisection so that greedy search finds three tokens a second in ``samples``, float32 [N]
    in [-1, 1] at 16 kHz: the time of a search depends on how much it finds.
    """
    torch.manual_seed(0)
    experiment = load_experiment(None, [f"model.preset={preset}", "data.features.storage=on_the_fly", *settings])
    tokenizer = Tokenizer("word", [BLANK, *(f"{SPACE}word{i}" for i in range(1, VOCAB_SIZE))])
    fbank = Fbank(experiment.data.features)
    features = [torch.from_numpy(fbank.extract(pad_tail(one, experiment.data.features))) for one in samples]
    rows = torch.cat(features)
    model = build_model(experiment, VOCAB_SIZE, rows.mean(0), 1 / rows.std(0).clamp(min=1e-3)).eval()
    wanted = TOKENS_PER_S * sum(one.size for one in samples) / 16000
    with torch.no_grad():
        model.joiner.out.weight *= 8  # untrained logits hardly differ from each other
        low, high = -20.0, 20.0
        for _ in range(12):
            model.joiner.out.bias[0] = (low + high) / 2
            found = sum(
                len(decode_features(model, one[None], torch.tensor([len(one)]), experiment.decoding)[0].tokens)
                for one in features
            )
            low, high = (low, (low + high) / 2) if found < wanted else ((low + high) / 2, high)
    return model, tokenizer, experiment


def noise(seconds: float, seed: int) -> np.ndarray:
    """Bursts of noise at the pace of syllables, float32 [N] at 16 kHz, where no recordings are given."""
    generator = np.random.default_rng(seed)
    size = int(seconds * 16000)
    loud = np.repeat(generator.random(size // 3200 + 1) < 0.6, 3200)[:size]
    return (generator.standard_normal(size) * np.where(loud, 0.1, 0.001)).clip(-1, 1).astype(np.float32)
