"""Features of cuts: computed from audio or read, by several processes into storage, and their statistics."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lhotse import CutSet, Features, MonoCut

from asr.data.audio import SAMPLE_RATE_HZ, audio_problem
from asr.data.augmentation import AugmentConfig, augment_samples, check_recordings, expand_cuts
from asr.data.bad_rows import BadRow
from asr.data.fbank import (
    FRAME_SHIFT_MS,
    Fbank,
    FbankExtractor,
    FeatureConfig,
    num_audio_frames,
    num_encoder_frames,
    num_feature_frames,
    pad_tail,
)
from asr.data.recordings import RecordingError
from asr.data.shar import SOURCE_TYPE, Shards
from asr.data.storage import STORAGE_NAME, PackedWriter, read_packed
from asr.errors import UserError

__all__ = [
    "Fbank",
    "FbankExtractor",
    "FeatureConfig",
    "FeatureStats",
    "check_stored_features",
    "compute_cut_features",
    "compute_features",
    "compute_stats",
    "features_of",
    "load_samples",
    "load_stored_features",
    "num_audio_frames",
    "num_encoder_frames",
    "num_feature_frames",
    "pad_tail",
]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Task = TypeVar("Task", bound="_WithCuts")

CUTS_PER_FILE = 256
"""Stored features are cut into files by this number alone, so that they do not depend on the number of processes."""
MIN_AUDIO_PER_PROCESS_S = 600.0
"""Below this much audio a further process takes longer to start than it saves."""
TASKS_UNDER_WAY = 1000
"""At most, on an executor that is given: what they say of their cuts takes memory there."""


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """lhotse resamples with torch: one thread makes the same bits in every process, whatever its number of threads."""
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


def load_samples(cut: MonoCut, shards: Shards | None = None) -> np.ndarray:
    """Audio of a cut, float32 [N] at 16 kHz.

    Args:
        cut: of a file or of a shard.
        shards: what reads shards, where many cuts are loaded.

    Raises:
        UserError: the file cannot be read, or is not at 16 kHz.
    """
    if cut.recording is None:
        raise UserError(f"cut {cut.id} has neither stored features nor a recording")
    source = cut.recording.sources[0].source
    if cut.sampling_rate != SAMPLE_RATE_HZ:
        raise UserError(f"cut {cut.id} ({source}) is at {cut.sampling_rate} Hz; resample it to {SAMPLE_RATE_HZ} Hz")
    if cut.recording.sources[0].type == "file":
        # lhotse fills up what a truncated file lacks with a mirror image of its end
        expected = None if cut.recording.transforms else cut.recording.num_samples
        problem = audio_problem(source, expected)
        if problem is not None:
            raise UserError(f"cannot use the audio of cut {cut.id} ({source}): {problem}")
    if cut.recording.sources[0].type == SOURCE_TYPE:
        cut = (shards or Shards()).fill(cut)
    try:
        with single_threaded_torch() if cut.recording.transforms else nullcontext():
            samples = cut.load_audio()
    except Exception as error:  # lhotse's backends raise almost anything for a broken file
        raise UserError(f"cannot read the audio of cut {cut.id} ({source}): {first_line(error)}") from error
    if samples is None or samples.shape[0] != 1:
        raise UserError(f"cut {cut.id} ({source}) has more than one channel; features need one")
    if samples.shape[1] != cut.num_samples:
        raise UserError(f"cut {cut.id} ({source}) has {cut.num_samples} samples, {samples.shape[1]} could be read")
    return np.ascontiguousarray(samples[0], dtype=np.float32)


def compute_cut_features(
    cut: MonoCut, fbank: Fbank, augment: AugmentConfig | None = None, *, seed: int = 0, epoch: int = 0
) -> np.ndarray:
    """Features float32 [T, F] of a cut from its audio, tail included, with waveform augmentation where asked for.

    Raises:
        UserError: the audio cannot be read.
    """
    return features_of(load_samples(cut), cut.id, fbank, augment, seed=seed, epoch=epoch)


def features_of(
    samples: np.ndarray,
    cut_id: str,
    fbank: Fbank,
    augment: AugmentConfig | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """Features float32 [T, F] of samples, float32 [N] at 16 kHz without the tail; see ``compute_cut_features``.

    Raises:
        UserError: samples are not finite, or a recording that augmentation adds cannot be read (``RecordingError``).
    """
    if augment is not None:
        samples = augment_samples(samples, augment, seed=seed, epoch=epoch, cut_id=cut_id)
    try:
        return fbank.extract(pad_tail(samples, fbank.config))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cut {cut_id}: {error}") from error


def load_stored_features(cut: MonoCut) -> np.ndarray:
    """Stored features of a cut, float32 [T, F] and read-only.

    They include the tail, which ``cut.load_features()`` would cut off.

    Raises:
        UserError: there are none, or their file is missing or truncated.
    """
    features = cut.features
    if features is None:
        raise UserError(f"cut {cut.id} has no stored features; run the features stage")
    if features.storage_type == STORAGE_NAME:
        return read_packed(features.storage_path, features.storage_key)
    return np.ascontiguousarray(features.load(), dtype=np.float32)


def check_stored_features(cuts: Iterable[MonoCut], config: FeatureConfig) -> None:
    """Refuse cuts whose stored features were made with other settings, without reading them. Raises UserError."""
    for cut in cuts:
        if cut.features is None:
            raise UserError(
                f"cut {cut.id} has no stored features; run the features stage or set data.features.storage=on_the_fly"
            )
        frames = num_feature_frames(cut.num_samples, config)
        if cut.features.num_frames != frames or cut.features.num_features != config.num_mel_bins:
            raise UserError(
                f"stored features of cut {cut.id} are {cut.features.num_frames} x {cut.features.num_features}, but "
                f"num_mel_bins={config.num_mel_bins} and tail_chunk_ms={config.tail_chunk_ms} ask for {frames} x "
                f"{config.num_mel_bins}; run the features stage again"
            )


@dataclass(frozen=True)
class _Task:
    """Cuts whose features go into one file."""

    cuts: list[MonoCut]
    copies: list[int]
    path: str
    config: FeatureConfig
    augment: AugmentConfig | None
    seed: int


def compute_features(
    cuts: CutSet | Sequence[MonoCut],
    out_dir: str | os.PathLike[str],
    config: FeatureConfig,
    augment: AugmentConfig | None,
    seed: int,
    num_jobs: int | None = None,
    *,
    bad_rows: list[BadRow] | None = None,
    executor: Executor | None = None,
) -> CutSet:
    """Compute and store the features of cuts, at every speed and copy where ``augment`` is given.

    The folder appears under its name only when everything in it is complete: work goes on in ``<out_dir>.partial``.
    Its bytes do not depend on ``num_jobs`` or ``executor``.

    Args:
        cuts: with recordings at 16 kHz.
        out_dir: folder for the features; replaced if it exists.
        config: features.
        augment: waveform augmentation for training cuts (the draws of copy c are those of epoch c); None for valid
            and test.
        seed: seed of the augmentation.
        num_jobs: processes; ``config.num_jobs`` by default. Few are used for little audio.
        bad_rows: gets one entry per given cut that could not be read, with the audio file as its file; such cuts are
            left out. Without a list a warning is logged for each.
        executor: computes in place of processes of its own, such as that of ``dask_executor``. Where its workers are on
            other machines, they need the audio and ``out_dir`` under the same names.

    Returns:
        The cuts with their ``Features``, in the order given (all utterances at the first speed, at the second, ...).

    Raises:
        UserError: no cut could be read, or a recording that augmentation adds cannot be; or the disk is full or cannot
            be written.
    """
    if augment is not None:
        check_recordings(augment)
    out_dir = Path(os.path.abspath(out_dir))
    partial = out_dir.with_name(out_dir.name + ".partial")
    plain = [cut.drop_features() for cut in cuts]
    expanded = plain if augment is None else expand_cuts(plain, augment)
    if not expanded:
        raise UserError(f"no cuts to compute features of for {out_dir}")
    per_copy = len(expanded) // (1 if augment is None else augment.copies)
    tasks = [
        _Task(
            cuts=expanded[first : first + CUTS_PER_FILE],
            copies=[index // per_copy for index in range(first, min(first + CUTS_PER_FILE, len(expanded)))],
            path=str(partial / f"features-{number:05d}.f32"),
            config=config,
            augment=augment,
            seed=seed,
        )
        for number, first in enumerate(range(0, len(expanded), CUTS_PER_FILE))
    ]
    found_bad: dict[int, BadRow] = {}
    num_bad = 0
    done: list[MonoCut] = []
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        jobs = config.num_jobs if num_jobs is None else num_jobs
        run = run_tasks(_compute_task, tasks, jobs) if executor is None else _run_on(executor, tasks)
        for task, results in zip(tasks, run, strict=True):
            for cut, result in zip(task.cuts, results, strict=True):
                if isinstance(result, BadRow):
                    # a recording is bad once, however many speeds and copies were asked for
                    found_bad.setdefault((len(done) + num_bad) % len(plain), result)
                    num_bad += 1
                else:
                    final = replace(result, storage_path=str(out_dir / Path(task.path).name))
                    done.append(replace(cut, features=final))
            logger.info("features of %d of %d cuts in %s", len(done) + num_bad, len(expanded), out_dir)
        if not done:
            raise UserError(f"none of the {len(plain)} cuts could be read; the first: {found_bad[0]}")
        replace_folder(partial, out_dir)
    except OSError as error:
        raise UserError(f"cannot write features to {out_dir}: {error.strerror or error}") from error
    for row in found_bad.values():
        logger.warning("left out: %s", row)
    if bad_rows is not None:
        bad_rows.extend(found_bad.values())
    return CutSet.from_cuts(done)


def replace_folder(partial: Path, out_dir: Path) -> None:
    """Put a complete folder in place of an older one."""
    old = out_dir.with_name(out_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


class _WithCuts(Protocol):
    @property
    def cuts(self) -> list[MonoCut]: ...


def run_tasks(work: Callable[[Task], Result], tasks: Sequence[Task], num_jobs: int) -> Iterator[Result]:
    """Results of a module's function in the order of the tasks; by processes, where that saves time."""
    audio_s = sum(cut.duration for task in tasks for cut in task.cuts)
    jobs = min(num_jobs, len(tasks), max(1, int(audio_s / MIN_AUDIO_PER_PROCESS_S)))
    if jobs <= 1:
        yield from map(work, tasks)
        return
    # spawned, not forked: the caller may hold threads of torch and numba, which a fork does not survive
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {jobs} processes that compute features was killed, perhaps for lack of memory; "
                f"lower features.num_jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _run_on(executor: Executor, tasks: Sequence[_Task]) -> Iterator[list[Features | BadRow]]:
    """Results in the order of the tasks, of which not too many are under way."""
    waiting: deque[Future[list[Features | BadRow]]] = deque()
    left = iter(tasks)
    try:
        for task in left:
            waiting.append(executor.submit(_compute_elsewhere, task))
            if len(waiting) >= TASKS_UNDER_WAY:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except CancelledError as error:
        raise UserError("what was to compute features ended before they were done; run the stage again") from error
    finally:
        for future in waiting:
            future.cancel()


