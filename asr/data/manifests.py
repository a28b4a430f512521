"""Cuts on disk, and which of them can be used."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet, MonoCut

from asr.data.audio import SAMPLE_RATE_HZ, audio_problem
from asr.data.bad_rows import BadRow, report_bad_rows, write_bad_rows
from asr.data.fbank import FeatureConfig, num_encoder_frames
from asr.data.packed_cuts import PackedCuts
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.errors import UserError

__all__ = ["BadRow", "check_cuts", "load_cuts", "report_bad_rows", "save_cuts", "write_bad_rows"]


def load_cuts(path: str | os.PathLike[str]) -> CutSet:
    """Read a manifest of cuts, ``.jsonl`` or ``.jsonl.gz``, into memory.

    Raises:
        UserError: it is missing, empty, truncated, or a line is not a cut (the message names the line), or an id
            comes twice.
    """
    return CutSet.from_cuts(list(PackedCuts.open(path)))


def save_cuts(cuts: CutSet | Iterable[MonoCut], path: str | os.PathLike[str]) -> None:
    """Write a manifest of cuts, ``.jsonl`` or ``.jsonl.gz``; readers see the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    text = "".join(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)
    try:
        with open(partial, "wb") as file:
            # without a time in the header equal cuts give equal bytes
            file.write(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_cuts(
    cuts: CutSet | Iterable[MonoCut],
    tokenizer: Tokenizer | None,
    config: FeatureConfig,
    *,
    min_frames: int = 1,
    max_tokens_per_frame: float = 1.0,
    max_speed: float = 1.0,
    source: str | os.PathLike[str] | None = None,
    check_audio: bool = True,
) -> tuple[CutSet, list[BadRow]]:
    """Tell usable cuts from bad ones.

    Args:
        cuts: in the order of their manifest.
        tokenizer: None leaves out the checks of tokens, for the time before it exists.
        config: features; their length decides how many tokens fit.
        min_frames: least number of encoder frames, tail included.
        max_tokens_per_frame: how many tokens the topology allows per encoder frame; 1 for searches and devices that
            emit at most one symbol per frame. Every range of the pruned loss can follow 1.
        max_speed: the tokens must also fit when the loader plays the cut at this speed.
        source: the manifest; bad rows then carry its name and line, and without it the audio file and line 0.
        check_audio: look into the audio files too (wav: header and size; other formats are decoded).

    Returns:
        The good cuts in their order, and the bad rows. Reasons name the cut and its audio file.
    """
    checked = checked_cuts(
        cuts,
        tokenizer,
        config,
        min_frames=min_frames,
        max_tokens_per_frame=max_tokens_per_frame,
        max_speed=max_speed,
        source=source,
        check_audio=check_audio,
    )
    good: list[MonoCut] = []
    bad: list[BadRow] = []
    for one in checked:
        if one.bad is None:
            good.append(one.cut)
        else:
            bad.append(one.bad)
    return CutSet.from_cuts(good), bad


class Checked(NamedTuple):
    """A cut, the number of its tokens (0 without a tokenizer), and what is wrong with it, or None."""

    cut: MonoCut
    tokens: int
    bad: BadRow | None


def checked_cuts(
    cuts: CutSet | Iterable[MonoCut],
    tokenizer: Tokenizer | None,
    config: FeatureConfig,
    *,
    min_frames: int = 1,
    max_tokens_per_frame: float = 1.0,
    max_speed: float = 1.0,
    source: str | os.PathLike[str] | None = None,
    check_audio: bool = True,
) -> Iterator[Checked]:
    """Each cut, one after the other, with what is wrong with it; arguments as of ``check_cuts``."""
    for line, cut in enumerate(cuts, 1):
        tokens = 0
        reason = _cut_problem(cut, check_audio)
        if reason is None:
            faster = max_speed > 1 and cut.recording is not None
            played = cut.perturb_speed(max_speed) if faster else cut
            frames = num_encoder_frames(played.num_samples, config)
            tokens, reason = _tokens(cut, tokenizer, frames, min_frames, max_tokens_per_frame)
        if reason is None:
            yield Checked(cut, tokens, None)
            continue
        audio = _audio_path(cut)
        named = f"cut {cut.id}: {reason}" if audio is None or source is None else f"cut {cut.id} ({audio}): {reason}"
        bad = BadRow(str(audio or cut.id), 0, named) if source is None else BadRow(str(source), line, named)
        yield Checked(cut, tokens, bad)


def _cut_problem(cut: MonoCut, check_audio: bool) -> str | None:
    """What is wrong with the recording of a cut."""
    if cut.recording is None:
        return None if cut.features is not None else "it has neither a recording nor stored features"
    if cut.sampling_rate != SAMPLE_RATE_HZ:
        return f"audio is at {cut.sampling_rate} Hz; {SAMPLE_RATE_HZ} Hz are needed"
    if cut.num_samples < 1:
        return "it holds no samples"
    path = _audio_path(cut)
    if not check_audio or path is None:
        return None
    # speed changes the number of samples of the recording, but not of its file
    return audio_problem(path, None if cut.recording.transforms else cut.recording.num_samples)


def _tokens(
    cut: MonoCut, tokenizer: Tokenizer | None, frames: int, min_frames: int, max_tokens_per_frame: float
) -> tuple[int, str | None]:
    """The number of tokens of a cut, and what is wrong with its transcript, or with its length for the audio."""
    if len(cut.supervisions) != 1:
        return 0, f"it has {len(cut.supervisions)} transcripts; one is needed"
    text = cut.supervisions[0].text or ""
    if not text.strip():
        return 0, "the transcript is empty"
    if frames < min_frames:
        return 0, f"{frames} encoder frames are fewer than the {min_frames} that are needed"
    if tokenizer is None:
        return 0, None
    try:
        tokens = len(tokenizer.encode(text))
    except UnknownToken as error:
        return 0, str(error)
    if tokens > max_tokens_per_frame * frames:
        allowed = int(max_tokens_per_frame * frames)
        return tokens, f"{tokens} tokens are more than the {allowed} that {frames} encoder frames allow"
    return tokens, None


def _audio_path(cut: MonoCut) -> str | None:
    """The file of a cut's audio, if it is a file."""
    if cut.recording is None or not cut.recording.sources or cut.recording.sources[0].type != "file":
        return None
    return str(cut.recording.sources[0].source)
