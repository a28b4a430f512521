"""Features on a Dask cluster, for corpora that one machine would take too long for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from asr.errors import UserError
from asr.export.packages import check_packages, imported

PURPOSE, EXTRA = "--dask", "dask"
CONNECT_S = 30

logger = logging.getLogger(__name__)


def check_dask(address: str) -> None:
    """Refuses what cannot be an address, and a missing package, before any work starts. Raises UserError."""
    check_packages(PURPOSE, EXTRA, "distributed")
    scheme, found, rest = address.partition("://")
    if not (found and scheme and rest):
        raise UserError(
            f"--dask {address!r} is no address of a scheduler; pass it as it prints it, like tcp://HOST:8786"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that its client logs where a connection is lost: the error says so in one line."""
    loggers = [logging.getLogger(f"distributed.{name}") for name in ("client", "utils")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """What computes on the workers of a scheduler: an executor for ``compute_features``.

    Scheduler and workers need this package, and the same folders under the same names.

    Args:
        address: of the scheduler, like tcp://host:8786.

    Raises:
        UserError: distributed is missing; nobody answers there; workers were lost again and again, or cannot import
            this package.
    """
    check_dask(address)
    distributed = imported("distributed", PURPOSE, EXTRA)
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dask {address}: no scheduler answers there ({str(error).splitlines()[0]}); start one with `dask "
            "scheduler`, and workers with `dask worker ADDRESS`"
        ) from error
    with _quiet(), client:
        if not client.scheduler_info()["workers"]:
            logger.warning("the scheduler at %s has no workers yet; waiting for them (dask worker %s)", *[address] * 2)
        try:
            # not pure: a task leaves a file, and the result of an earlier one is of a folder that is gone
            yield client.get_executor(pure=False)
        except distributed.scheduler.KilledWorker as error:
            raise UserError(
                f"--dask {address}: workers that compute features were lost again and again, perhaps for lack of "
                "memory; give them more, or start fewer of them on a machine"
            ) from error
        except ImportError as error:
            raise UserError(
                f"--dask {address}: {error}; scheduler and workers need the same version of this package"
            ) from error
