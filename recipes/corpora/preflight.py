"""What is worth knowing of one's own recordings before days of training: the findings of the pre-flight report.

DATA/preflight.txt holds them; `preflight_page` makes DATA/preflight.html of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank import FeatureConfig, num_encoder_frames
from recipes.corpora.kaldi_folder import Spoken

QUIET = 10 ** (-50 / 20)
"""A peak below -50 dB of full scale is no speech that anyone meant."""
CLIPPED = 1e-3
"""So much of a recording at full scale is heard."""
UNSPACED = 6
"""Characters from which on a text without a space is hardly one word."""
SHOWN = 10


@dataclass(frozen=True)
class Heard:
    """An utterance and its sound.

    path: of the audio that training will read.
    rate_hz, channels: of the file that it came from; 0 where that is not known.
    peak, clipped: largest sample, and part of the samples at full scale.
    problem: why it cannot be used.
    """

    spoken: Spoken
    path: Path = Path()
    num_samples: int = 0
    digest: str = ""
    rate_hz: int = 0
    channels: int = 0
    peak: float = 0.0
    clipped: float = 0.0
    problem: str = ""

    @property
    def duration_s(self) -> float:
        return self.num_samples / SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Preflight:
    """What was found.

    sizes: a line for each set.
    findings: what was looked for, and the names that it is true of.
    durations_s: of the utterances of each set.
    """

    sizes: list[str]
    findings: list[tuple[str, list[str]]]
    durations_s: dict[str, list[float]]

    def summary(self) -> list[str]:
        """Lines for the log, with some of the names."""
        return [*self.sizes, *(f"{what}: {some(names)}" for what, names in self.findings)]


def look(heard: dict[str, list[Heard]], data_dir: Path, *, characters: bool = False) -> Preflight:
    """Findings about the usable utterances of each set, also written as text.

    Args:
        heard: by set.
        data_dir: where to write.
        characters: whether results are to be character error rates.
    """
    found = Preflight(
        [_sizes(split, every) for split, every in heard.items()],
        [*_within(heard), *_between(heard, characters)],
        {split: [one.duration_s for one in every] for split, every in heard.items()},
    )
    lines = [*found.sizes, *(f"{what}: {len(names)}: {', '.join(names)}" for what, names in found.findings)]
    (data_dir / "preflight.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}"


def _sizes(split: str, found: Sequence[Heard]) -> str:
    if not found:
        return f"{split}: nothing that can be used"
    durations = sorted(one.duration_s for one in found)
    rates = Counter(f"{one.rate_hz} Hz" if one.rate_hz else "unknown rate" for one in found)
    words = sum(len(one.spoken.text.split()) for one in found)
    speakers = {one.spoken.speaker for one in found if one.spoken.has_speaker}
    nobody = {one.spoken.source for one in found if not one.spoken.has_speaker}
    voices = [f"{len(speakers)} speakers"] if speakers else []
    voices += [f"{len(nobody)} recordings of unnamed speakers"] if nobody else []
    lengths = f"{durations[0]:.2f} to {durations[-1]:.2f} s (median {durations[len(durations) // 2]:.2f})"
    sources = ", ".join(f"{count} at {rate}" for rate, count in rates.most_common())
    size = f"{sum(durations) / 3600:.2f} h, {len(found)} utterances of {' and '.join(voices)}"
    return f"{split}: {size}, {lengths}, {words} words, {sources}"


def _within(heard: dict[str, list[Heard]]) -> Iterable[tuple[str, list[str]]]:
    """What may be wrong with single utterances."""
    everyone = [one for found in heard.values() for one in found]
    config = FeatureConfig()
    checks = {
        "of files with several channels, which are mixed into one": lambda one: one.channels > 1,
        "nearly silent, peak below -50 dB": lambda one: one.peak < QUIET,
        "clipped, more than 0.1% of the samples at full scale": lambda one: one.clipped > CLIPPED,
        "more characters than encoder frames of 40 ms, so that a transducer with one token a frame cannot say them": (
            lambda one: len(one.spoken.text.replace(" ", "")) > num_encoder_frames(one.num_samples, config)
        ),
        "longer than 30 s, which costs memory": lambda one: one.duration_s > 30,
    }
    for what, check in checks.items():
        names = [one.spoken.utterance for one in everyone if check(one)]
        if names:
            yield what, names


def _between(heard: dict[str, list[Heard]], characters: bool) -> Iterable[tuple[str, list[str]]]:
    """What utterances have to do with each other."""
    texts = [one.spoken.text for one in heard["train"]]
    unspaced = [text for text in texts if " " not in text and len(text) >= UNSPACED]
    if not characters and 2 * len(unspaced) > len(texts):
        hint = "texts without spaces, for which character error rates are better: --characters, and mostly "
        yield f"{hint}--set tokenizer.kind=char", unspaced
    same: dict[str, list[str]] = defaultdict(list)
    for split, found in heard.items():
        for one in found:
            same[one.digest].append(f"{split}/{one.spoken.utterance}")
    if copies := [" = ".join(names) for names in same.values() if len(names) > 1]:
        yield "the same sound twice", copies
    counts = {split: Counter(c for one in found for c in one.spoken.text) for split, found in heard.items()}
    yield "symbols of the training texts, with counts", [f"{c!r} {n}" for c, n in counts["train"].most_common()]
    if rare := [f"{c!r}" for c, n in counts["train"].items() if n == 1]:
        yield "symbols that training hears once", rare
    for split in heard:
        if strange := [f"{c!r} {n}" for c, n in counts[split].items() if c not in counts["train"]]:
            yield f"symbols of {split} that training never hears", strange
