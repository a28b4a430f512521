"""No export without proof: files run in their real runtime, and must hear what the model hears."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asr.checkpoint import Loaded
from asr.data.fbank import Fbank
from asr.data.features import load_samples
from asr.decoding.score import ErrorUnit, errors_name, text_errors
from asr.errors import UserError
from asr.export import find_target
from asr.export.folder import Manifest, sha256_of
from asr.export.packages import check_packages
from asr.export.trials import Expected, Trials, make_trials
from asr.models.context import Milliseconds

if TYPE_CHECKING:
    from lhotse import CutSet

CHILD = Path(__file__).resolve().parent / "runtimes" / "child.py"
TENSOR_UTTERANCES = 4
"""Recordings whose features and encoder output are compared number by number."""


@dataclass
class Difference:
    """Where a runtime and the model part: the first token that differs, in one stream of one trial."""

    trial: str
    utterance: str
    expected: list[int]
    expected_frames: list[int]
    found: list[int]
    found_frames: list[int]

    def __str__(self) -> str:
        wanted = list(zip(self.expected, self.expected_frames, strict=True))
        got = list(zip(self.found, self.found_frames, strict=True))
        at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
        said = [f"{one[at][0]} at frame {one[at][1]}" if at < len(one) else "no more" for one in (got, wanted)]
        return f"{self.utterance} ({self.trial}): token {at} is {said[0]}, and {said[1]} in PyTorch"


@dataclass
class TensorDifference:
    """Largest difference of a tensor from the model's, and where it is."""

    name: str
    largest: float
    utterance: str
    frame: int
    scale: float  # standard deviation of the model's


@dataclass
class PrecisionReport:
    """One precision of one export in its runtime.

    Resident memory in MiB is that with the runtime imported and the recordings read (``runtime_mib``), after loading,
    and at most until all recordings were heard one after another (``alone_mib``) and in all trials. ``errors``, also as
    percent of the reference, are in the unit of the ``Report``.
    """

    precision: str
    ok: bool
    reason: str
    runtime: str
    runtime_version: str
    bytes: int
    utterances: int
    errors: str
    error_percent: float
    eager_error_percent: float
    same_tokens: dict[str, str]
    differences: list[str]
    tensors: list[TensorDifference]
    cold_start_s: float
    runtime_mib: float
    loaded_mib: float
    alone_mib: float
    peak_mib: float
    step_ms_median: float
    step_ms_p95: float
    real_time_factor: float


