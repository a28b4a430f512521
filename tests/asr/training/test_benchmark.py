"""The benchmark times the trainer's own step, and its parts are the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr.training.benchmark import PARTS, main, make_trainer, measure, profile, random_batch
from losses import LOSSES


def test_random_batch_is_what_the_loader_could_have_made() -> None:
    batch = random_batch(audio_s=20.0, utterance_s=2.0, tokens_per_s=30.0, vocab_size=11, num_bins=80)
    assert batch.size == 10
    assert batch.features.shape == (10, int(batch.feature_lens.max()), 80)
    assert sum(batch.durations_s) == pytest.approx(20.0)
    # one symbol a frame, even where more are asked for
    assert (batch.target_lens <= (batch.feature_lens - 3) // 4).all()
    for row in range(batch.size):
        inside = torch.arange(batch.targets.shape[1]) < batch.target_lens[row]
        assert (batch.targets[row][inside] > 0).all() and (batch.targets[row][~inside] == 0).all()
        assert not batch.features[row, batch.feature_lens[row] :].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_make_up_the_step(tmp_path: Path, precision: str) -> None:
    trainer = make_trainer("xs", precision, 20, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    timing = measure(trainer, random_batch(4.0, 1.0, 3.0, 20, 80), steps=1, warmup=1)
    assert set(timing.parts_s) == set(PARTS) and min(timing.parts_s.values()) > 0
    assert sum(timing.parts_s.values()) == pytest.approx(timing.step_s)
    assert 0 < timing.loss_share < 1
    assert trainer.progress.step == 2
    moved = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("encoder.blocks") for name in moved)


def test_profile_names_operators(tmp_path: Path) -> None:
    trainer = make_trainer("xs", "fp32", 20, tmp_path)
    assert "aten::addmm" in profile(trainer, random_batch(2.0, 1.0, 3.0, 20, 80), steps=1, rows=40)


@pytest.mark.parametrize("method", list(LOSSES))
def test_every_method_is_measured(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--preset xs --audio-s 2 --utterance-s 1 --vocab-size 20 --steps 1 --precision fp32 --method {method}"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert f"loss {method}" in shown and all(part in shown for part in PARTS)
    assert int(shown.split("peak memory of the process: ")[1].split(" MiB")[0]) > 100


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset xs --audio-s 2 --utterance-s 1 --vocab-size 20 --steps 1 --precision fp32"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert "audio s/s" in shown and all(part in shown for part in PARTS)
    assert main(["--steps", "0"]) == 2
