"""Runs the stages of a recipe: which are up to date, which must run and why, and how to go on after a failure.

A stage that finished leaves a marker, ``EXP/.done/<stage>.json``, with

- the settings that matter to it, and a hash of them that also covers the hashes of the stages before it: a changed
  setting reruns this stage and every later one that uses its outputs, and nothing else;
- a fingerprint of its outputs: when a stage runs again (forced, outputs missing) and leaves the same bytes, later
  stages stay up to date; when it leaves others, they run again.

Which stage comes before which follows from ``inputs`` and ``outputs``. Paths are relative to the experiment folder.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr.cli.guard import describe, nearest
from asr.errors import UserError

DONE_DIR = ".done"
LOG_DIR = "logs"
RUN_FILE = "config.yaml"
"""What a run writes into its ``resume_dir`` before anything else: a folder without it is somebody's own."""


class StageFailed(UserError):
    """A stage did not finish. ``exit_code`` is 2 when the user can mend it, 1 for a fault of the program."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StageStopped(Exception):
    """Raised by a stage that was asked to stop (SIGTERM) and saved its work: no error, but not done either."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    ``run(context)`` does the work. ``inputs`` are outputs of earlier stages. ``config_keys`` are dotted names into the
    settings; a leading ``!`` leaves a sub-tree out (``("train", "!train.num_workers")``). ``local_keys`` make only this
    stage run again; later ones follow only if its outputs change (the place of the corpus, checks). ``resume_dir`` is a
    folder in which an interrupted run goes on; when the settings have changed it is renamed to ``<resume_dir>.old-N``,
    and with it ``results_dir``, what later stages found out about it; of such folders whose ``checkpoints``, a folder
    in them, is empty, only the newest is kept. ``check(context)`` raises a UserError for what it
    could not begin with, before anything of an earlier run is touched; a run that goes on is not asked.
    ``audio_s(context)`` is how much audio the stage has worked on, noted with its time: what later estimates go by.
    """

    name: str
    run: Callable[[Any], None]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    local_keys: tuple[str, ...] = ()
    resume_dir: str | None = None
    results_dir: str | None = None
    checkpoints: str | None = None
    check: Callable[[Any], None] | None = None
    audio_s: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Status:
    """Whether a stage must run, and why."""

    must_run: bool
    reason: str


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists, scalars and empty dicts are leaves."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def pick(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The flat settings under ``keys``, less those under keys with a leading ``!``."""

    def under(name: str, key: str) -> bool:
        return name == key or name.startswith(f"{key}.")

    flat = flatten(settings)
    wanted = [key for key in keys if not key.startswith("!")]
    left_out = [key[1:] for key in keys if key.startswith("!")]
    for key in wanted + left_out:
        assert any(under(name, key) for name in flat), f"no setting named {key}"
    return {
        name: value
        for name, value in sorted(flat.items())
        if any(under(name, key) for key in wanted) and not any(under(name, key) for key in left_out)
    }


