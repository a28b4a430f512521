"""custom: your own recordings, from Kaldi data folders or lhotse manifests.

DIR of `--corpus-dir DIR` holds what to train on as `train`, and what to choose and test on as `valid` (or `dev`) and
`test` (or `eval`). Each is a Kaldi data folder (wav.scp and text; segments and utt2spk where there are such files) or a
lhotse manifest of cuts, `cuts_train.jsonl.gz`. Without valid or test, a part of train is held out for it.

Recordings are read whole before anything else: what cannot be used is left out and named, and the pre-flight report
says what else may surprise. Files of 16 kHz mono stay where they are; others, and segments, become such files.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from asr.data.audio import SAMPLE_RATE_HZ, AudioError, read_audio
from asr.errors import UserError
from recipes.corpora.audio import MIN_DURATION_S, pcm_digest, to_pcm16, write_wav
from recipes.corpora.base import CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.kaldi_folder import (
    FILES,
    Bad,
    Spoken,
    command_output,
    is_kaldi_folder,
    missing_files,
    read_kaldi_folder,
)
from recipes.corpora.preflight import Heard, look

NAME = "custom"
_NAMES = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test", "eval")}
_EXPECTED = f"train/ (a Kaldi data folder with {' and '.join(FILES)}) or cuts_train.jsonl.gz (of lhotse)"


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus.

    held_out: part of the training utterances that is valid, and part that is test, where there is no set of its own.
    run_commands: whether entries of wav.scp that are commands ("sph2pipe ... |") may run.
    characters: whether results are character error rates, for texts without spaces.
    """

    held_out: float = 0.05
    run_commands: bool = False
    characters: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 0.5:
            raise UserError(f"held_out={self.held_out} is not between 0 and 0.5")

    @property
    def scores_characters(self) -> bool:
        return self.characters


def download(dest: Path, options: Options) -> Path:
    """There is nothing to download."""
    raise UserError(f"{NAME} has no download; pass --corpus-dir DIR with {_EXPECTED} in it")


def _sets(corpus_dir: Path | None) -> dict[str, Path]:
    """By split: the data folder or the manifest."""
    if corpus_dir is None or not corpus_dir.is_dir():
        raise UserError(f"--corpus-dir {corpus_dir or 'DIR'} is needed, a folder with {_EXPECTED}")
    found: dict[str, Path] = {}
    for split, names in _NAMES.items():
        for name in names:
            manifests = [corpus_dir / f"cuts_{name}.jsonl{end}" for end in (".gz", "")]
            places = [path for path in manifests if path.is_file()]
            places += [corpus_dir / name] if is_kaldi_folder(corpus_dir / name) else []
            if not places and (missing := missing_files(corpus_dir / name)):
                raise UserError(f"{corpus_dir / name} has no {missing}, which a Kaldi data folder needs; add it")
            if len(places) > 1 or (places and split in found):
                raise UserError(f"{corpus_dir} has {split} twice, as {found.get(split, places[0])} and {places[-1]}")
            if places:
                found[split] = places[0]
    if "train" not in found:
        raise UserError(f"{corpus_dir} has no training data: {_EXPECTED} is needed")
    return found


def _read(place: Path, bad: Bad) -> list[Spoken]:
    if place.is_dir():
        return read_kaldi_folder(place, bad)
    from asr.data.manifests import load_cuts

    found = []
    for line, cut in enumerate(load_cuts(place), 1):
        sources = cut.recording.sources if cut.recording is not None else []
        text = " ".join(part.text for part in cut.supervisions if part.text)
        if len(sources) != 1 or sources[0].type != "file":
            bad(place, f"{cut.id} is not of one audio file", line)
        elif not text:
            bad(place, f"{cut.id} has no text", line)
        else:
            whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-3
            start_s, end_s = (None, None) if whole else (cut.start, cut.end)
            named = cut.supervisions[0].speaker
            source = str(Path(sources[0].source).absolute())
            speaker, has_speaker = named or cut.id, bool(named)
            found.append(Spoken(cut.id, source, text, speaker, place, line, start_s, end_s, has_speaker))
    return found


def _hold_out(heard: dict[str, list[Heard]], part: float, writer: CorpusWriter) -> list[str]:
    """Moves usable utterances of train to the sets that are missing, by a hash of their recording; says so."""
    notes = []
    for split in ("valid", "test"):
        if split in heard:
            continue
        sources = {one.spoken.source for one in heard["train"] if not one.problem}
        ordered = sorted(sources, key=lambda source: hashlib.sha256(f"{split} {source}".encode()).digest())
        chosen = set(ordered[: max(1, round(part * len(ordered)))])
        held_out = [one for one in heard["train"] if one.spoken.source in chosen and not one.problem]
        moved = {id(one) for one in held_out}
        heard["train"] = [one for one in heard["train"] if id(one) not in moved]
        heard[split] = [_moved(one, split, writer) for one in held_out]
        notes.append(
            f"{split}: {len(chosen)} of {len(ordered)} training recordings, held out, whose speakers training may hear"
        )
    if notes and not all(any(not one.problem for one in found) for found in heard.values()):
        raise UserError("there are too few training recordings to hold some out; give valid and test sets")
    return notes


