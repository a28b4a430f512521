"""synth: spoken commands and digit strings that espeak-ng speaks; nothing to download.

Many voices (base voice + variant), rates and pitches; noise at 10 to 20 dB signal-to-noise ratio. No test or valid
sentence occurs in training. Every test voice has a variant that training never heard, half of them also a base voice
that it never heard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from asr.data.audio import SAMPLE_RATE_HZ, resample
from asr.errors import UserError
from recipes.corpora import noise
from recipes.corpora.audio import join, limit_peak, pcm_digest, rms, to_pcm16, write_wav
from recipes.corpora.base import CorpusOptions, CorpusWriter, Prepared
from recipes.corpora.commands import sentences
from recipes.corpora.espeak import Request, speak

T = TypeVar("T")
NAME = "synth"
NUM_VALID, NUM_TEST = 150, 300
SHARD = 50
"""Utterances of one child process. Part of the definition: espeak-ng's samples depend on what it spoke before."""
SNR_DB = (10.0, 20.0)
LEVEL_DB = (-32.0, -20.0)

TRAIN_BASES = ("en-us", "en", "en-029", "en-gb-scotland", "en-gb-x-gbcwmd")
# Left out: whispers, robots, monsters, echoes, variants that hardly differ from a neighbour, and loud ones that clip.
TRAIN_VARIANTS = (
    "m1", "m2", "m4", "m5", "m6", "f1", "f3", "f4", "Alex", "Andy", "max", "grandpa", "grandma", "Gene", "pablo", "rob",
    "robert", "Hugo", "Nguyen", "michel", "miguel", "sandro", "quincy", "Mario", "Denis", "boris", "victor", "klatt4",
    "belinda", "steph", "anika", "aunty", "edward", "gustave", "travis", "Michael",
)  # fmt: skip
VALID_VOICES = ("en-us+iven3", "en+Andrea")
"""Voices of a third of the valid strings; training never hears them. The other valid strings have training voices."""
TEST_VOICES = (
    "en-us-nyc+m3", "en-us-nyc+f2", "en-gb-x-rp+m7", "en-gb-x-rp+f5", "en-gb-x-gbclan+m8", "en-gb-x-gbclan+f2",
    "en-us+m3", "en-us+f5", "en+m8", "en+f2", "en-029+m7", "en-gb-scotland+f5",
)  # fmt: skip


@dataclass
class Options(CorpusOptions):
    """Settings of the corpus.

    num_train: training sentences (3,000 are about 2.5 hours). Valid and test strings do not depend on it.
    num_words: further training utterances of one or two words alone, from which the sound of a word is learnt soonest.
    """

    num_train: int = 3000
    num_words: int = 2000

    def __post_init__(self) -> None:
        if self.num_train < 1:
            raise UserError(f"num_train={self.num_train} is too small; pass at least 1")
        if self.num_words < 0:
            raise UserError(f"num_words={self.num_words} is too small; pass at least 0")

    @property
    def expected_hours(self) -> dict[str, float]:
        train_s = 3.0 * self.num_train + 0.6 * self.num_words
        return {"train": train_s / 3600, "valid": 3.0 * NUM_VALID / 3600, "test": 3.0 * NUM_TEST / 3600}


@dataclass(frozen=True)
class Utterance:
    """One line of the plan: what is said, by whom, how, and in what noise."""

    cut_id: str
    split: str
    request: Request
    noise: str
    snr_db: float
    level_db: float
    lead_s: float
    tail_s: float

    @property
    def text(self) -> str:
        """The transcript: upper case, no punctuation."""
        return self.request.text.replace(",", "").upper()


def voices() -> dict[str, list[str]]:
    """Voices by split; "valid_unheard" are those of the valid strings that training does not hear."""
    train = [f"{base}+{variant}" for base in TRAIN_BASES for variant in TRAIN_VARIANTS]
    return {"train": train, "valid_unheard": list(VALID_VOICES), "test": list(TEST_VOICES)}


def download(dest: Path, options: Options) -> Path:
    """Nothing to download: the recordings are made by ``prepare``."""
    dest.mkdir(parents=True, exist_ok=True)
    return dest


