"""Long recordings, in chunks or cut and decoded with full context: nothing is lost, repeated or out of order."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr.config import Experiment, load_experiment
from asr.data.audio import read_audio, read_pieces
from asr.decoding import regions
from asr.decoding.playing import Heard, Player
from asr.decoding.regions import RegionCutter
from asr.decoding.streaming import StreamingRecognizer
from asr.decoding.terminal import LiveText, Progress
from asr.decoding.transcribe import Listener, streaming_settings, transcribe_files
from asr.decoding.transcript import Segment, Transcript
from asr.errors import UserError
from tests.asr.decoding.corpus import bursts, tokenizer
from tests.asr.decoding.test_real_model import SETTINGS, make_model

RULES = ["decoding.endpoint.max_segment_s=3", "decoding.endpoint.silence_after_text_s=0.6"]


@cache
def model() -> torch.nn.Module:
    return make_model(blank_bias=2.0)


def experiment(*more: str) -> Experiment:
    return load_experiment(None, [*SETTINGS, *RULES, *more])


def sound(path: Path, seconds: float, seed: int, rate_hz: int = 16000) -> Path:
    """Bursts and, in their midst, four seconds of silence."""
    samples = bursts(int(seconds * rate_hz), seed)
    samples[len(samples) // 2 :][: 4 * rate_hz] = 0
    soundfile.write(path, samples, rate_hz)
    return path


class Told(Listener):
    def __init__(self) -> None:
        self.audio_s = 0.0
        self.segments: list[tuple[Path, Segment]] = []

    def heard(self, duration_s: float) -> None:
        self.audio_s += duration_s

    def segment(self, path: Path, segment: Segment) -> None:
        self.segments.append((path, segment))


def transcribe(paths: list[Path], *settings: str, **options: object) -> list[Transcript]:
    return list(transcribe_files(model(), tokenizer(), paths, experiment(*settings), **options))  # type: ignore[arg-type]


def test_all_of_a_recording_is_in_one_region_or_another(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.wav", 14.3, 1)
    config = experiment("decoding.chunk_ms=640")
    player, cutter = Player(StreamingRecognizer(model(), tokenizer(), config)), RegionCutter(7)
    player.add(7, read_pieces(path, 1.0))
    found, ends = [], [0]
    while len(player):
        (heard,) = player.step()
        found += cutter.hear(heard)
        ends += [round(segment.end_s * 25) for segment in heard.segments]
        assert len(cutter._samples) < 16000 * 4.7, "what is cut is let go"
    np.testing.assert_array_equal(np.concatenate([region.samples for region in found]), read_audio(path))
    starts = [region.start for region in found]
    assert starts == sorted(starts) and set(ends[:-1]) <= set(starts) and len(found) > 4
    assert all(region.key == 7 and region.duration_s <= 3.7 for region in found)


def test_a_long_file_is_cut_and_its_parts_decoded_with_full_context(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.wav", 12.0, 2, rate_hz=8000)
    (whole,) = transcribe([path], "decoding.batch_duration_s=5")
    assert whole.duration_s == 12.0 and len(whole.segments) > 2
    samples = read_audio(path)
    for segment in whole.segments:
        part = tmp_path / "part.wav"
        soundfile.write(part, samples[round(segment.start_s * 16000) : round(segment.end_s * 16000)], 16000, "FLOAT")
        (alone,) = transcribe([part])
        assert alone.text == segment.text
        (found,) = alone.segments
        shift = round(segment.start_s * 25)
        assert segment.hypothesis.frames == [frame + shift for frame in found.hypothesis.frames]
        assert segment.words[0].start_s == pytest.approx(found.words[0].start_s + segment.start_s)


@pytest.mark.parametrize("chunk", ["full", "640"])
def test_files_of_all_lengths_in_the_order_given(tmp_path: Path, chunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "CPU_BATCH_S", 7.0)
    lengths = [1.0, 9.0, 0.5, 6.0, 1.5, 7.0, 5.5, 1.2]
    paths = [sound(tmp_path / f"{i}.wav", length, i) for i, length in enumerate(lengths)]
    broken = tmp_path / "broken.wav"
    samples = bursts(16000 * 8, 5)
    samples[16000 * 7 :] = np.nan  # found out when most of it is decoded
    soundfile.write(broken, samples, 16000, subtype="FLOAT")
    paths[3:3] = [broken, tmp_path / "absent.wav"]
    settings = [f"decoding.chunk_ms={chunk}", "decoding.batch_duration_s=4"]
    told = Told()
    together = transcribe(paths, *settings, listener=told, at_once=3)
    assert [one.path for one in together] == paths
    assert [one.error for one in together[3:5]] == [
        "it holds samples that are not finite numbers",
        "the file does not exist",
    ]
    assert together[3].segments == []
    good = [one for one in together if one.error is None]
    assert [one.duration_s for one in good] == lengths
    for one in good:
        (alone,) = transcribe([one.path], *settings)
        assert [part.text for part in one.segments] == [part.text for part in alone.segments]
        assert [part.start_s for part in one.segments] == [part.start_s for part in alone.segments]
        assert [part for path, part in told.segments if path == one.path and part.final] == one.segments
    assert sum(len(one.segments) for one in good) > 12
    assert sum(lengths) <= told.audio_s <= sum(lengths) + 8
    assert all(part.final for _, part in told.segments) == (chunk == "full")


def test_settings_of_a_stream() -> None:
    config = experiment("decoding.search=modified_beam_search")
    assert streaming_settings(config, must=False, search_given=False) is config
    live = streaming_settings(config, must=True, search_given=False).decoding
    assert (live.chunk_ms, live.search) == (640, "greedy")
    chunked = experiment("decoding.search=modified_beam_search", "decoding.chunk_ms=320")
    assert streaming_settings(chunked, must=True, search_given=False).decoding.chunk_ms == 320
    asked = streaming_settings(chunked, must=False, search_given=True)
    with pytest.raises(UserError, match="modified_beam_search cannot stream"):
        list(transcribe_files(model(), tokenizer(), [Path("a")], asked))


class Terminal:
    def __init__(self, tty: bool) -> None:
        self.text, self.tty = "", tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("tty", [True, False])
def test_words_as_they_come(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "11")
    out = Terminal(tty)
    live = LiveText(out, named=False)  # type: ignore[arg-type]
    for text, final in (
        ("one", False),
        ("one two three", False),
        ("一二三四五六", False),
        ("one two three four", True),
    ):
        live.segment(Path("a"), Segment(0.0, 1.0, None, text, [], final))  # type: ignore[arg-type]
    end = "one two three four\n"
    assert out.text == (f"\r\x1b[Kone\r\x1b[K two three\r\x1b[K二三四五六\r\x1b[K{end}" if tty else end)


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [sound(tmp_path / "a.wav", 5.0, 0), sound(tmp_path / "b.wav", 7.0, 0)]
    out = Terminal(True)
    progress = Progress(out, paths)  # type: ignore[arg-type]
    progress.heard(5.0)
    assert out.text == "", "not more often than one can read"
    progress.finished(Transcript(paths[0]))
    assert progress.line(0.5) == "1/2 files, 0:00:05 of 0:00:12 of audio, 10 times real time, 0:00:01 left"
    progress._shown -= 1
    progress.heard(1.0)
    assert out.text.count("\r\x1b[K") == 2 and "1/2 files, 0:00:06" in out.text and "\n" not in out.text
    assert "left" not in Progress(out, [*paths, tmp_path / "none"]).line(1.0)  # type: ignore[arg-type]
    quiet = Terminal(False)
    nothing = Progress(quiet, paths)  # type: ignore[arg-type]
    nothing._shown -= 1
    nothing.heard(1.0)
    nothing.finished(Transcript(paths[0]))
    assert quiet.text == ""


def test_an_error_of_reading_ends_one_stream(tmp_path: Path) -> None:
    player = Player(StreamingRecognizer(model(), tokenizer(), experiment("decoding.chunk_ms=320")))
    player.add(1, read_pieces(tmp_path / "absent.wav"))
    player.add(2, read_pieces(sound(tmp_path / "a.wav", 2.0, 0)))
    found: list[Heard] = []
    while len(player):
        found += player.step()
    assert found[0].error == "the file does not exist" and found[0].ended
    assert sum(one.samples.size for one in found if one.key == 2) == 32000 and found[-1].ended
