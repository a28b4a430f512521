"""memory.limit: what is chosen of what a model takes, and that the choice holds for a real one."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asr.data.augmentation import expand_cuts
from asr.data.fbank import num_feature_frames
from asr.data.utterances import Utterances
from asr.errors import UserError
from asr.models.transducer import Transducer
from asr.training import memory_plan
from asr.training.memory import used_bytes
from asr.training.memory_plan import Costs, _within_limit, longest_utterance
from asr.training.ranks import Ranks
from asr.training.trainer import TrainData
from tests.asr.data.speech import write_cuts
from tests.asr.training.runs import NO_DROPOUT, TOKENIZER, differences, experiment, newest, records, run

MIB = 2**20
FRAMES = 1000
# of one utterance of FRAMES, in MiB, by mode and by whether the loss has a limit
NEED = {("none", False): 40, ("none", True): 30, ("selective", False): 20, ("full", False): 8, ("full", True): 6}


class Probe:
    """In place of a model: 100 MiB of weights and the like, 80 MiB of optimizer state."""

    longest = (FRAMES, 5)
    parts = (None, None)
    device = torch.device("cpu")

    def __init__(self, *settings: str):
        self.experiment = experiment(f"data.max_duration_s={8 * FRAMES / 100}", *settings)

    def static(self, offload: str) -> float:
        return (100 + 80 * (offload == "none")) * MIB

    def costs(self, mode: str, loss_limit: int | None, room: float) -> Costs:
        need = NEED.get((mode, loss_limit is not None), NEED[mode, False])
        return Costs(0.0, need * MIB / FRAMES)


@pytest.mark.parametrize(
    ("limit", "pieces", "mode", "loss", "offload"),
    [
        (600, 1, "none", None, "none"),  # 8 x 40 and 180
        (400, 2, "none", None, "none"),  # 200 left, 5 of 40 fit
        (240, 8, "none", None, "none"),  # 48 left
        (222, 8, "none", "limited", "none"),  # 31 left
        (215, 8, "selective", None, "none"),  # 24 left
        (200, 8, "full", None, "none"),  # 10 left
        (197, 8, "full", "limited", "none"),  # 7 left
        (180, 8, "none", None, "file"),  # 71 left beside a file
        (112, 8, "full", "limited", "file"),
    ],
)
def test_the_cheapest_choice_that_fits(limit: int, pieces: int, mode: str, loss: str | None, offload: str) -> None:
    plan, text = _within_limit(Probe(f"memory.limit={limit}MiB"))  # type: ignore[arg-type]
    assert (plan.modes, plan.offload) == ([mode] * 2, offload)
    assert (plan.loss.memory_limit is not None) == (loss is not None)
    costs, room = plan.pieces or (None, 0.0)
    assert costs is not None and costs.cost(1, FRAMES) <= room <= 0.95 * limit * MIB - 100 * MIB
    assert text.startswith(f"memory.limit={limit}MiB: ")
    wanted = "whole batches" if pieces == 1 else f"batches in up to {pieces} pieces"
    assert wanted in text and ("optimizer state: file" in text) == (offload == "file")
    assert (f"checkpointing {mode}" in text) == (mode != "none")
    assert plan.decoding_s <= room / costs.per_frame / 100


def test_what_the_configuration_asks_for_is_the_least() -> None:
    plan, _ = _within_limit(Probe("memory={limit: 600MiB, checkpointing: full, offload: file}"))  # type: ignore[arg-type]
    assert (plan.modes, plan.offload) == (["full"] * 2, "file")
    plan, _ = _within_limit(Probe("memory.limit=197MiB", "parallel.zero=1"))  # type: ignore[arg-type]
    assert plan.offload == "none"


def test_what_does_not_fit_names_the_smallest_limit() -> None:
    with pytest.raises(UserError, match=r"memory.limit=105MiB does not hold.*10.0 s.*is ([0-9.]+)MiB") as error:
        _within_limit(Probe("memory.limit=105MiB"))  # type: ignore[arg-type]
    smallest = re.search(r"is ([0-9.]+)MiB", str(error.value))
    assert smallest is not None
    plan, _ = _within_limit(Probe(f"memory.limit={smallest[1]}MiB"))  # type: ignore[arg-type]
    assert plan.offload == "file" and plan.modes == ["full"] * 2


@pytest.mark.parametrize("runs", [0, 1])
def test_less_memory_than_the_limit_is_told(
    data: TrainData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """There may be none at the first try already, or at one that is measured."""
    encode, done = Transducer.encode, []

    def no_memory(*arguments):  # type: ignore[no-untyped-def]
        done.append(1)
        if len(done) > runs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(*arguments)

    monkeypatch.setattr(Transducer, "encode", no_memory)
    with pytest.raises(UserError, match=r"memory.limit=4GiB is more than there is.* longest utterance, 1\.\d s"):
        run(data, tmp_path, "memory.limit=4GiB")


def test_wrong_limits_are_refused() -> None:
    for text in ("8 elephants", "-1", "0"):
        with pytest.raises(UserError, match="memory.limit"):
            experiment(f"memory.limit={text}")


def test_the_longest_utterance_has_the_slowest_speed_where_it_is_still_to_come() -> None:
    cuts = [SimpleNamespace(duration=s, supervisions=[SimpleNamespace(text="ONE TWO")]) for s in (2.0, 1.0)]
    config = experiment("data.augment.speed_factors=[0.5, 1.0]").data
    frames, tokens = longest_utterance(cuts, TOKENIZER, config)
    config.features.storage = "on_the_fly"
    slow, _ = longest_utterance(cuts, TOKENIZER, config)
    assert 200 <= frames < 300 and 400 <= slow < 500 and tokens == 2


def test_the_longest_utterance_has_silence_and_may_be_two() -> None:
    cuts = [SimpleNamespace(duration=s, supervisions=[SimpleNamespace(text="ONE TWO")]) for s in (2.0, 1.0)]
    settings = ["data.features.storage=on_the_fly", "data.augment.pad_front_ms=[0, 500]", "data.max_duration_s=20"]
    frames, _ = longest_utterance(cuts, TOKENIZER, experiment(*settings).data)
    assert 250 <= frames < 320
    joined = [*settings, "data.augment.concat_prob=0.1"]
    frames, tokens = longest_utterance(cuts, TOKENIZER, experiment(*joined).data)
    assert 500 <= frames < 570 and tokens == 5
    frames, _ = longest_utterance(cuts, TOKENIZER, experiment(*joined, "data.augment.concat_max_s=4").data)
    assert 400 <= frames < 470


@pytest.mark.parametrize(
    ("settings", "seconds", "size"),
    [
        ([], 2.0, 10),
        (["data.augment.speed_factors=[0.8, 1.0]"], 2.5, 8),
        (["data.augment.pad_front_ms=[0, 500]", "data.augment.pad_behind_ms=[100, 300]"], 2.8, 7),
        (["data.augment.concat_prob=0.1"], 4.0, 5),
        (["data.augment.concat_prob=0.1", "data.augment.concat_max_s=3"], 3.0, 6),
        (["data.augment.concat_prob=0.1", "data.max_duration_s=3"], 3.0, 1),
        (["data.augment.concat_prob=0.1", "data.augment.pad_front_ms=[1000, 1000]"], 6.0, 3),
    ],
)
def test_a_budget_is_measured_on_utterances_as_long_as_they_come(
    settings: list[str], seconds: float, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With silence and joined, at the slowest speed; of cuts of the recordings no utterance is longer."""
    common = ["data.features.storage=on_the_fly", "data.max_duration_s=20", "memory.checkpointing=budget"]
    config = experiment(*common, *settings)
    cuts = [*write_cuts(tmp_path, [2.0, 2.0, 1.0, 1.2, 1.9, 0.5])]
    measured: list[tuple[int, int]] = []

    def note(encoder: Any, size: int, frames: int, context: Any) -> Costs:
        measured.append((size, frames))
        return Costs(0.0, 0.0)

    monkeypatch.setattr(memory_plan, "measure", note)
    monkeypatch.setattr(memory_plan, "within_budget", lambda *_: ([], ""))
    model = SimpleNamespace(encoder=SimpleNamespace(blocks=[None]))
    memory_plan._within_budget(config, model, cuts, Ranks(), nullcontext)  # type: ignore[arg-type]
    frames = num_feature_frames(round(seconds * 16000), config.data.features)
    assert measured == [(size, frames)]
    assert longest_utterance(cuts, TOKENIZER, config.data)[0] == frames
    found = 0
    for epoch in range(20):
        utterances = Utterances(
            expand_cuts(cuts, config.data.augment),
            config.data.augment,
            epoch=epoch,
            max_s=min(config.data.augment.concat_max_s, config.data.max_duration_s),
        )
        found = max(found, *(num_feature_frames(one.num_samples, config.data.features) for one in utterances))
    assert 0.75 * frames < found <= frames


def test_a_run_within_a_limit_ends_in_the_same_weights(data: TrainData, tmp_path: Path) -> None:
    """Where nothing has to change nothing does; too small a limit is refused with one that holds."""
    settings = [*NO_DROPOUT, "training.max_epochs=1"]
    run(data, tmp_path / "free", *settings)
    ample = used_bytes(torch.device("cpu")) + 2**30
    run(data, tmp_path / "ample", *settings, f'memory.limit="{ample}B"')
    assert differences(newest(tmp_path / "free")["model"], newest(tmp_path / "ample")["model"]) == []
    with pytest.raises(UserError, match="memory.limit=1MiB does not hold") as error:
        run(data, tmp_path / "small", *settings, "memory.limit=1MiB")
    smallest = re.search(r"in a file, is (\S+)$", str(error.value))
    assert smallest is not None
    run(data, tmp_path / "held", *settings, f"memory.limit={smallest[1]}")
    free, held = (records(tmp_path / name, "train") for name in ("free", "held"))
    assert [r["loss"] for r in held] == pytest.approx([r["loss"] for r in free], rel=1e-4)
