"""What is worth knowing of one's own recordings before days of training: the pre-flight report.

DATA/preflight.txt holds it, and DATA/durations.png how long utterances are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank import FeatureConfig, num_encoder_frames
from recipes.corpora.kaldi_folder import Spoken

QUIET = 10 ** (-50 / 20)
"""A peak below -50 dB of full scale is no speech that anyone meant."""
CLIPPED = 1e-3
"""So much of a recording at full scale is heard."""
SHOWN = 10


@dataclass(frozen=True)
class Heard:
    """An utterance and its sound.

    path: of the audio that training will read.
    rate_hz: of the file that it came from; 0 where that is not known.
    peak, clipped: largest sample, and part of the samples at full scale.
    problem: why it cannot be used.
    """

    spoken: Spoken
    path: Path = Path()
    num_samples: int = 0
    digest: str = ""
    rate_hz: int = 0
    peak: float = 0.0
    clipped: float = 0.0
    problem: str = ""

    @property
    def duration_s(self) -> float:
        return self.num_samples / SAMPLE_RATE_HZ


def report(heard: dict[str, list[Heard]], data_dir: Path) -> list[str]:
    """Writes the report of the usable utterances of each split; its first lines, for the log."""
    sizes = [_sizes(split, found) for split, found in heard.items()]
    findings = [*_within(heard), *_between(heard)]
    lines = [*sizes, *(f"{what}: {len(names)}: {', '.join(names)}" for what, names in findings)]
    path = data_dir.absolute() / "preflight.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(heard, data_dir / "durations.png")
    return [*sizes, *(f"{what}: {_some(names)}" for what, names in findings), f"pre-flight report: {path}"]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}"


def _sizes(split: str, found: Sequence[Heard]) -> str:
    if not found:
        return f"{split}: nothing that can be used"
    durations = sorted(one.duration_s for one in found)
    rates = Counter(f"{one.rate_hz} Hz" if one.rate_hz else "unknown rate" for one in found)
    words = sum(len(one.spoken.text.split()) for one in found)
    speakers = len({one.spoken.speaker for one in found})
    lengths = f"{durations[0]:.2f} to {durations[-1]:.2f} s (median {durations[len(durations) // 2]:.2f})"
    sources = ", ".join(f"{count} at {rate}" for rate, count in rates.most_common())
    size = f"{sum(durations) / 3600:.2f} h, {len(found)} utterances of {speakers} speakers"
    return f"{split}: {size}, {lengths}, {words} words, {sources}"


def _within(heard: dict[str, list[Heard]]) -> Iterable[tuple[str, list[str]]]:
    """What may be wrong with single utterances."""
    everyone = [one for found in heard.values() for one in found]
    config = FeatureConfig()
    checks = {
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


def _between(heard: dict[str, list[Heard]]) -> Iterable[tuple[str, list[str]]]:
    """What utterances have to do with each other."""
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


def _plot(heard: dict[str, list[Heard]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    longest = max((one.duration_s for found in heard.values() for one in found), default=1.0)
    bins = np.linspace(0, longest, 41).tolist()
    axes.hist([[one.duration_s for one in found] for found in heard.values()], bins, stacked=True, label=list(heard))
    axes.set_xlabel("seconds")
    axes.set_ylabel("utterances")
    axes.legend()
    figure.savefig(path, dpi=120)
