"""What one folder of an export is asked to hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from asr.errors import UserError
from asr.export.config import PRECISIONS, ExportConfig, Precision
from asr.models.context import Milliseconds

if TYPE_CHECKING:
    from lhotse import CutSet


@dataclass(frozen=True)
class Spec:
    """One target at one chunk size.

    Args:
        chunk_ms: "full" for whole utterances.
        left_context_ms: of streams.
        precisions: fp32, int8.
        development: recordings with texts on which int8 is chosen, layer by layer; None where there is no int8.
        max_wer_increase: of int8 on them, in percent; of characters with ``training.errors_in``.
    """

    chunk_ms: Milliseconds
    left_context_ms: Milliseconds
    precisions: tuple[Precision, ...] = ("fp32",)
    development: CutSet | None = None
    max_wer_increase: float = 0.3


class Written(NamedTuple):
    """What a target wrote.

    Args:
        files: for each precision, the name of each part's file.
        float_layers: for int8, weight matrices that stay in float.
    """

    files: dict[str, dict[str, str]]
    float_layers: list[str]


def read_spec(
    config: ExportConfig,
    chunk_ms: str | None = None,
    left_context_ms: int | None = None,
    precisions: str | None = None,
    development: CutSet | None = None,
) -> Spec:
    """A spec from settings and from what a command line says instead of them.

    Raises:
        UserError: a chunk, a context or a precision that does not exist; int8 without recordings.
    """
    chunk: Milliseconds = config.chunk_ms[0]
    if chunk_ms is not None:
        if chunk_ms != "full" and not chunk_ms.isdigit():
            raise UserError(f"--chunk-ms {chunk_ms} is neither a number of milliseconds nor full")
        chunk = "full" if chunk_ms == "full" else int(chunk_ms)
    names = config.precisions if precisions is None else precisions.split(",")
    for name in names:
        if name not in PRECISIONS:
            raise UserError(f"unknown precision {name!r}; choose from {', '.join(PRECISIONS)}")
    wanted = [name for name in PRECISIONS if name in names]
    left = config.left_context_ms if left_context_ms is None else left_context_ms
    checked = replace(config, chunk_ms=[chunk], left_context_ms=left, precisions=wanted)  # type: ignore[arg-type]
    if "int8" in wanted and development is None:
        raise UserError(
            "int8 is chosen layer by layer on recordings with texts; pass --cuts, e.g. EXP/data/cuts_valid.jsonl.gz"
        )
    return Spec(chunk, checked.left_context_ms, tuple(checked.precisions), development, config.max_wer_increase)
