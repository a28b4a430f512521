"""Parts that training leaves alone, on several processes: their weights stay to the bit, the others train as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr.training.ranks import Ranks
from tests.asr.training.runs import experiment, make_trainer, newest, read_data
from tests.distributed.processes import runs, sgd_steps, together
from tests.distributed.test_equal import largest_difference, spread

# whole units of shares and parts of them: a block, a layer of another one, the predictor, one weight
FROZEN = {
    "parts": ["encoder.blocks.0.ff1", "predictor", "joiner.out.bias"],
    "units": ["encoder.subsampling", "encoder.blocks.0", "joiner.encoder_proj"],
    "encoder": ["encoder"],
}
ZEROS = (0, 1, 2, 3)


def _begin(ranks: Ranks, data: Path, out: Path) -> None:
    trainer = make_trainer(experiment(*spread(1)), read_data(data), out, ranks)
    torch.save(trainer.model.state_dict(), out / "begin.pt")


def _frozen(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def test_frozen_parts_stay_and_the_others_are_those_of_one_process(data: Path, tmp_path: Path) -> None:
    def freeze(kind: str) -> str:
        return f"training.freeze=[{', '.join(FROZEN[kind])}]"

    for name in ("begin", "one", "many"):
        (tmp_path / name).mkdir()
    together(1, _begin, data, tmp_path / "begin")
    together(1, sgd_steps, {kind: spread(1, freeze(kind)) for kind in FROZEN}, 2, data, tmp_path / "one")
    cases = {f"{kind}-{zero}": spread(2, freeze(kind), f"parallel.zero={zero}") for kind in FROZEN for zero in ZEROS}
    together(2, sgd_steps, cases, 2, data, tmp_path / "many")
    begin = torch.load(tmp_path / "begin" / "begin.pt")
    for name in cases:
        kind = name.split("-")[0]
        one = torch.load(tmp_path / "one" / f"{kind}.pt")
        many = torch.load(tmp_path / "many" / f"{name}.pt")
        still = {key for key, value in many["weights"].items() if torch.equal(value, begin[key])}
        frozen = {key for key in begin if _frozen(key, FROZEN[kind])}
        moves = {key for key, value in one["weights"].items() if not torch.equal(value, begin[key])}
        assert frozen and frozen <= still, name
        assert moves and not moves & still, name
        assert largest_difference(one["weights"], many["weights"]) < 1e-6, name
        for left, right in zip(one["records"], many["records"], strict=True):
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
            assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_runs_with_frozen_parts_end_and_go_on(data: Path, tmp_path: Path) -> None:
    """With the configured optimizer, the average of the weights, offload and checkpoints."""

    def settings(steps: int, freeze: str, *more: str) -> list[str]:
        limits = ["optim.eps=1e-2", "optim.schedule=constant", f"training.max_steps={steps}", "training.max_epochs=3"]
        return spread(2, *limits, f"training.freeze=[{freeze}]", *more)

    ways = {f"zero{zero}": [f"parallel.zero={zero}"] for zero in ZEROS}
    ways["file"] = ["parallel.zero=3", "memory.offload=file"]
    parts = ", ".join(FROZEN["parts"])
    together(1, _begin, data, tmp_path)
    (tmp_path / "single").mkdir()
    alone = [*settings(5, parts), "training.accumulation=4"]
    together(1, runs, {"one": alone}, data, tmp_path / "single")
    for steps in (3, 5):  # the first epoch has three
        together(2, runs, {way: settings(steps, parts, *more) for way, more in ways.items()}, data, tmp_path)
    begin, one = torch.load(tmp_path / "begin.pt"), newest(tmp_path / "single" / "one")
    for way in ways:
        found = newest(tmp_path / way)
        assert found["step"] == one["step"] == 5
        for name, value in found["model"].items():
            assert not _frozen(name, FROZEN["parts"]) or torch.equal(value, begin[name]), (way, name)
        assert largest_difference(one["model"], found["model"]) < 1e-6, way
        assert largest_difference(one["training"]["ema"], found["training"]["ema"]) < 1e-6, way
        assert found["training"]["optimizer"].keys() == one["training"]["optimizer"].keys()
        assert not [name for name in found["training"]["optimizer"] if _frozen(name, FROZEN["parts"])]
