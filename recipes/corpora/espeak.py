"""Speech from espeak-ng, in a child process of its own.

espeak-ng is licensed under GPLv3 and keeps state between calls: the same request gives other samples later in one
process. So this file is both sides of a pipe. ``speak`` (parent) starts it as a fresh program for every list of
requests; the program (child) loads the library, speaks the list in order, and writes samples. The same list gives the
same bytes on every run. The child imports the standard library and espeakng_loader only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INSTALL = "pip install 'transducer-asr[synth]'"
_MISSING = 3
_SYNCHRONOUS, _CHARS_UTF8 = 2, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_SAFE_VOLUME = 40  # the default of 100 clips inside the synthesizer for some voices


@dataclass(frozen=True)
class Request:
    """One utterance: text, voice (``base+variant``), rate in words per minute, pitch and pitch range (0 to 100)."""

    text: str
    voice: str
    rate: int = 175
    pitch: int = 50
    range: int = 50


def speak(requests: Sequence[Request]) -> tuple[int, list[bytes]]:
    """Speak all requests in one fresh process: sample rate in Hz, and native int16 samples of each request.

    Raises UserError if espeak-ng is not installed or does not know a voice.
    """
    from asr.errors import UserError

    found = importlib.util.find_spec("espeakng_loader")
    if found is None or found.origin is None:
        raise UserError(f"espeak-ng is not installed; install it: {INSTALL}")
    site = str(Path(found.origin).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="espeak-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "samples.raw"
        job.write_text(json.dumps([asdict(request) for request in requests]), encoding="utf-8")
        # By path, not by module name: the child then loads nothing of the toolkit. Isolated: no settings from outside,
        # so it is told where espeakng_loader lies.
        command = [sys.executable, "-I", str(Path(__file__).resolve()), site, str(job), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == _MISSING:
            raise UserError(f"espeak-ng is not available ({done.stderr.strip()}); install it: {INSTALL}")
        if done.returncode != 0:
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise UserError(f"espeak-ng failed: {last}; another version of it may help: {INSTALL}")
        answer = json.loads(done.stdout.splitlines()[-1])
        raw = result.read_bytes()
    out, start = [], 0
    for count in answer["num_samples"]:
        out.append(raw[start : start + 2 * count])
        start += 2 * count
    return int(answer["rate_hz"]), out


def _load(site: str) -> tuple[Any, int]:
    """The library, initialised, and its sample rate in Hz."""
    sys.path.append(site)
    try:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
    except (ImportError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(_MISSING) from error
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
    if rate <= 0:
        print(f"espeak_Initialize returned {rate} for {data}", file=sys.stderr)
        raise SystemExit(_MISSING)
    if not hasattr(library, "espeak_ng_SetRandSeed"):
        print("this build is older than 1.52 and cannot repeat its random numbers", file=sys.stderr)
        raise SystemExit(_MISSING)
    return library, rate


def _main(site: str, job: str, result: str) -> None:
    library, rate = _load(site)
    chunks: list[bytes] = []
    callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    @callback_type
    def collect(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(collect)
    counts = []
    with open(result, "wb") as file:
        for request in json.loads(Path(job).read_text(encoding="utf-8")):
            if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
                raise SystemExit(f"unknown voice {request['voice']!r}")
            for parameter, value in ((_RATE, request["rate"]), (_PITCH, request["pitch"]), (_RANGE, request["range"])):
                library.espeak_SetParameter(parameter, value, 0)
            library.espeak_SetParameter(_VOLUME, _SAFE_VOLUME, 0)
            # Breath of some variants is random noise, seeded with the time of day unless told otherwise.
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            text = request["text"].encode()
            chunks.clear()
            status = library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
            if status != 0 or library.espeak_Synchronize() != 0:
                raise SystemExit(f"cannot speak {request['text']!r} in voice {request['voice']!r}")
            samples = b"".join(chunks)
            file.write(samples)
            counts.append(len(samples) // 2)
    print(json.dumps({"rate_hz": rate, "num_samples": counts}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
