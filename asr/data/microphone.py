"""Audio of a microphone, by the optional package sounddevice."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from asr.data.audio import Resampler
from asr.errors import UserError

WAIT_S = 0.05  # between looks at what has come


def import_sounddevice() -> Any:
    """The package.

    Raises:
        UserError: it is missing, or its library; the line says how to install it.
    """
    try:
        import sounddevice
    except ImportError:
        raise UserError(
            "a microphone needs the package sounddevice; install it: pip install 'transducer-asr[mic]'"
        ) from None
    except OSError as error:
        raise UserError(
            f"sounddevice does not find its library ({error}); install it: apt-get install libportaudio2"
        ) from None
    return sounddevice


def microphone_reader(stop: threading.Event) -> Callable[[Path], Iterator[np.ndarray]]:
    """``microphone_pieces`` in the form of ``read_pieces``; the path is not looked at."""
    return lambda path: microphone_pieces(stop)


def microphone_pieces(stop: threading.Event) -> Iterator[np.ndarray]:
    """float32 [N] in [-1, 1] at 16 kHz from the default microphone, as they come, until ``stop`` is set.

    The device runs at its own rate: not all have 16 kHz.

    Raises:
        UserError: no package, no microphone.
    """
    sounddevice = import_sounddevice()
    heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def callback(data: np.ndarray, frames: int, time: Any, status: Any) -> None:
        heard.put(data[:, 0].copy())

    try:
        rate_hz = round(sounddevice.query_devices(kind="input")["default_samplerate"])
        stream = sounddevice.InputStream(samplerate=rate_hz, channels=1, dtype="float32", callback=callback)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"the microphone cannot be opened ({' '.join(str(error).split())})") from None
    resampler = Resampler(rate_hz)
    with stream:
        stopped = False
        while not stopped:
            stopped = stop.wait(WAIT_S if heard.empty() else 0)
            pieces = []
            while not heard.empty():  # all that came while the last piece was decoded
                pieces.append(heard.get())
            if pieces:
                yield resampler.accept(np.concatenate(pieces))
    yield resampler.finish()


@contextmanager
def set_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets within the block; the second interrupts as ever."""
    stop = threading.Event()
    old = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, old)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, old)
