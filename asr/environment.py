"""What this machine and this installation offer: versions, devices, optional parts, and whether the basics work."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

# Distributions without which nothing runs.
REQUIRED = (
    "torch", "numpy", "numba", "scipy", "lhotse", "sentencepiece", "kaldi-native-fbank", "kaldialign", "soundfile",
    "jsonargparse", "PyYAML", "tensorboard", "matplotlib",
)  # fmt: skip
# Instruction sets of x86 and ARM processors that decide how fast matrix products are.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class OptionalPart:
    """A package that the toolkit can do without. `code` is what must run for it to count as usable."""

    name: str
    module: str
    code: str
    unlocks: str
    install: str
    distribution: str = ""


@dataclass(frozen=True)
class PartState:
    """`state` is "ok", "missing" or "broken"; `detail` says why it is broken."""

    part: OptionalPart
    state: str
    version: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """One step of the self-test."""

    name: str
    ok: bool
    detail: str


def optional_parts() -> list[OptionalPart]:
    """The parts that `asr doctor` looks for."""
    espeak = "import ctypes, espeakng_loader; ctypes.CDLL(espeakng_loader.get_library_path())"
    board = "from torch.utils.tensorboard import SummaryWriter"
    own = own_distribution() or "transducer-asr"
    later = "for a later version: "
    apart = "   (in an environment of its own: its wheels"
    return [
        OptionalPart("espeak-ng", "espeakng_loader", espeak, "the synth recipe: speech for `make demo`",
                     f"pip install '{own}[synth]'", "espeakng-loader"),
        OptionalPart("tensorboard", "tensorboard", board, "training curves in TensorBoard",
                     "pip install tensorboard"),
        OptionalPart("torchaudio", "torchaudio", "import torchaudio.functional", "parity tests of losses.rnnt_loss",
                     f"pip install torch==2.11.0 torchaudio==2.11.0{apart} need the CUDA build of the same torch)"),
        OptionalPart("k2", "k2", "import k2", later + "comparison with k2's transducer losses",
                     f"pip install k2 -f https://k2-fsa.github.io/k2/cpu.html{apart} lag behind torch)"),
        OptionalPart("triton", "triton", "import triton", later + "GPU kernels", "pip install triton"),
        OptionalPart("onnx", "onnx", "import onnx", "asr export: ONNX files", f"pip install '{own}[export]'"),
        OptionalPart("onnxruntime", "onnxruntime", "import onnxruntime", "asr export and asr verify",
                     f"pip install '{own}[export]'"),
        OptionalPart("sherpa-onnx", "sherpa_onnx", "import sherpa_onnx", "asr verify: exports in their device runtime",
                     f"pip install '{own}[export]'"),
        OptionalPart("executorch", "executorch", "import executorch.exir", "asr export: ExecuTorch programs",
                     f"pip install '{own}[executorch]'"),
        OptionalPart("dask", "distributed", "import distributed", "--dask of recipes: features on many machines",
                     f"pip install '{own}[dask]'"),
        OptionalPart("sounddevice", "sounddevice", "import sounddevice", "asr transcribe --mic: text of a microphone",
                     f"pip install '{own}[mic]'   (and the PortAudio library: apt-get install libportaudio2)"),
    ]  # fmt: skip


def own_distribution() -> str:
    """Name under which this package is installed; empty when it runs from a checkout that is not installed."""
    owners = packages_distributions().get("asr", [])
    return owners[0] if owners else ""


def distribution_version(name: str) -> str:
    """Version of an installed distribution, or an empty string. Nothing is imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def probe(part: OptionalPart, limit_s: float) -> PartState:
    """Import a part in a child process, because some broken installations take the interpreter with them."""
    if importlib.util.find_spec(part.module) is None:
        return PartState(part, "missing")
    found = distribution_version(part.distribution or part.name)
    try:
        # -P: a folder of the current directory that has the name of the part is not the part
        done = subprocess.run(
            [sys.executable, "-P", "-c", part.code], capture_output=True, text=True, errors="replace", timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return PartState(part, "broken", found, f"its import did not end within {limit_s:g} s")
    if done.returncode == 0:
        return PartState(part, "ok", found)
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return PartState(part, "broken", found, f"its import kills the interpreter ({name})")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return PartState(part, "broken", found, lines[-1].strip()[:300] if lines else f"exit code {done.returncode}")


def probe_all(parts: Sequence[OptionalPart], limit_s: float = 60.0) -> list[PartState]:
    """Probe parts, two at a time, in the given order."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda part: probe(part, limit_s), parts))


def cpu() -> dict[str, Any]:
    """Model, usable cores, memory in GiB, and the instruction sets that matter."""
    info = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "instruction_sets": [flag for flag in _FLAGS if flag in flags],
        **_memory(),
    }


def _memory() -> dict[str, float]:
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    out = {}
    for name, key in (("memory_gib", "MemTotal"), ("memory_available_gib", "MemAvailable")):
        if key in rows:
            out[name] = round(int(rows[key].split()[0]) / 2**20, 1)
    limit = _read("/sys/fs/cgroup/memory.max").strip()  # of a container
    if limit.isdigit() and "memory_gib" in out:
        out["memory_gib"] = min(out["memory_gib"], round(int(limit) / 2**30, 1))
    return out


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def precision(device_name: str = "cpu") -> dict[str, Any]:
    """What training.precision=auto means on a device, and why."""
    import torch

    from asr.training.precision import has_native_bf16, resolve_precision

    device = torch.device(device_name)
    native = has_native_bf16(device)
    return {"auto": resolve_precision("auto", device), "native_bf16": native}


def bf16_speed_ratio() -> float:
    """How many times faster a CPU matrix product of a model's size is in bf16 than in float32; about 0.2 s."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def cuda_devices() -> list[dict[str, Any]]:
    import torch

    out = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        out.append(
            {
                "name": found.name,
                "memory_gib": round(found.total_memory / 2**30, 1),
                "capability": f"{found.major}.{found.minor}",
                **precision(f"cuda:{i}"),
            }
        )
    return out


def self_test() -> list[Check]:
    """Whether the parts that everything rests on work here, each in a moment."""
    return [_check("transducer loss", _loss_check), _check("features", _feature_check), _check("scoring", _score_check)]


def _check(name: str, run: Any) -> Check:
    begin = time.perf_counter()
    try:
        detail = run()
    except Exception as error:  # whatever it is, the user wants to read it
        return Check(name, False, f"{type(error).__name__}: {error}"[:500])
    return Check(name, True, f"{detail}, {time.perf_counter() - begin:.1f} s")


def _loss_check() -> str:
    """Loss and gradients of a tiny lattice against the sum over each of its alignments, written out."""
    import torch

    from losses import transducer_loss

    generator = torch.Generator().manual_seed(0)
    frames, vocab_size, targets = 4, 5, [3, 1]
    shapes = ((1, frames, 6), (1, len(targets) + 1, 6), (vocab_size, 6), (vocab_size,))
    values = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    enc, pred, weight, bias = values
    lens = torch.tensor([frames]), torch.tensor([len(targets)])
    loss = transducer_loss(enc, pred, weight, bias, torch.tensor([targets]), *lens, reduction="sum").loss
    found = [loss, *torch.autograd.grad(loss, values)]

    log_probs = (torch.tanh(enc[0][:, None] + pred[0][None]) @ weight.T + bias).log_softmax(-1)
    paths = []
    # an alignment is the choice of the frame of each token; frames do not go back
    for at in itertools.combinations_with_replacement(range(frames), len(targets)):
        steps = [log_probs[t, u, targets[u]] for u, t in enumerate(at)]
        steps += [log_probs[t, sum(a <= t for a in at), 0] for t in range(frames)]
        paths.append(torch.stack(steps).sum())
    expected = -torch.stack(paths).logsumexp(0)
    wanted = [expected, *torch.autograd.grad(expected, values)]
    error = max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))
    if not error < 1e-9:
        raise ArithmeticError(f"loss or gradient differs by {error:.1e} from the sum over all alignments")
    return f"equals the sum over {len(paths)} alignments within {error:.0e}, gradients too"


def _feature_check() -> str:
    import numpy as np

    from asr.data.features import Fbank, FeatureConfig

    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    features = Fbank(FeatureConfig()).extract(0.1 * tone)
    if features.ndim != 2 or features.shape[1] != 80 or not np.isfinite(features).all():
        raise ArithmeticError(f"filter banks of one second have shape {features.shape} or are not finite")
    return f"one second gives {features.shape[0]} frames of {features.shape[1]} mel bins"


def _score_check() -> str:
    from asr.decoding.score import Transcribed, score

    line = score([Transcribed("a", "one two three", "one too three four")], replications=10).wer_line
    if line != "%WER 66.67% [2 / 3, 1 ins, 0 del, 1 sub ]":
        raise ArithmeticError(f"two errors in three words were scored as {line}")
    return "alignment counts errors"
