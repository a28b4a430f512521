"""From checkpoints to the model that decodes: every candidate is scored, validation alone decides."""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import asr.training.averaging as averaging
from asr import checkpoint
from asr.data.loader import eval_loader
from asr.errors import UserError
from asr.training.averaging import average
from asr.training.trainer import TrainData, train
from asr.training.trainer_config import AverageConfig
from asr.training.validation import Validation, validate
from tests.asr.training.runs import TOKENIZER, differences, experiment


@pytest.fixture(scope="module")
def trained(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(experiment("training.max_epochs=3", "training.keep_last=4", "training.ema_decay=0.8"), data, out)
    return out


@pytest.fixture
def train_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "train"))


def weights_of(train_dir: Path, count: int) -> dict[str, torch.Tensor]:
    paths = checkpoint.step_checkpoints(train_dir / "checkpoints")[-count:]
    states = [checkpoint.read(path)["model"] for path in paths]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}


def expected_weights(train_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    newest = checkpoint.read(checkpoint.step_checkpoints(train_dir / "checkpoints")[-1])
    return {
        "last-1": newest["model"],
        "last-3": weights_of(train_dir, 3),
        "ema": newest["training"]["ema"],
        "best": checkpoint.read(train_dir / "best.pt")["model"],
    }


def test_every_candidate_is_scored_with_its_own_weights(data: TrainData, train_dir: Path) -> None:
    path, candidates = average(train_dir, data.valid_cuts, say=lambda text: None)
    assert {c.name for c in candidates} == {"last-1", "last-3", "ema", "best"}
    assert [c.validation.rank for c in candidates] == sorted(c.validation.rank for c in candidates)
    expected = expected_weights(train_dir)
    for candidate in candidates:
        loaded = checkpoint.load(path)
        loaded.model.load_state_dict(expected[candidate.name])
        batches = eval_loader(data.valid_cuts, TOKENIZER, loaded.config.data)
        own = validate(loaded.model, batches, TOKENIZER, loaded.config, torch.device("cpu"))
        assert (own.errors, own.words) == (candidate.validation.errors, candidate.validation.words)
        assert own.loss == pytest.approx(candidate.validation.loss, rel=1e-5)
    assert len({c.validation.loss for c in candidates}) >= 3
    assert differences(checkpoint.read(path)["model"], expected[candidates[0].name]) == []


@pytest.mark.parametrize("wanted", ["last-1", "last-3", "ema", "best"])
def test_validation_alone_decides(
    data: TrainData, train_dir: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_weights(train_dir)[wanted]
    seen: list[list[str]] = []

    def scored(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Validation:
        seen.append([cut_id for batch in batches for cut_id in batch.cut_ids])
        right = differences(model.state_dict(), expected) == []
        return Validation(5.0 if right else 1.0, 3 if right else 4, 10)

    monkeypatch.setattr(averaging, "validate", scored)
    path, candidates = average(train_dir, data.valid_cuts, say=lambda text: None)
    # best may hold the same weights as the moving average
    assert wanted in [c.name for c in candidates if c.validation.errors == 3]
    assert differences(checkpoint.read(path)["model"], expected) == []
    assert [sorted(ids) for ids in seen] == [sorted(cut.id for cut in data.valid_cuts)] * 4


def test_the_file_is_for_decoding(data: TrainData, train_dir: Path) -> None:
    path, candidates = average(train_dir, data.valid_cuts, say=lambda text: None)
    assert path == train_dir / "average.pt"
    payload = torch.load(path, weights_only=True)
    assert "training" not in payload and payload["averaged"] == candidates[0].name
    newest = checkpoint.step_checkpoints(train_dir / "checkpoints")[-1]
    assert path.stat().st_size < 0.5 * newest.stat().st_size, "there is optimizer state in it"
    loaded = checkpoint.load(path)
    assert not loaded.model.training and loaded.tokenizer.symbols == TOKENIZER.symbols
    assert loaded.config == checkpoint.experiment_of(payload, "")


def test_only_what_is_asked_for(data: TrainData, train_dir: Path) -> None:
    said: list[str] = []
    config = AverageConfig(last=[2, 100, 200], ema=False, best=False)
    _, candidates = average(train_dir, data.valid_cuts, config, say=said.append)
    assert {c.name for c in candidates} == {"last-2", "last-4"}, "fewer checkpoints than asked for are taken once"
    assert any("chosen: " + candidates[0].name in line for line in said)
    with pytest.raises(UserError, match="average.last is empty"):
        average(train_dir, data.valid_cuts, AverageConfig(last=[], ema=False, best=False), say=said.append)


@pytest.mark.parametrize(("last", "count"), [([], 1), ([1], 1), ([1, 3], 3), ([2, 100], 4)])
def test_each_checkpoint_is_read_once_and_one_is_held(
    data: TrainData, train_dir: Path, monkeypatch: pytest.MonkeyPatch, last: list[int], count: int
) -> None:
    files = checkpoint.step_checkpoints(train_dir / "checkpoints")
    reads: list[Path] = []
    moments: list[weakref.ref[torch.Tensor]] = []
    real = checkpoint._read

    def read(path: Path) -> dict[str, Any]:
        reads.append(path)
        assert [ref for ref in moments if ref() is not None] == [], "the optimizer state of another one is held"
        payload = real(path)
        if "training" in payload:
            moments.append(weakref.ref(payload["training"]["optimizer"]["joiner.out.weight"]["exp_avg"]))
        return payload

    monkeypatch.setattr(checkpoint, "_read", read)
    average(train_dir, data.valid_cuts, AverageConfig(last=last), say=lambda text: None)
    assert reads == [*reversed(files[-count:]), train_dir / "best.pt"]
    assert len(moments) == count


def test_damaged_files_are_left_out_with_a_warning(data: TrainData, train_dir: Path) -> None:
    files = checkpoint.step_checkpoints(train_dir / "checkpoints")
    os.truncate(files[-1], 3000)
    os.truncate(train_dir / "best.pt", 3000)
    said: list[str] = []
    path, candidates = average(train_dir, data.valid_cuts, AverageConfig(last=[1]), say=said.append)
    assert {c.name for c in candidates} == {"last-1", "ema"}
    warnings = " ".join(line for line in said if line.startswith("warning:"))
    assert files[-1].name in warnings and "best.pt" in warnings
    assert checkpoint.read(path)["step"] == int(files[-2].stem.split("-")[1])


def test_nothing_to_average(data: TrainData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole checkpoint in .*checkpoints; run the train stage first"):
        average(tmp_path, data.valid_cuts)


def test_a_loss_that_is_not_finite_is_never_chosen(
    data: TrainData, train_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([Validation(float("nan"), 0, 10), Validation(9.0, 10, 10), Validation(float("inf"), 0, 10)])
    monkeypatch.setattr(averaging, "validate", lambda *args, **kwargs: next(scores))
    _, candidates = average(train_dir, data.valid_cuts, AverageConfig(last=[1, 2], best=False), say=lambda text: None)
    assert candidates[0].name == "last-2"


def test_validation_texts_that_cannot_be_spelt_are_left_out_as_in_training(data: TrainData, train_dir: Path) -> None:
    cuts = copy.deepcopy(list(data.valid_cuts))
    cuts[1].supervisions[0].text = "UNHEARD"
    said: list[str] = []
    _, candidates = average(train_dir, cuts, say=said.append)
    words = sum(len(cut.supervisions[0].text.split()) for number, cut in enumerate(cuts) if number != 1)
    assert {candidate.validation.words for candidate in candidates} == {words}
    assert "left out 1 of 3 validation cuts, the first: " in said[0] and "'UNHEARD'" in said[0]
    assert all("on 2 of 3 validation cuts" in line for line in said if " errors in " in line)
    for cut in cuts:
        cut.supervisions[0].text = "UNHEARD"
    with pytest.raises(UserError, match="no validation cut can be used"):
        average(train_dir, cuts, say=said.append)


def test_errors_may_be_counted_in_characters(data: TrainData, train_dir: Path) -> None:
    _, candidates = average(train_dir, data.valid_cuts, say=lambda text: None)
    loaded = checkpoint.load(train_dir / "average.pt")
    loaded.config.training.errors_in = "characters"
    batches = eval_loader(data.valid_cuts, TOKENIZER, loaded.config.data)
    found = validate(loaded.model, batches, TOKENIZER, loaded.config, torch.device("cpu"))
    texts = [cut.supervisions[0].text.replace(" ", "") for cut in data.valid_cuts]
    assert found.words == sum(map(len, texts)) > candidates[0].validation.words
