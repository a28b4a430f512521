"""How much of an utterance an encoder frame hears, as configurations say it: in milliseconds, or all of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from asr.errors import UserError

ENCODER_FRAME_MS = 40

Milliseconds = Literal["full"] | int


class Context(NamedTuple):
    """Chunk and left context in encoder frames of 40 ms, as ``attention_mask`` takes them: 0 and -1 are all."""

    chunk_frames: int = 0
    left_frames: int = -1


def context(chunk_ms: Milliseconds, left_context_ms: Milliseconds) -> Context:
    """Values that ``check_chunk`` and ``check_left_context`` have passed, in frames; a full chunk hears all."""
    if chunk_ms == "full":
        return Context()
    left_frames = -1 if left_context_ms == "full" else left_context_ms // ENCODER_FRAME_MS
    return Context(chunk_ms // ENCODER_FRAME_MS, left_frames)


def check_chunk(name: str, value: Milliseconds) -> None:
    """Raises ValueError for a chunk that is no whole number of encoder frames."""
    if value != "full" and (value < ENCODER_FRAME_MS or value % ENCODER_FRAME_MS):
        raise ValueError(f"{name}={value} must be a multiple of {ENCODER_FRAME_MS} ms of at least that, or full")


def check_left_context(name: str, value: Milliseconds) -> None:
    """Raises ValueError for a left context that is no whole number of encoder frames."""
    if value != "full" and (value < 0 or value % ENCODER_FRAME_MS):
        raise ValueError(f"{name}={value} must be a multiple of {ENCODER_FRAME_MS} ms, or full")


def chunk_list(name: str, text: str) -> list[Milliseconds]:
    """``full,640,320`` as chunks in ms, each once, in their order.

    Args:
        name: of the option, for errors.
        text: with commas between.

    Raises:
        UserError, ValueError: an entry is neither full nor a multiple of 40 ms.
    """
    found: dict[Milliseconds, None] = {}
    for word in map(str.strip, text.split(",")):
        if word != "full" and not word.lstrip("+-").isdigit():
            raise UserError(f"{name}: {word!r} is no number of milliseconds; pass such as 160,320,full")
        chunk: Milliseconds = "full" if word == "full" else int(word)
        check_chunk(name, chunk)
        found[chunk] = None
    return list(found)
