from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.data.audio import read_audio
from asr.decoding.decode import decode_cuts
from asr.decoding.transcribe import transcribe_files
from tests.asr.decoding.corpus import bursts, config, tokenizer, write_cuts
from tests.asr.decoding.fake import TinyTransducer


def sine(rate_hz: int, duration_s: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate_hz * duration_s)) / rate_hz)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_any_rate_becomes_16_khz(tmp_path, rate_hz, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, sine(rate_hz), rate_hz)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) <= 2
    inner = slice(800, 7200)  # the ends of a resampled tone ring
    np.testing.assert_allclose(samples[inner], sine(16_000)[inner], atol=0.01)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "four.wav"
    channels = np.stack([sine(16_000), np.zeros(8000), sine(16_000), np.zeros(8000)], axis=1)
    soundfile.write(path, channels, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path), 0.5 * sine(16_000), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 159])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("search", ["greedy", "modified_beam_search"])
def test_hardly_any_audio_is_no_error(tmp_path, count, rate_hz, search):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(count, 0.3), rate_hz)
    (found,) = transcribe_files(TinyTransducer(blank_bias=100.0), tokenizer(), [path], config(search=search))
    assert (found.error, found.text) == (None, "")


def test_silence(tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(16_000), 16_000)
    (found,) = transcribe_files(TinyTransducer(), tokenizer(), [path], config())
    assert found.error is None
    assert found.duration_s == 1.0


def broken_files(folder: Path) -> dict[Path, str]:
    (folder / "garbage.wav").write_bytes(b"RIFF but not really")
    (folder / "notes.txt").write_text("hello")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "headerless.raw").write_bytes(b"\0" * 1000)
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "none.wav", np.zeros(0), 16_000)
    (folder / os.fsdecode(b"caf\xe9.wav")).write_bytes((folder / "none.wav").read_bytes())
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan, 0.0]), 16_000, subtype="FLOAT")
    return {
        folder / "absent.wav": "the file does not exist",
        folder / "garbage.wav": "not readable as audio",
        folder / "notes.txt": "not readable as audio",
        folder / "empty.wav": "empty",
        folder / "headerless.raw": "not readable as audio",
        folder / "folder.wav": "folder",
        folder / "none.wav": "it holds no samples",
        folder / os.fsdecode(b"caf\xe9.wav"): "not valid UTF-8",
        folder / "nan.wav": "not finite",
    }


def test_broken_files_are_named_and_the_rest_goes_on(tmp_path):
    broken = broken_files(tmp_path)
    good = []
    for i in range(4):
        good.append(tmp_path / f"good-{i}.wav")
        soundfile.write(good[-1], bursts(9000 + 1000 * i, seed=i), 16_000)
    order = [good[0], *list(broken)[:3], good[1], good[2], *list(broken)[3:], good[3]]
    model = TinyTransducer(seed=5, blank_bias=0.5)
    for batch_duration_s in (600, 1.0):  # one batch; nearly one file a batch
        found = list(transcribe_files(model, tokenizer(), order, config(batch_duration_s=batch_duration_s)))
        assert [one.path for one in found] == order
        for one in found:
            if one.path in broken:
                assert one.error is not None and broken[one.path] in one.error
                assert "\n" not in one.error
            else:
                assert one.error is None and one.text


def test_nothing_but_broken_files(tmp_path):
    found = list(transcribe_files(TinyTransducer(), tokenizer(), [tmp_path / "a", tmp_path / "b"], config()))
    assert [one.error for one in found] == ["the file does not exist"] * 2
    assert list(transcribe_files(TinyTransducer(), tokenizer(), [], config())) == []


def test_same_result_as_decoding_the_cuts(tmp_path):
    cuts = write_cuts(tmp_path, ["a", "b", "c", "ab"])
    model = TinyTransducer(seed=5, blank_bias=0.5)
    decoded = {result.cut_id: result for result in decode_cuts(model, tokenizer(), cuts, config())}
    paths = [tmp_path / f"utt-{i}.wav" for i in range(4)]
    for one in transcribe_files(model, tokenizer(), paths, config()):
        other = decoded[one.path.stem]
        assert one.text == other.hyp
        (segment,) = one.segments
        assert segment.hypothesis.frames == other.hypothesis.frames
        assert segment.hypothesis.score == pytest.approx(other.hypothesis.score, abs=1e-9)
        assert (segment.start_s, segment.end_s) == (0.0, one.duration_s)
        assert one.duration_s == pytest.approx(other.duration_s, abs=1e-3)
