from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.data.audio import AudioError, audio_problem, read_audio
from asr.data.bad_rows import BadRow, report_bad_rows
from asr.data.fbank import FeatureConfig, num_encoder_frames
from asr.data.manifests import check_cuts, load_cuts, save_cuts
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from tests.asr.data.speech import RATE_HZ, make_cut, make_samples, write_cuts

WORDS = Tokenizer.train(["ONE TWO THREE FOUR FIVE"], TokenizerConfig("word"))
CONFIG = FeatureConfig()


def wav(path: Path, num_samples: int = 8000, rate_hz: int = RATE_HZ) -> Path:
    soundfile.write(path, make_samples(num_samples, 0), rate_hz, subtype="PCM_16")
    return path


def test_bad_rows_are_named_with_file_line_and_reason(tmp_path: Path) -> None:
    truncated, no_audio, missing = wav(tmp_path / "truncated.wav"), tmp_path / "text.wav", tmp_path / "missing.wav"
    truncated.write_bytes(truncated.read_bytes()[:9000])
    no_audio.write_text("ONE TWO THREE, but not as a recording")
    good = wav(tmp_path / "good.wav")
    frames = num_encoder_frames(8000, CONFIG)
    cuts = [
        make_cut(good, "good", "ONE TWO", 8000),
        make_cut(truncated, "truncated", "ONE", 8000),
        make_cut(no_audio, "text", "ONE", 8000),
        make_cut(missing, "missing", "ONE", 8000),
        make_cut(good, "empty", "  ", 8000),
        make_cut(good, "unknown", "ONE ELEVEN", 8000),
        make_cut(good, "many", " ".join(["ONE"] * (frames + 1)), 8000),
        make_cut(good, "longer", "ONE", 8001),
        make_cut(wav(tmp_path / "slow.wav", rate_hz=8000), "slow", "ONE", 8000, rate_hz=8000),
        make_cut(good, "just", " ".join(["ONE"] * frames), 8000),
    ]
    save_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    kept, bad = check_cuts(load_cuts(tmp_path / "cuts.jsonl.gz"), WORDS, CONFIG, source=tmp_path / "cuts.jsonl.gz")
    assert [cut.id for cut in kept] == ["good", "just"]
    assert {row.file for row in bad} == {str(tmp_path / "cuts.jsonl.gz")}
    expected = {
        2: f"cut truncated ({truncated}): truncated: the header declares 16000 bytes",
        3: f"cut text ({no_audio}): not readable as audio",
        4: f"cut missing ({missing}): the file does not exist",
        5: f"cut empty ({good}): the transcript is empty",
        6: f"cut unknown ({good}): token 'ELEVEN' of the text 'ONE ELEVEN'",
        7: f"cut many ({good}): {frames + 1} tokens are more than the {frames}",
        8: f"cut longer ({good}): it holds 8000 samples, but the manifest says 8001",
        9: f"cut slow ({tmp_path / 'slow.wav'}): audio is at 8000 Hz",
    }
    assert [row.line for row in bad] == list(expected)
    for row in bad:
        assert row.reason.startswith(expected[row.line])


