"""What training hears of a cut: before and after augmentation, with the draws of its seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lhotse import MonoCut, Recording

from asr.data.audio import SAMPLE_RATE_HZ, audio_problem
from asr.data.augmentation import augment_samples, random_generator, spec_augment
from asr.data.features import (
    Fbank,
    check_stored_features,
    load_samples,
    load_stored_features,
    num_audio_frames,
    num_encoder_frames,
    pad_tail,
)
from asr.data.loader import DataConfig, transcript
from asr.data.packed_cuts import ExpandedCuts, PackedCuts
from asr.data.shar import SOURCE_TYPE, Shards
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.errors import UserError


@dataclass
class ShownCut:
    """One cut of an epoch.

    Args:
        cut_id: with the suffixes of its speed and copy.
        text: the transcript.
        tokens: of the transcript, as ``Tokenizer.shown``; empty if it cannot be spelt.
        problem: why it cannot be spelt, or why there is no sound.
        speed: 1.1 is faster.
        before: float32 [T0, F], features of the recording as it is; None where it cannot be read.
        after: float32 [T, F], what training gets: at its speed, augmented, masked, with the silent tail.
        samples_before: float32 [N0] at 16 kHz, the recording as it is; None where it cannot be read.
        samples_after: float32 [N], at its speed and augmented, without the tail; None with stored features.
        duration_s: of the cut at its speed, without the tail.
        encoder_frames: after subsampling, with the tail.
        drawn: of ``augment_samples`` (not with stored features) and ``spec_augment``.
    """

    cut_id: str
    text: str
    tokens: list[str]
    problem: str
    speed: float
    before: np.ndarray | None
    after: np.ndarray
    samples_before: np.ndarray | None
    samples_after: np.ndarray | None
    duration_s: float
    encoder_frames: int
    drawn: dict[str, Any] = field(default_factory=dict)


def choose_cuts(cuts: PackedCuts, config: DataConfig, count: int, *, seed: int, epoch: int) -> Sequence[MonoCut]:
    """Some cuts of an epoch, drawn by its seed: at their speeds and copies, as ``train_loader`` has them.

    Stored features are taken if the configuration says so and the cuts have them.
    """
    stored = config.features.storage == "stored" and cuts[0].features is not None
    of_epoch = cuts if stored else ExpandedCuts(cuts, config.augment)
    rng = random_generator(seed, epoch, "", "show_data")
    return [of_epoch[int(i)] for i in rng.permutation(len(of_epoch))[:count]]


def show_cut(cut: MonoCut, tokenizer: Tokenizer, config: DataConfig, *, seed: int, epoch: int) -> ShownCut:
    """What the batches of ``train_loader`` hold of a cut, and where it came from.

    Args:
        cut: of ``choose_cuts``: one with features is shown with those.
        tokenizer: spells the transcript.
        config: features and augmentation.
        seed, epoch: of the training; stored features were drawn when they were computed.

    Raises:
        UserError: there are neither features nor sound, or the features were made with other settings.
    """
    fbank = Fbank(config.features)
    shards = Shards(config.shar)
    drawn: dict[str, Any] = {}
    problem = ""
    plain, speed = _without_speed(cut, shards)
    try:
        samples_before = load_samples(plain, shards)
    except UserError as error:
        if cut.features is None:
            raise
        samples_before, problem = None, f"no sound: {error}"
    if cut.features is not None:
        check_stored_features([cut], config.features)
        samples_after = None
        after = load_stored_features(cut).copy()
    else:
        samples_after = augment_samples(
            load_samples(cut, shards), config.augment, seed=seed, epoch=epoch, cut_id=cut.id, drawn=drawn
        )
        after = fbank.extract(pad_tail(samples_after, config.features))
    if config.spec_augment.prob > 0:
        spec_augment(
            after,
            config.spec_augment,
            seed=seed,
            epoch=epoch,
            cut_id=cut.id,
            num_frames=num_audio_frames(cut.num_samples),
            drawn=drawn,
        )
    text = transcript(cut)
    tokens: list[str] = []
    try:
        tokens = [tokenizer.shown(token) for token in tokenizer.encode(text)]
    except UnknownToken as error:
        problem = "; ".join(filter(None, [problem, str(error)]))
    return ShownCut(
        cut_id=cut.id,
        text=text,
        tokens=tokens,
        problem=problem,
        speed=speed,
        before=None if samples_before is None else fbank.extract(pad_tail(samples_before, config.features)),
        after=after,
        samples_before=samples_before,
        samples_after=samples_after,
        duration_s=cut.num_samples / SAMPLE_RATE_HZ,
        encoder_frames=num_encoder_frames(cut.num_samples, config.features),
        drawn=drawn,
    )


def _without_speed(cut: MonoCut, shards: Shards) -> tuple[MonoCut, float]:
    """The cut of the recording as it is in its file, and the speed at which ``cut`` plays it."""
    changes = (cut.recording.transforms or []) if cut.recording is not None else []
    entries = [change if isinstance(change, dict) else change.to_dict() for change in changes]
    source = cut.recording.sources[0] if cut.recording is not None else None
    if not entries or source is None or any(entry["name"] != "Speed" for entry in entries):
        return cut, 1.0
    if source.type not in ("file", SOURCE_TYPE):
        return cut, 1.0
    speed = float(np.prod([entry["kwargs"]["factor"] for entry in entries]))
    if source.type == SOURCE_TYPE:
        recording = Recording.from_bytes(shards.read(source.source), cut.recording_id)
    elif audio_problem(source.source) is not None:  # told when it is read
        return cut, speed
    else:
        recording = Recording.from_file(source.source, recording_id=cut.recording_id)
    start = round(cut.start * speed * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    duration = min(round(cut.duration * speed * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ, recording.duration - start)
    plain = MonoCut(cut.id, start, duration, cut.channel, recording=recording)
    return plain, speed