def digest(value: Any) -> str:
    """Hash of a JSON-able value, the same for the same content in any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(root: Path, outputs: Sequence[str]) -> str:
    """Hash of outputs: files by content (``.gz`` unpacked: its header holds the time), folders by names and sizes."""
    total = hashlib.sha256()
    for output in sorted(outputs):
        path = root / output
        total.update(f"\n{output}\n".encode())
        if path.is_dir():
            for child in sorted(item for item in path.rglob("*") if item.is_file()):
                total.update(f"{child.relative_to(path)} {child.stat().st_size}\n".encode())
            continue
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:16]


def write_atomic(path: Path, text: str) -> None:
    """Writes ``path`` so that a crash leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def exists(path: Path) -> bool:
    """Whether an output is there: a file (which may be empty), or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def drop_failed_tries(folder: Path, checkpoints: str) -> None:
    """Deletes each ``<folder>.old-N`` but the newest, of those in which a run wrote its settings and no checkpoint."""
    tries = [
        path
        for path in folder.parent.glob(f"{folder.name}.old-*")
        if (path / RUN_FILE).is_file()
        and (path / checkpoints).is_dir()
        and not any(path.rglob("*.pt"))
        and not any((path / checkpoints).iterdir())
    ]
    for path in sorted(tries, key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(path)


def set_aside(*folders: Path) -> list[Path]:
    """Renames each folder to ``<folder>.old-N``, N free for all, and returns the new paths. Nothing is deleted."""
    number = 1
    while any(folder.with_name(f"{folder.name}.old-{number}").exists() for folder in folders):
        number += 1
    return [folder.rename(folder.with_name(f"{folder.name}.old-{number}")) for folder in folders if folder.exists()]


class Pipeline:
    """The stages of one experiment folder.

    ``settings`` is a nested, JSON-able dict that ``config_keys`` point into. ``command`` is what the user would type to
    run this recipe again, without stage selection; it is used in messages.
    """

    def __init__(self, stages: Sequence[Stage], exp_dir: Path, settings: dict[str, Any], command: str) -> None:
        self.stages = list(stages)
        self.exp_dir = exp_dir
        self.command = command
        self.upstream: dict[str, list[str]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.hashes: dict[str, str] = {}
        maker: dict[str, str] = {}
        for stage in self.stages:
            for path in stage.inputs:
                assert path in maker, f"stage {stage.name}: no earlier stage makes {path}"
            self.upstream[stage.name] = sorted({maker[path] for path in stage.inputs})
            self.settings[stage.name] = pick(settings, stage.config_keys)
            self.hashes[stage.name] = digest(
                [stage.name, self.settings[stage.name], [self.hashes[name] for name in self.upstream[stage.name]]]
            )
            self.settings[stage.name] |= pick(settings, stage.local_keys)
            maker.update(dict.fromkeys(stage.outputs, stage.name))
        self.maker = maker

    def index(self, word: str) -> int:
        """Stage number for a number or name; ``UserError`` names the valid ones."""
        names = [stage.name for stage in self.stages]
        if word in names:
            return names.index(word)
        if word.lstrip("+-").isdigit() and 0 <= int(word) < len(names):
            return int(word)
        valid = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        problem = "is out of range" if word.lstrip("+-").isdigit() else "is not a stage"
        raise UserError(f"stage {word} {problem}; valid stages: {valid}{nearest(word, names)}")

    def select(self, first: str, last: str) -> range:
        """The stage numbers from ``first`` to ``last``, both included."""
        start, stop = self.index(first), self.index(last)
        if start > stop:
            raise UserError(
                f"--stage {first} comes after --stop-stage {last}, so no stage would run; "
                f"choose a --stop-stage of at least {start}"
            )
        return range(start, stop + 1)

    def label(self, name: str) -> str:
        return f"stage {self.index(name)} ({name})"

    def marker(self, name: str) -> dict[str, Any] | None:
        """What ``name`` left when it last finished; None when it did not, or when the marker cannot be read."""
        return _read_json(self.exp_dir / DONE_DIR / f"{name}.json")

    def status(self, stage: Stage, *, force: bool = False) -> Status:
        """Whether ``stage`` must run, judged by what is on disk now."""
        if force:
            return Status(True, "forced")
        marker = self.marker(stage.name)
        if marker is None:
            begun = stage.resume_dir is not None and exists(self.exp_dir / stage.resume_dir)
            return Status(True, "it has not finished yet" if begun else "it has not run yet")
        changed = _changes(marker.get("settings", {}), self.settings[stage.name])
        if changed:
            return Status(True, f"changed setting {changed}")
        if marker.get("hash") != self.hashes[stage.name]:
            seen = marker.get("upstream", {})
            names = self.upstream[stage.name]
            outdated = [name for name in names if seen.get(name, {}).get("hash") != self.hashes[name]]
            return Status(True, f"changed settings of {' and '.join(outdated) or 'an earlier stage'}")
        missing = [path for path in stage.outputs if not exists(self.exp_dir / path)]
        if missing:
            return Status(True, f"missing output {missing[0]}")
        for name in self.upstream[stage.name]:
            before = marker.get("upstream", {}).get(name, {}).get("result")
            now = (self.marker(name) or {}).get("result")
            if now is not None and now != before:
                return Status(True, f"other results of {name}")
        return Status(False, "up to date")

    def plan(self, selected: range, *, force: bool = False) -> list[Status]:
        """What ``execute`` would do, for each selected stage, as far as it can be told before anything has run."""
        planned: dict[str, Status] = {}
        for number in selected:
            stage = self.stages[number]
            status = self.status(stage, force=force)
            first = [name for name in self.upstream[stage.name] if name in planned and planned[name].must_run]
            if not status.must_run and first:
                status = Status(True, f"{' and '.join(first)} runs before it (skipped if that leaves the same results)")
            not_made = [path for path in stage.inputs if self.maker[path] not in planned]
            missing = [path for path in not_made if not exists(self.exp_dir / path)]
            if status.must_run and missing:
                first_needed = self.label(self.maker[missing[0]])
                status = Status(True, f"{status.reason}; but it needs {missing[0]}: run {first_needed} first")
            planned[stage.name] = status
        return list(planned.values())

    def execute(self, context: Any, selected: range, *, force: bool = False) -> None:
        """Runs what must run. Raises ``StageFailed`` (with the command to go on) or ``StageStopped``."""
        with _locked(self.exp_dir):
            self._warn_outdated(selected)
            for number in selected:
                stage = self.stages[number]
                status = self.status(stage, force=force)
                if not status.must_run:
                    print(f"stage {number} {stage.name}: up to date", flush=True)
                    continue
                print(f"stage {number} {stage.name}: runs ({status.reason})", flush=True)
                self._run_stage(stage, context, selected, force=force)

    def _warn_outdated(self, selected: range) -> None:
        """A later start uses older outputs as they are, as in Kaldi; say so when they belong to other settings."""
        needed: set[str] = set()
        for number in reversed(selected):
            needed.update(self.upstream[self.stages[number].name])
        for stage in self.stages[: selected.start]:
            if stage.name in needed and self.marker(stage.name) is not None and (status := self.status(stage)).must_run:
                print(
                    f"warning: {self.label(stage.name)} is out of date ({status.reason}); its outputs are used as they "
                    f"are. To bring it up to date: {self.command} --stage {stage.name}",
                    file=sys.stderr,
                    flush=True,
                )

    def _run_stage(self, stage: Stage, context: Any, selected: range, *, force: bool) -> None:
        self._check_inputs(stage)
        until = self.stages[selected[-1]].name
        go_on = f"{self.command} --stage {stage.name}"
        if until != self.stages[-1].name:
            go_on += f" --stop-stage {until}"
        begin = time.monotonic()
        try:
            upstream = {name: self._seen(name) for name in self.upstream[stage.name]}
            if stage.check is not None and not self._goes_on(stage, upstream, force=force):
                stage.check(context)
            marker_path = self.exp_dir / DONE_DIR / f"{stage.name}.json"
            marker_path.unlink(missing_ok=True)  # from here on the old outputs may be half overwritten
            if stage.resume_dir is not None:
                self._clear_resume_dir(stage, upstream, force=force)
            stage.run(context)
            missing = [path for path in stage.outputs if not exists(self.exp_dir / path)]
            if missing:
                raise RuntimeError(f"the stage ended without writing {', '.join(missing)}")
            seconds = time.monotonic() - begin
            marker = {
                "stage": stage.name,
                "hash": self.hashes[stage.name],
                "settings": self.settings[stage.name],
                "upstream": upstream,
                "result": fingerprint(self.exp_dir, stage.outputs),
                "outputs": list(stage.outputs),
                "seconds": round(seconds, 3),
                "audio_s": None if stage.audio_s is None else round(stage.audio_s(context), 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": go_on,
            }
            write_atomic(marker_path, json.dumps(marker, indent=1, default=str) + "\n")
        except StageStopped as stopped:
            raise StageStopped(f"{self.label(stage.name)} stopped: {stopped}; to go on: {go_on}") from stopped
        except KeyboardInterrupt:
            print(f"{self.label(stage.name)} interrupted; to go on: {go_on}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            raise self._failure(stage, error, go_on) from error
        print(f"stage {stage.name}: done in {_duration(seconds)}", flush=True)

    def _check_inputs(self, stage: Stage) -> None:
        missing = [path for path in stage.inputs if not exists(self.exp_dir / path)]
        if missing:
            first = min((self.maker[path] for path in missing), key=self.index)
            path = next(path for path in missing if self.maker[path] == first)
            raise UserError(
                f"{self.label(stage.name)} needs {self.exp_dir / path}, which {self.label(first)} makes; "
                f"run that first: {self.command} --stage {first} --stop-stage {stage.name}"
            )

    def _seen(self, name: str) -> dict[str, Any]:
        marker = self.marker(name) or {}
        return {"hash": marker.get("hash"), "result": marker.get("result")}

    def _started(self, stage: Stage, upstream: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Where it is noted what a run began with, and what this one begins with."""
        results = {name: seen["result"] for name, seen in upstream.items()}
        path = self.exp_dir / DONE_DIR / f"{stage.name}.started.json"
        return path, {"hash": self.hashes[stage.name], "upstream": results}

    def _goes_on(self, stage: Stage, upstream: dict[str, Any], *, force: bool) -> bool:
        """Whether a run with the same settings and inputs began the stage's folder."""
        assert stage.resume_dir is not None
        folder = self.exp_dir / stage.resume_dir
        path, started = self._started(stage, upstream)
        return folder.is_dir() and exists(folder) and not force and _read_json(path) == started

    def _clear_resume_dir(self, stage: Stage, upstream: dict[str, Any], *, force: bool) -> None:
        """Leaves the folder alone when a run with the same settings and inputs began it, else moves it aside."""
        assert stage.resume_dir is not None
        folder = self.exp_dir / stage.resume_dir
        started_path, started = self._started(stage, upstream)
        if folder.is_dir() and exists(folder) and not self._goes_on(stage, upstream, force=force):
            kept = set_aside(folder, *([self.exp_dir / stage.results_dir] if stage.results_dir else []))
            where = " and ".join(str(path) for path in kept)
            print(f"stage {stage.name}: starts anew; the earlier run is kept in {where}", flush=True)
            if stage.checkpoints is not None:
                drop_failed_tries(folder, stage.checkpoints)
        write_atomic(started_path, json.dumps(started, indent=1) + "\n")

    def _failure(self, stage: Stage, error: Exception, go_on: str) -> StageFailed:
        """The error of a failed stage. What is not plainly the user's to mend also leaves its traceback in a file."""
        expected = isinstance(error, (ValueError, OSError))
        message = f"{self.label(stage.name)} failed: {describe(error)}"
        if not isinstance(error, (UserError, OSError)):
            path = self.exp_dir / LOG_DIR / f"{stage.name}.traceback.txt"
            try:
                write_atomic(path, "".join(traceback.format_exception(error)))
                message += f" (details: {path})"
            except OSError:
                traceback.print_exception(error)
        return StageFailed(f"{message.rstrip('.')}; when that is mended, go on with: {go_on}", 2 if expected else 1)


def _changes(before: dict[str, Any], now: dict[str, Any], limit: int = 3) -> str:
    """``a.b: 1 -> 2, ...`` for the settings that differ; an empty string when none does."""
    now = json.loads(json.dumps(now, default=str))  # compare what JSON keeps: tuples come back as lists
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    shown = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


@contextmanager
def _locked(exp_dir: Path) -> Iterator[None]:
    """Keeps a second run out of the same folder; the lock goes with the process, however that ends."""
    (exp_dir / DONE_DIR).mkdir(parents=True, exist_ok=True)
    with open(exp_dir / DONE_DIR / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another run (process {file.read().strip() or 'unknown'}) is working in {exp_dir}; wait for its end "
                f"or give this run its own --exp-dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
