"""What leaves for devices, as configurations say it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from asr.errors import UserError
from asr.export import find_target
from asr.models.context import Milliseconds, check_chunk, check_left_context

Precision = Literal["fp32", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass
class ExportConfig:
    """Files for devices.

    Args:
        targets: names of ``asr.export.TARGETS`` that the recipe's stage export makes; none by default, since each needs
            packages of its own.
        precisions: fp32, and int8 with weights of 8 bits.
        chunk_ms: what a file hears at a time, each in a folder of its own: multiples of 40 ms for streams, full for
            whole utterances.
        left_context_ms: how far a streaming file hears back beyond its chunk, at least 40 ms.
        max_wer_increase: how much more of the reference words (characters with training.errors_in), in percent, int8
            may get wrong on the development set before layers stay in float, and at most in verification.
    """

    targets: list[str] = field(default_factory=list)
    precisions: list[Precision] = field(default_factory=lambda: ["fp32"])
    chunk_ms: list[Milliseconds] = field(default_factory=lambda: [320])
    left_context_ms: Milliseconds = 5120
    max_wer_increase: float = 0.3

    @property
    def folders(self) -> dict[str, tuple[str, Milliseconds]]:
        """A recipe's folder of each export: its target and chunk."""
        return {
            f"{target}-{chunk if chunk == 'full' else f'{chunk}ms'}": (target, chunk)
            for target in self.targets
            for chunk in self.chunk_ms
        }

    def __post_init__(self) -> None:
        for target in self.targets:
            find_target(target)
        for name in ("precisions", "chunk_ms"):
            if not getattr(self, name):
                raise UserError(f"export.{name} is empty; leave it out for its default")
        for value in self.chunk_ms:
            check_chunk("export.chunk_ms", value)
        check_left_context("export.left_context_ms", self.left_context_ms)
        if self.left_context_ms == "full" or self.left_context_ms < 40:
            raise UserError(
                f"export.left_context_ms={self.left_context_ms}; a file remembers a fixed time, at least 40 ms: "
                "set it to 5120, for example"
            )
        if self.max_wer_increase < 0:
            raise UserError(f"export.max_wer_increase={self.max_wer_increase} must be at least 0")
