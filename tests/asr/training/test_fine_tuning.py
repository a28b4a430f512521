"""Training that begins with the weights of another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asr import checkpoint
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from asr.training.trainer import TrainData, train
from tests.asr.data.speech import WORDS
from tests.asr.training.runs import TOKENIZER, experiment, make_trainer, read_data, records, run


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainData:
    return read_data(folder)


@pytest.mark.parametrize("frozen", ["encoder.subsampling", "encoder.blocks.0", "encoder"])
def test_frozen_parts_have_a_memory_plan(frozen: str, data: TrainData, tmp_path: Path) -> None:
    for number, memory in enumerate(["memory={checkpointing: budget, activation_budget: 0.9}", "memory.limit=4GiB"]):
        out = tmp_path / str(number)
        result = run(data, out, f"training.freeze=[{frozen}]", memory, "training.max_steps=2")
        assert result.reason == "finished"
        assert [record["loss"] > 0 for record in records(out, "train")] == [True, True]


@pytest.fixture(scope="module")
def first(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    run(data, out)
    return out / "best.pt"


def test_the_first_step_begins_with_the_weights(first: Path, data: TrainData, tmp_path: Path) -> None:
    begun = make_trainer(experiment(f"training.init_from={first}", "seed=7"), data, tmp_path)
    weights = checkpoint.read(first)["model"]
    state = begun.model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)
    assert begun.progress.step == 0


def test_tokens_of_another_tokenizer_keep_their_rows(
    first: Path, data: TrainData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS[1:], "NEVER"]  # one is gone and one is new; in another order, since symbols are sorted
    tokenizer = Tokenizer.train([" ".join(words)], TokenizerConfig("word"))
    own = replace(data, tokenizer=tokenizer)
    settings = f"training.init_from={first}", "seed=7"
    fresh = make_trainer(experiment("seed=7"), own, tmp_path / "fresh").model.state_dict()
    begun = make_trainer(experiment(*settings), own, tmp_path / "begun").model.state_dict()
    weights = checkpoint.read(first)["model"]
    rows = {symbol: row for row, symbol in enumerate(TOKENIZER.symbols)}
    for name in ("joiner.out.weight", "joiner.out.bias", "predictor.embedding.weight"):
        for row, symbol in enumerate(tokenizer.symbols):
            want = weights[name][rows[symbol]] if symbol in rows else fresh[name][row]
            assert torch.equal(begun[name][row], want), (name, symbol)
    said = capsys.readouterr().out
    assert f"{len(WORDS)} of {tokenizer.vocab_size} tokens are known by their symbols" in said


def test_a_resumed_run_needs_no_checkpoint_to_begin_with(first: Path, data: TrainData, tmp_path: Path) -> None:
    copied = tmp_path / "begin.pt"
    copied.write_bytes(first.read_bytes())
    settings = f"training.init_from={copied}", "training.max_epochs=1"
    run(data, tmp_path / "out", *settings)
    copied.unlink()
    assert run(data, tmp_path / "out", settings[0]).reason == "finished"
    with pytest.raises(UserError, match=r"begin\.pt"):
        run(data, tmp_path / "new", *settings)


def test_new_parts_are_named_and_other_sizes_refused(
    first: Path, data: TrainData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(experiment(f"training.init_from={first}", "model.ctc=true"), data, tmp_path / "a")
    assert "new in this model: ctc_head" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"joiner.* is \(16, 16\) there and \(24, 16\) in the configured model"):
        make_trainer(experiment(f"training.init_from={first}", "model.joiner.dim=24"), data, tmp_path / "b")


def test_frozen_parts_stay_as_they_are(first: Path, data: TrainData, tmp_path: Path) -> None:
    frozen = "encoder.subsampling", "predictor"
    config = experiment(
        f"training.init_from={first}", f"training.freeze=[{', '.join(frozen)}]", "training.max_epochs=1"
    )
    train(config, data, tmp_path, command="asr train")
    before, after = (
        checkpoint.read(first)["model"],
        checkpoint.read(checkpoint.step_checkpoints(tmp_path / "checkpoints")[-1]),
    )
    same = {name for name, value in after["model"].items() if torch.equal(value, before[name])}
    assert {name for name in before if name.startswith(frozen)} <= same
    assert "joiner.out.weight" not in same and "encoder.blocks.0.ff1.up.weight" not in same
    assert not [name for name in after["training"]["optimizer"] if name.startswith(frozen)]
    with pytest.raises(UserError, match=r"'encoder.subsamplin', .*; did you mean encoder.subsampling"):
        make_trainer(experiment("training.freeze=[encoder.subsamplin]"), data, tmp_path)
    with pytest.raises(UserError, match=r"training.freeze has 'decoder', .* its parts: encoder, predictor, joiner"):
        make_trainer(experiment("training.freeze=[decoder]"), data, tmp_path)
    with pytest.raises(UserError, match="leaves nothing to train"):
        make_trainer(experiment("training.freeze=[encoder, predictor, joiner]"), data, tmp_path)
