"""Audio in pieces: resampled as the whole, read with the same checks, by ffmpeg where libsndfile cannot."""

from __future__ import annotations

import math
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import firwin, resample_poly

from asr.data.audio import AudioError, Resampler, audio_duration_s, read_audio, read_pieces, resample
from asr.data.audio_files import find_audio
from asr.errors import UserError


def noise(count: int, seed: int = 0, channels: int | None = None) -> np.ndarray:
    shape = count if channels is None else (count, channels)
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


@given(
    rates=st.sampled_from(
        [(8000, 16000), (44100, 16000), (48000, 16000), (11025, 16000), (7919, 16000), (16000, 8000)]
    ),
    cuts=st.lists(st.integers(0, 5000), max_size=6),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60, deadline=None)
def test_resampled_pieces_are_the_whole_bit_by_bit(
    rates: tuple[int, int], cuts: list[int], dtype: type[np.floating]
) -> None:
    samples = noise(sum(cuts)).astype(dtype)
    divisor = math.gcd(*rates)
    up, down = rates[1] // divisor, rates[0] // divisor
    widest = max(up, down)
    low_pass = firwin(20 * widest + 1, 1 / widest, window=("kaiser", 8.0))
    expected = resample_poly(samples, up, down, window=low_pass).astype(np.float32) if len(samples) else samples
    resampler = Resampler(*rates)
    pieces = [resampler.accept(piece) for piece in np.split(samples, np.cumsum(cuts))]
    found = np.concatenate([*pieces, resampler.finish()])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(resample(samples, *rates), expected)


def test_the_resampler_keeps_no_more_than_its_filter_reaches_and_is_not_late() -> None:
    resampler = Resampler(44100)
    given_s = returned = 0.0
    for _ in range(20):
        returned += len(resampler.accept(noise(4410)))
        given_s += 0.1
        assert len(resampler._kept) < 100
        assert given_s - returned / 16000 < 0.001
    assert Resampler(16000).accept(np.zeros(3)).dtype == np.float32


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_pieces_are_the_whole_file(tmp_path: Path, rate_hz: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(2 * rate_hz + 77, channels=2), rate_hz)
    whole, rate = soundfile.read(path, dtype="float64")
    assert rate == rate_hz
    pieces = list(read_pieces(path, 0.3))
    assert len(pieces) >= 7 and all(piece.dtype == np.float32 for piece in pieces)
    assert max(len(piece) for piece in pieces) <= 0.32 * 16000
    expected = resample(whole.mean(axis=1), rate_hz)
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-6)  # vorbis depends on how it is read
    np.testing.assert_allclose(read_audio(path), expected, atol=1e-6)
    assert audio_duration_s(path) == pytest.approx(2 + 77 / rate_hz)


def test_what_is_wrong_behind_the_first_pieces_is_told_there(tmp_path: Path) -> None:
    samples = noise(80000)
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) * 3 // 4])
    samples[70000] = np.nan
    soundfile.write(tmp_path / "b.wav", samples, 16000, subtype="FLOAT")
    for name, message in (("a.flac", "truncated|not readable"), ("b.wav", "not finite")):
        pieces = read_pieces(tmp_path / name, 1.0)
        assert len(next(pieces)) == 16000
        with pytest.raises(AudioError, match=message):
            list(pieces)


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_ffmpeg_reads_what_libsndfile_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = noise(30000, channels=2).astype(np.float32)
    soundfile.write(tmp_path / "a.au", samples, 22050, format="AU", subtype="FLOAT")
    decoded = tmp_path / "decoded"
    data = bytearray((tmp_path / "a.au").read_bytes())
    data[8:12] = b"\xff" * 4  # ffmpeg cannot know the length before the end
    decoded.write_bytes(data)
    film = tmp_path / "a film.mp4"
    film.write_bytes(b"what ffmpeg decodes")
    said = tmp_path / "said"
    fake_ffmpeg(tmp_path, monkeypatch, f'echo "$@" >{said}; cat {decoded}')
    found = np.concatenate(list(read_pieces(film, 0.5)))
    np.testing.assert_array_equal(found, resample(samples.astype(np.float64).mean(axis=1), 22050))
    assert f"-i file:{film} " in said.read_text()
    assert audio_duration_s(film) is None


def test_ffmpeg_that_fails_says_why_and_one_that_is_left_early_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no film")
    script = 'echo "[mov @ 0x1] moov atom not found" >&2; echo "file: Invalid data" >&2; exit 1'
    fake_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(AudioError, match=r"^not readable as audio \(ffmpeg: file: Invalid data\)$"):
        read_audio(path)
    header = tmp_path / "header"
    header.write_bytes(struct.pack(">4s5I", b".snd", 24, 0xFFFFFFFF, 6, 16000, 1))
    (tmp_path / "bin" / "ffmpeg").write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\ncat {header}\nexec cat /dev/zero\n")
    pieces = read_pieces(path, 0.1)
    assert not next(pieces).any()
    pieces.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_ffmpeg_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"a film")
    with pytest.raises(AudioError, match="^not readable as audio .*apt-get install ffmpeg") as caught:
        read_audio(tmp_path / "a.mp4")
    assert "\n" not in str(caught.value)


def test_folders_stand_for_the_audio_in_them(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "deep/er/c.m4a", "notes.txt", ".hidden.wav", ".cache/d.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    inside = [tmp_path / "in" / name for name in ("a.FLAC", "b.wav", "deep/er/c.m4a")]
    assert find_audio([tmp_path / "gone.wav", tmp_path / "in"]) == [tmp_path / "gone.wav", *inside]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no audio files"):
        find_audio([tmp_path / "none"])
    with pytest.raises(UserError, match="absent: no such file or folder"):
        find_audio([tmp_path / "absent"])


class FakeSoundDevice:
    """The parts of sounddevice that are used: a microphone at 8 kHz that says what it is given."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, sounds: list[np.ndarray]) -> None:
        self.sounds = sounds

    def query_devices(self, kind: str) -> dict[str, float]:
        return {"default_samplerate": 8000.0}

    def InputStream(self, samplerate: int, channels: int, dtype: str, callback):  # type: ignore[no-untyped-def]
        assert (samplerate, channels, dtype) == (8000, 1, "float32")
        self.callback = callback
        return self

    def __enter__(self) -> None:
        for sound in self.sounds:
            self.callback(sound[:, None], len(sound), None, None)

    def __exit__(self, *error: object) -> None:
        self.sounds = []


def test_a_microphone_is_read_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from asr.data.microphone import microphone_pieces

    sound = noise(4000).astype(np.float32)
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", FakeSoundDevice([sound[:1000], sound[1000:]]))
    stop = threading.Event()
    pieces = []
    for piece in microphone_pieces(stop):
        pieces.append(piece)
        stop.set()
    np.testing.assert_array_equal(np.concatenate(pieces), resample(sound, 8000))
