"""The stages of real recipes: which setting concerns which stage, and one small run through all of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import recipes.cli
from asr import checkpoint
from asr.errors import UserError
from asr.training.trainer import Trainer
from recipes.cli import make_parser
from recipes.corpora import CORPORA
from recipes.engine import Pipeline
from recipes.stages import check_beginning, make_recipe
from tests.integration.tiny import write_config, write_corpus

STAGES = "download prepare features tokenizer train average decode score export verify report".split()


def _pipeline(exp_dir: Path, *words: str, corpus: str = "yesno") -> Pipeline:
    args = make_parser(corpus).parse_args(["--exp-dir", str(exp_dir), *words])
    return make_recipe(corpus, args, "command", None)[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "1"], STAGES[4:]),
        (["--data-seed", "1"], STAGES[1:]),
        (
            ["--num-recombined", "7"],
            STAGES[1:],
        ),
        (["--set", "data.features.tail_chunk_ms=640"], ["features", *STAGES[4:]]),
        (["--set", "data.augment.noise_prob=0.9"], ["features", *STAGES[4:]]),
        (["--set", "tokenizer.kind=char"], STAGES[3:]),
        (["--set", "model.preset=xs"], STAGES[4:]),
        (["--set", "optim.lr=0.5"], STAGES[4:]),
        (["--init-from", "average.pt"], STAGES[4:]),
        (["--set", "loss.fastemit_lambda=0.01"], STAGES[4:]),
        (["--set", "average.ema=false"], STAGES[5:]),
        (["--set", "decoding.beam=9"], ["decode", "score", "report"]),
        (["--set", "decoding.chunk_ms=320"], ["decode", "score", "report"]),
        (["--decode-chunks", "full,320"], ["decode", "score", "report"]),
        (["--set", "scoring.case=lower"], ["score", "report"]),
        (["--decode-chunks", "full"], []),
        # speed and place, but not results
        (["--set", "data.num_workers=0"], []),
        (["--set", "data.features.num_jobs=7"], []),
        (["--num-jobs", "9"], []),
        (["--device", "cpu"], []),
        (["--set", "name=other"], []),
        (["--corpus-dir", "elsewhere"], []),
        (["--strict"], []),
    ],
)
def test_a_setting_concerns_exactly_these_stages(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    before, after = _pipeline(tmp_path), _pipeline(tmp_path, *words)
    assert [name for name in STAGES if before.hashes[name] != after.hashes[name]] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--corpus-dir", "elsewhere"], ["download"]), (["--strict"], ["prepare", "features", "train"])],
)
def test_place_and_checks_rerun_stages_without_all_that_follows(
    tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    before, after = _pipeline(tmp_path), _pipeline(tmp_path, *words)
    assert [name for name in STAGES if before.settings[name] != after.settings[name]] == expected


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".done").mkdir()
    (tmp_path / ".done" / "download.json").write_text('{"settings": {"corpus.name": "yesno"}}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.json").write_text('{"corpus_dir": "/its/own", "given": true}')
    assert _pipeline(tmp_path).settings["download"]["corpus.dir"] == "/its/own"
    with pytest.raises(UserError, match=r"belongs to the recipe yesno, not to fsdd; .*--exp-dir, or pass --force"):
        _pipeline(tmp_path, corpus="fsdd")
    forced = _pipeline(tmp_path, "--force", corpus="fsdd")
    assert forced.settings["download"]["corpus.dir"] is None, "the folder of the other corpus is not this one's"


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_recipe_has_the_same_stages_and_its_own_configuration(corpus: str, tmp_path: Path) -> None:
    args = make_parser(corpus).parse_args(["--exp-dir", str(tmp_path)])
    recipe, pipeline = make_recipe(corpus, args, "command", recipes.cli.default_config(corpus))
    assert [stage.name for stage in pipeline.stages] == STAGES
    assert recipe.experiment.name == corpus
    statuses = pipeline.plan(pipeline.select("0", "decode"))
    assert all(status.must_run for status in statuses)
    assert list(tmp_path.iterdir()) == []


def test_two_searches_are_two_results(tmp_path: Path) -> None:
    outputs = _pipeline(tmp_path, "--set", "decoding.search=modified_beam_search").stages[7].outputs
    assert {path.split("/")[1] for path in outputs} == {"greedy", "modified_beam_search"}
    assert {path.split("/")[1] for path in _pipeline(tmp_path).stages[7].outputs} == {"greedy"}


def test_several_test_sets_are_several_results(tmp_path: Path) -> None:
    pipeline = _pipeline(tmp_path, "--subset", "960h", corpus="librispeech")
    outputs = pipeline.stages[7].outputs
    folders = ("greedy", "greedy-chunk-640-left-5120", "greedy-chunk-320-left-5120")
    scores = [f"decode/{folder}/score-{name}.json" for folder in folders for name in ("test-clean", "test-other")]
    assert [name for name in outputs if "score" in name] == scores
    assert outputs[-1] == "decode/wer-by-chunk.txt"
    assert {"data/cuts_test-clean.jsonl.gz", "data/cuts_test-other.jsonl.gz"} <= set(pipeline.stages[1].outputs)


def test_chunks_are_those_that_are_asked_for_or_that_training_heard(tmp_path: Path) -> None:
    def folders(*words: str, corpus: str = "librispeech") -> list[str]:
        outputs = _pipeline(tmp_path, *words, corpus=corpus).stages[7].outputs
        return list(dict.fromkeys(path.split("/")[1] for path in outputs))

    ours = ["greedy", "greedy-chunk-640-left-5120", "greedy-chunk-320-left-5120", "wer-by-chunk.txt"]
    assert folders() == folders(corpus="aishell") == ours
    assert folders("--set", "training.chunk_ms=[full]") == folders(corpus="yesno") == ["greedy"]
    # a list is taken as it is, whatever decoding.chunk_ms says, and only its own order counts
    given = ["--decode-chunks", "160, 320,160", "--set", "decoding.left_context_ms=2560"]
    assert folders(*given) == ["greedy-chunk-160-left-2560", "greedy-chunk-320-left-2560", "wer-by-chunk.txt"]
    before, after = (_pipeline(tmp_path, *given, "--set", f"decoding.chunk_ms={ms}") for ms in (640, 1280))
    assert before.hashes == after.hashes
    # by default decoding.chunk_ms comes first
    assert folders("--set", "decoding.chunk_ms=160")[:2] == ["greedy-chunk-160-left-5120", "greedy"]
    with pytest.raises(UserError, match="--decode-chunks: 'fast' is no number"):
        folders("--decode-chunks", "full,fast")
    with pytest.raises(ValueError, match="--decode-chunks=50 must be a multiple of 40"):
        folders("--decode-chunks", "50")


def test_another_subset_is_downloaded(tmp_path: Path) -> None:
    before = _pipeline(tmp_path, corpus="librispeech")
    after = _pipeline(tmp_path, "--subset", "100h", corpus="librispeech")
    assert [name for name in STAGES if before.hashes[name] != after.hashes[name]] == STAGES


def test_changed_files_of_the_corpus_rerun_prepare(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.wav").write_text("x")
    before = _pipeline(tmp_path / "exp", "--corpus-dir", str(corpus))
    (corpus / "a.wav").write_text("mended")
    after = _pipeline(tmp_path / "exp", "--corpus-dir", str(corpus))
    assert [name for name in STAGES if before.settings[name] != after.settings[name]] == ["prepare"]
    assert before.hashes == after.hashes, "what follows depends on what prepare makes of it"
    assert "data/checksums.json" in after.stages[2].inputs


def test_a_changed_manifest_of_another_corpus_trains_again(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("{}")
    words = ["--set", f"data.more_cuts={{{other}: 0.5}}"]
    before = _pipeline(tmp_path / "exp", *words)
    assert _pipeline(tmp_path / "exp", *words).hashes == before.hashes
    other.write_text("{}\n{}")
    after = _pipeline(tmp_path / "exp", *words)
    assert [name for name in STAGES if before.hashes[name] != after.hashes[name]] == STAGES[4:]


def test_training_begins_with_the_average_of_a_folder(tmp_path: Path) -> None:
    for name in ("a/average.pt", "b/train/average.pt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    for given, expected in (("a", "a/average.pt"), ("b", "b/train/average.pt"), ("c.pt", "c.pt")):
        args = make_parser("yesno").parse_args(["--init-from", str(tmp_path / given), "--exp-dir", str(tmp_path / "e")])
        recipe, _ = make_recipe("yesno", args, "command", None)
        assert recipe.experiment.training.init_from == str(tmp_path / expected)


def test_training_begins_with_no_file_that_is_missing_or_would_be_set_aside(tmp_path: Path) -> None:
    inside = tmp_path / "exp" / "train" / "average.pt"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"no checkpoint")
    for given, says in ((tmp_path / "typo.pt", "typo.pt does not exist"), (inside, "is corrupt or no checkpoint")):
        args = make_parser("yesno").parse_args(["--exp-dir", str(tmp_path / "exp"), "--init-from", str(given)])
        recipe, _ = make_recipe("yesno", args, "command", None)
        with pytest.raises(UserError, match=says):
            check_beginning(recipe)
    checkpoint.atomic_save(dict.fromkeys(checkpoint.KEYS) | {"format_version": checkpoint.FORMAT_VERSION}, inside)
    with pytest.raises(UserError, match="whose place the new one takes; copy the file elsewhere"):
        check_beginning(recipe)


# -- a real run -------------------------------------------------------------------------------------------------------


class Tiny:
    """The recipe of yesno on an imitation of its recordings, small enough for a test."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.exp = root / "exp"
        self.corpus = root / "corpus"
        self.capsys = capsys
        write_corpus(self.corpus)

    def run(self, *words: str, code: int = 0) -> list[str]:
        """Runs the recipe; returns the lines that it printed."""
        self.capsys.readouterr()
        argv = ["yesno", "--exp-dir", str(self.exp), "--num-recombined", "0", "--num-jobs", "1", *words]
        assert recipes.cli.main(argv) == code
        shown = self.capsys.readouterr()
        self.error = shown.err
        return shown.out.splitlines()

    def digest(self, name: str) -> str:
        return hashlib.sha256((self.exp / name).read_bytes()).hexdigest()


