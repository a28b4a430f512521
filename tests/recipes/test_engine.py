"""The engine with small fake stages: what runs, what does not, and what is said and kept when something goes wrong."""

from __future__ import annotations

import errno
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asr.cli.guard import guarded
from asr.errors import UserError
from recipes.engine import Pipeline, Stage, StageFailed, StageStopped, digest, exists, fingerprint, pick, set_aside

SETTINGS: dict[str, Any] = {
    "source": "here",
    "features": {"bins": 80, "jobs": 2},
    "tokenizer": {"size": 30},
    "train": {"lr": 0.1, "betas": (0.9, 0.98)},
    "search": {"beam": 4},
}


class Recipe:
    """Four fake stages in the shape of a real recipe, that count their runs.

    prepare -> features -> train -> decode, and prepare -> tokenizer -> train.
    """

    def __init__(self, exp_dir: Path) -> None:
        self.exp_dir = exp_dir
        self.ran: list[str] = []
        self.settings: dict[str, Any] = json.loads(json.dumps(SETTINGS))
        self.content = {name: name for name in ("prepare", "features", "tokenizer", "train", "decode")}
        self.hooks: dict[str, Callable[[], None]] = {}
        self.check: Callable[[Any], None] | None = None  # of training

    def _run(self, name: str, path: str) -> Callable[[Any], None]:
        def run(context: Any) -> None:
            assert context == "context"
            self.ran.append(name)
            if name in self.hooks:
                self.hooks[name]()
            (self.exp_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (self.exp_dir / path).write_text(self.content[name])

        return run

    def stages(self) -> list[Stage]:
        return [
            Stage("prepare", self._run("prepare", "data/cuts"), (), ("data/cuts",), (), ("source",)),
            Stage(
                "features",
                self._run("features", "data/features/a"),
                ("data/cuts",),
                ("data/features",),
                ("features", "!features.jobs"),
            ),
            Stage("tokenizer", self._run("tokenizer", "tok/model"), ("data/cuts",), ("tok/model",), ("tokenizer",)),
            Stage(
                "train",
                self._run("train", "train/best.pt"),
                ("data/features", "tok/model"),
                ("train/best.pt",),
                ("train",),
                resume_dir="train",
                results_dir="decode",
                checkpoints="checkpoints",
                check=self.check,
            ),
            Stage(
                "decode",
                self._run("decode", "decode/wer"),
                ("train/best.pt", "data/features"),
                ("decode/wer",),
                ("search",),
            ),
        ]

    def pipeline(self) -> Pipeline:
        return Pipeline(self.stages(), self.exp_dir, self.settings, "python -m recipes fake")

    def go(self, first: str = "0", last: str = "decode", *, force: bool = False) -> list[str]:
        self.ran.clear()
        pipeline = self.pipeline()
        pipeline.execute("context", pipeline.select(first, last), force=force)
        return list(self.ran)

    def planned(self) -> dict[str, str]:
        pipeline = self.pipeline()
        statuses = pipeline.plan(pipeline.select("0", "decode"))
        pairs = zip(pipeline.stages, statuses, strict=True)
        return {stage.name: status.reason for stage, status in pairs if status.must_run}


ALL = ["prepare", "features", "tokenizer", "train", "decode"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path / "exp")


def test_all_stages_run_once_and_then_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.go() == ALL
    out = capsys.readouterr().out
    for number, name in enumerate(ALL):
        assert f"stage {number} {name}: runs (it has not run yet)" in out
        assert re.search(rf"stage {name}: done in \d+\.\d s", out)
    assert recipe.go() == []
    assert capsys.readouterr().out.count("up to date") == len(ALL)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("features.bins", 40, ["features", "train", "decode"]),
        ("features.jobs", 8, []),
        ("tokenizer.size", 60, ["tokenizer", "train", "decode"]),
        ("train.lr", 0.2, ["train", "decode"]),
        ("search.beam", 8, ["decode"]),
        ("source", "there", ["prepare"]),
    ],
)
def test_a_changed_setting_reruns_exactly_what_it_must(
    recipe: Recipe, key: str, value: Any, expected: list[str]
) -> None:
    recipe.go()
    branch: Any = recipe.settings
    *parents, last = key.split(".")
    for parent in parents:
        branch = branch[parent]
    branch[last] = value
    assert list(recipe.planned())[: len(expected)] == expected
    assert recipe.go() == expected
    assert recipe.go() == []


