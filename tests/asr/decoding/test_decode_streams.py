"""Decoding in streams gives what decoding under the mask of the same chunks gives, whoever is heard together."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from asr import checkpoint
from asr.cli.main import main
from asr.config import Experiment, load_experiment
from asr.data.fbank import Fbank
from asr.data.features import compute_cut_features
from asr.decoding.decode import decode_features
from asr.decoding.decode_streams import decode_in_streams
from asr.decoding.streaming import StreamingRecognizer
from asr.errors import UserError
from tests.asr.decoding.corpus import tokenizer, write_cuts
from tests.asr.decoding.test_real_model import SETTINGS, make_model

TEXTS = ["ab c", "b", "", "a a a", "cab", "c c", "abc"]


@cache
def model() -> torch.nn.Module:
    return make_model(blank_bias=0.5)


def experiment(*more: str, chunk_ms: object = 320) -> Experiment:
    overrides = [f"decoding.chunk_ms={chunk_ms}", "decoding.left_context_ms=320", *more]
    return load_experiment(None, [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    return write_cuts(tmp_path_factory.mktemp("audio"), TEXTS)


@pytest.mark.parametrize(("streams", "chunk_ms"), [(1, 160), (3, 160), (3, 320), (20, 40), (4, 280), (2, 1280)])
def test_equals_the_chunk_mask(cuts: CutSet, streams: int, chunk_ms: int) -> None:
    config = experiment(chunk_ms=chunk_ms)
    found = decode_in_streams(model(), tokenizer(), cuts, config, streams=streams)
    assert [one.cut_id for one in found] == [f"utt-{i}" for i in range(len(TEXTS))]
    assert [one.ref for one in found] == TEXTS
    fbank = Fbank(config.data.features)
    unmasked = 0
    for one, cut in zip(found, cuts, strict=True):
        features = torch.from_numpy(compute_cut_features(cut, fbank))[None]
        lens = torch.tensor([features.shape[1]])
        expected = decode_features(model(), features, lens, config.decoding)[0]
        assert one.hypothesis.tokens == expected.tokens and one.hypothesis.frames == expected.frames
        assert one.hyp == tokenizer().decode(expected.tokens) and one.duration_s == cut.duration
        full = decode_features(model(), features, lens, experiment(chunk_ms="full").decoding)[0]
        unmasked += (full.tokens, full.frames) != (expected.tokens, expected.frames)
    assert sum(len(one.hypothesis.tokens) for one in found) > 20
    if chunk_ms < 320:
        assert unmasked  # or the equality above would not show that there are chunks


def test_a_new_utterance_takes_the_place_of_one_that_ended(cuts: CutSet, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    advance = StreamingRecognizer.advance
    monkeypatch.setattr(StreamingRecognizer, "advance", lambda self, s: heard.append(len(s)) or advance(self, s))
    decode_in_streams(model(), tokenizer(), cuts, experiment(chunk_ms=160), streams=3)
    assert max(heard) == 3
    assert heard == sorted(heard, reverse=True)  # no place is empty until there is nothing left to say


def test_what_cannot_be_heard(cuts: CutSet, tmp_path: Path) -> None:
    for streams, setting, message in [
        (0, "decoding.chunk_ms=320", "at least 1"),
        (1, "decoding.chunk_ms=full", "decoding.chunk_ms=full cannot stream"),
        (1, "decoding.search=modified_beam_search", "cannot stream; use greedy"),
    ]:
        with pytest.raises(UserError, match=message):
            decode_in_streams(model(), tokenizer(), cuts, experiment(setting), streams=streams)
    broken = write_cuts(tmp_path, TEXTS[:3])
    (tmp_path / "utt-1.wav").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cut utt-1"):
        decode_in_streams(model(), tokenizer(), broken, experiment(), streams=2)


def test_the_command(cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = checkpoint.make_payload(
        model().state_dict(), load_experiment(None, SETTINGS), tokenizer(), step=1, epoch=1
    )
    checkpoint.atomic_save(payload, tmp_path / "train" / "average.pt")
    cuts.to_file(tmp_path / "cuts_test.jsonl.gz")
    words = ["decode", "--checkpoint", f"{tmp_path}/train/average.pt", "--cuts", f"{tmp_path}/cuts_test.jsonl.gz"]
    words += ["--device", "cpu", "--set", "decoding.chunk_ms=320"]
    assert main([*words, "--streams", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("greedy-chunk-320-left-5120, 2 streams: 7 utterances")
    out = tmp_path / "decode" / "greedy-chunk-320-left-5120"
    streamed = {path.name: path.read_text() for path in out.iterdir()}
    assert json.loads(streamed["score-test.json"])["setting"] == "greedy-max-symbols-1-chunk-320-left-5120"
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    assert {path.name: path.read_text() for path in out.iterdir()} == streamed
    assert main([*words[:-1], "decoding.chunk_ms=full", "--streams", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: decoding.chunk_ms=full cannot stream") and error.count("\n") == 1
