"""Synthetic speech in the official layout of a public corpus, at any size: whoever has the corpus runs the same stages.

English sentences over 500 words as LibriSpeech (train-clean-5, dev-clean-2, test-clean), Mandarin ones over more than a
hundred characters as AISHELL. No sentence of dev or test occurs in train, and train hears no voice of theirs. Words
follow a grammar, their meanings nothing.

    python -m recipes.corpora.synth_layouts --layout librispeech --hours 2 --out DIR
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from asr.cli.guard import Parser, end_of_process, guarded
from asr.data.audio import SAMPLE_RATE_HZ
from asr.errors import UserError
from recipes.corpora.sentences import english, mandarin
from recipes.corpora.synth import (
    SHARD,
    TEST_VOICES,
    TRAIN_BASES,
    TRAIN_VARIANTS,
    VALID_VOICES,
    Utterance,
    deal,
    draw_utterance,
    recordings,
)

TRAIN, DEV, TEST = "train", "dev", "test"
HELD_OUT = 0.05
"""Dev and test have this part of the training sentences each, and ``LEAST`` at least."""
LEAST = 50


@dataclass(frozen=True)
class Layout:
    """What a corpus looks like.

    Args:
        folder: its own name for its folder.
        sentence: draws a text.
        mean_s: seconds of a sentence, about.
        voices: by set; a voice is a speaker.
        place: of set, number of the speaker, of the shard and of the sentence: path of the recording, the id in front.
        write_texts: writes the transcripts, by path of the recording.
    """

    folder: str
    sentence: Callable[[np.random.Generator], str]
    mean_s: float
    voices: dict[str, Sequence[str]]
    place: Callable[[str, int, int, int], Path]
    write_texts: Callable[[Path, dict[Path, str]], None]


def _librispeech_place(part: str, speaker: int, shard: int, number: int) -> Path:
    name = {TRAIN: "train-clean-5", DEV: "dev-clean-2", TEST: "test-clean"}[part]
    chapter = 10000 + shard
    return Path(name, str(speaker), str(chapter), f"{speaker}-{chapter}-{number:04d}.flac")


def _librispeech_texts(root: Path, texts: dict[Path, str]) -> None:
    chapters: dict[Path, list[str]] = {}
    for path, text in sorted(texts.items()):
        chapters.setdefault(path.parent, []).append(f"{path.stem} {text}\n")
    for folder, lines in chapters.items():
        name = f"{folder.parent.name}-{folder.name}.trans.txt"
        (root / folder / name).write_text("".join(lines), encoding="utf-8")


def _aishell_place(part: str, speaker: int, shard: int, number: int) -> Path:
    return Path("wav", part, f"S{speaker:04d}", f"BAC009S{speaker:04d}W{SHARD * shard + number:04d}.wav")


def _aishell_texts(root: Path, texts: dict[Path, str]) -> None:
    lines = [f"{path.stem} {text}\n" for path, text in sorted(texts.items(), key=lambda item: item[0].stem)]
    path = root / "transcript" / "aishell_transcript_v0.8.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines), encoding="utf-8")


LAYOUTS = {
    "librispeech": Layout(
        "LibriSpeech",
        english,
        2.9,
        {
            TRAIN: [f"{base}+{variant}" for base in TRAIN_BASES for variant in TRAIN_VARIANTS],
            DEV: VALID_VOICES,
            TEST: TEST_VOICES,
        },
        _librispeech_place,
        _librispeech_texts,
    ),
    "aishell": Layout(
        "data_aishell",
        mandarin,
        4.8,
        {
            TRAIN: [f"cmn+{variant}" for variant in TRAIN_VARIANTS],
            DEV: ["cmn+iven3", "cmn+Andrea"],
            TEST: ["cmn+m3", "cmn+m7", "cmn+m8", "cmn+f2", "cmn+f5"],
        },
        _aishell_place,
        _aishell_texts,
    ),
}


def plan(layout: Layout, hours: float, seed: int) -> Iterator[list[Utterance]]:
    """Shards of utterances: test, dev, train. ``cut_id`` is the path of the recording."""
    count = max(1, round(3600 * hours / layout.mean_s))
    sizes = {TEST: max(LEAST, round(HELD_OUT * count)), DEV: max(LEAST, round(HELD_OUT * count)), TRAIN: count}
    taken: set[str] = set()
    shard, first_speaker = 0, 1
    for stream, (part, size) in enumerate(sizes.items()):
        rng = np.random.default_rng([seed, stream])
        names = layout.voices[part]
        spoken_by = deal(list(range(len(names))), size, rng)
        fresh: set[str] = set()
        for start in range(0, size, SHARD):
            utterances = []
            for number, voice in enumerate(spoken_by[start : start + SHARD]):
                text = layout.sentence(rng)
                while text in taken or (part != TRAIN and text in fresh):
                    text = layout.sentence(rng)
                fresh.add(text)
                path = layout.place(part, first_speaker + voice, shard, number)
                utterances.append(draw_utterance(str(path), part, text, names[voice], rng))
            yield utterances
            shard += 1
        first_speaker += len(names)
        taken |= fresh if part != TRAIN else set()


def write(layout: Layout, out: Path, hours: float, seed: int = 0, num_jobs: int = 2) -> tuple[Path, dict[str, float]]:
    """Speaks everything; the folder of the corpus, and hours by set. Equal arguments give equal files.

    Raises:
        UserError: the folder is there already; espeak-ng is not installed.
    """
    folder = out / layout.folder
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    if folder.exists():
        raise UserError(f"{folder} is there already; delete it, or choose another --out")
    partial = out / f"partial-{layout.folder}"
    shutil.rmtree(partial, ignore_errors=True)
    seconds: dict[str, float] = dict.fromkeys((TRAIN, DEV, TEST), 0.0)
    texts: dict[Path, str] = {}
    # Threads: the work is in child processes and in array code that releases the interpreter's lock.
    with ThreadPoolExecutor(max_workers=max(1, num_jobs)) as pool:
        shards = list(plan(layout, hours, seed))
        for utterances, made in zip(shards, pool.map(lambda s: _speak(s, partial, seed), shards), strict=True):
            for utterance, duration_s in zip(utterances, made, strict=True):
                if duration_s:
                    texts[Path(utterance.cut_id)] = utterance.text
                    seconds[utterance.split] += duration_s
    layout.write_texts(partial, texts)
    partial.rename(folder)
    return folder, {part: value / 3600 for part, value in seconds.items()}


def unheard_characters(layout: Layout, hours: float, seed: int) -> list[str]:
    """What the texts of dev and test are written with and those of train are not."""
    written: dict[bool, set[str]] = {True: set(), False: set()}
    for shard in plan(layout, hours, seed):
        for utterance in shard:
            written[utterance.split == TRAIN] |= set(utterance.text)
    return sorted(written[False] - written[True])


def _speak(utterances: Sequence[Utterance], root: Path, seed: int) -> list[float]:
    """Writes one shard; seconds of each, 0 where espeak-ng gave no sound."""
    durations = []
    for utterance, pcm in zip(utterances, recordings(utterances, seed), strict=True):
        if pcm is None:
            durations.append(0.0)
            continue
        path = root / utterance.cut_id
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(path), pcm, SAMPLE_RATE_HZ, subtype="PCM_16")
        durations.append(len(pcm) / SAMPLE_RATE_HZ)
    return durations


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m recipes.corpora.synth_layouts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", choices=tuple(LAYOUTS), required=True, help="whose folders and names")
    parser.add_argument("--hours", type=float, required=True, metavar="H", help="of training speech, about")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the corpus becomes a folder in it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sentences, voices and noise")
    parser.add_argument("--num-jobs", type=int, default=2, metavar="N", help="processes that speak")
    args: argparse.Namespace = parser.parse_args(argv)
    if not 0 < args.hours <= 10000:
        raise UserError(f"--hours {args.hours} is not between 0 and 10000")
    folder, hours = write(LAYOUTS[args.layout], args.out, args.hours, args.seed, args.num_jobs)
    if unheard := unheard_characters(LAYOUTS[args.layout], args.hours, args.seed):
        print(
            f"warning: {len(unheard)} characters of dev and test are in no training text, such as {unheard[0]}; a "
            "tokenizer made of it cannot spell them: ask for more --hours"
        )
    said = ", ".join(f"{part} {value:.2f} h" for part, value in hours.items())
    print(f"{folder}: {said}; --corpus-dir {args.out} runs egs/{args.layout}/run.sh on it")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m recipes.corpora.synth_layouts``."""
    raise SystemExit(end_of_process(guarded(lambda: _run(argv))))


if __name__ == "__main__":
    main()
