"""Checkpoints of several processes: each writes its own shares into one folder, in a thread beside the training.

Nothing has its name before all of it is on the disk: the files lie in a hidden folder until the first process has the
checksums of all, writes them and renames it. What the processes tell each other on the way goes through a group of
its own, where it cannot get between the messages of training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, async_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor

from asr import checkpoint, checkpoint_folder
from asr.atomic import cause_on_disk, partial_name, sync_folder
from asr.training.ranks import SAVED, Ranks


class FolderWriter(FileSystemWriter):
    """Writes one checkpoint; torch.distributed.checkpoint calls it in a thread of each process.

    Args:
        path: the name in the end.
        content: what is not tensors.
        keep_last: step checkpoints that stay afterwards.
    """

    def __init__(self, path: Path, content: dict[str, Any], keep_last: int):
        super().__init__(partial_name(path), sync_files=True)
        self.target, self.content, self.keep_last = path, content, keep_last
        self.partial = partial_name(path)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # without paths of this machine

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy in main memory: what training waits for."""
        return {name: _copy(tensor) for name, tensor in state_dict.items()}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process, before any writes: a killed run may have left files."""
        checkpoint.remove_partials(self.target.parent)
        self.partial.mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """On each process: its files, and their sizes and checksums."""
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as err:
            raise cause_on_disk(err) from None
        own = self.partial.glob(f"{plan.storage_data.prefix}*")
        files = {path.name: checkpoint_folder.fingerprint(path) for path in own}
        return written.then(lambda done: (done.value(), files))

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On the first process, after all have written."""
        super().finish(metadata, [written for written, _ in results])
        files = {name: entry for _, own in results for name, entry in own.items()}
        for name, entry in files.items():
            if not (self.partial / name).is_file() or (self.partial / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{self.partial / name} is not seen by the first process; all need one shared disk")
        files[checkpoint_folder.METADATA] = checkpoint_folder.fingerprint(self.partial / checkpoint_folder.METADATA)
        checkpoint_folder.write_manifest(self.partial, self.content, files)
        sync_folder(self.partial)
        if self.target.exists():  # of another run: `FolderSaver.save`
            checkpoint.set_aside(self.target)
        os.replace(self.partial, self.target)
        sync_folder(self.target.parent)
        checkpoint.prune(self.target.parent, self.keep_last)


class FolderSaver:
    """Saves checkpoints of a run, one at a time; all processes call its methods together, `poll` excepted.

    A save that finds the disk full leaves nothing behind; the first process says so, and the run goes on.

    Args:
        ranks: the processes.
        keep_last: newest step checkpoints that are kept.
        timeout_s: seconds that a process waits for the others.
        say: prints a line, on the first process.
    """

    def __init__(self, ranks: Ranks, keep_last: int, timeout_s: float, say: Callable[[str], None]):
        self.ranks, self.keep_last, self.say = ranks, keep_last, say
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._pending: tuple[Future[Any], Path] | None = None
        self._newest: Path | None = None
        self._failed: OSError | None = None

    def resumed(self, path: Path) -> None:
        """A checkpoint, perhaps of this run's own folder, has the tensors that the run begins with."""
        self._newest = path

    def save(self, payload: dict[str, Any], path: Path) -> None:
        """Begins to write a checkpoint once the one before is written, and returns when it has copied the tensors.

        Args:
            payload: tree of plain values, which processes have in common, and of tensors: shares, tensors that all
                have, of which DCP writes one, and tensors that one has.
            path: the folder. Where it is that of the last save or resume, no step was taken since, and only the
                progress is written.
        """
        self.wait()
        content, tensors = checkpoint_folder.split(payload)
        if path == self._newest:
            self._ended(path, self._error_of(lambda: _write_progress(path, content)))
            return
        writer = FolderWriter(path, content, self.keep_last)
        future = async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._pending = future, path

    def poll(self) -> None:
        """Says, if a save has failed meanwhile, why."""
        if self._pending is not None and self._pending[0].done():
            (future, path), self._pending = self._pending, None
            self._ended(path, future.exception())

    def wait(self) -> None:
        """Waits for the save under way."""
        if self._pending is not None:
            wait([self._pending[0]])
            self.poll()

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
            OSError: the last save failed.
        """
        self.wait()
        if self._failed is not None:
            raise self._failed

    def _error_of(self, function: Callable[[], None]) -> BaseException | None:
        try:
            self.ranks.from_first(function)
        except OSError as error:
            return error
        return None

    def _ended(self, path: Path, error: BaseException | None) -> None:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        self._failed = next((cause for cause, _ in failures if isinstance(cause, OSError)), None)
        self._newest = path if error is None else None
        if error is None:
            if self.ranks.first:
                self.ranks.note(SAVED)
            return
        if self.ranks.first:
            shutil.rmtree(partial_name(path), ignore_errors=True)
        if self._failed is None:
            raise RuntimeError(f"checkpoint {path} could not be written") from error
        reason = self._failed.strerror or self._failed
        self.say(
            f"error: checkpoint {path} is not written: {reason}; training goes on: free some space, or let it write,"
            " before the next one"
        )


def _copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    # DTensor's own ways to copy also copy the description of the processes, 1 ms a tensor
    return DTensor(_copy(tensor.to_local()), tensor._spec, requires_grad=False)


def _write_progress(path: Path, content: dict[str, Any]) -> None:
    """An epoch was closed since the checkpoint was written; its tensors are the same."""
    old, files = checkpoint_folder.read_manifest(path)
    old["epoch"], old["training"]["progress"] = content["epoch"], content["training"]["progress"]
    checkpoint_folder.write_manifest(path, old, files)