def _ran(lines: list[str]) -> list[str]:
    return [line.split()[2].rstrip(":") for line in lines if line.startswith("stage ") and ": runs (" in line]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tiny:
    config = write_config(tmp_path / "tiny.yaml")
    monkeypatch.setattr(recipes.cli, "default_config", lambda corpus: config)
    return Tiny(tmp_path, capsys)


def test_features_on_dask_are_those_of_this_machine(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="pip install 'transducer-asr[dask]'")
    monkeypatch.setattr("asr.data.features.CUTS_PER_FILE", 5)
    tiny.run("--corpus-dir", str(tiny.corpus), "--stop-stage", "features")

    def made() -> dict[str, bytes]:
        folder = tiny.exp / "data/features"
        return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = made()
    assert len([name for name in before if name.endswith(".f32")]) > 5
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        place = ["--dask", cluster.scheduler_address]
        assert _ran(tiny.run(*place, "--stop-stage", "features")) == []  # a place, not a setting
        assert _ran(tiny.run(*place, "--stage", "features", "--stop-stage", "features", "--force")) == ["features"]
    assert made() == before


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("absent", "--dask needs distributed; install: pip install 'transducer-asr[dask]'"),
        ("json", "--dask computes stored features"),
    ],
)
def test_dask_without_package_or_work_is_refused(
    tiny: Tiny, found: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: find(found if name == "distributed" else name))
    tiny.run("--dask", "tcp://127.0.0.1:1", "--set", "data.features.storage=on_the_fly", code=2)
    assert says in tiny.error


