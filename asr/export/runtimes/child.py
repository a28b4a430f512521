"""Runs trials in one runtime: ``python .../asr/export/runtimes/child.py JOB.json RESULT.json``.

A job names the adapter, the folder and the precision of an export, a file of waveforms, and trials: what is heard, how
it is divided, and which streams are open at the same time. Results are tokens, their frames, and what loading and
computing cost.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ADAPTERS = {
    "sherpa-onnx": "sherpa:Online",
    "sherpa-onnx-offline": "sherpa:Offline",
    "onnx": "runner:Runner",
    "executorch": "executorch_program:Programs",
    "torch.export": "torch_program:Programs",
}
"""Class by name, in a module beside this file: made of folder, precision, and a dict of options."""


class Adapter(Protocol):
    """One runtime with an export loaded. Streams are whatever it makes.

    An adapter that can look inside has ``tensors(samples)`` too: features [T, F] and encoder_out [T', J] of a waveform.
    """

    version: str

    def open(self) -> Any: ...

    def accept(self, stream: Any, samples: np.ndarray) -> None:
        """The next samples, float32 [N] at 16 kHz; N may be 0."""

    def finish(self, stream: Any) -> None:
        """No more samples come. Nothing is appended: the waveforms of a job end in silence already."""

    def advance(self, streams: list[Any]) -> list[Any]:
        """One step of each stream that can go on, in one batch; those that did."""

    def result(self, stream: Any) -> tuple[list[int], list[int]]:
        """Tokens since the start or the last reset, and their encoder frames counted from the start of the stream."""

    def reset(self, stream: Any) -> None:
        """As at an endpoint: the text starts anew, the sound goes on."""


def memory_mib() -> dict[str, float]:
    """Resident memory of this process now, and its highest; 0 where there is no /proc."""
    path = Path("/proc/self/status")
    if not path.exists():
        return {"now": 0.0, "peak": 0.0}
    # not getrusage: its highest value counts the process that started this one
    sizes = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("Vm"))
    return {"now": int(sizes["VmRSS"].split()[0]) / 2**10, "peak": int(sizes["VmHWM"].split()[0]) / 2**10}


def run_trial(adapter: Adapter, trial: dict[str, Any], waveforms: list[np.ndarray]) -> dict[str, Any]:
    """Streams of one trial: lists of parts that are heard one after another with a reset between them.

    A part is the number of a waveform and the sizes of the pieces in which it comes, the last of which takes the rest.
    Stream n starts n * ``stagger`` rounds late, or with None when the one before it has ended.
    """
    seconds: list[float] = []
    if trial["stagger"] is not None:
        return {
            "streams": _together(adapter, trial["streams"], trial["stagger"], waveforms, seconds),
            "seconds": seconds,
        }
    results = [_together(adapter, [parts], 0, waveforms, seconds)[0] for parts in trial["streams"]]
    return {"streams": results, "seconds": seconds}


class _Part:
    """A waveform on its way into a stream."""

    def __init__(self, samples: np.ndarray, pieces: list[int]):
        self.samples, self.pieces, self.position, self.given = samples, list(pieces), 0, False

    def next(self) -> np.ndarray:
        size = self.pieces.pop(0) if self.pieces else len(self.samples)
        piece = self.samples[self.position : self.position + size]
        self.position += size
        self.given = self.position >= len(self.samples)
        return piece


def _together(
    adapter: Adapter, streams: list[Any], stagger: int, waveforms: list[np.ndarray], seconds: list[float]
) -> list[list[dict[str, Any]]]:
    """Results of each part of each stream; the time of each step of a stream is added to ``seconds``."""
    opened: list[Any] = []
    results: list[list[dict[str, Any]]] = [[] for _ in streams]
    todo = [[_Part(waveforms[number], pieces) for number, pieces in parts] for parts in streams]
    number = 0
    while any(todo):
        active = [index for index, parts in enumerate(todo) if parts and number >= index * stagger]
        number += 1
        for index in active:
            if index == len(opened):
                opened.append(adapter.open())
            part = todo[index][0]
            adapter.accept(opened[index], part.next())
            if part.given and len(todo[index]) == 1:
                adapter.finish(opened[index])
        while True:
            began = time.perf_counter()
            advanced = adapter.advance([opened[index] for index in active])
            if not advanced:
                break
            seconds.append((time.perf_counter() - began) / len(advanced))
        for index in active:
            if todo[index][0].given:
                tokens, frames = adapter.result(opened[index])
                results[index].append({"tokens": tokens, "frames": frames})
                todo[index].pop(0)
                if todo[index]:
                    adapter.reset(opened[index])
    return results


def main(job_path: str, result_path: str) -> int:
    """Exit status: 0."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    packed = np.load(job["waveforms"])
    waveforms = np.split(packed["samples"], packed["ends"][:-1])
    module, _, name = ADAPTERS[job["adapter"]].partition(":")
    adapter_class = getattr(importlib.import_module(module), name)
    before = memory_mib()
    began = time.perf_counter()
    adapter: Adapter = adapter_class(Path(job["folder"]), job["precision"], job["options"])
    loaded_s = time.perf_counter() - began
    after = memory_mib()
    trials, peaks = {}, {}
    for name, trial in job["trials"].items():
        trials[name] = run_trial(adapter, trial, waveforms)
        peaks[name] = memory_mib()["peak"]  # of this one and those before it
    if hasattr(adapter, "tensors"):
        found = {n: adapter.tensors(waveforms[n]) for n in job["tensors"]}
        flat = {f"{name}/{n}": value for n, tensors in found.items() for name, value in tensors.items()}
        np.savez(job["tensors_file"], **flat)
    result = {
        "version": adapter.version,
        "cold_start_s": loaded_s,
        "memory_mib": {
            "runtime": before["now"],
            "loaded": after["now"],
            "alone": peaks.get("alone", 0.0),
            "peak": max(peaks.values(), default=after["peak"]),
        },
        "trials": trials,
    }
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