@dataclass
class Report:
    """What ``verify`` found; ``errors_in``: the unit of errors."""

    folder: str
    manifest: dict[str, Any]
    seconds_of_audio: float
    threads: int
    errors_in: ErrorUnit = "words"
    precisions: list[PrecisionReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every precision holds."""
        return all(one.ok for one in self.precisions)


class RuntimeFailed(UserError):
    """The runtime ended, or refused the files."""


def verify(
    loaded: Loaded,
    checkpoint: Path,
    folder: Path,
    cuts: CutSet,
    *,
    max_wer_increase: float = 0.3,
    threads: int = 1,
    python: str = sys.executable,
) -> Report:
    """Compares the files of a folder, in their runtime, with the model on recordings.

    fp32 must give the model's tokens and their frames in every trial; int8 at most ``max_wer_increase`` percent more
    errors of the reference words (characters with ``training.errors_in``) than the model, and the same tokens however
    the samples of a stream are divided.

    Args:
        loaded: the model that was exported, on the CPU and in evaluation mode.
        checkpoint: its file, which must be the one that was exported.
        folder: of ``export``.
        cuts: recordings at 16 kHz with texts.
        threads: of the runtime.
        python: interpreter that has the runtime, for versions that live in another environment.

    Raises:
        UserError: a folder that is no export, or one of another checkpoint; a missing package; a runtime that ends.
    """
    manifest = Manifest.load(folder)
    target = find_target(manifest.target)
    if manifest.checkpoint_sha256 != sha256_of(checkpoint):
        raise UserError(
            f"{folder} was exported from another checkpoint ({manifest.checkpoint}) than {checkpoint}; export again"
        )
    if python == sys.executable:
        check_packages(f"verification of {manifest.target}", target.extra, *target.packages)
    adapter = target.offline if manifest.chunk_ms == "full" else target.streaming
    assert adapter is not None  # such a folder is not written
    chosen = list(cuts)
    samples = [load_samples(cut) for cut in chosen]
    trials = make_trials(samples, [cut.id for cut in chosen], manifest.chunk_ms)
    left: Milliseconds = "full" if manifest.left_context_ms is None else manifest.left_context_ms
    expected = Expected(loaded, trials, manifest.chunk_ms, left)
    texts = [" ".join(part.text for part in cut.supervisions) for cut in chosen]
    audio_s = sum(len(one) for one in samples) / 16000
    report = Report(str(folder), asdict(manifest), round(audio_s, 2), threads, loaded.config.training.errors_in)
    for precision, files in manifest.files.items():
        options = {"threads": threads, "num_mel_bins": manifest.num_mel_bins, "files": files}
        found, tensors = run_child(adapter, folder, precision, options, trials, python)
        if target.inside is not None:
            few = replace(trials, trials={}, waveforms=trials.waveforms[:TENSOR_UTTERANCES])
            _, tensors = run_child(target.inside, folder, precision, options, few)
        one = _judge(loaded, precision, trials, expected, texts, found, tensors, max_wer_increase)
        one.bytes = sum((folder / name).stat().st_size for name in files.values())
        one.runtime = adapter
        one.real_time_factor = round(sum(found["trials"]["alone"]["seconds"]) / max(audio_s, 1e-9), 5)
        report.precisions.append(one)
    return report


def run_child(
    adapter: str, folder: Path, precision: str, options: dict[str, Any], trials: Trials, python: str = sys.executable
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results of all trials in a child process; and features and encoder output of some, where the adapter gives them.

    Raises:
        RuntimeFailed: it ended with an error, or without one.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        ends = np.cumsum([len(one) for one in trials.waveforms])
        np.savez(work / "waveforms.npz", samples=np.concatenate(trials.waveforms), ends=ends)
        job = {
            "adapter": adapter,
            "folder": str(folder.absolute()),
            "precision": precision,
            "options": options,
            "waveforms": str(work / "waveforms.npz"),
            "trials": {key: asdict(trial) for key, trial in trials.trials.items()},
            "tensors": list(range(min(TENSOR_UTTERANCES, trials.recordings))),
            "tensors_file": str(work / "tensors.npz"),
        }
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # by its path: another environment need not have this distribution
        command = [python, str(CHILD), str(work / "job.json"), str(work / "result.json")]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode or not (work / "result.json").is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            last = lines[-1][:300] if lines else "nothing was said"
            raise RuntimeFailed(
                f"{adapter} ended with {done.returncode} on {folder} ({precision}): {last}; it cannot run these files"
            )
        result = json.loads((work / "result.json").read_text(encoding="utf-8"))
        tensors: dict[str, np.ndarray] = {}
        if (work / "tensors.npz").is_file():
            with np.load(work / "tensors.npz") as packed:
                tensors = dict(packed)
        return result, tensors


def _judge(
    loaded: Loaded,
    precision: str,
    trials: Trials,
    expected: Expected,
    texts: Sequence[str],
    found: dict[str, Any],
    tensors: dict[str, np.ndarray],
    max_wer_increase: float,
) -> PrecisionReport:
    """Compares what one precision heard with the model."""
    differences: list[Difference] = []
    same: dict[str, str] = {}
    alone = {
        parts[0][0]: heard[0]
        for parts, heard in zip(trials.trials["alone"].streams, found["trials"]["alone"]["streams"], strict=True)
    }
    for name, trial in trials.trials.items():
        equal = count = 0
        for parts, heard in zip(trial.streams, found["trials"][name]["streams"], strict=True):
            wanted = expected.of([number for number, _ in parts])
            for (number, _), one, want in zip(parts, heard, wanted, strict=True):
                tokens, frames = want.tokens, want.frames
                if precision != "fp32" and len(parts) == 1 and number in alone:
                    # its own result in one piece is what other ways must give
                    tokens, frames = alone[number]["tokens"], alone[number]["frames"]
                elif precision != "fp32":
                    continue
                count += 1
                if (one["tokens"], one["frames"]) == (tokens, frames):
                    equal += 1
                # int8 rounds activations by the largest of a batch: who is heard together may move a token
                elif precision == "fp32" or trial.stagger is None:
                    differences.append(
                        Difference(name, trials.names[number], tokens, frames, one["tokens"], one["frames"])
                    )
        same[name] = f"{equal}/{count}"
    tokenizer, unit = loaded.tokenizer, loaded.config.training.errors_in
    numbers = range(len(texts))
    heard_tokens = [expected.of([number])[0].tokens for number in numbers]
    counts = text_errors(texts, [tokenizer.decode(alone[number]["tokens"]) for number in numbers], unit)
    eager = text_errors(texts, [tokenizer.decode(tokens) for tokens in heard_tokens], unit)
    increase = 100 * (counts.rate - eager.rate)
    reason = ""
    if not any(heard_tokens):
        reason = "the model hears no token in any recording, so that nothing is proved; pass other --cuts"
    elif differences:
        reason = f"{len(differences)} results differ; first: {differences[0]}"
    elif increase > max_wer_increase:
        rise = f"{increase:.2f}, from {100 * eager.rate:.2f} to {100 * counts.rate:.2f}%"
        reason = f"{errors_name(unit)} rise by {rise}; the limit is {max_wer_increase}"
    milliseconds = 1e3 * np.array(found["trials"]["alone"]["seconds"] or [0.0])
    memory = found["memory_mib"]
    return PrecisionReport(
        precision=precision,
        ok=not reason,
        reason=reason,
        runtime="",
        runtime_version=found["version"],
        bytes=0,
        utterances=len(texts),
        errors=str(counts),
        error_percent=100 * counts.rate,  # rounded twice, 1.2554 would be shown as 1.25
        eager_error_percent=100 * eager.rate,
        same_tokens=same,
        differences=[str(one) for one in differences[:10]],
        tensors=_compare_tensors(tensors, trials, expected, loaded),
        cold_start_s=round(found["cold_start_s"], 3),
        runtime_mib=round(memory["runtime"], 1),
        loaded_mib=round(memory["loaded"], 1),
        alone_mib=round(memory["alone"], 1),
        peak_mib=round(memory["peak"], 1),
        step_ms_median=round(float(np.median(milliseconds)), 2),
        step_ms_p95=round(float(np.percentile(milliseconds, 95)), 2),
        real_time_factor=0.0,
    )


def _compare_tensors(
    tensors: dict[str, np.ndarray], trials: Trials, expected: Expected, loaded: Loaded
) -> list[TensorDifference]:
    """Features and encoder output of the utterances for which the adapter gave them."""
    fbank = Fbank(loaded.config.data.features)
    found: dict[str, TensorDifference] = {}
    for key, value in tensors.items():
        name, _, number = key.partition("/")
        index = int(number)
        want = fbank.extract(trials.waveforms[index]) if name == "features" else expected.of([index])[0].encoder_out
        # streams end with the last chunk that is whole
        rows = min(len(value), len(want))
        by_frame = np.abs(value[:rows] - want[:rows]).max(1) if rows else np.zeros(1)
        frame = int(by_frame.argmax())
        one = TensorDifference(name, float(by_frame[frame]), trials.names[index], frame, float(want.std()))
        if name not in found or one.largest > found[name].largest:
            found[name] = one
    return list(found.values())