def test_the_reason_names_the_setting_with_both_values(recipe: Recipe) -> None:
    recipe.go()
    recipe.settings["tokenizer"]["size"] = 60
    assert recipe.planned() == {
        "tokenizer": "changed setting tokenizer.size: 30 -> 60",
        "train": "changed settings of tokenizer",
        "decode": "changed settings of train",
    }


def test_setting_it_back_after_a_dry_run_changes_nothing(recipe: Recipe) -> None:
    recipe.go()
    recipe.settings["tokenizer"]["size"] = 60
    before = {path: path.read_bytes() for path in recipe.exp_dir.rglob("*") if path.is_file()}
    recipe.planned()
    assert {path: path.read_bytes() for path in recipe.exp_dir.rglob("*") if path.is_file()} == before
    recipe.settings["tokenizer"]["size"] = 30
    assert recipe.go() == []


def test_a_plan_of_a_folder_that_does_not_exist_makes_none(recipe: Recipe) -> None:
    assert list(recipe.planned()) == ALL
    assert not recipe.exp_dir.exists()


def test_a_missing_output_reruns_its_stage_and_no_later_one_when_it_comes_out_the_same(recipe: Recipe) -> None:
    recipe.go()
    (recipe.exp_dir / "data" / "features" / "a").unlink()
    planned = recipe.planned()
    assert planned["features"] == "missing output data/features"
    assert "features runs before it" in planned["train"] and "features" in planned["decode"]
    assert recipe.go() == ["features"]


def test_other_results_of_a_forced_stage_rerun_what_uses_them(recipe: Recipe) -> None:
    recipe.go()
    assert recipe.go("prepare", "prepare", force=True) == ["prepare"]
    assert recipe.go() == []
    recipe.content["prepare"] = "new recordings"
    assert recipe.go("prepare", "prepare", force=True) == ["prepare"]
    assert recipe.planned()["features"] == "other results of prepare"
    # features and tokenizer come out as before, so training and decoding are still good
    assert recipe.go() == ["features", "tokenizer"]


def test_force_runs_the_selected_stages_only(recipe: Recipe) -> None:
    recipe.go()
    assert recipe.go("features", "tokenizer", force=True) == ["features", "tokenizer"]


def test_one_stage_runs_in_a_fresh_process_from_what_is_on_disk(recipe: Recipe) -> None:
    recipe.go("0", "train")
    again = Recipe(recipe.exp_dir)
    assert again.go("decode", "decode") == ["decode"]


def test_a_stage_without_its_inputs_says_which_stage_to_run(recipe: Recipe) -> None:
    recipe.go("0", "1")
    with pytest.raises(UserError, match=r"stage 4 \(decode\) needs .*best\.pt, which stage 3 \(train\)") as caught:
        recipe.go("decode", "decode")
    assert str(caught.value).endswith("python -m recipes fake --stage train --stop-stage decode")
    assert recipe.ran == []
    with pytest.raises(UserError, match=r"which stage 2 \(tokenizer\) makes"):
        recipe.go("train", "train")


def test_outdated_inputs_are_used_with_a_warning_and_later_redone(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.go()
    recipe.settings["train"]["lr"] = 0.5
    assert recipe.go("decode", "decode") == ["decode"]
    warning = capsys.readouterr().err
    assert "warning: stage 3 (train) is out of date (changed setting train.lr: 0.1 -> 0.5)" in warning
    assert "--stage train" in warning
    recipe.content["train"] = "other weights"
    assert recipe.go() == ["train", "decode"]


@pytest.mark.parametrize("word", ["5", "-1", "7", "99"])
def test_a_stage_out_of_range_names_the_valid_ones(recipe: Recipe, word: str) -> None:
    with pytest.raises(UserError, match=f"stage {word} is out of range; valid stages: 0 prepare, .*4 decode"):
        recipe.pipeline().select("0", word)


def test_a_misspelled_stage_names_the_nearest(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="stage tokeniser is not a stage; valid .*did you mean tokenizer"):
        recipe.pipeline().select("tokeniser", "4")


def test_stages_in_the_wrong_order_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="--stage train comes after --stop-stage 1"):
        recipe.pipeline().select("train", "1")


