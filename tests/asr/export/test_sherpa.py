"""What users of sherpa-onnx do beside greedy search works on exported files: beams, hotwords, endpoints, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr import checkpoint
from asr.checkpoint import Loaded
from asr.config import load_experiment
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.decoding.load import load_for_decoding
from asr.errors import UserError
from asr.export.export import export
from asr.export.spec import Spec
from asr.models.transducer import Transducer
from tests.asr.decoding.corpus import bursts
from tests.asr.decoding.test_real_model import SETTINGS

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason="pip install 'transducer-asr[export]'")
sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="pip install 'transducer-asr[export]'")

SOUND = np.concatenate([bursts(32000, seed=3), np.zeros(16000, np.float32)])


@pytest.fixture(scope="module")
def streaming(loaded: Loaded, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    export(loaded, trained, "sherpa-onnx", folder, Spec(320, 640))
    return folder


@pytest.fixture(scope="module")
def whole(loaded: Loaded, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    export(loaded, trained, "sherpa-onnx", folder, Spec("full", 640))
    return folder


def files(folder: Path) -> dict[str, str]:
    parts = {part: str(folder / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    return {**parts, "tokens": str(folder / "tokens.txt")}


def online(folder: Path, method: str = "modified_beam_search", **options: Any) -> Any:
    return sherpa_onnx.OnlineRecognizer.from_transducer(**files(folder), decoding_method=method, **options)


def offline(folder: Path, method: str, **options: Any) -> Any:
    return sherpa_onnx.OfflineRecognizer.from_transducer(**files(folder), decoding_method=method, **options)


def hear(recognizer: Any, sound: np.ndarray = SOUND, **options: Any) -> tuple[list[str], list[float]]:
    stream = recognizer.create_stream(**options)
    stream.accept_waveform(16000, sound)
    stream.input_finished()
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return recognizer.tokens(stream), recognizer.timestamps(stream)


def test_modified_beam_search(streaming: Path) -> None:
    """One path is greedy search; more of them find something else, at the same pace."""
    greedy = hear(online(streaming, "greedy_search"))
    assert len(greedy[0]) > 5
    assert hear(online(streaming, max_active_paths=1)) == greedy
    several = hear(online(streaming, max_active_paths=4))
    assert several != greedy and len(several[0]) > 5
    assert np.all(np.diff(several[1]) >= 0) and several[1][-1] < len(SOUND) / 16000


def test_modified_beam_search_of_whole_utterances(whole: Path) -> None:
    found = []
    for method, paths in (("greedy_search", 4), ("modified_beam_search", 1), ("modified_beam_search", 4)):
        recognizer = offline(whole, method, max_active_paths=paths)
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, SOUND)
        recognizer.decode_stream(stream)
        found.append(stream.result.tokens)
    assert found[0] == found[1] and len(found[2]) > 5


def test_hotwords(streaming: Path) -> None:
    """A sequence that is asked for comes far more often, in the stream that asks for it only."""
    recognizer = online(streaming, max_active_paths=4, modeling_unit="cjkchar", hotwords_score=6.0)

    def count(tokens: list[str]) -> int:
        return "".join(tokens).count("ba")

    plain = hear(recognizer)[0]
    boosted = hear(recognizer, hotwords="b a")[0]
    assert count(boosted) > count(plain) + 5
    assert hear(recognizer)[0] == plain


def test_hotwords_of_sentencepiece_tokens(tmp_path: Path) -> None:
    """Written as words: sherpa-onnx divides them into tokens by bpe.vocab."""
    tokenizer = Tokenizer.train(["hello world", "held low", "old wool"] * 20, TokenizerConfig("bpe", 30))
    experiment = load_experiment(None, SETTINGS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Transducer(
            experiment.model, tokenizer.vocab_size, torch.full((80,), -8.0), torch.full((80,), 0.3)
        ).eval()
    with torch.no_grad():
        model.joiner.out.weight *= 8
    payload = checkpoint.make_payload(model.state_dict(), experiment, tokenizer, step=1, epoch=1)
    checkpoint.atomic_save(payload, tmp_path / "average.pt")
    folder = tmp_path / "out"
    loaded = load_for_decoding(tmp_path / "average.pt", "cpu")
    export(loaded, tmp_path / "average.pt", "sherpa-onnx", folder, Spec(320, 640))
    recognizer = online(
        folder, max_active_paths=40, modeling_unit="bpe", bpe_vocab=str(folder / "bpe.vocab"), hotwords_score=40.0
    )
    wanted = [tokenizer.symbols[token].replace("\u2581", " ") for token in tokenizer.encode("held world")]
    assert len(wanted) > 1
    boosted, plain = ("".join(hear(recognizer, **options)[0]) for options in ({"hotwords": "held world"}, {}))
    assert boosted.count("".join(wanted)) > plain.count("".join(wanted))


@pytest.mark.parametrize("chunk", [320, "full"])
def test_bytes_become_characters(tmp_path: Path, chunk: Any) -> None:
    """Of byte-level BPE, sherpa-onnx gives the text, with U+FFFD where bytes are no character."""
    tokenizer = Tokenizer.train(["你好 世界", "好 HELLO"] * 20, TokenizerConfig("byte_bpe", 265))
    experiment = load_experiment(None, SETTINGS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Transducer(
            experiment.model, tokenizer.vocab_size, torch.full((80,), -8.0), torch.full((80,), 0.3)
        ).eval()
    whole = next(token for token in range(tokenizer.vocab_size) if tokenizer.shown(token) == "好")
    with torch.no_grad():
        model.joiner.out.weight *= 8
        model.joiner.out.bias[0] -= 50.0
        model.joiner.out.bias[whole] += 6.0
    payload = checkpoint.make_payload(model.state_dict(), experiment, tokenizer, step=1, epoch=1)
    checkpoint.atomic_save(payload, tmp_path / "average.pt")
    folder = tmp_path / "out"
    loaded = load_for_decoding(tmp_path / "average.pt", "cpu")
    for target in ("onnx", "torch.export", "executorch"):
        with pytest.raises(UserError, match=f"{target} cannot hold tokenizer.kind=byte_bpe: .*; export to sherpa-onnx"):
            export(loaded, tmp_path / "average.pt", target, folder, Spec(320, 640))
    export(loaded, tmp_path / "average.pt", "sherpa-onnx", folder, Spec(chunk, 640))
    if chunk == "full":
        recognizer = offline(folder, "greedy_search")
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, SOUND)
        recognizer.decode_stream(stream)
        symbols, text = stream.result.tokens, stream.result.text
    else:
        recognizer = online(folder, "greedy_search")
        symbols = hear(recognizer)[0]
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, SOUND)
        stream.input_finished()
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
        text = recognizer.get_result(stream)
    tokens = [tokenizer.symbols.index(symbol.replace(" ", "\u2581")) for symbol in symbols]
    expected = tokenizer.decode(tokens)
    assert "好" in expected and "\ufffd" not in expected and "\ufffd" in text
    assert " ".join(text.replace("\ufffd", "").split()) == expected


def test_endpoints(streaming: Path) -> None:
    """An endpoint by length; after the reset the text is new and time goes on."""
    recognizer = online(
        streaming, "greedy_search", enable_endpoint_detection=True, rule1_min_trailing_silence=100.0,
        rule2_min_trailing_silence=100.0, rule3_min_utterance_length=1.0,
    )  # fmt: skip
    stream = recognizer.create_stream()
    texts, starts = [], []
    for piece in np.array_split(SOUND, 30):
        stream.accept_waveform(16000, piece)
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
        if recognizer.is_endpoint(stream):
            texts.append(recognizer.get_result(stream))
            starts.append(recognizer.start_time(stream))
            recognizer.reset(stream)
            assert recognizer.get_result(stream) == ""
    assert len(texts) == 2 and all(texts) and starts[0] == 0.0 < starts[1]


@pytest.mark.parametrize("method", ["greedy_search", "modified_beam_search"])
def test_batches(streaming: Path, whole: Path, method: str) -> None:
    """Several at once give what each gives alone."""
    sounds = [bursts(size, seed=size) for size in (9000, 24000, 40000, 16000)]
    recognizer = online(streaming, method)
    alone = [hear(recognizer, sound) for sound in sounds]
    streams = [recognizer.create_stream() for _ in sounds]
    for stream, sound in zip(streams, sounds, strict=True):
        stream.accept_waveform(16000, sound)
        stream.input_finished()
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
    assert [(recognizer.tokens(one), recognizer.timestamps(one)) for one in streams] == alone

    recognizer = offline(whole, method)
    results = []
    for groups in ([[sound] for sound in sounds], [sounds]):
        found = []
        for group in groups:
            streams = [recognizer.create_stream() for _ in group]
            for stream, sound in zip(streams, group, strict=True):
                stream.accept_waveform(16000, sound)
            recognizer.decode_streams(streams)
            found += [stream.result.tokens for stream in streams]
        results.append(found)
    assert results[0] == results[1] and all(results[0])
