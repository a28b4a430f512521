"""Errors become one line and an exit code; options are read strictly."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import pytest

from asr.cli.guard import Parser, describe, guarded, log_to_stdout, nearest
from asr.errors import UserError


def _raise(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("seed=-1 is negative"), 2, "error: seed=-1 is negative"),
        (ValueError("two\n  lines"), 2, "error: two lines"),
        (ValueError(), 2, "error: ValueError"),
        (OSError(errno.ENOSPC, "x", "/d/f"), 2, "error: /d/f: no space left on the disk; free some space or"),
        (OSError(errno.EDQUOT, "x"), 2, "error: the disk quota is used up"),
        (PermissionError(errno.EACCES, "x", "/d/f"), 2, "error: /d/f: permission denied; choose a folder that you may"),
        (OSError(errno.EROFS, "x", "/d/f"), 2, "error: /d/f: the file system is read-only"),
        (FileNotFoundError(errno.ENOENT, "x", "/d/f"), 2, "error: /d/f: no such file or folder"),
        (OSError(errno.EIO, "Input/output error", "/d/f"), 2, "error: /d/f: Input/output error"),
        (OSError("without a number"), 2, "error: OSError: without a number"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(_raise(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_faults_of_the_program_are_not_hidden() -> None:
    with pytest.raises(KeyError):
        guarded(_raise(KeyError("x")))


def test_the_value_of_the_call_is_the_exit_code() -> None:
    assert guarded(lambda: 0) == 0
    assert guarded(lambda: 7) == 7


def test_a_reader_that_went_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(_raise(SystemExit(0))) == 0
    assert guarded(_raise(SystemExit(None))) == 0
    assert guarded(_raise(SystemExit("text"))) == 1


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="asr train")
    made.add_argument("--config", required=True)
    made.add_argument("--seed", type=int, default=3, help="of the training")
    made.add_argument("files", nargs="*")
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # the misspelled option is named, not the one that is missing for that reason
        (["--confg", "x"], r"unknown option --confg; did you mean --config\? "),
        (["--confg=x"], r"unknown option --confg; did you mean --config\? "),
        (["--conf", "x"], "unknown option --conf; did you mean --config"),
        (["--config", "x", "--zzz"], r"unknown option --zzz \(asr train --help"),
        (["--config", "x", "--seed", "a"], "argument --seed: invalid int value: 'a'"),
        (["--config"], "argument --config: expected one argument"),
        ([], "the following arguments are required: --config"),
        (["--config", "x", "-z"], "unknown argument -z"),
    ],
)
def test_options_are_read_strictly(parser: Parser, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parser.parse_args(words)


def test_values_after_a_double_dash_are_no_options(parser: Parser) -> None:
    assert parser.parse_args(["--config", "x", "--", "--odd.wav"]).files == ["--odd.wav"]
    assert parser.parse_args(["--config=x", "--seed", "-1"]).seed == -1


def test_nearest_names_at_most_three() -> None:
    assert nearest("trian", ["train", "average"]) == "; did you mean train?"
    assert nearest("zzz", ["train", "average"]) == ""
    assert nearest("aaa", ["aaaa", "aaab", "aaac", "aaad"]).count(" or ") == 2


def test_an_error_without_text_is_named_by_its_type() -> None:
    assert describe(RuntimeError()) == "RuntimeError"
    assert describe(KeyError("x")) == "KeyError: 'x'"


def test_the_toolkit_logs_to_stdout_once(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stdout()
    log_to_stdout()
    logging.getLogger("recipes.corpora.download").info("downloading %s", "x")
    assert capsys.readouterr().out == "downloading x\n"