def _moved(one: Heard, split: str, writer: CorpusWriter) -> Heard:
    """An utterance of train in another set; so is the file that was written for it."""
    if one.path != writer.audio_path("train", one.spoken.utterance):
        return one
    path = writer.audio_path(split, one.spoken.utterance)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace(one, path=one.path.rename(path))


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Write cuts, audio where it is needed, and the findings about it. ``seed`` is accepted and not needed."""
    places = _sets(corpus_dir)
    writer = CorpusWriter(data_dir, options.splits)
    sets = {split: _read(place, writer.bad) for split, place in places.items()}
    listed = len(writer.bad_rows) + sum(map(len, sets.values()))
    heard: dict[str, list[Heard]] = {}
    with ThreadPoolExecutor(max(1, num_jobs)) as pool:
        for split, every in sets.items():
            groups: dict[str, list[Spoken]] = defaultdict(list)
            for one in every:
                groups[one.source].append(one)
            made = pool.map(lambda group, split=split: _hear(group, split, writer, options), groups.values())
            heard[split] = [one for found in made for one in found]
    notes = _hold_out(heard, options.held_out, writer)
    heard = {split: heard[split] for split in options.splits}
    for split, found in heard.items():
        for utterance in found:
            _add(writer, split, utterance)
    usable = {split: [one for one in found if not one.problem] for split, found in heard.items()}
    preflight = look(usable, data_dir, characters=options.characters)
    return replace(writer.finish(listed, notes=[*notes, *preflight.summary()]), preflight=preflight)


def _add(writer: CorpusWriter, split: str, one: Heard) -> None:
    spoken = one.spoken
    if one.problem:
        writer.bad(spoken.listed_in, f"{spoken.utterance}: {one.problem}", spoken.line)
    else:
        writer.add_file(split, spoken.utterance, one.path, one.num_samples, one.digest, spoken.text, spoken.speaker)


def _hear(group: Sequence[Spoken], split: str, writer: CorpusWriter, options: Options) -> list[Heard]:
    """Reads one recording, and writes its utterances where it cannot stay what it is."""
    try:
        samples, rate_hz, channels = _samples(group[0], options)
    except AudioError as error:
        return [Heard(one, problem=f"{error} ({one.source})") for one in group]
    return [_one(one, samples, rate_hz, channels, writer.audio_path(split, one.utterance)) for one in group]


def _samples(spoken: Spoken, options: Options) -> tuple[np.ndarray, int, int]:
    """float32 [N] at 16 kHz, and rate and channels of the file, 0 where they are not known."""
    source = spoken.source
    if spoken.is_command:
        if not options.run_commands:
            raise AudioError("its entry is a command; pass --run-commands if you trust it, or write files")
        return command_output(source), 0, 0
    samples = read_audio(source)
    try:
        info = soundfile.info(source)
    except soundfile.LibsndfileError:  # ffmpeg read it
        return samples, 0, 0
    return samples, info.samplerate, info.channels


def _one(spoken: Spoken, samples: np.ndarray, rate_hz: int, channels: int, path: Path) -> Heard:
    in_place = (rate_hz, channels) == (SAMPLE_RATE_HZ, 1)
    if spoken.start_s is not None:
        end = len(samples) if spoken.end_s is None else round(spoken.end_s * SAMPLE_RATE_HZ)
        if end > len(samples) + SAMPLE_RATE_HZ // 10:
            problem = f"it ends at {spoken.end_s} s, but the recording at {len(samples) / SAMPLE_RATE_HZ:.2f} s"
            return Heard(spoken, problem=problem)
        samples, in_place = samples[round(spoken.start_s * SAMPLE_RATE_HZ) : end], False
    if len(samples) < MIN_DURATION_S * SAMPLE_RATE_HZ:
        return Heard(spoken, problem=f"it holds {len(samples) / SAMPLE_RATE_HZ:.3f} s of audio")
    level = np.abs(samples)
    if not level.any():
        return Heard(spoken, problem="it holds nothing but zeros")
    pcm = to_pcm16(samples)
    if not in_place:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, pcm)
    return Heard(
        spoken,
        Path(spoken.source) if in_place else path,
        len(samples),
        pcm_digest(pcm),
        rate_hz,
        channels,
        peak=float(level.max()),
        clipped=float((level >= 0.999).mean()),
    )
