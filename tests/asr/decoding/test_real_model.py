"""The searches, decoding and both commands with the toolkit's own transducer, from a checkpoint file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import soundfile
import torch

from asr import checkpoint
from asr.cli.main import main
from asr.config import load_experiment
from asr.decoding import DecodingConfig, greedy, modified_beam_search
from asr.decoding.load import load_for_decoding
from asr.errors import UserError
from asr.models.transducer import Transducer
from tests.asr.decoding.corpus import bursts, tokenizer, write_cuts
from tests.asr.decoding.test_greedy import frame_by_frame

SETTINGS = ["model.preset=xs", "data.features.storage=on_the_fly", "data.num_workers=0"]


def make_model(predictor: str = "stateless", blank_bias: float = 0.0) -> Transducer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        experiment = load_experiment(None, [*SETTINGS, f"model.predictor.kind={predictor}"])
        mean, scale = torch.full((80,), -8.0), torch.full((80,), 0.3)
        model = Transducer(experiment.model, tokenizer().vocab_size, mean, scale)
    with torch.no_grad():
        model.joiner.out.weight *= 8  # untrained logits hardly differ from each other
        model.joiner.out.bias[0] += blank_bias
    return model.eval()


@pytest.fixture(scope="module")
def experiment_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EXP with a checkpoint, five recordings and their manifest."""
    folder = tmp_path_factory.mktemp("exp")
    experiment = load_experiment(None, SETTINGS)
    payload = checkpoint.make_payload(make_model().state_dict(), experiment, tokenizer(), step=7, epoch=1)
    checkpoint.atomic_save(payload, folder / "train" / "average.pt")
    (folder / "audio").mkdir()
    write_cuts(folder / "audio", ["ab c", "b", "", "a a a", "cab"]).to_file(folder / "cuts_test.jsonl.gz")
    return folder


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_greedy_equals_the_frame_by_frame_loop(predictor):
    model = make_model(predictor, blank_bias=0.5).double()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 203, 80, generator=generator, dtype=torch.float64) * 3 - 8
    lens = torch.tensor([203, 90, 7, 131])
    features[1, 90:] = torch.nan
    with torch.no_grad():
        enc, enc_lens = model.encode(features.nan_to_num(), lens)
        found = greedy(model, enc, enc_lens, DecodingConfig(max_symbols_per_frame=2))
        expected = [frame_by_frame(model, enc[b], int(enc_lens[b]), 2) for b in range(4)]
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.frames for one in found] == [one.frames for one in expected]
    assert sum(len(one.tokens) for one in found) > 5
    # what greedy follows is one path of what the other search sums
    single = greedy(model, enc, enc_lens, DecodingConfig())
    summed = modified_beam_search(model, enc, enc_lens, DecodingConfig(beam=8))
    for one, other in zip(single, summed, strict=True):
        if one.tokens == other.tokens:
            assert other.score >= one.score - 1e-6


@pytest.mark.parametrize("search", ["greedy", "modified_beam_search"])
def test_decode_command(experiment_dir, capsys, search):
    cuts, model = experiment_dir / "cuts_test.jsonl.gz", experiment_dir / "train" / "average.pt"
    options = ["--search", search, "--device", "cpu", "--set", "decoding.beam=3", "--emissions", "2"]
    assert main(["decode", "--checkpoint", str(model), "--cuts", str(cuts), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("%WER ") and lines[-1].endswith(" sub ]")
    out_dir = experiment_dir / "decode" / search
    described = json.loads((out_dir / "score-test.json").read_text())
    assert described["line"] == lines[-1]
    assert described["utterances"] == 5
    assert {path.name for path in out_dir.glob("emissions-*")} == {
        "emissions-test.json",
        "emissions-test-1.png",
        "emissions-test-2.png",
    }


def test_transcribe_command(experiment_dir, tmp_path, capsys):
    model = ["--checkpoint", str(experiment_dir / "train" / "average.pt"), "--device", "cpu"]
    good = tmp_path / "a.flac"
    soundfile.write(good, bursts(20_000, seed=3).reshape(-1, 2), 8_000)
    assert main(["transcribe", *model, str(good)]) == 0
    found = capsys.readouterr()
    assert found.out.startswith(f"{good}: ") and found.out.count("\n") == 1
    assert found.err == ""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"nothing")
    assert main(["transcribe", *model, str(broken), str(good)]) == 3
    again = capsys.readouterr()
    assert again.out == found.out
    assert again.err.startswith(f"error: {broken}: ") and again.err.count("\n") == 1
    assert main(["transcribe", *model, str(broken), str(tmp_path / "absent.wav")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "decoding.bean=3"], "decoding.beam"),
        (["--set", "decoding.beam=0"], "decoding.beam=0"),
        (["--set", "decoding.beam=many"], "beam"),
        (["--set", "model.encoder.dim=3"], "only decoding.*, scoring.*, data.*"),
        (["--search", "greddy"], "greddy"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--cuts", "absent.jsonl.gz"], "absent.jsonl.gz does not exist"),
        (["--checkpoint", "absent.pt"], "absent.pt does not exist"),
    ],
)
def test_wrong_options_are_one_line(experiment_dir, capsys, options, message):
    words = {
        "--checkpoint": str(experiment_dir / "train" / "average.pt"),
        "--cuts": str(experiment_dir / "cuts_test.jsonl.gz"),
        "--device": "cpu",
    }
    words |= dict([options])
    assert main(["decode", *(word for pair in words.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_settings_of_this_run_win(experiment_dir):
    path = experiment_dir / "train" / "average.pt"
    plain = load_for_decoding(path)
    assert plain.config == checkpoint.load(path).config
    changed = load_for_decoding(path, "cpu", "modified_beam_search", ["decoding.beam=7", "data.num_workers=1"])
    assert changed.config.decoding == dataclasses.replace(plain.config.decoding, search="modified_beam_search", beam=7)
    assert changed.config.data.num_workers == 1
    assert changed.config.model == plain.config.model
    with pytest.raises(UserError, match="unknown search"):
        load_for_decoding(path, search="viterbi")