def _compute_elsewhere(task: _Task) -> list[Features | BadRow]:
    """One file, in a process that may have several threads and may have lost the first try of this task."""
    torch.set_num_threads(1)
    folder = Path(task.path).parent
    if not folder.is_dir():
        raise UserError(
            f"{socket.gethostname()}, which is to compute features, has no folder {folder}; all machines need the same "
            "folders under the same names"
        )
    Path(task.path).unlink(missing_ok=True)
    return _compute_task(task)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool process waits for work for ever when its parent was killed; end it then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel])
        os._exit(1)


def _compute_task(task: _Task) -> list[Features | BadRow]:
    """Compute one file; one entry per cut."""
    fbank = Fbank(task.config)
    results: list[Features | BadRow] = []
    with PackedWriter(task.path) as writer:
        for cut, copy in zip(task.cuts, task.copies, strict=True):
            try:
                values = compute_cut_features(cut, fbank, task.augment, seed=task.seed, epoch=copy)
            except RecordingError:  # no fault of this cut
                raise
            except UserError as error:
                source = cut.recording.sources[0].source if cut.recording is not None else cut.id
                results.append(BadRow(str(source), 0, str(error)))
                continue
            results.append(
                Features(
                    type=FbankExtractor.name,
                    num_frames=values.shape[0],
                    num_features=values.shape[1],
                    frame_shift=FRAME_SHIFT_MS / 1000,
                    sampling_rate=SAMPLE_RATE_HZ,
                    start=cut.start,
                    duration=values.shape[0] * FRAME_SHIFT_MS / 1000,
                    storage_type=writer.name,
                    storage_path=writer.storage_path,
                    storage_key=writer.write(cut.id, values),
                    recording_id=cut.recording_id,
                    channels=cut.channel,
                )
            )
    return results


