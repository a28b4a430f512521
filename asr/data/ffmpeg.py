"""Recordings that libsndfile does not read (m4a, webm, wma, films), decoded by ffmpeg in a child process."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from asr.data.audio import AudioError, UnknownFormatError

HOW_TO_GET_IT = "apt-get install ffmpeg, or brew install ffmpeg"


def ffmpeg_blocks(path: Path, block_s: float, reason: UnknownFormatError) -> Iterator[tuple[int, np.ndarray]]:
    """Rate in Hz and samples, float64 [N, channels], of one block after another of the first audio track.

    The rate and the channels are those of the file: its samples are averaged and resampled as those of other files.

    Args:
        path: of the file.
        block_s: seconds of a block.
        reason: why libsndfile has not read it.

    Raises:
        AudioError: ffmpeg is not installed, or fails. Of a file that is cut off ffmpeg decodes what is there, where the
            format allows it, and does not complain.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise AudioError(f"{reason}; ffmpeg would read more formats, but is not installed ({HOW_TO_GET_IT})")
    # "file:": a name may look like an address or an option. The header of AU says the rate and needs no length.
    command = [program, "-nostdin", "-v", "error", "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            yield from _read_au(process.stdout, block_s)
            failed = process.wait() != 0
        finally:  # also where nobody wants the rest
            process.stdout.close()
            process.kill()
            process.wait()
        if failed:
            raise AudioError(f"not readable as audio (ffmpeg: {_last_line(said)})")


def _read_au(stream: IO[bytes], block_s: float) -> Iterator[tuple[int, np.ndarray]]:
    header = stream.read(24)
    if len(header) < 24:  # ffmpeg has failed, and says why
        return
    magic, offset, _, encoding, rate_hz, channels = struct.unpack(">4s5I", header)
    if magic != b".snd" or encoding != 6:
        raise AudioError("not readable as audio (ffmpeg wrote another format than it was asked for)")
    stream.read(offset - 24)
    frame = 4 * channels
    size = max(1, int(block_s * rate_hz)) * frame
    while data := stream.read(size):
        whole = len(data) // frame * frame
        if whole:
            yield rate_hz, np.frombuffer(data[:whole], dtype=">f4").reshape(-1, channels).astype(np.float64)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode("utf-8", errors="replace").split("\n")
    # each line begins with the part of ffmpeg that speaks and its address in memory
    found = [" ".join(line.rsplit("] ", 1)[-1].split()) for line in lines if line.strip()]
    return found[-1][:200] if found else "it failed without a word"
