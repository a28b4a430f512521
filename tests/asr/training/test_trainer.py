"""The training loop on a few short utterances: steps, limits, metrics, bad batches, what is kept."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import CutSet

from asr import checkpoint
from asr.checkpoint import step_checkpoints
from asr.config import load_experiment
from asr.data.batch import Batch, collate
from asr.data.loader import eval_loader, train_loader
from asr.errors import UserError
from asr.training.averaging import average
from asr.training.faults import BadBatches, Termination, TooManyBadBatches
from asr.training.metrics import MetricsWriter
from asr.training.trainer import TrainData, Trainer, train
from asr.training.validation import validate
from losses import LOSSES
from tests.asr.training.runs import (
    DURATIONS_S,
    NO_DROPOUT,
    TOKENIZER,
    differences,
    experiment,
    make_trainer,
    newest,
    read_data,
    records,
    run,
    spoil,
    write_data,
)


def allow(trainer: Trainer, count: int = 0) -> BadBatches:
    return BadBatches(trainer.out_dir / "bad_batches", count, 0, lambda **fields: None, trainer.line.say)


# -- steps ------------------------------------------------------------------------------------------------------------


def merge(first: Batch, second: Batch) -> Batch:
    rows = [(b, i) for b in (first, second) for i in range(b.size)]
    return collate(
        [b.features[i, : b.feature_lens[i]].numpy() for b, i in rows],
        [b.targets[i, : b.target_lens[i]].tolist() for b, i in rows],
        *(sum((getattr(b, name) for b in (first, second)), []) for name in ("cut_ids", "texts", "durations_s")),
    )


@pytest.mark.parametrize("normalize", ["tokens", "utterances"])
def test_accumulation_equals_one_batch_of_twice_the_size(data: TrainData, tmp_path: Path, normalize: str) -> None:
    # a large eps, so that Adam's first step is smooth in gradients that are zero but for rounding
    settings = [
        *NO_DROPOUT,
        f"training.normalize={normalize}",
        "optim.eps=0.01",
        "optim.warmup_steps=0",
        "optim.lr=0.1",
    ]
    config = experiment(*settings, "model.ctc=true", "loss.ctc_weight=0.5")
    loader = train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0)
    _, first, *_, second = sorted(loader, key=lambda batch: batch.features.shape[1])
    assert first.features.shape[1] < second.features.shape[1] and first.targets.shape != second.targets.shape
    results = []
    for batches in ([first, second], [merge(first, second)]):
        trainer = make_trainer(config, data, tmp_path)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        record = trainer.step(batches, allow(trainer))
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        results.append((record, gradients, trainer.model.state_dict(), trainer.ema.weights))
        assert (trainer.progress.step, trainer.progress.batch) == (1, len(batches))
    (record, *trees), (other, *others) = results
    assert record == pytest.approx(other)
    assert record["grad_norm"] > 0.1
    for left, right in zip(trees, others, strict=True):
        for name, value in left.items():
            torch.testing.assert_close(value, right[name], rtol=1e-6, atol=1e-6, msg=name)
    assert max((trees[1][name] - value).abs().max() for name, value in before.items()) > 0.01


def test_dual_mode_takes_the_mean_of_both_passes(data: TrainData, tmp_path: Path) -> None:
    settings = [*NO_DROPOUT, "optim.clip_grad_norm=0", "training.left_context_ms=[80]", "model.encoder.num_layers=2"]
    chunks = {"full": ["chunk_ms=[full]"], "chunked": ["chunk_ms=[80]"]}
    chunks["dual"] = ["chunk_ms=[full,80]", "dual_mode=true"]
    losses, gradients = {}, {}
    for name, of_training in chunks.items():
        config = experiment(*settings, *(f"training.{setting}" for setting in of_training))
        batch = next(iter(train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0)))
        trainer = make_trainer(config, data, tmp_path)
        losses[name] = trainer.step([batch], allow(trainer))["loss"]
        assert (trainer.progress.step, trainer.progress.batch) == (1, 1)
        gradients[name] = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert losses["full"] != pytest.approx(losses["chunked"], rel=1e-4)
    assert losses["dual"] == pytest.approx((losses["full"] + losses["chunked"]) / 2, rel=1e-6)
    for name, value in gradients["dual"].items():
        mean = (gradients["full"][name] + gradients["chunked"][name]) / 2
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6, msg=name)


def test_chunks_are_drawn_from_a_fraction_of_the_run_on(data: TrainData, tmp_path: Path) -> None:
    config = experiment("training.chunk_ms=[80]", "training.left_context_ms=[80]", "training.chunks_from=0.5")
    trainer = make_trainer(config, data, tmp_path)
    heard = []
    for step in range(4):
        trainer.progress.consumed_s = step / 4 * trainer.stepper.total_s
        heard.append(trainer.stepper._contexts())
    assert heard == [[(0, -1)]] * 2 + [[(2, 2)]] * 2


def test_dual_mode_needs_a_chunk() -> None:
    with pytest.raises(UserError, match="needs a chunk besides full in training.chunk_ms"):
        experiment("training.dual_mode=true", "training.chunk_ms=[full]")


def test_the_gradient_is_clipped_and_its_norm_is_that_before(data: TrainData, tmp_path: Path) -> None:
    config = experiment("optim.clip_grad_norm=0.01")
    trainer = make_trainer(config, data, tmp_path)
    batch = next(iter(train_loader(data.train_cuts, TOKENIZER, config.data, seed=0, epoch=0)))
    record = trainer.step([batch], allow(trainer))
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.model.parameters()))
    assert norm == pytest.approx(0.01, rel=1e-3) and record["grad_norm"] > 0.1


def test_the_loss_falls(finished: Path, data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.max_epochs=60", "optim.lr=0.005", *NO_DROPOUT)
    losses = [r["loss"] for r in records(tmp_path, "train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_bf16_runs_on_this_cpu(data: TrainData, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        run(data, out, f"training.precision={precision}", "training.max_steps=2", *NO_DROPOUT)
        assert records(out, "start")[0]["precision"] == precision
        assert {v.dtype for v in newest(out)["model"].values()} == {torch.float32}
        losses[precision] = [r["loss"] for r in records(out, "train")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


# -- length and learning rate -----------------------------------------------------------------------------------------


def test_max_steps_ends_the_run_within_an_epoch(data: TrainData, tmp_path: Path) -> None:
    result = run(data, tmp_path, "training.max_steps=3", "optim.final_lr_ratio=0.1", "optim.lr=0.001")
    assert (result.reason, result.step) == ("finished", 3)
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3]
    assert [r["step"] for r in records(tmp_path, "valid")] == [3]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000003.pt" and result.checkpoint.is_file()
    cosine = 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 3)) / 2)
    assert records(tmp_path, "train")[-1]["lr"] == pytest.approx(cosine)


def test_the_limit_that_comes_first_decides_the_learning_rate(finished: Path, data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.max_steps=100000")
    assert [r["lr"] for r in records(tmp_path, "train")] == [r["lr"] for r in records(finished, "train")]


def test_stored_features_use_all_audio_once_an_epoch(finished: Path) -> None:
    progress = newest(finished)["training"]["progress"]
    assert progress["consumed_s"] == pytest.approx(2 * sum(DURATIONS_S))
    assert (progress["epoch"], progress["batch"]) == (2, 0)


def test_on_the_fly_reaches_the_end_of_its_learning_rate(data: TrainData, tmp_path: Path) -> None:
    cuts = CutSet.from_cuts(cut.drop_features() for cut in data.train_cuts)
    augment = "data.augment={speed_factors: [0.8, 1.0, 1.25], copies: 2, volume_db: 3, noise_prob: 0.5}"
    joined = ["data.augment.concat_prob=0.5", "data.augment.pad_front_ms=[50, 100]"]
    config = experiment("data.features.storage=on_the_fly", augment, *joined, "training.ema_decay=0")
    trainer = make_trainer(config, TrainData(cuts, data.valid_cuts, TOKENIZER), tmp_path)
    trainer.run(Termination())
    assert trainer.progress.consumed_s == pytest.approx(trainer.stepper.total_s, rel=1e-4)
    epochs_s = 2 * 2 * (1 / 0.8 + 1 + 1 / 1.25) * sum(DURATIONS_S)
    assert trainer.stepper.total_s == pytest.approx(epochs_s)
    last = records(tmp_path, "train")[-1]
    before_last = 1 - last["batch_seconds"] / epochs_s
    ratio = 0.02 + 0.98 * (1 + math.cos(math.pi * before_last)) / 2
    assert last["lr"] == pytest.approx(2e-3 * ratio, rel=1e-2)


# -- metrics ----------------------------------------------------------------------------------------------------------

NUMBER = (int, float)
SCHEMA: dict[str, dict[str, Any]] = {
    "start": {"command": str, "parameters": int, "device": str, "torch": str, "precision": str, "processes": int,
              "threads": int, "python": str, "machine": str, "train_cuts": int, "seed": int},
    "train": {"step": int, "epoch": int, "batch": int, "time_s": float, "loss": float, "transducer_loss": float,
              "simple_loss": type(None), "ctc_loss": type(None), "lr": float, "grad_norm": float,
              "batch_seconds": float, "batch_size": int, "audio_s_per_s": float, "data_wait_fraction": float},
    "valid": {"step": int, "epoch": int, "time_s": float, "loss": float, "wer": float, "errors": int, "words": int},
    "end": {"step": int, "reason": str, "time_s": float},
}  # fmt: skip


def test_metrics_have_the_promised_form(finished: Path) -> None:
    lines = records(finished)
    assert [line["kind"] for line in lines[:2]] == ["start", "train"] and lines[-1]["kind"] == "end"
    for line in lines:
        expected = SCHEMA[line.pop("kind")]
        assert line.keys() == expected.keys()
        assert {name: type(value) for name, value in line.items()} == expected
    trained = records(finished, "train")
    assert [r["step"] for r in trained] == list(range(1, len(trained) + 1))
    for epoch in (0, 1):
        own = [r for r in trained if r["epoch"] == epoch]
        assert [r["batch"] for r in own] == list(range(1, len(own) + 1))
        assert sum(r["batch_size"] for r in own) == len(DURATIONS_S)
        assert sum(r["batch_seconds"] for r in own) == pytest.approx(sum(DURATIONS_S))
    assert [r["epoch"] for r in records(finished, "valid")] == [1, 2]
    assert all(0 <= r["data_wait_fraction"] <= 1 for r in trained)
    times = [r["time_s"] for r in trained]
    assert times == sorted(times) and times[0] > 0
    assert records(finished, "end") == [
        {"kind": "end", "step": len(trained), "reason": "finished", "time_s": times[-1]}
    ]
    assert (finished / "report.html").is_file()
    assert load_experiment(finished / "config.yaml") == experiment()


def test_ctc_and_the_interval_of_metrics(data: TrainData, tmp_path: Path) -> None:
    run(
        data,
        tmp_path,
        "model.ctc=true",
        "loss.ctc_weight=0.3",
        "training.log_every_steps=3",
        "training.tensorboard=true",
    )
    trained = records(tmp_path, "train")
    assert [r["step"] for r in trained] == [s for s in range(1, trained[-1]["step"] + 1) if s % 3 == 0]
    for r in trained:
        assert r["loss"] == pytest.approx(r["transducer_loss"] + 0.3 * r["ctc_loss"], rel=1e-5) and r["ctc_loss"] > 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("method", list(LOSSES))
def test_one_setting_chooses_the_loss(method: str, data: TrainData, tmp_path: Path) -> None:
    settings = [f"loss.method={method}", "loss.simple_warmup=0.5", "loss.prune_range=2", "training.max_steps=4"]
    assert run(data, tmp_path, *settings).reason == "finished"
    trained = records(tmp_path, "train")
    for r in trained:
        if method == "pruned":
            warm = min(1.0, (r["step"] - 1) / 4 / 0.5)
            expected = (1 - 0.5 * warm) * r["simple_loss"] + (0.1 + 0.9 * warm) * r["transducer_loss"]
            assert r["loss"] == pytest.approx(expected, rel=1e-5) and r["simple_loss"] > 0
        else:
            assert r["simple_loss"] is None and r["loss"] == r["transducer_loss"]
    payload = newest(tmp_path)
    simple = {"joiner.simple.am.weight", "joiner.simple.am.bias", "joiner.simple.lm.weight", "joiner.simple.lm.bias"}
    for weights in (payload["model"], payload["training"]["ema"]):
        assert {n for n in weights if "simple" in n} == (simple if method == "pruned" else set())
    path, _ = average(tmp_path, data.valid_cuts, say=lambda text: None)
    loaded = checkpoint.load(path)
    assert loaded.config.loss.method == method
    assert {n for n in loaded.model.state_dict() if "simple" in n} == (simple if method == "pruned" else set())


def test_validation_takes_the_exact_loss_of_the_same_topology(data: TrainData, tmp_path: Path) -> None:
    losses = {}
    weights = make_trainer(experiment(), data, tmp_path).model.state_dict()
    for method in ("fused", "pruned"):
        config = experiment(f"loss.method={method}", "loss.prune_range=2", "loss.topology=regular")
        trainer = make_trainer(config, data, tmp_path / method)
        trainer.model.load_state_dict(weights, strict=False)
        loader = eval_loader(data.valid_cuts, TOKENIZER, config.data)
        losses[method] = validate(trainer.model, loader, TOKENIZER, config, trainer.device).loss
    assert losses["pruned"] == losses["fused"]


def test_tensorboard_shows_each_step_of_a_killed_run_once(data: TrainData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.MonkeyPatch.context() as monkeypatch:
        real = MetricsWriter.write

        def write(self: MetricsWriter, kind: str, **values: Any) -> None:
            real(self, kind, **values)
            if kind == "train" and values["step"] == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(MetricsWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "training.tensorboard=true")
    assert step_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000004.pt"
    run(data, tmp_path, "training.tensorboard=true")
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3, 4, 5, *range(5, 13)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in board.Scalars("valid/loss")] == [6, 12]


def test_a_line_that_was_cut_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    for step in (1, 2):
        writer = MetricsWriter(tmp_path, False)
        writer.write("end", step=step)
        writer.close()
    ends = [f'{{"kind": "end", "step": {step}}}' for step in (1, 2)]
    assert path.read_text().splitlines() == ['{"kind": "train", "st', *ends]


# -- batches that break a step ----------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> TrainData:
    """Cuts of which train004 has features that are no numbers."""
    copy = tmp_path / "spoiled"
    copy.mkdir()
    write_data(copy)
    data = read_data(copy)
    spoil(data.train_cuts, "train004")
    return data


CLEAN = "data.spec_augment.prob=0"  # masks could hide the bad values


def test_a_bad_batch_is_skipped_and_named(spoiled: TrainData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(spoiled, out, CLEAN, "training.max_bad_batches=2").reason == "finished"
    bad = records(out, "bad_batch")
    assert len(bad) == 2
    by_step = {r["step"]: r for r in records(out, "train")}
    for record in bad:
        assert "train004" in record["cut_ids"] and "nan" in record["reason"]
        assert by_step[record["step"]]["loss"] is None
        dump = torch.load(record["dump"], weights_only=True)
        assert dump["cut_ids"] == record["cut_ids"] and dump["step"] == record["step"]
        rows = dump["features"].isnan().any(-1).any(-1)
        assert [cut_id for cut_id, row in zip(dump["cut_ids"], rows, strict=True) if row] == ["train004"]
    finite = [r for r in by_step.values() if r["loss"] is not None]
    assert len(finite) == len(by_step) - 2
    payload = newest(out)
    for weights in (payload["model"], payload["training"]["ema"]):
        assert all(bool(v.isfinite().all()) for v in weights.values())
    assert payload["training"]["progress"]["bad_batches"] == 2


def test_too_many_bad_batches_stop_the_run(spoiled: TrainData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyBadBatches) as caught:
        run(spoiled, out, CLEAN, "training.max_bad_batches=1")
    message = str(caught.value)
    for part in ("2 batches", "training.max_bad_batches=1", str(out / "bad_batches"), "--resume auto"):
        assert part in message
    assert records(out, "end")[-1]["reason"] == "failed"
    assert "train004" in (out / "report.html").read_text(encoding="utf-8")
    assert len(list((out / "bad_batches").glob("*.pt"))) == 2
    assert step_checkpoints(out / "checkpoints"), "the checkpoints before are kept"
    # what was counted before the newest checkpoint still counts
    with pytest.raises(TooManyBadBatches, match="2 batches"):
        run(spoiled, out, CLEAN, "training.max_bad_batches=1")


@pytest.mark.parametrize("normalize", ["tokens", "utterances"])
def test_in_an_accumulated_step_only_the_bad_batch_is_left_out(
    spoiled: TrainData, tmp_path: Path, normalize: str
) -> None:
    config = experiment(*NO_DROPOUT, f"training.normalize={normalize}", "optim.clip_grad_norm=0")
    batches = list(train_loader(spoiled.train_cuts, TOKENIZER, config.data, seed=0, epoch=0))
    bad = next(b for b in batches if "train004" in b.cut_ids)
    good = next(b for b in batches if b is not bad)
    trainer, alone = (make_trainer(config, spoiled, tmp_path / name) for name in ("both", "alone"))
    record = trainer.step([bad, good], allow(trainer, 1))
    expected = alone.step([good], allow(alone))
    assert record["loss"] == expected["loss"] and record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for parameter, other in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert trainer.progress.bad_batches == 1 and (trainer.progress.step, trainer.progress.batch) == (1, 2)


def test_a_gradient_that_is_not_finite_changes_nothing(data: TrainData, tmp_path: Path) -> None:
    trainer = make_trainer(experiment("training.accumulation=2"), data, tmp_path)
    step = trainer.progress
    trainer.model.joiner.out.bias.register_hook(lambda g: g * math.inf if step.step == 1 else g)
    batches = list(train_loader(data.train_cuts, TOKENIZER, trainer.experiment.data, seed=0, epoch=0))
    bad = allow(trainer, 2)
    trainer.step(batches[:2], bad)

    def state() -> Any:
        moments = trainer.parallel.optimizer.state_dict()["state"]
        return {"model": trainer.model.state_dict(), "ema": trainer.ema.weights, "moments": moments}

    before = {name: torch.load(_saved(value, tmp_path), weights_only=True) for name, value in state().items()}
    record = trainer.step(batches[2:4], bad)
    assert not math.isfinite(record["grad_norm"]) and math.isfinite(record["loss"])
    assert bad.count == 2 and differences(before, state()) == []
    dumps = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "bad_batches").glob("*.pt"))]
    assert [d["cut_ids"] for d in dumps] == [b.cut_ids for b in batches[2:4]]
    assert all("gradient" in d["reason"] for d in dumps)
    record = trainer.step(batches[:2], bad)
    assert math.isfinite(record["grad_norm"]) and differences(before, state()) != []


def _saved(value: Any, folder: Path) -> Path:
    path = folder / "value.pt"
    torch.save(value, path)
    return path


def test_a_batch_is_counted_once_when_loss_and_gradient_are_bad(spoiled: TrainData, tmp_path: Path) -> None:
    config = experiment(*NO_DROPOUT)
    batches = list(train_loader(spoiled.train_cuts, TOKENIZER, config.data, seed=0, epoch=0))
    bad = next(b for b in batches if "train004" in b.cut_ids)
    good = next(b for b in batches if b is not bad)
    trainer = make_trainer(config, spoiled, tmp_path)
    trainer.model.joiner.out.bias.register_hook(lambda g: g * math.nan)
    counter = allow(trainer, 2)
    trainer.step([bad, good], counter)
    assert counter.count == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_while_loading_ends_the_run_in_order(folder: Path, tmp_path: Path, workers: int) -> None:
    data = read_data(folder)
    for cut in data.train_cuts:
        cut.features.storage_path = str(tmp_path / "gone")
    with pytest.raises(UserError, match="gone.*run the features stage"):
        run(data, tmp_path, f"data.num_workers={workers}")
    assert records(tmp_path, "end")[-1]["reason"] == "failed"
    assert (tmp_path / "report.html").is_file()


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(data: TrainData, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000001.pt.partial").write_bytes(b"killed while writing")
    run(data, tmp_path, "training.keep_last=2", "training.checkpoint_every_steps=3")
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000009.pt", "step-00000012.pt"]


def test_best_is_the_average_of_the_best_validation(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.max_epochs=6", "training.keep_last=100", "training.ema_decay=0.5", "optim.lr=0.02")
    ranks = {r["step"]: (r["errors"], r["loss"]) for r in records(tmp_path, "valid")}
    best = checkpoint.read(tmp_path / "best.pt")
    assert best["step"] == min(ranks, key=ranks.__getitem__) and "training" not in best
    step = torch.load(tmp_path / "checkpoints" / f"step-{best['step']:08d}.pt", weights_only=True)
    assert differences(best["model"], step["training"]["ema"]) == []
    assert differences(best["model"], step["model"]) != []
    loaded = checkpoint.load(tmp_path / "best.pt")
    assert differences(loaded.model.state_dict(), best["model"]) == [] and loaded.config == load_experiment(
        tmp_path / "config.yaml"
    )


def test_without_an_average_the_weights_themselves_are_judged(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.max_epochs=1", "training.ema_decay=0")
    assert differences(checkpoint.read(tmp_path / "best.pt")["model"], newest(tmp_path)["model"]) == []


def test_how_many_validation_utterances_there_were_is_said_where_some_are_missing(
    data: TrainData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(data.valid_cuts)
    for given, says in ((count + 37, f"] on {count} of {count + 37} utterances"), (count, "]"), (0, "]")):
        run(replace(data, num_valid=given), tmp_path / str(given), "training.max_steps=1")
        said = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
        assert said and all(line.endswith(says) for line in said)


def test_validation_every_second_epoch_and_at_the_end(data: TrainData, tmp_path: Path) -> None:
    run(data, tmp_path, "training.max_epochs=3", "training.valid_every_epochs=2")
    assert [r["epoch"] for r in records(tmp_path, "valid")] == [2, 3]


def test_no_cuts_and_no_device(data: TrainData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training cuts are empty"):
        run(TrainData(CutSet.from_cuts([]), data.valid_cuts, TOKENIZER), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="use --device cpu"):
            train(experiment(), data, tmp_path, device="cuda")


def test_a_full_disk_keeps_records_waiting(tmp_path: Path) -> None:
    said: list[str] = []
    writer = MetricsWriter(tmp_path, True, say=said.append)
    for step in range(1, 8):
        # steps 3 to 5 find no room
        with no_room(tmp_path / "metrics.jsonl") if step in (3, 4, 5) else nullcontext():
            writer.write("train", step=step, text="x" * 100)
    with no_room(tmp_path / "metrics.jsonl"):
        writer.write("end", step=7)
        writer.close()
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(said) == 2 and "metrics.jsonl cannot be written to: File too large; training goes on" in said[0]


def test_a_bad_batch_that_cannot_be_dumped_is_skipped(data: TrainData, tmp_path: Path) -> None:
    said: list[str] = []
    bad = BadBatches(tmp_path, 1, 0, lambda **_: None, said.append)
    with no_room(tmp_path):
        bad.skip(next(iter(train_loader(data.train_cuts, TOKENIZER, experiment().data, seed=0, epoch=0))), 1, "nan")
    assert len(said) == 1 and "batch skipped, not dumped to" in said[0] and "(File too large)" in said[0]


@contextmanager
def no_room(path: Path) -> Iterator[None]:
    """No file becomes larger than this one is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size if path.is_file() else 0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