@dataclass
class FeatureStats:
    """Fixed normalisation of features: ``(features - mean) * scale`` has zero mean and unit variance per mel bin.

    Args:
        mean: float32 [F].
        scale: float32 [F], one over the standard deviation.
        num_frames: how many frames they were computed from.
    """

    mean: np.ndarray
    scale: np.ndarray
    num_frames: int = 0

    def to_state(self) -> dict[str, Any]:
        """As a dict that JSON can hold."""
        return {"num_frames": self.num_frames, "mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> FeatureStats:
        """What ``to_state`` described. Raises ValueError for anything else."""
        try:
            mean, scale = (np.asarray(state[name], dtype=np.float32) for name in ("mean", "scale"))
            num_frames = int(state["num_frames"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not feature statistics: {error!r}") from error
        if mean.ndim != 1 or mean.shape != scale.shape or not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            raise ValueError(f"mean and scale must be finite vectors of one size, got {mean.shape} and {scale.shape}")
        return FeatureStats(mean, scale, num_frames)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file; a reader sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        partial.write_text(json.dumps(self.to_state(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FeatureStats:
        """Read what ``save`` wrote. Raises UserError when it is missing or broken."""
        try:
            return FeatureStats.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"cannot read statistics {path}: {error.strerror}; run the features stage") from error
        except ValueError as error:
            raise UserError(f"{path} holds no feature statistics: {error}; run the features stage again") from error


def compute_stats(cuts: CutSet | Iterable[MonoCut], config: FeatureConfig | None = None) -> FeatureStats:
    """Mean and scale per mel bin over the audio of all cuts; their silent tails do not count.

    Args:
        cuts: with stored features; those of others are computed from their audio.
        config: features, for cuts without stored ones; stored ones have their own number of bins.

    Raises:
        UserError: there is no audio.
    """
    fbank = Fbank(config)
    shards = Shards()
    total = total_square = np.zeros(1)
    num_frames = 0
    for cut in cuts:
        values = (
            load_stored_features(cut)
            if cut.features is not None
            else features_of(load_samples(cut, shards), cut.id, fbank)
        )
        audio = values[: num_audio_frames(cut.num_samples)].astype(np.float64)
        total = total + audio.sum(axis=0)
        total_square = total_square + np.square(audio).sum(axis=0)
        num_frames += len(audio)
    if num_frames == 0:
        raise UserError("no audio to compute feature statistics from")
    mean = total / num_frames
    # bins that never change (band-limited recordings) must not blow up the noise of other recordings
    deviation = np.maximum(np.sqrt(np.maximum(total_square / num_frames - mean**2, 0.0)), 0.1)
    return FeatureStats(mean.astype(np.float32), (1.0 / deviation).astype(np.float32), num_frames)


def first_line(error: BaseException) -> str:
    """The first line of an error's message with text, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