def test_without_a_manifest_rows_name_the_audio(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav")
    kept, bad = check_cuts([make_cut(path, "a", "", 8000)], None, CONFIG)
    assert len(kept) == 0
    assert bad == [BadRow(str(path), 0, "cut a: the transcript is empty")]


def test_limits_of_tokens_and_frames_can_be_set(tmp_path: Path) -> None:
    cuts = [make_cut(wav(tmp_path / "a.wav"), "a", "ONE TWO", 8000)]
    frames = num_encoder_frames(8000, CONFIG)
    assert check_cuts(cuts, WORDS, CONFIG, min_frames=frames, max_tokens_per_frame=2 / frames)[1] == []
    assert "fewer than" in check_cuts(cuts, WORDS, CONFIG, min_frames=frames + 1)[1][0].reason
    assert "2 tokens" in check_cuts(cuts, WORDS, CONFIG, max_tokens_per_frame=1.9 / frames)[1][0].reason
    assert check_cuts([make_cut(tmp_path / "none.wav", "a", "ONE", 8000)], WORDS, CONFIG, check_audio=False)[1] == []


def test_speed_perturbed_cuts_are_judged_by_their_own_length(tmp_path: Path) -> None:
    (cut,) = write_cuts(tmp_path, [1.0])
    kept, bad = check_cuts([cut.perturb_speed(1.1), cut.perturb_speed(0.9)], None, CONFIG)
    assert len(kept) == 2 and bad == []


ROWS = [BadRow("cuts.jsonl", 3, "it is\tbad"), BadRow("other.wav", 0, "worse")]


def test_report_writes_the_list_and_lets_few_pass(tmp_path: Path) -> None:
    path = tmp_path / "data" / "bad_rows.txt"
    report_bad_rows(ROWS, 20, False, 0.1, path)
    assert path.read_text() == "cuts.jsonl\t3\tit is bad\nother.wav\t0\tworse\n"
    report_bad_rows([], 20, True, 0.0, path)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("total", "strict", "fraction", "message"),
    [
        (1000, True, 0.1, "2 of 1000 rows are bad and the strict mode allows none; the first is cuts.jsonl:3: it is"),
        (19, False, 0.1, "10.5% and more than the 10.0% allowed"),
        (2, False, 1.0, "all 2 rows are bad"),
    ],
)
def test_report_stops_the_run(tmp_path: Path, total: int, strict: bool, fraction: float, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        report_bad_rows(ROWS, total, strict, fraction, tmp_path / "bad_rows.txt")
    assert len((tmp_path / "bad_rows.txt").read_text().splitlines()) == 2
    assert "\n" not in str(caught.value)


def test_manifests_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "a", [0.5, 0.6])
    save_cuts(cuts, tmp_path / "one.jsonl.gz")
    loaded = load_cuts(tmp_path / "one.jsonl.gz")
    assert list(loaded) == cuts
    save_cuts(loaded, tmp_path / "two.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    save_cuts(cuts, tmp_path / "plain.jsonl")
    assert list(load_cuts(tmp_path / "plain.jsonl")) == cuts


def test_broken_manifests_are_clear_errors(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "a", [0.5, 0.6])
    path = tmp_path / "cuts.jsonl"
    with pytest.raises(UserError, match="does not exist"):
        load_cuts(path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no cuts"):
        load_cuts(path)
    save_cuts(cuts, path)
    text = path.read_text()
    for wrong, message in (
        (text + "{oops\n", "cuts.jsonl:3: this is not a cut"),
        (text + '{"a": 1}\n', "cuts.jsonl:3: this is not a cut"),
        (text + text, "cuts.jsonl:3: id 'utt000' is in line 1 too"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=message):
            load_cuts(path)
    packed = tmp_path / "cuts.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        load_cuts(packed)
    packed.write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        load_cuts(packed)


def test_audio_of_any_rate_and_channels_becomes_16_khz_mono(tmp_path: Path) -> None:
    time_s = np.arange(22050) / 22050
    tone = 0.5 * np.sin(2 * np.pi * 440 * time_s)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, tone * 0.5], axis=1), 22050)
    samples = read_audio(tmp_path / "a.flac")
    assert samples.dtype == np.float32 and samples.shape == (RATE_HZ,)
    expected = 0.375 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=2e-3)
    soundfile.write(tmp_path / "b.wav", make_samples(5000, 1), RATE_HZ, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "b.wav"), make_samples(5000, 1))


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", make_samples(5000, 1), RATE_HZ)
    (tmp_path / "a.flac").rename(tmp_path / "a.wav")
    assert audio_problem(tmp_path / "a.wav", 5000) is None and len(read_audio(tmp_path / "a.wav")) == 5000


def test_broken_audio_is_told_apart(tmp_path: Path) -> None:
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, make_samples(80000, 0), RATE_HZ)
    assert audio_problem(whole, 80000) is None
    assert "80000 samples, but the manifest says 80001" in str(audio_problem(whole, 80001))
    (tmp_path / "part.flac").write_bytes(whole.read_bytes()[:60000])
    assert audio_problem(tmp_path / "part.flac") is not None
    (tmp_path / "empty.wav").write_bytes(b"")
    assert audio_problem(tmp_path / "empty.wav") == "the file is empty"
    (tmp_path / "header.wav").write_bytes(wav(tmp_path / "a.wav").read_bytes()[:20])
    assert "no data chunk" in str(audio_problem(tmp_path / "header.wav"))
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE_HZ)
    assert audio_problem(tmp_path / "none.wav") == "it holds no samples"
    with pytest.raises(AudioError, match="it holds no samples"):
        read_audio(tmp_path / "none.wav")
    assert "not readable as audio" in str(audio_problem(Path(__file__)))
    with pytest.raises(UserError, match="truncated|not readable"):
        read_audio(tmp_path / "part.flac")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), RATE_HZ, subtype="FLOAT")
    with pytest.raises(UserError, match="not finite"):
        read_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("declared", [0x7FFFF000, 0x7FFFFFFF, 0x80000000 - 36, 0xFFFFFFFF - 36, 0xFFFFFFFF])
def test_wav_files_written_into_a_pipe_are_whole(tmp_path: Path, declared: int) -> None:
    path = wav(tmp_path / "a.wav")
    data = bytearray(path.read_bytes())
    data[40:44] = declared.to_bytes(4, "little")  # the length of the data chunk, not known when it was written
    path.write_bytes(data)
    assert audio_problem(path) is None
    assert len(read_audio(path)) == 8000


def test_formats_in_which_libsndfile_cannot_seek(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", make_samples(8000, 0), RATE_HZ, subtype="GSM610")
    assert audio_problem(tmp_path / "a.wav") is None
    samples = read_audio(tmp_path / "a.wav")  # in whole blocks of 320
    assert len(samples) == soundfile.info(tmp_path / "a.wav").frames >= 8000 and np.abs(samples).max() > 0.01


def test_flac_without_a_length(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, make_samples(8000, 0), RATE_HZ)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples, 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert "does not say how long it is" in str(audio_problem(path))
    with pytest.raises(AudioError, match="does not say how long it is; re-encode it"):
        read_audio(path)


def test_truncated_mp3(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.mp3", tmp_path / "part.mp3"
    soundfile.write(whole, make_samples(80000, 0), RATE_HZ, format="MP3")
    assert audio_problem(whole, 80000) is None and len(read_audio(whole)) == 80000
    data = whole.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="truncated: .* of 80000 samples") as caught:
        read_audio(part)
    assert audio_problem(part) == str(caught.value)