def test_a_recipe_runs_stops_goes_on_and_is_not_repeated(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # data first; the corpus need not be named again afterwards
    lines = tiny.run("--corpus-dir", str(tiny.corpus), "--stop-stage", "tokenizer")
    assert _ran(lines) == STAGES[:4]
    (tiny.corpus / "notes.txt").write_text("a file more, and the same recordings")
    lines = tiny.run("--stop-stage", "tokenizer")
    assert _ran(lines) == ["prepare"] and f"corpus: {tiny.corpus}, as in the earlier run (--corpus-dir)" in lines
    test_list = tiny.digest("data/cuts_test.jsonl.gz")

    # SIGTERM before training: exit code 0, not done
    def load(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("asr.training.train_data.load_train_data", load)
        lines = tiny.run()
    assert _ran(lines) == ["train"] and "SIGTERM with nothing left to save" in lines[-1] and "to go on: " in lines[-1]

    # SIGTERM in the middle of training: saved, exit code 0, not done
    real = Trainer.step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        lines = tiny.run()
    assert _ran(lines) == ["train"]
    assert "SIGTERM at step 3" in lines[-1] and "to go on: " in lines[-1] and lines[-1].endswith("--stage train")
    assert not (tiny.exp / ".done" / "train.json").exists()

    # SIGTERM after it, while the report is written: later stages are left to the next run
    def render(*args: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "<html>"

    with monkeypatch.context() as patched:
        patched.setattr("asr.training.report._render", render)
        lines = tiny.run("--stage", "train")
    assert _ran(lines) == ["train"] and re.search(r"SIGTERM at step \d+, saved in .*\.pt; to go on: ", lines[-1])
    assert (tiny.exp / "train" / "report.html").read_text() == "<html>"

    # goes on from there to the result
    lines = tiny.run("--stage", "train")
    assert _ran(lines) == STAGES[4:]
    records = [json.loads(line) for line in (tiny.exp / "train" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert lines[-1].startswith("%WER ") and "/ 240," in lines[-1]
    for word in ("report: ", "checkpoint: ", "transcripts (greedy): ", "plot: "):
        path = Path(next(line for line in lines if line.startswith(word)).removeprefix(word).split(",")[0])
        assert path.is_file()

    # nothing to do; the result is shown again
    again = tiny.run()
    assert _ran(again) == [] and again[-1] == lines[-1]

    page, text = ((tiny.exp / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert again[-1] in page and again[-1] in text and "Texts compared as they are." in text
    assert [row.split("|")[1].strip() for row in text.splitlines()[-12:-2]] == STAGES[:-1]
    assert 'href="train/report.html"' in page

    # other rules for texts: nothing is decoded again
    lines = tiny.run("--set", "scoring.case=lower")
    assert _ran(lines) == ["score", "report"] and "  texts compared all in lower case" in lines

    # another search: decoding only, and both results
    lines = tiny.run("--set", "decoding.search=modified_beam_search")
    assert _ran(lines) == ["decode", "score", "report"]
    assert lines[-2].startswith("greedy: %WER ") and lines[-1].startswith("%WER ")

    # several chunks: decoding only, a folder for each, and a table of their results
    lines = tiny.run("--decode-chunks", "full,320")
    assert _ran(lines) == ["decode", "score", "report"]
    table = (tiny.exp / "decode" / "wer-by-chunk.txt").read_text().splitlines()
    assert [row.split("|")[1:3] for row in table[2:]] == [[" greedy ", "      full "], [" greedy ", "       320 "]]
    rates = []
    for folder in ("greedy", "greedy-chunk-320-left-5120"):
        score = json.loads((tiny.exp / "decode" / folder / "score-test.json").read_text())
        assert score["setting"].endswith(folder.removeprefix("greedy"))
        rates.append(f"{100 * score['words']['rate']:.2f}")
    assert [row.split("|")[3].strip() for row in table] == ["test, %WER", "-" * 9 + ":", *rates]
    assert lines[-1] == json.loads((tiny.exp / "decode" / "greedy" / "score-test.json").read_text())["line"]
    assert lines[-5:-1] == table
    assert _ran(tiny.run("--decode-chunks", "full")) == ["decode", "score", "report"]
    assert not (tiny.exp / "decode" / "wer-by-chunk.txt").exists()

    # another seed: the same test list, and the first training is kept
    weights = tiny.digest("train/average.pt")
    lines = tiny.run("--seed", "5")
    assert _ran(lines) == STAGES[4:]
    assert tiny.digest("data/cuts_test.jsonl.gz") == test_list
    assert tiny.digest("train.old-1/average.pt") == weights != tiny.digest("train/average.pt")


def test_features_on_the_fly_are_computed_without_storing_them(tiny: Tiny) -> None:
    words = ["--set", "data.features.storage=on_the_fly", "--set", "training.max_steps=2"]
    lines = tiny.run("--corpus-dir", str(tiny.corpus), *words)
    assert lines[-1].startswith("%WER ")
    assert not list((tiny.exp / "data" / "features").rglob("*.f32"))
    noted = {name: json.loads((tiny.exp / ".done" / f"{name}.json").read_text())["audio_s"] for name in STAGES}
    assert noted["prepare"] > noted["features"] > 0 and noted["download"] is None


def test_training_audio_goes_into_shards_that_may_move(tiny: Tiny) -> None:
    shar = ["--set", "data.features.storage=shar", "--set", "data.features.shard_cuts=3"]
    words = [*shar, "--set", "training.max_steps=2", "--stop-stage", "train"]
    assert _ran(tiny.run("--corpus-dir", str(tiny.corpus), *words)) == STAGES[:5]
    shards = tiny.exp / "data" / "features" / "train"
    assert list(shards.glob("recording.*.tar")) and not list(tiny.exp.rglob("*.f32"))
    assert _ran(tiny.run(*words)) == []
    # how speeds are and where the cache is changes nothing in the shards; the training, only the first
    faster = ["--set", "data.augment.speed_factors=[1.0, 1.1]"]
    assert _ran(tiny.run(*words, *faster)) == ["train"]
    assert _ran(tiny.run(*words, *faster, "--set", f"data.shar.cache={tiny.exp / 'cache'}")) == []
    shards.rename(tiny.exp / "bucket")
    moved = ["--set", f"data.shar.urls={{{shards}: file://{tiny.exp / 'bucket'}}}"]
    moved += ["--set", f"data.shar.cache={tiny.exp / 'cache'}"]
    assert _ran(tiny.run(*words, *faster, *moved)) == []
    assert _ran(tiny.run(*words, *faster, *moved, "--seed", "5")) == ["train"]
    assert list((tiny.exp / "cache").glob("*recording*.tar"))