def plan(seed: int, options: Options) -> list[Utterance]:
    """All utterances. Test depends on the seed alone, valid on it and test, training also on the options."""
    names = voices()
    counts = {"test": NUM_TEST, "valid": NUM_VALID, "train": options.num_train}
    taken: set[str] = set()
    utterances = []
    for stream, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, stream])
        texts = sentences(count, rng, taken, distinct=split != "train")
        taken.update(texts if split != "train" else ())
        if split == "valid":
            unheard = count // 3
            spoken_by = deal(names["valid_unheard"], unheard, rng) + deal(names["train"], count - unheard, rng)
        else:
            spoken_by = deal(names[split], count, rng)
        utterances += [
            draw_utterance(f"{split}-{index:05d}", split, text, voice, rng)
            for index, (text, voice) in enumerate(zip(texts, spoken_by, strict=True))
        ]
    vocabulary = sorted(
        {word for utterance in utterances if utterance.split == "train" for word in utterance.text.split()}
    )
    rng = np.random.default_rng([seed, len(counts)])
    spoken = deal(vocabulary, options.num_words + options.num_words // 2, rng)
    singles, pairs = spoken[: options.num_words // 2], spoken[options.num_words // 2 :]
    texts = singles + [" ".join(pair) for pair in zip(pairs[::2], pairs[1::2], strict=False)]
    return utterances + [
        draw_utterance(f"train-word-{index:05d}", "train", text, voice, rng)
        for index, (text, voice) in enumerate(zip(texts, deal(names["train"], len(texts), rng), strict=True))
    ]


def deal(names: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """``count`` names in random order, each about equally often."""
    rounds = [rng.permutation(len(names)) for _ in range(-(-count // len(names)))]
    return [names[i] for i in np.concatenate(rounds)[:count]]


def draw_utterance(cut_id: str, split: str, text: str, voice: str, rng: np.random.Generator) -> Utterance:
    """Rate, pitch, pauses, noise and level of one utterance."""
    words = text.lower().split(" ")
    # People pause inside numbers; a comma makes espeak-ng do so. Nothing else is pronounced differently.
    spoken = [
        word + ("," if index + 1 < len(words) and words[0] in ("call", *_SPOKEN_DIGITS) and rng.random() < 0.15 else "")
        for index, word in enumerate(words)
    ]
    request = Request(
        text=" ".join(spoken),
        voice=voice,
        rate=int(rng.integers(135, 206)),
        pitch=int(rng.integers(30, 71)),
        range=int(rng.integers(30, 81)),
    )
    return Utterance(
        cut_id=cut_id,
        split=split,
        request=request,
        noise=noise.KINDS[rng.integers(len(noise.KINDS))],
        snr_db=round(float(rng.uniform(*SNR_DB)), 2),
        level_db=round(float(rng.uniform(*LEVEL_DB)), 2),
        lead_s=float(rng.uniform(0.1, 0.4)),
        tail_s=float(rng.uniform(0.1, 0.4)),
    )


_SPOKEN_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """Without what espeak-ng adds before and after: below 1% of the peak."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=0.0))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def mix(speech: np.ndarray, utterance: Utterance, others: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Speech with silence around it, noise at the wanted ratio of RMS over the spoken part, and the wanted level."""
    rng = np.random.default_rng([seed, 7, *utterance.cut_id.encode()])
    lead, tail = (np.zeros(int(s * SAMPLE_RATE_HZ), np.float32) for s in (utterance.lead_s, utterance.tail_s))
    signal = join([lead, speech, tail], fade_s=0.002)
    background = noise.make(utterance.noise, len(signal), rng, others)
    mixture = signal + background * np.float32(rms(speech) * 10 ** (-utterance.snr_db / 20))
    return limit_peak((mixture * (10 ** (utterance.level_db / 20) / rms(mixture))).astype(np.float32))


@dataclass(frozen=True)
class _Written:
    num_samples: int
    digest: str


def recordings(shard: Sequence[Utterance], seed: int) -> Iterator[np.ndarray | None]:
    """Speak, resample and mix one shard: int16 [N] at 16 kHz of each utterance; None where espeak-ng gave no sound."""
    rate, raw = speak([utterance.request for utterance in shard])
    clean = [_trimmed(resample(np.frombuffer(data, np.int16).astype(np.float32) / 32768, rate)) for data in raw]
    audible = [samples for samples in clean if rms(samples) > 0]
    for utterance, samples in zip(shard, clean, strict=True):
        yield to_pcm16(mix(samples, utterance, audible, seed)) if rms(samples) > 0 else None


def _make_shard(shard: Sequence[Utterance], writer: CorpusWriter, seed: int) -> list[_Written | None]:
    """Write one shard; None where espeak-ng gave no sound."""
    written: list[_Written | None] = []
    for utterance, pcm in zip(shard, recordings(shard, seed), strict=True):
        if pcm is None:
            written.append(None)
            continue
        write_wav(writer.audio_path(utterance.split, utterance.cut_id), pcm)
        written.append(_Written(len(pcm), pcm_digest(pcm)))
    return written


def prepare(corpus_dir: Path | None, data_dir: Path, *, seed: int, options: Options, num_jobs: int = 2) -> Prepared:
    """Speak and write everything, and ``voices.json``. ``corpus_dir`` is not used, ``num_jobs`` changes only the time.

    Raises UserError if espeak-ng is not installed.
    """
    speak([Request("ready", TRAIN_BASES[0])])  # fails here, before older output is deleted
    utterances = plan(seed, options)
    writer = CorpusWriter(data_dir)
    shards = []
    for split in ("test", "valid", "train"):
        of_split = [utterance for utterance in utterances if utterance.split == split]
        shards += [of_split[start : start + SHARD] for start in range(0, len(of_split), SHARD)]
    # Threads: the work is in child processes and in array code that releases the interpreter's lock.
    with ThreadPoolExecutor(max_workers=max(1, num_jobs)) as pool:
        results = list(pool.map(lambda shard: _make_shard(shard, writer, seed), shards))
    for shard, made in zip(shards, results, strict=True):
        for utterance, written in zip(shard, made, strict=True):
            _add(writer, utterance, written)
    (writer.data_dir / "voices.json").write_text(json.dumps(voices(), indent=1) + "\n", encoding="utf-8")
    words = {word for utterance in utterances for word in utterance.text.split()}
    note = f"{len(words)} distinct words; {len(voices()['train'])} training voices, {len(TEST_VOICES)} others in test"
    return writer.finish(len(utterances), notes=[note])


def _add(writer: CorpusWriter, utterance: Utterance, written: _Written | None) -> None:
    if written is None:
        writer.bad(utterance.cut_id, f"espeak-ng gave no sound for voice {utterance.request.voice}")
        return
    writer.add_written(
        utterance.split,
        utterance.cut_id,
        written.num_samples,
        written.digest,
        utterance.text,
        utterance.request.voice,
        rate=utterance.request.rate,
        pitch=utterance.request.pitch,
        noise=utterance.noise,
        snr_db=utterance.snr_db,
    )
