"""Subtitles in the forms SubRip (.srt) and WebVTT (.vtt): a cue has two lines that people can read in time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asr.decoding.transcript import Segment, Transcript
from asr.decoding.words import Word

LINE_CHARACTERS = 42
LINES = 2
LONGEST_S = 7.0
"""Of the words of one cue."""
PAUSE_S = 1.5
"""A pause between words after which a cue ends."""
HOLD_S = 1.0
"""A cue stays so long after its last word, if no other comes."""
SHORTEST_S = 0.04


@dataclass(frozen=True)
class Cue:
    """What is shown from one time to another."""

    start_s: float
    end_s: float
    lines: list[str]


def srt(transcript: Transcript, name: str = "") -> str:
    """The file as SubRip, in which nothing can be escaped: the arrow of its time lines is written otherwise."""
    found = []
    for number, cue in enumerate(cues(transcript.segments), start=1):
        text = "\n".join(cue.lines).replace("-->", "->")
        found.append(f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{text}\n")
    return "\n".join(found)


def vtt(transcript: Transcript, name: str = "") -> str:
    """The file as WebVTT."""
    found = ["WEBVTT\n"]
    for cue in cues(transcript.segments):
        text = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        found.append(f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{text}\n")
    return "\n".join(found)


def cues(segments: Sequence[Segment]) -> list[Cue]:
    """Cues of whole words, in order of time, which do not overlap. A word longer than a line is broken."""
    groups = [group for segment in segments for group in _groups(list(_fitting(segment.words)))]
    found: list[Cue] = []
    for number, group in enumerate(groups):
        start_s = max(group[0].start_s, found[-1].end_s if found else 0.0)
        next_s = groups[number + 1][0].start_s if number + 1 < len(groups) else math.inf
        end_s = max(group[-1].end_s, min(group[-1].end_s + HOLD_S, next_s), start_s + SHORTEST_S)
        found.append(Cue(start_s, end_s, _lines([word.text for word in group])))
    return found


def _groups(words: Sequence[Word]) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group:
            full = len(_lines([one.text for one in [*group, word]])) > LINES
            late = word.start_s - group[-1].end_s >= PAUSE_S or word.end_s - group[0].start_s > LONGEST_S
            if full or late:
                yield group
                group = []
        group.append(word)
    if group:
        yield group


def _fitting(words: Sequence[Word]) -> Iterator[Word]:
    """Words no longer than a line; parts of a word share out its time."""
    for word in words:
        count = -(-len(word.text) // LINE_CHARACTERS)
        part_s = (word.end_s - word.start_s) / count
        for i in range(count):
            text = word.text[i * LINE_CHARACTERS : (i + 1) * LINE_CHARACTERS]
            yield Word(text, word.start_s + i * part_s, word.start_s + (i + 1) * part_s, word.confidence)


def _lines(words: Sequence[str]) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= LINE_CHARACTERS:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _clock(time_s: float, point: str) -> str:
    """Hours of at least two digits, as both forms want them."""
    ms = round(1000 * time_s)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"
