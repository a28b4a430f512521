"""The streamed result is that of the whole utterance under the mask of the same chunks, however its samples arrive."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.config import Experiment, load_experiment
from asr.data.fbank import Fbank, pad_tail
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.decoding import Hypothesis, greedy
from asr.decoding.decode import decode_features
from asr.decoding.streaming import Stream, StreamingRecognizer
from asr.decoding.words import Word, pause_between, timed_words
from asr.errors import UserError
from tests.asr.decoding.corpus import bursts, tokenizer
from tests.asr.decoding.test_real_model import SETTINGS, make_model

RATE_HZ = 16000


@cache
def model() -> torch.nn.Module:
    return make_model(blank_bias=1.0)


def experiment(chunk_ms: object = 320, left_context_ms: object = 640, *more: str) -> Experiment:
    overrides = [f"decoding.chunk_ms={chunk_ms}", f"decoding.left_context_ms={left_context_ms}", *more]
    return load_experiment(None, [*SETTINGS, *overrides])


def recognizer(config: Experiment, endpoints: bool = False) -> StreamingRecognizer:
    return StreamingRecognizer(model(), tokenizer(), config, endpoints=endpoints)


def whole(samples: np.ndarray, config: Experiment) -> Hypothesis:
    fbank = Fbank(config.data.features)
    features = torch.from_numpy(fbank.extract(pad_tail(samples, config.data.features)))
    return decode_features(model(), features[None], torch.tensor([len(features)]), config.decoding)[0]


def only(stream: Stream) -> Hypothesis:
    """Of a stream without endpoints, which may have no text at all."""
    assert stream.ended and len(stream.segments) <= 1 and not stream.partial.hypothesis.tokens
    return stream.segments[0].hypothesis if stream.segments else Hypothesis([], [], 0.0)


def assert_same(found: Hypothesis, expected: Hypothesis) -> None:
    assert found.tokens == expected.tokens and found.frames == expected.frames
    assert found.confidences == pytest.approx(expected.confidences, abs=1e-4)
    if expected.tokens:
        assert found.score == pytest.approx(expected.score, abs=1e-3)


@given(
    chunk_ms=st.sampled_from([40, 120, 160, 320, 640, 1280]),
    left_context_ms=st.sampled_from([0, 200, 1280, 5120]),
    lengths=st.lists(st.integers(0, 40000), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=15, deadline=None)
def test_pieces_of_any_size_in_any_company(
    chunk_ms: int, left_context_ms: int, lengths: list[int], data: st.DataObject
) -> None:
    config = experiment(chunk_ms, left_context_ms)
    sounds = [bursts(length, seed=i) for i, length in enumerate(lengths)]
    listening = recognizer(config)
    streams: list[Stream] = []
    heard = [0] * len(sounds)
    while len(streams) < len(sounds) or not all(stream.ended for stream in streams):
        if len(streams) < len(sounds) and (not streams or data.draw(st.booleans())):
            streams.append(listening.open())
        for i, stream in enumerate(streams):
            if not stream.finished:
                piece = data.draw(st.one_of(st.integers(0, 400), st.integers(400, 20000)))
                stream.accept(sounds[i][heard[i] : heard[i] + piece])
                heard[i] += piece
                if heard[i] >= len(sounds[i]):
                    stream.finish()
        listening.advance(streams)
    for sound, stream in zip(sounds, streams, strict=True):
        assert_same(only(stream), whole(sound, config))


def test_one_sample_at_a_time() -> None:
    config, sound = experiment(160), bursts(9000, seed=3)
    listening = recognizer(config)
    stream = listening.open()
    seen: list[list[int]] = []
    for i in range(len(sound)):
        stream.accept(sound[i : i + 1])
        if listening.advance([stream]):
            seen.append(stream.partial.hypothesis.tokens)
    stream.finish()
    while not stream.ended:
        listening.advance([stream])
    expected = whole(sound, config)
    assert_same(only(stream), expected)
    # what was said stays, and it was said as early as its chunk was there
    assert all(expected.tokens[: len(tokens)] == tokens for tokens in seen)
    for number, tokens in enumerate(seen):
        assert len(tokens) == sum(frame < 4 * (number + 1) for frame in expected.frames)
    assert seen[-1]


@pytest.mark.parametrize("num_samples", [0, 1, 159, 2000])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_next_to_nothing_and_silence(num_samples: int, level: float) -> None:
    config = experiment()
    listening = recognizer(config, endpoints=True)
    stream = listening.open()
    sound = bursts(num_samples, seed=1) * np.float32(level)
    stream.accept(sound)
    stream.finish()
    while not stream.ended:
        listening.advance([stream])
    assert [x for part in stream.segments for x in part.hypothesis.tokens] == whole(sound, config).tokens


def test_streams_are_opened_again_and_again() -> None:
    """A place that a stream has left remembers nothing of it."""
    config = experiment()
    listening = recognizer(config)
    sounds = [bursts(8000 + 977 * i, seed=i) for i in range(7)]
    for i, sound in enumerate(sounds):
        dropped, stream = listening.open(), listening.open()
        dropped.accept(sounds[-i])
        listening.advance([dropped])
        listening.close(dropped)
        assert dropped.ended and dropped.finished
        stream.accept(sound)
        stream.finish()
        while not stream.ended:
            listening.advance([stream, dropped])
        assert_same(only(stream), whole(sound, config))


def test_a_finished_stream_takes_no_more() -> None:
    stream = recognizer(experiment()).open()
    stream.finish()
    stream.finish()
    with pytest.raises(ValueError, match="finished; open another"):
        stream.accept(np.zeros(3, dtype=np.float32))


def test_what_cannot_stream_is_refused() -> None:
    with pytest.raises(UserError, match="decoding.chunk_ms=full cannot stream; set milliseconds"):
        recognizer(experiment("full"))
    with pytest.raises(UserError, match="decoding.left_context_ms=full cannot stream"):
        recognizer(experiment(320, "full"))
    with pytest.raises(UserError, match="decoding.search=modified_beam_search cannot stream; use greedy"):
        recognizer(experiment(320, 640, "decoding.search=modified_beam_search"))


class Endpoints:
    """A stream whose emissions are given: frames with a token; what the rules make of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, emitting: set[int], seconds: float, *settings: str):
        import asr.decoding.streaming as module
        from asr.decoding.greedy import Emissions

        state = {"frame": 0, "resets": 0}

        def advance(model, search, enc, lens, config):  # type: ignore[no-untyped-def]
            frames = [t for t in range(int(lens[0])) if state["frame"] + t in emitting]
            state["frame"] += int(lens[0])
            zeros = torch.zeros(len(frames), dtype=torch.int64)
            found = Emissions(
                zeros, zeros + 1, torch.tensor(frames, dtype=torch.int64), torch.full((len(frames),), 0.5)
            )
            return search, found, torch.tensor([-1.0])

        monkeypatch.setattr(module, "advance_greedy", advance)
        listening = recognizer(experiment(160, 640, *settings), endpoints=True)
        stream = listening.open()
        self.segments = []
        for _ in range(round(seconds / 0.16)):
            stream.accept(np.zeros(2560, dtype=np.float32))
            listening.advance([stream])
            self.segments += [(part, stream.frames) for part in stream.take()]
        self.open = stream.partial
        stream.finish()
        while not stream.ended:
            listening.advance([stream])
        self.last = stream.segments


