"""Words of a token sequence, with times and confidences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asr.data.tokenizer import SPACE
from asr.models.context import ENCODER_FRAME_MS


def seconds_of(frames: int) -> float:
    """The time at which an encoder frame begins."""
    return frames * ENCODER_FRAME_MS / 1000


def frames_of(time_s: float) -> int:
    """The encoder frame that begins at a time, or nearest to it."""
    return round(time_s * 1000 / ENCODER_FRAME_MS)


@dataclass(frozen=True)
class Word:
    """A word as it was emitted: from the frame of its first token to the end of the frame of its last, in seconds.

    Transducers emit a token once they are sure of it, often behind its sound, and say nothing of its length.
    ``confidence`` is the product of those of its tokens: the probability of the word given what came before.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float


def timed_words(
    characters: Iterable[tuple[str, Sequence[int]]], frames: Sequence[int], confidences: Sequence[float]
) -> list[Word]:
    """Splits what tokens spell at its spaces, as ``Tokenizer.decode`` does.

    Args:
        characters: of ``Tokenizer.characters``: each with the positions of its tokens.
        frames, confidences: as in ``Hypothesis``, frames of 40 ms from the start of the audio.
    """
    words: list[Word] = []
    # of the word that is being spelt: its characters, and the positions of their tokens
    text = ""
    parts: list[int] = []

    def close() -> None:
        if text:
            confidence = math.prod(confidences[i] for i in dict.fromkeys(parts))
            words.append(Word(text, seconds_of(frames[parts[0]]), seconds_of(frames[parts[-1]] + 1), confidence))

    for character, positions in characters:
        if character.isspace():
            close()
            text, parts = "", []
        else:
            text += character
            parts += positions
    close()
    return words


def pause_between(
    symbols: Sequence[str],
    tokens: Sequence[int],
    frames: Sequence[int],
    begin: int,
    end: int,
    inside: frozenset[int] = frozenset(),
) -> int:
    """Where to cut a stretch that is too long: the middle of the widest gap between words in its second half.

    Where no two words meet there, as in writing without spaces, tokens count as words; without any, it is cut at its
    end.

    Args:
        symbols: of the tokenizer, by token id.
        tokens, frames: as in ``Hypothesis``, frames within ``begin`` to ``end``.
        begin, end: encoder frames of the stretch; what follows the last token is a gap too.
        inside: tokens that go on within a character: nothing is cut before them.

    Returns:
        An encoder frame, above ``begin`` and at most ``end``.
    """
    gaps = []  # (width, middle), then whether words meet there
    for i in range(1, len(tokens) + 1):
        if i < len(tokens) and tokens[i] in inside:
            continue
        after, before = frames[i - 1] + 1, frames[i] if i < len(tokens) else end
        middle = (after + before + 1) // 2
        if 2 * (middle - begin) >= end - begin:
            meet = i < len(tokens) and (symbols[tokens[i - 1]].endswith(SPACE) or symbols[tokens[i]].startswith(SPACE))
            gaps.append(((before - after, middle), meet))
    if not gaps:
        return end
    # behind the last token a word may go on or not: that gap is one of tokens and, where there are words, one of words
    words = [gap for gap, meet in gaps if meet]
    return max([*words, gaps[-1][0]] if words else [gap for gap, _ in gaps])[1]
