"""What every command line of the toolkit shares: a strict argument parser, and errors as one line.

Exit codes: 0 done, or stopped by SIGTERM with nothing lost, 1 a fault of the program (with traceback), 2 something that
the user can mend (one line ``error: ...`` on stderr, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from asr.errors import Terminated, UserError

_OS_HINTS = {
    errno.ENOSPC: "no space left on the disk; free some space or choose another folder, then run this again",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder, then run this again",
    errno.EACCES: "permission denied; choose a folder that you may write, or change the permissions",
    errno.EPERM: "operation not permitted; choose a folder that you may write, or change the permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "this is a folder, a file was expected",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
}


def nearest(word: str, choices: Iterable[str]) -> str:
    """The valid names closest to ``word``, to append to a message: ``; did you mean a or b?``, or an empty string."""
    found = difflib.get_close_matches(word, sorted(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something; ``(default: None)`` does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default == []
        return action.help if empty else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` without abbreviations, with defaults in --help, raising ``UserError`` instead of exiting."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = list(sys.argv[1:] if args is None else args)
        # Misspelled options first: argparse would rather complain that the right spelling is missing.
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.split("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                raise UserError(
                    f"unknown option {name}{nearest(name, self._option_string_actions)} ({self.prog} --help lists them)"
                )
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise UserError(f"unknown argument {unknown[0]} ({self.prog} --help lists the arguments)")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def describe(error: BaseException) -> str:
    """One line that says what went wrong; for errors of the operating system with the file and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        hint = _OS_HINTS.get(error.errno, error.strerror or os.strerror(error.errno))
        name = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        return f"{os.fspath(name)}: {hint}" if name else hint
    text = " ".join(str(error).split())
    if isinstance(error, UserError) and text:
        return text
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises ``Terminated`` at once: for work that leaves nothing to save.

    The training loop, which has something to save, takes the signal over while it runs.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: someone else owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def guarded(call: Callable[[], int]) -> int:
    """Runs ``call`` and returns the exit code (head of this module). Other exceptions pass: they are our own faults."""
    try:
        return call()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("SIGTERM: stopped with nothing left to save; the same command goes on", flush=True)
        return 0
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`): keep the interpreter from failing again at its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))


def end_of_process(code: int) -> int:
    """``code``, which SIGTERM can no longer change: with torch loaded, the interpreter takes a second to shut down."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


class _StdoutHandler(logging.Handler):
    """Prints to whatever ``sys.stdout`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def log_to_stdout() -> None:
    """Shows what the toolkit itself logs; other libraries are left as they are. Calling it again changes nothing."""
    for name in ("asr", "losses", "recipes"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
            logger.addHandler(_StdoutHandler())