def test_silence_after_text_ends_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Endpoints(monkeypatch, {5, 7, 60}, 6.0)
    (first, _), (second, _) = found.segments
    assert first.hypothesis.frames == [5, 7] and first.text == "aa" and first.final
    # 1.2 s of silence after frame 7 are over with frame 38: the chunk that ends at frame 40
    assert (first.start_s, first.end_s) == (0.0, pytest.approx(40 * 0.04))
    assert first.words == [Word("aa", pytest.approx(0.2), pytest.approx(0.32), 0.25)]
    assert second.start_s == first.end_s and second.hypothesis.frames == [60]
    assert second.end_s == pytest.approx(92 * 0.04)
    assert not found.open.hypothesis.tokens and found.last == []


def test_silence_without_text_moves_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Endpoints(monkeypatch, {65}, 2.9)
    assert found.segments == [] and not found.open.final
    assert found.open.hypothesis.frames == [65] and found.open.start_s == pytest.approx(60 * 0.04)
    assert [part.hypothesis.frames for part in found.last] == [[65]]


def test_a_segment_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    emitting = set(range(0, 500, 3)) - {63, 66, 69, 72}
    found = Endpoints(monkeypatch, emitting, 9.0, "decoding.endpoint.max_segment_s=4")
    parts = [part for part, _ in found.segments]
    # at 4 s it is cut in the pause of frames 61 to 74; then in the last of many equal ones before frame 168 + 100
    assert (parts[0].start_s, parts[0].end_s) == (0.0, pytest.approx(68 * 0.04))
    assert parts[0].hypothesis.frames == list(range(0, 61, 3))
    assert parts[1].start_s == parts[0].end_s and 4.0 < parts[1].end_s <= 6.8
    frames = [frame for part in [*parts, *found.last] for frame in part.hypothesis.frames]
    assert frames == sorted(emitting & set(range(frames[-1] + 1))), "no token is lost or said twice"


@pytest.mark.parametrize(
    ("spelt", "frames", "end", "cut"),
    [
        # the widest gap is within a word, and one between words is before the second half
        (["▁a", "▁b", "▁c", "d", "▁e"], [10, 40, 55, 80, 92], 100, 87),
        (["▁", "a", "▁", "b"], [0, 60, 62, 90], 100, 77),  # a space of its own belongs to neither
        (["a", "b", "c"], [10, 55, 90], 100, 73),  # writing without spaces
        (["▁a", "▁b"], [10, 60], 100, 81),  # what follows the last word is a gap as well
        (["▁a"], [10], 100, 56),
        (["▁a", "▁b"], [10, 10], 20, 16),  # two tokens of one frame
        ([], [], 100, 100),
    ],
)
def test_a_long_stretch_is_cut_between_words(spelt: list[str], frames: list[int], end: int, cut: int) -> None:
    symbols = ["<blk>", *dict.fromkeys(spelt)]
    assert pause_between(symbols, [symbols.index(one) for one in spelt], frames, 0, end) == cut
    assert pause_between(symbols, [symbols.index(one) for one in spelt], [f + 7 for f in frames], 7, end + 7) == cut + 7


