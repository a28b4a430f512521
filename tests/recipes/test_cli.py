"""The recipe's command line: options, messages, and the command that continues a run."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from asr.cli.guard import Parser
from asr.errors import UserError
from recipes import cli
from recipes.corpora import CORPORA

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    """Settings of a corpus.

    Args:
        held_out_speaker: tests on this one speaker, with 100% of
            the recordings.
        num_strings: how many.
        gap_s: pause.
        mode: what to join.
        noisy: adds noise.
        voices: names.
    """

    held_out_speaker: str | None = None
    num_strings: int = 20
    gap_s: float = 0.5
    mode: Literal["words", "digits"] = "words"
    noisy: bool = True
    voices: list[str] = field(default_factory=lambda: ["a", "b"])


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="recipe")
    cli.add_corpus_options(made, Options)
    return made


def _values(args: argparse.Namespace) -> Options:
    return Options(**{name.removeprefix("corpus_"): value for name, value in vars(args).items()})


def test_options_of_a_corpus_have_their_defaults(parser: Parser) -> None:
    assert _values(parser.parse_args([])) == Options()


def test_options_of_a_corpus_have_their_types(parser: Parser) -> None:
    words = "--held-out-speaker george --num-strings 3 --gap-s 1 --mode digits --no-noisy --voices x y z".split()
    expected = Options("george", 3, 1.0, "digits", False, ["x", "y", "z"])
    assert _values(parser.parse_args(words)) == expected


def test_help_tells_meaning_and_default(parser: Parser) -> None:
    text = " ".join(parser.format_help().split())
    assert "tests on this one speaker, with 100% of the recordings" in text
    assert "how many (default: 20)" in text
    assert "default: None" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out-speeker", "x"], "unknown option --held-out-speeker; did you mean --held-out-speaker"),
        (["--held-out", "x"], "unknown option --held-out"),
        (["--num-strings", "many"], "invalid int value: 'many'"),
        (["--mode", "letters"], "invalid choice: 'letters'"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_wrong_options_are_told(parser: Parser, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parser.parse_args(words)


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_recipe_has_help_with_all_options(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([corpus, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--stage", "--stop-stage", "--dry-run", "--exp-dir", "--corpus-dir", "--seed", "--device", "--set"):
        assert option in text
    assert "0 download, 1 prepare, 2 features, 3 tokenizer, 4 train, 5 average, 6 decode" in " ".join(text.split())


def test_the_list_of_corpora_is_shown_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for corpus in CORPORA:
        assert f"\n  {corpus} " in text


def test_the_continuing_command_keeps_options_and_drops_the_choice_of_stages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["--stage", "2", "--exp-dir", "my exp", "--stop-stage=4", "--force", "--set", "optim.lr=1", "--dry-run"]
    monkeypatch.chdir(ROOT)
    assert cli.continuing_command("yesno", argv) == "egs/yesno/run.sh --exp-dir 'my exp' --set optim.lr=1"
    monkeypatch.chdir(tmp_path)
    assert cli.continuing_command("yesno", []) == str(ROOT / "egs" / "yesno" / "run.sh")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.continuing_command("yesno", ["--seed", "1"]) == "python -m recipes yesno --seed 1"


def test_folders_in_a_checkout_and_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cli.default_exp_dir("yesno") == ROOT / "egs" / "yesno" / "exp"
    assert cli.default_config("yesno") == ROOT / "egs" / "yesno" / "conf" / "train.yaml"
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.default_exp_dir("yesno") == Path("exp/yesno")
    assert cli.default_download_dir("yesno") == Path("data/yesno")


@pytest.mark.parametrize("corpus", ["yesno", "fsdd", "synth"])
def test_run_sh_only_calls_the_recipe_from_any_folder(corpus: str, tmp_path: Path) -> None:
    script = ROOT / "egs" / corpus / "run.sh"
    assert len(script.read_text().splitlines()) <= 12
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert f"python -m recipes {corpus}" in done.stdout
    assert list(tmp_path.iterdir()) == []
