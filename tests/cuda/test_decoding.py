"""Decoding on CUDA finds what decoding on CPU finds, whole and as the audio comes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from asr.bench.streaming.model import model_of, noise
from asr.data.fbank import Fbank, pad_tail
from asr.decoding.decode import decode_features
from asr.decoding.streaming import StreamingRecognizer


@pytest.mark.parametrize("chunk_ms", ["320", "full"])
def test_tokens_are_those_of_the_cpu(chunk_ms: str) -> None:
    samples = [noise(seconds, seed) for seed, seconds in enumerate((3.0, 7.3, 0.4, 5.1))]
    model, tokenizer, config = model_of("s", [f"decoding.chunk_ms={chunk_ms}"], samples)
    there = copy.deepcopy(model).cuda()
    fbank = Fbank(config.data.features)
    features = [torch.from_numpy(fbank.extract(pad_tail(one, config.data.features))) for one in samples]
    lens = torch.tensor([len(one) for one in features])
    batch = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    here = decode_features(model, batch, lens, config.decoding)
    found = decode_features(there, batch.cuda(), lens.cuda(), config.decoding)
    assert sum(len(one.tokens) for one in here) > 20
    assert [(one.tokens, one.frames) for one in found] == [(one.tokens, one.frames) for one in here]
    if chunk_ms == "full":
        return
    listening = StreamingRecognizer(there, tokenizer, config, "cuda", endpoints=False)
    streams = [listening.open() for _ in samples]
    for stream, sound in zip(streams, samples, strict=True):
        for piece in np.array_split(sound, 5):
            stream.accept(piece)
            listening.advance(streams)
        stream.finish()
    while not all(stream.ended for stream in streams):
        listening.advance(streams)
    heard = [[t for segment in stream.segments for t in segment.hypothesis.tokens] for stream in streams]
    assert heard == [one.tokens for one in here]