@pytest.mark.parametrize("rule", ["silence_after_text_s=0.2", "max_segment_s=0.96"])
def test_neither_encoder_nor_predictor_forgets_at_an_endpoint_after_text(rule: str) -> None:
    """As in device runtimes, and as where a segment is too long, in the midst of speech."""
    config = experiment(320, 640, f"decoding.endpoint.{rule}")
    sound = bursts(40000, seed=5)
    network = make_model(blank_bias=3.0)  # with pauses
    listening = StreamingRecognizer(network, tokenizer(), config)
    stream = listening.open()
    stream.accept(sound)
    stream.finish()
    while not stream.ended:
        listening.advance([stream])
    fbank = Fbank(config.data.features)
    features = torch.from_numpy(fbank.extract(pad_tail(sound, config.data.features)))
    with torch.inference_mode():
        enc, _ = network.encode(features[None], torch.tensor([len(features)]), *config.decoding.context)
        (found,) = greedy(network, enc, torch.tensor([enc.shape[1]]), config.decoding)
    expected = list(zip(found.tokens, found.frames, strict=True))
    said = [
        pair for part in stream.segments for pair in zip(part.hypothesis.tokens, part.hypothesis.frames, strict=True)
    ]
    assert said == expected and len(stream.segments) > 1


def test_the_predictor_forgets_at_an_endpoint_without_text() -> None:
    config = experiment(320, 640, "decoding.endpoint.silence_s=0.64")
    listening = StreamingRecognizer(make_model(blank_bias=100.0), tokenizer(), config)
    stream = listening.open()
    context = listening._states[1].predictor[0]
    with torch.inference_mode():
        context[stream._slot] = 1
    forgot = []
    for piece in np.split(bursts(16000, seed=5), 10):
        stream.accept(piece)
        listening.advance([stream])
        now = listening._states[1].predictor[0][stream._slot]
        forgot.append(torch.equal(now, listening._fresh.predictor[0][0]))
    assert not forgot[0] and forgot[-1] and not stream.segments


def test_words_and_their_times() -> None:
    symbols = ["<blk>", "<unk>", "▁he", "llo", "▁", "a", "▁b▁c"]
    tokens, frames, sure = [2, 3, 1, 4, 5, 6], [3, 5, 6, 10, 12, 20], [0.5, 0.5, 0.1, 0.9, 0.8, 0.7]
    spelt = Tokenizer("char", symbols).characters(tokens)
    assert timed_words(spelt, frames, sure) == [
        Word("hello", pytest.approx(0.12), pytest.approx(0.24), 0.25),
        Word("a", pytest.approx(0.48), pytest.approx(0.52), 0.8),
        Word("b", pytest.approx(0.8), pytest.approx(0.84), 0.7),
        Word("c", pytest.approx(0.8), pytest.approx(0.84), 0.7),
    ]
    assert timed_words([], [], []) == []


def test_words_of_bytes_and_their_times() -> None:
    texts = Tokenizer.train(["你好 世界"], TokenizerConfig("byte_bpe", 258))
    tokens = texts.encode("a你 \U0001f600")  # a space, a, three bytes; a space, four bytes
    assert len(tokens) == 10
    frames, sure = list(range(10, 20)), [0.5] * 10
    expected = [
        Word("a你", pytest.approx(0.44), pytest.approx(0.6), 0.5**4),
        Word("\U0001f600", pytest.approx(0.64), pytest.approx(0.8), 0.5**4),
    ]
    assert timed_words(texts.characters(tokens), frames, sure) == expected
    # of a character without its end nothing is said, and its time is not the word's
    assert timed_words(texts.characters(tokens[:4]), frames[:4], sure[:4]) == [
        Word("a", pytest.approx(0.44), pytest.approx(0.48), 0.5)
    ]
    assert timed_words(texts.characters(tokens[:-1]), frames, sure) == expected[:1]


def test_nothing_is_cut_within_a_character() -> None:
    texts = Tokenizer.train(["你好"], TokenizerConfig("byte_bpe", 258))
    tokens = texts.encode("你好")[1:]  # three bytes each
    frames, end = [10, 11, 12, 50, 60, 80], 82
    assert pause_between(texts.symbols, tokens, frames, 0, end) == 71
    assert pause_between(texts.symbols, tokens, frames, 0, end, texts.inside) == 82
    frames = [10, 11, 60, 70, 71, 80]
    assert pause_between(texts.symbols, tokens, frames, 0, end, texts.inside) == 66
