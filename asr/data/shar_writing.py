"""The features stage of storage=shar: training cuts as lhotse Shar."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from lhotse import CutSet, MonoCut
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers import AudioTarWriter

from asr.atomic import write_whole
from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.augmentation import random_generator
from asr.data.bad_rows import BadRow
from asr.data.fbank import FeatureConfig
from asr.data.features import load_samples, replace_folder, run_tasks
from asr.data.manifests import save_cuts
from asr.data.shar import source_of
from asr.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """The cuts of a shard."""

    cuts: list[MonoCut]
    folder: Path
    number: int

    @property
    def tar(self) -> Path:
        return self.folder / f"recording.{self.number:06d}.tar"

    @property
    def manifest(self) -> Path:
        return self.folder / f"cuts.{self.number:06d}.jsonl.gz"

    @property
    def note(self) -> Path:
        """What is known of a shard that is whole, for a run that goes on after an interrupted one."""
        return self.folder / f"{self.number:06d}.json"


def write_shards(
    cuts: CutSet | Sequence[MonoCut],
    out_dir: str | os.PathLike[str],
    config: FeatureConfig,
    seed: int,
    num_jobs: int | None = None,
    *,
    bad_rows: list[BadRow] | None = None,
) -> CutSet:
    """Write cuts as lhotse Shar, ``cuts.NNNNNN.jsonl.gz`` and ``recording.NNNNNN.tar``, which lhotse reads too.

    Audio is FLAC of 16 bits: without loss where the recordings have no more. The order of cuts is random, so that a few
    shards are like all. The folder appears under its name only when everything in it is complete; an interrupted run
    goes on where it was. Neither changes with ``num_jobs``.

    Args:
        cuts: with recordings at 16 kHz.
        out_dir: folder for the shards; replaced if it exists.
        config: ``shard_cuts``, and ``num_jobs``.
        seed: decides the order.
        num_jobs: processes; ``config.num_jobs`` by default. Few are used for little audio.
        bad_rows: gets one entry per cut that could not be read; such cuts are left out.

    Returns:
        The cuts in the order of the shards, with sources of type "shar" that say where they lie (``asr.data.shar``).

    Raises:
        UserError: no cut could be read; or the disk is full or cannot be written.
    """
    out_dir = Path(os.path.abspath(out_dir))
    partial = out_dir.with_name(out_dir.name + ".partial")
    plain = [cut.drop_features() for cut in cuts]
    if not plain:
        raise UserError(f"no cuts to write to {out_dir}")
    order = random_generator(seed, 0, "", "shards").permutation(len(plain)).tolist()
    shuffled = [plain[number] for number in order]
    size = config.shard_cuts
    tasks = [
        _Task(shuffled[first : first + size], partial, number)
        for number, first in enumerate(range(0, len(shuffled), size))
    ]
    done: list[MonoCut] = []
    bad: list[BadRow] = []
    try:
        partial.mkdir(parents=True, exist_ok=True)
        jobs = config.num_jobs if num_jobs is None else num_jobs
        for task, results in zip(tasks, run_tasks(_write_shard, tasks, jobs), strict=True):
            for cut, result in zip(task.cuts, results, strict=True):
                if isinstance(result, BadRow):
                    bad.append(result)
                else:
                    done.append(_placed(cut, f"{out_dir / task.tar.name}:{result}"))
            logger.info("%d of %d cuts in %s", len(done) + len(bad), len(plain), out_dir)
        if not done:
            raise UserError(f"none of the {len(plain)} cuts could be read; the first: {bad[0]}")
        wanted = {path for task in tasks for path in (task.tar, task.manifest)}
        for path in partial.iterdir():
            if path not in wanted:
                path.unlink()
        replace_folder(partial, out_dir)
    except OSError as error:
        raise UserError(f"cannot write shards to {out_dir}: {error.strerror or error}") from error
    for row in bad:
        logger.warning("left out: %s", row)
    if bad_rows is not None:
        bad_rows.extend(bad)
    return CutSet.from_cuts(done)


def _placed(cut: MonoCut, source: str) -> MonoCut:
    """The cut as a whole recording of its own, with this source."""
    assert cut.recording is not None
    recording = to_shar_placeholder(cut.recording, cut)
    recording = replace(recording, sources=[replace(recording.sources[0], channels=[cut.channel], source=source)])
    return replace(cut, start=0.0, recording=replace(recording, channel_ids=[cut.channel]))


def _write_shard(task: _Task) -> list[str | BadRow]:
    """Of each cut where it lies in the tar, or why it is in none."""
    key = _key(task.cuts)
    known = _noted(task, key)
    if known is not None:
        return known
    for path in (task.tar, task.manifest):
        path.unlink(missing_ok=True)
    results: list[BadRow | None] = []
    written: list[MonoCut] = []
    with AudioTarWriter(str(task.tar), shard_size=None, format="flac") as writer:
        for cut in task.cuts:
            try:
                samples = load_samples(cut)
            except UserError as error:
                source = cut.recording.sources[0].source if cut.recording is not None else cut.id
                results.append(BadRow(str(source), 0, str(error)))
                continue
            placed = _placed(cut, "")
            writer.write(cut.id, samples[None], SAMPLE_RATE_HZ, manifest=placed.recording)
            written.append(placed)
            results.append(None)
    places: Iterator[str] = iter(())
    if written:
        with open(task.tar, "rb") as file:
            places = iter(_index(file))
            os.fsync(file.fileno())
        save_cuts(written, task.manifest)
    found = [next(places) if bad is None else bad for bad in results]
    rows = [row if isinstance(row, str) else dataclasses.astuple(row) for row in found]
    write_whole(task.note, lambda file: file.write(json.dumps([key, rows]).encode()))
    return found


def _index(file: IO[bytes]) -> list[str]:
    """Where each recording lies: every other member, before the one that describes it."""
    with tarfile.open(fileobj=file) as tar:
        members = tar.getmembers()[::2]
    places = []
    for member in members:
        file.seek(member.offset_data)
        places.append(source_of("", member.offset_data, file.read(member.size)).removeprefix(":"))
    return places


def _key(cuts: Sequence[MonoCut]) -> str:
    """Of the cuts and their files as they are now."""
    total = hashlib.sha256()
    for cut in cuts:
        total.update(json.dumps(cut.to_dict()).encode())
        for source in cut.recording.sources if cut.recording is not None else []:
            if source.type == "file" and os.path.exists(source.source):
                status = os.stat(source.source)
                total.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return total.hexdigest()


def _noted(task: _Task, key: str) -> list[str | BadRow] | None:
    """What an interrupted run found out, if it wrote this shard of these cuts."""
    try:
        noted, rows = json.loads(task.note.read_bytes())
    except (OSError, ValueError):
        return None
    return [row if isinstance(row, str) else BadRow(*row) for row in rows] if noted == key else None