def test_numbers_and_names_select_the_same(recipe: Recipe) -> None:
    assert recipe.pipeline().select("1", "3") == recipe.pipeline().select("features", "train") == range(1, 4)


def _raise(error: BaseException) -> Callable[[], None]:
    def hook() -> None:
        raise error

    return hook


def test_a_failed_stage_says_what_why_and_how_to_go_on(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.hooks["train"] = _raise(UserError("optim.lr=-1 is negative; choose a positive value"))
    code = guarded(lambda: bool(recipe.go()))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err == (
        "error: stage 3 (train) failed: optim.lr=-1 is negative; choose a positive value; "
        "when that is mended, go on with: python -m recipes fake --stage train\n"
    )
    del recipe.hooks["train"]
    assert recipe.go("train") == ["train", "decode"]


def test_a_failed_stage_of_a_part_keeps_the_end_of_the_part(recipe: Recipe) -> None:
    recipe.hooks["features"] = _raise(UserError("no"))
    with pytest.raises(StageFailed, match="--stage features --stop-stage tokenizer$"):
        recipe.go("0", "tokenizer")


def test_a_fault_of_the_program_keeps_its_traceback(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.hooks["features"] = _raise(KeyError("mystery"))
    code = guarded(lambda: bool(recipe.go()))
    captured = capsys.readouterr()
    path = recipe.exp_dir / "logs" / "features.traceback.txt"
    assert code == 1
    assert "KeyError: 'mystery'" in captured.err and str(path) in captured.err
    assert "Traceback" not in captured.err and "Traceback" in path.read_text()


def test_a_stage_that_fails_again_is_not_taken_for_done(recipe: Recipe) -> None:
    recipe.go()
    recipe.hooks["features"] = _raise(UserError("no"))
    with pytest.raises(StageFailed):
        recipe.go("features", "features", force=True)
    del recipe.hooks["features"]
    assert recipe.go() == ["features"]


def test_a_full_disk_is_told_in_one_line(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.hooks["train"] = _raise(OSError(errno.ENOSPC, "No space left on device", "/somewhere/step-1.pt"))
    assert guarded(lambda: bool(recipe.go())) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: stage 3 (train) failed: /somewhere/step-1.pt: no space left on the disk")
    assert err.count("\n") == 1


def test_a_marker_on_a_full_disk_loses_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "features.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, text)

    import recipes.engine

    real = recipes.engine.write_atomic
    monkeypatch.setattr(recipes.engine, "write_atomic", full)
    with pytest.raises(StageFailed, match="features.json: no space left"):
        recipe.go()
    monkeypatch.undo()
    assert (recipe.exp_dir / "data" / "features" / "a").read_text() == "features"
    assert recipe.go() == ["features", "tokenizer", "train", "decode"]


def test_a_stage_that_leaves_no_output_has_failed(recipe: Recipe) -> None:
    pipeline = recipe.pipeline()
    pipeline.stages[0] = replace(pipeline.stages[0], run=lambda context: None)
    with pytest.raises(StageFailed, match="ended without writing data/cuts") as caught:
        pipeline.execute("context", range(1))
    assert caught.value.exit_code == 1


def test_a_stopped_stage_is_neither_done_nor_failed(recipe: Recipe) -> None:
    recipe.hooks["train"] = _raise(StageStopped("SIGTERM at step 7"))
    with pytest.raises(StageStopped, match=r"stage 3 \(train\) stopped: SIGTERM at step 7; to go on: .*--stage train"):
        recipe.go()
    del recipe.hooks["train"]
    assert recipe.go() == ["train", "decode"]


def test_an_interrupted_stage_says_how_to_go_on(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.hooks["train"] = _raise(KeyboardInterrupt())
    assert guarded(lambda: bool(recipe.go())) == 130
    assert "stage 3 (train) interrupted; to go on: python -m recipes fake --stage train" in capsys.readouterr().err


def _half_trained(recipe: Recipe) -> None:
    """A run whose training is killed after it has written a checkpoint."""

    def killed() -> None:
        (recipe.exp_dir / "train").mkdir(exist_ok=True)
        (recipe.exp_dir / "train" / "step-1.pt").write_text("weights")
        raise KeyboardInterrupt

    recipe.hooks["train"] = killed
    with pytest.raises(KeyboardInterrupt):
        recipe.go()
    del recipe.hooks["train"]


def test_killed_training_goes_on_in_its_folder(recipe: Recipe) -> None:
    _half_trained(recipe)
    assert recipe.go() == ["train", "decode"]
    assert (recipe.exp_dir / "train" / "step-1.pt").read_text() == "weights"
    assert not list(recipe.exp_dir.glob("train.old-*"))


def test_killed_training_with_other_settings_starts_anew_and_keeps_the_old(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    _half_trained(recipe)
    recipe.settings["train"]["lr"] = 0.3
    assert recipe.go() == ["train", "decode"]
    assert (recipe.exp_dir / "train.old-1" / "step-1.pt").read_text() == "weights"
    assert [path.name for path in (recipe.exp_dir / "train").iterdir()] == ["best.pt"]
    assert "starts anew; the earlier run is kept in" in capsys.readouterr().out


def test_what_a_stage_cannot_begin_with_is_said_before_anything_is_touched(recipe: Recipe) -> None:
    def refuse(_: Any) -> None:
        raise UserError("no such file")

    assert recipe.go() == ALL
    recipe.check = refuse
    recipe.settings["train"]["lr"] = 0.3
    with pytest.raises(StageFailed, match="no such file"):
        recipe.go()
    assert not list(recipe.exp_dir.glob("*.old-*"))
    recipe.settings["train"]["lr"] = 0.1
    assert recipe.go() == [], "the run of before is as it was"


def test_a_run_that_goes_on_is_not_asked_what_it_began_with(recipe: Recipe) -> None:
    _half_trained(recipe)

    def refuse(_: Any) -> None:
        raise UserError("no such file")

    recipe.check = refuse
    assert recipe.go() == ["train", "decode"]


def test_training_on_other_data_starts_anew(recipe: Recipe) -> None:
    _half_trained(recipe)
    recipe.content["tokenizer"] = "other"
    recipe.go("tokenizer", "tokenizer", force=True)
    recipe.go()
    assert (recipe.exp_dir / "train.old-1" / "step-1.pt").is_file()


def test_every_new_training_keeps_all_old_ones(recipe: Recipe) -> None:
    for lr in (0.1, 0.2, 0.3):
        recipe.settings["train"]["lr"] = lr
        recipe.content["train"] = f"weights {lr}"
        recipe.go()
        (recipe.exp_dir / "decode" / "wer").write_text(f"result {lr}")
    recipe.go("train", "train", force=True)
    for number, lr in enumerate((0.1, 0.2, 0.3), 1):
        assert (recipe.exp_dir / f"train.old-{number}" / "best.pt").read_text() == f"weights {lr}"
        assert (recipe.exp_dir / f"decode.old-{number}" / "wer").read_text() == f"result {lr}"


def test_of_tries_without_a_checkpoint_only_the_newest_is_kept(recipe: Recipe) -> None:
    train = recipe.exp_dir / "train"

    def begin() -> None:
        (train / "checkpoints").mkdir(parents=True)
        (train / "config.yaml").write_text(f"lr: {recipe.settings['train']['lr']}")
        if recipe.settings["train"]["lr"] in (2, 5):
            (train / "checkpoints" / "step-1.pt").write_text("weights")
        raise KeyboardInterrupt

    recipe.hooks["train"] = begin
    for lr in range(1, 8):
        recipe.settings["train"]["lr"] = lr
        with pytest.raises(KeyboardInterrupt):
            recipe.go()
        assert recipe.planned()["train"] == "it has not finished yet"
    kept = {path: (path / "config.yaml").read_text() for path in recipe.exp_dir.glob("train.old-*")}
    assert sorted(kept.values()) == ["lr: 2", "lr: 5", "lr: 6"]


def test_a_training_folder_of_unknown_origin_is_kept(recipe: Recipe) -> None:
    (recipe.exp_dir / "train").mkdir(parents=True)
    (recipe.exp_dir / "train" / "precious.pt").write_text("mine")
    recipe.go()
    assert (recipe.exp_dir / "train.old-1" / "precious.pt").read_text() == "mine"


def test_a_second_run_in_the_same_folder_is_refused(recipe: Recipe) -> None:
    def second_run() -> None:
        Recipe(recipe.exp_dir).go("0", "0")

    recipe.hooks["features"] = second_run
    with pytest.raises(StageFailed, match=r"another run \(process \d+\) is working in"):
        recipe.go()
    del recipe.hooks["features"]
    assert recipe.go()[0] == "features"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01"])
def test_a_damaged_marker_reruns_the_stage(recipe: Recipe, text: str) -> None:
    recipe.go()
    (recipe.exp_dir / ".done" / "decode.json").write_text(text)
    assert recipe.go() == ["decode"]


def test_markers_list_what_was_made_and_are_whole_files(recipe: Recipe) -> None:
    recipe.go()
    marker = json.loads((recipe.exp_dir / ".done" / "train.json").read_text())
    assert marker["outputs"] == ["train/best.pt"]
    assert marker["settings"] == {"train.lr": 0.1, "train.betas": [0.9, 0.98]}
    assert set(marker["upstream"]) == {"features", "tokenizer"}
    assert not [path for path in recipe.exp_dir.rglob("*") if ".tmp" in path.name]


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_pick_takes_subtrees_less_what_is_left_out() -> None:
    assert pick(SETTINGS, ("features", "!features.jobs", "search.beam")) == {"features.bins": 80, "search.beam": 4}
    with pytest.raises(AssertionError, match="no setting named featurs"):
        pick(SETTINGS, ("featurs",))
    assert pick({"a": 1, "ab": 2}, ("a",)) == {"a": 1}


def test_fingerprints_see_content_and_not_the_time_of_packing(tmp_path: Path) -> None:
    def packed(text: str, mtime: int) -> str:
        with open(tmp_path / "cuts.gz", "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=mtime) as file:
            file.write(text.encode())
        return fingerprint(tmp_path, ["cuts.gz"])

    assert packed("a", 1) == packed("a", 2)
    assert packed("a", 1) != packed("b", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("1")
    before = fingerprint(tmp_path, ["folder"])
    (tmp_path / "folder" / "x").write_text("12")
    assert fingerprint(tmp_path, ["folder"]) != before


def test_an_empty_folder_is_no_output_but_an_empty_file_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert not exists(tmp_path / "folder") and not exists(tmp_path / "none") and exists(tmp_path / "file")


def test_set_aside_takes_the_first_number_that_is_free_for_all(tmp_path: Path) -> None:
    (tmp_path / "decode.old-2").mkdir()
    for expected in (["train.old-1"], ["train.old-3"], ["train.old-4", "decode.old-4"]):
        (tmp_path / "train").mkdir()
        if len(expected) == 2:
            (tmp_path / "decode").mkdir()
        assert [path.name for path in set_aside(tmp_path / "train", tmp_path / "decode")] == expected


def test_inputs_that_no_earlier_stage_makes_are_refused(tmp_path: Path) -> None:
    stages = [Stage("a", lambda context: None, inputs=("x",), outputs=("y",))]
    with pytest.raises(AssertionError, match="no earlier stage makes x"):
        Pipeline(stages, tmp_path, {}, "run")
