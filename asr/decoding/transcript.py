"""What a recording says: segments with words and times. Every way of decoding gives this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from asr.data.tokenizer import Tokenizer
from asr.decoding.search import Hypothesis
from asr.decoding.words import Word, timed_words


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording, as a rule between two endpoints.

    ``hypothesis.frames`` and the times of words count from the start of the recording. ``final`` is False while the
    stretch goes on: what is there stays, and more may come.
    """

    start_s: float
    end_s: float
    hypothesis: Hypothesis
    text: str
    words: list[Word]
    final: bool = True


@dataclass(frozen=True)
class Transcript:
    """One file: its segments with text, in order of time, or in ``error`` why there are none."""

    path: Path
    segments: list[Segment] = field(default_factory=list)
    duration_s: float = 0.0
    error: str | None = None

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words]


def make_segment(
    tokenizer: Tokenizer, hypothesis: Hypothesis, start_s: float, end_s: float, *, final: bool = True
) -> Segment:
    """The segment of a hypothesis whose frames count from the start of the recording."""
    tokens, frames, confidences = hypothesis.tokens, hypothesis.frames, hypothesis.confidences
    words = timed_words(tokenizer.characters(tokens), frames, confidences)
    return Segment(start_s, end_s, hypothesis, tokenizer.decode(tokens), words, final)
