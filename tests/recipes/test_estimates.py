"""What `--dry-run` says of time and disk: hours times rates, measured where a stage has run, and a shortage named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import recipes.cli
from asr.data.manifests import save_cuts
from recipes.corpora.base import make_cut
from recipes.engine import Pipeline, Status
from recipes.estimates import Audio, Estimate, audio_of_stage, duration, estimates, guess_from_files, size, totals
from recipes.stages import Recipe, make_recipe
from tests.recipes.corpora.makers import write_16khz


def made(exp: Path, corpus: str = "librispeech", *words: str) -> tuple[Recipe, Pipeline]:
    args = recipes.cli.make_parser(corpus).parse_args(
        ["--exp-dir", str(exp), "--download-dir", str(exp / "down"), "--device", "cpu", *words]
    )
    return make_recipe(corpus, args, "command", recipes.cli.default_config(corpus))


def of_all(recipe: Recipe, pipeline: Pipeline) -> dict[str, Estimate]:
    return estimates(recipe, pipeline, {stage.name: Status(True, "forced") for stage in pipeline.stages})[0]


def write_cuts(exp: Path, hours: dict[str, float]) -> None:
    for split, count in hours.items():
        cut = make_cut(split, Path("a.wav"), round(3600 * 16000 * count), "A", "s")
        save_cuts([cut], exp / f"data/cuts_{split}.jsonl.gz")


def test_published_sizes_before_anything_is_there(tmp_path: Path) -> None:
    words = ["--subset", "100h", "--set", "data.features.storage=stored", "--set", "data.augment.speed_factors=[1.0]"]
    found = of_all(*made(tmp_path, "librispeech", *words, "--set", "training.max_epochs=2"))
    assert found["download"].disk["to download"] == pytest.approx(7.71e9, rel=0.01)
    assert found["prepare"].disk == {} and "a guess" in found["prepare"].source
    assert found["features"].disk["stored features"] == pytest.approx(121.8 * 3600 * 32000)
    assert found["train"].seconds == pytest.approx(2 * 100.6 * 3600 / 116, rel=0.05)
    assert "ARCHITECTURE.md" in found["train"].source
    speeds = of_all(*made(tmp_path, "librispeech", "--subset", "100h", "--set", "training.max_epochs=2"))
    assert speeds["train"].seconds == pytest.approx((1 / 0.9 + 1 + 1 / 1.1) * (found["train"].seconds or 0))
    (tmp_path / "down" / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    assert of_all(*made(tmp_path, "librispeech", "--subset", "100h"))["download"].disk["to download"] < 1.4e9


def test_counted_hours_and_measured_rates_go_first(tmp_path: Path) -> None:
    recipe, pipeline = made(tmp_path, "yesno", "--set", "training.max_steps=10", "--set", "data.max_duration_s=36")
    write_cuts(tmp_path, {"train": 1.0, "valid": 0.5, "test": 0.25})
    assert Audio(recipe, prepared=True).seconds == {"train": 3600, "valid": 1800, "test": 900}
    assert Audio(recipe, prepared=False).source == "expected of this corpus"
    plan = {stage.name: Status(stage.name in ("decode", "train"), "") for stage in pipeline.stages}
    (tmp_path / ".done").mkdir()
    done = {"audio_s": audio_of_stage("decode", recipe), "seconds": 90.0, "settings": {}}
    (tmp_path / ".done" / "decode.json").write_text(json.dumps(done))
    found, audio = estimates(recipe, pipeline, plan)
    assert found.keys() == {"decode", "train"} and audio == "audio: train 1.00 h, valid 0.50 h, test 0.25 h, counted"
    assert found["decode"].seconds == pytest.approx(90) and "measured" in found["decode"].source
    (tmp_path / ".done" / "decode.json").write_text(json.dumps(done | {"audio_s": 60.0}))
    assert "a guess" in estimates(recipe, pipeline, plan)[0]["decode"].source, "a minute tells little about more"
    guessed = found["train"]
    assert "a guess" in guessed.source and "0.1 h with all epochs" in guessed.source, "no more than max_steps batches"

    train = tmp_path / "train"
    train.mkdir()
    settings = "loss: {method: fused}\ntraining: {dual_mode: false}\n"
    (train / "config.yaml").write_text(settings)
    for model, expected in ((_parameters_of(recipe), "measured: 200 audio s/s"), (10**7, "a guess")):
        start: dict[str, Any] = {"kind": "start", "device": "cpu", "processes": 1, "parameters": model}
        records = [start, *({"kind": "train", "audio_s_per_s": rate} for rate in (100, 200, 300))]
        (train / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        now = estimates(recipe, pipeline, plan)[0]["train"]
        assert now.source.startswith(expected)


def _parameters_of(recipe: Recipe) -> int:
    from asr.models.transducer import build_model

    return sum(p.numel() for p in build_model(recipe.experiment, recipe.experiment.tokenizer.vocab_size).parameters())


def test_checkpoints_take_what_they_are_said_to(tmp_path: Path) -> None:
    recipe, pipeline = made(tmp_path, "yesno")
    weights = 4 * _parameters_of(recipe)
    assert sum(of_all(recipe, pipeline)["train"].disk.values()) == (5 * 4 + 1) * weights
    recipe, pipeline = made(tmp_path, "yesno", "--set", "training.ema_decay=0", "--set", "training.keep_last=2")
    assert sum(of_all(recipe, pipeline)["train"].disk.values()) == (2 * 3 + 1) * weights


def test_own_recordings_are_guessed_from_their_files(tmp_path: Path) -> None:
    write_16khz(tmp_path / "own" / "train" / "a.wav", 30.0)
    (tmp_path / "own" / "train" / "text").write_text("no audio" * 1000)
    assert guess_from_files(tmp_path / "own") == pytest.approx(30, rel=0.01)
    recipe, pipeline = made(tmp_path / "exp", "custom", "--corpus-dir", str(tmp_path / "own"))
    assert Audio(recipe, prepared=False).seconds["train"] == pytest.approx(27, rel=0.01)
    assert of_all(recipe, pipeline)["download"].seconds == 0
    unknown = of_all(*made(tmp_path / "exp", "custom"))
    assert unknown["train"].seconds is None and unknown["train"].line.startswith("time unknown")


class Usage(NamedTuple):
    free: float


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    left = [1e12]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(left[0]))
    yield left


def test_a_shortage_is_named(tmp_path: Path, free: list[float]) -> None:
    one = Estimate(7200.0, "", {"to download": 6e9, "unpacked": 6e9}, tmp_path / "down")
    two = Estimate(None, "", {"audio": 3e9}, tmp_path / "exp")
    lines = totals([one, two])
    assert lines[0] == "all of it: about 2 h, and what is unknown of 1 stages" and len(lines) == 2
    free[0] = 10e9
    assert totals([one, two])[-1] == (
        "warning: 5.0 GB too little; free some, or choose another --download-dir or --exp-dir"
    )
    assert totals([two])[-1].endswith("3.0 GB needed, 10.0 GB free")


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["synth", "--exp-dir", str(tmp_path / "exp"), "--download-dir", str(tmp_path / "down"), "--dry-run"]
    assert recipes.cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("stage ") for line in lines) == 11 and any("audio: train 2." in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_words_for_time_and_size() -> None:
    assert [duration(s) for s in (0.2, 59, 90, 3600, 3720, 90000, 86400)] == [
        "1 s", "59 s", "2 min", "1 h", "1 h 2 min", "1 d 1 h", "1 d",
    ]  # fmt: skip
    assert [size(n) for n in (4e4, 1.23e6, 2e9, 3.4e11, 5e12)] == ["40.0 kB", "1.2 MB", "2.0 GB", "340 GB", "5.0 TB"]
