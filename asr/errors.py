"""Errors that a user can act on, and the request to stop."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input or a state of the disk that the user can mend.

    The message is one line: what is wrong, the value, the limit, and what to change. Command-line programs print it
    as ``error: <message>`` and exit with code 2, without a traceback.
    """


class CheckpointError(UserError):
    """A file or folder that is no checkpoint, is damaged, or belongs to another model or version."""


class StartAgain(UserError):
    """Only this try has failed: all processes have to start anew, as they do after the loss of one."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM came. Not an ``Exception``: what guards against damaged files must not take it for damage."""
