"""Optional packages that targets need."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from asr.errors import UserError


def check_packages(purpose: str, extra: str, *modules: str) -> None:
    """Raises UserError with the command that installs them if any of these modules is missing; imports none."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}; install: pip install 'transducer-asr[{extra}]'")


def imported(name: str, purpose: str, extra: str) -> Any:
    """The module, or a UserError with the command that installs it."""
    check_packages(purpose, extra, name)
    return importlib.import_module(name)


def version_of(distribution: str) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
