from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.data.audio import AudioError
from recipes.corpora import audio
from tests.recipes.corpora.makers import tone, write_8khz


def test_recordings_are_resampled_to_16_khz(tmp_path: Path) -> None:
    write_8khz(tmp_path / "a.wav", tone(1000.0, 0.5))
    samples = audio.read_recording(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and len(samples) == 8000
    power = np.abs(np.fft.rfft(samples)) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / 16000)
    assert hertz[power.argmax()] == pytest.approx(1000.0, abs=2)
    assert power[hertz > 4000].sum() < 1e-7 * power.sum()  # no image of the tone at 7 kHz


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = tone(500.0, 0.2)
    soundfile.write(str(tmp_path / "a.wav"), np.stack([left, np.zeros_like(left)], axis=1), 8000, subtype="PCM_16")
    write_8khz(tmp_path / "b.wav", left / 2)
    difference = audio.read_recording(tmp_path / "a.wav") - audio.read_recording(tmp_path / "b.wav")
    assert np.abs(difference).max() < 1e-3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-100], "truncated: .* 8000 bytes of samples, the file holds 7900"),
        (lambda data: data[:20], "truncated: the wav header has no data chunk"),
        (lambda data: b"<html>not found</html>", "not readable as audio"),
        (lambda data: b"", "the file is empty"),
        (lambda data: data[:20] + b"\x63\x00" + data[22:], "not readable as audio"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path: Path, damage, reason: str) -> None:
    write_8khz(tmp_path / "a.wav", tone(500.0, 0.5))
    (tmp_path / "b.wav").write_bytes(damage((tmp_path / "a.wav").read_bytes()))
    with pytest.raises(AudioError, match=reason):
        audio.read_recording(tmp_path / "b.wav")


def test_wav_header_of_a_stream_is_accepted(tmp_path: Path) -> None:
    write_8khz(tmp_path / "a.wav", tone(500.0, 0.5))
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "b.wav").write_bytes(data)
    assert np.array_equal(audio.read_recording(tmp_path / "a.wav"), audio.read_recording(tmp_path / "b.wav"))


def test_too_short_is_refused(tmp_path: Path) -> None:
    write_8khz(tmp_path / "a.wav", np.zeros(100))
    with pytest.raises(AudioError, match="at least 0.05 s"):
        audio.read_recording(tmp_path / "a.wav")


def test_pcm_is_scaled_down_and_never_clipped(tmp_path: Path) -> None:
    square = np.sign(np.sin(np.arange(8000) / 5))
    write_8khz(tmp_path / "a.wav", square)
    pcm = audio.to_pcm16(audio.read_recording(tmp_path / "a.wav"))
    assert np.abs(pcm.astype(int)).max() <= round(audio.PEAK_LIMIT * 32767)
    quiet = np.full(10, 0.25, np.float32)
    assert audio.limit_peak(quiet) is quiet
    assert audio.to_pcm16(np.array([0.5, -0.5], np.float32)).tolist() == [16384, -16384]


def test_write_and_read_back(tmp_path: Path) -> None:
    pcm = audio.to_pcm16(tone(500.0, 0.2).astype(np.float32))
    audio.write_wav(tmp_path / "a.wav", pcm)
    info = soundfile.info(str(tmp_path / "a.wav"))
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    assert np.array_equal(soundfile.read(str(tmp_path / "a.wav"), dtype="int16")[0], pcm)


def test_join_keeps_the_level_of_noise_and_makes_no_step() -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.standard_normal(8000).astype(np.float32) for _ in range(2)]
    joined = audio.join(pieces, fade_s=0.1)
    assert len(joined) == 16000 - 1600
    joint = joined[8000 - 1600 : 8000]
    assert audio.rms(joint) == pytest.approx(1.0, abs=0.08)
    ramp = audio.join([np.full(800, 0.5, np.float32), np.full(800, -0.5, np.float32)], fade_s=0.01)
    assert np.abs(np.diff(ramp)).max() < 0.02


def test_join_of_short_and_no_pieces() -> None:
    assert len(audio.join([])) == 0
    one = np.ones(1, np.float32)
    assert audio.join([one, one, one]).tolist() == [1, 1, 1]
    assert len(audio.join([np.ones(10, np.float32), np.ones(4, np.float32)], fade_s=1.0)) == 12


def test_energy_db_of_a_tone() -> None:
    samples = np.sin(2 * np.pi * 400 * np.arange(16000) / 16000).astype(np.float32)
    level = audio.energy_db(samples)
    assert len(level) == 100
    assert np.allclose(level[2:], 10 * np.log10(0.5), atol=0.05)
