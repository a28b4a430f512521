from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet

import asr.data.features as features_module
from asr.data.augmentation import AugmentConfig
from asr.data.bad_rows import BadRow
from asr.data.batch import collate
from asr.data.fbank import FbankExtractor, FbankExtractorConfig, padded_num_samples
from asr.data.features import (
    Fbank,
    FeatureConfig,
    FeatureStats,
    check_stored_features,
    compute_cut_features,
    compute_features,
    compute_stats,
    load_stored_features,
    num_audio_frames,
    num_encoder_frames,
    num_feature_frames,
    pad_tail,
)
from asr.data.manifests import load_cuts, save_cuts
from asr.errors import UserError
from tests.asr.data.speech import RATE_HZ, make_cut, make_samples, write_cuts


def native_features(samples: np.ndarray) -> np.ndarray:
    """kaldi-native-fbank as a device runtime sets it up, written out once more."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = 80
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = -400
    bank = kaldi_native_fbank.OnlineFbank(options)
    for first in range(0, len(samples), 1000):  # in pieces, as a microphone gives them
        bank.accept_waveform(16000, samples[first : first + 1000].tolist())
    bank.input_finished()
    return np.stack([bank.get_frame(t) for t in range(bank.num_frames_ready)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def exact_features(samples: np.ndarray) -> np.ndarray:
    """The definition in float64, with the native library's window and mel weights."""
    frame, mel = kaldi_native_fbank.FrameExtractionOptions(), kaldi_native_fbank.MelBanksOptions()
    mel.num_bins, mel.low_freq, mel.high_freq = 80, 20, -400
    weights = kaldi_native_fbank.MelBanks(mel, frame).get_matrix().astype(np.float64)
    window = np.array(kaldi_native_fbank.FeatureWindowFunction(frame).window, np.float64)
    wave = np.pad(samples.astype(np.float64), (120, 400), mode="symmetric")
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160][: (len(samples) + 80) // 160].copy()
    frames -= frames.mean(1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft((frames - np.float32(0.97) * before) * window, 512)) ** 2
    return np.log(np.maximum(power @ weights.T, np.finfo(np.float32).eps))


@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_features_are_as_exact_as_those_of_the_native_library(loudness: float) -> None:
    samples = make_samples(23457, seed=3) * np.float32(loudness)
    ours, native, exact = Fbank().extract(samples), native_features(samples), exact_features(samples)
    assert ours.dtype == np.float32 and ours.shape == native.shape
    error, native_error = np.abs(ours - exact), np.abs(native - exact)
    assert error.max() < 2e-3
    assert error.mean() < 1.1 * native_error.mean() < 1e-5
    np.testing.assert_allclose(ours, native, atol=2e-3)


@pytest.mark.parametrize("num_samples", [80, 81, 119, 121, 279, 400, 1001])
def test_short_audio_is_mirrored_as_by_the_native_library(num_samples: int) -> None:
    samples = make_samples(num_samples, seed=4)
    np.testing.assert_allclose(Fbank().extract(samples), native_features(samples), atol=2e-3)


def test_silence_is_that_of_the_native_library() -> None:
    samples = np.zeros(8000, np.float32)
    np.testing.assert_array_equal(Fbank().extract(samples), native_features(samples))


def test_features_take_arrays_of_any_layout() -> None:
    samples = make_samples(4000, seed=6)
    expected = Fbank().extract(samples)
    fixed = samples.copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(Fbank().extract(fixed), expected)
    np.testing.assert_array_equal(Fbank().extract(np.repeat(samples, 2)[::2]), expected)


def test_extractor_of_lhotse_gives_tail_padded_features() -> None:
    samples = make_samples(12345, seed=1)
    config = FeatureConfig(tail_chunk_ms=640)
    extractor = FbankExtractor(FbankExtractorConfig(tail_chunk_ms=640))
    expected = Fbank(config).extract(pad_tail(samples, config))
    np.testing.assert_array_equal(extractor.extract(samples[None], RATE_HZ), expected)
    with pytest.raises(ValueError, match="8000 Hz"):
        extractor.extract(samples, 8000)
    with pytest.raises(ValueError, match="2 channels"):
        extractor.extract(np.stack([samples, samples]), RATE_HZ)


def test_extract_refuses_what_is_not_a_finite_vector() -> None:
    with pytest.raises(ValueError, match="float32"):
        Fbank().extract(np.zeros(100))
    with pytest.raises(ValueError, match="NaN"):
        Fbank().extract(np.full(1000, np.nan, dtype=np.float32))


@given(num_samples=st.integers(0, 200_000), chunk=st.integers(1, 40))
def test_tail_makes_whole_chunks_and_one_of_pure_silence(num_samples: int, chunk: int) -> None:
    config = FeatureConfig(tail_chunk_ms=40 * chunk)
    padded = padded_num_samples(num_samples, config)
    frames = num_feature_frames(num_samples, config)
    assert frames == (padded + 80) // 160  # what the extractor gives without snip_edges
    assert (frames - 3) % (4 * chunk) == 0
    assert num_encoder_frames(num_samples, config) == (frames - 3) // 4
    assert num_encoder_frames(num_samples, config) % chunk == 0
    silence = padded - num_samples
    # up to the next whole chunk, plus one; the shortest recordings get the three frames of overlap in addition
    assert 640 * chunk <= silence < 2 * 640 * chunk or num_samples < 480


@pytest.mark.parametrize("num_samples", [0, 1, 480, 481, 5120, 5600, 5601, 16000])
def test_pad_tail_keeps_the_audio_and_appends_zeros(num_samples: int) -> None:
    config = FeatureConfig()
    samples = make_samples(num_samples, seed=2)
    padded = pad_tail(samples, config)
    np.testing.assert_array_equal(padded[:num_samples], samples)
    assert not padded[num_samples:].any()
    assert padded.dtype == np.float32
    assert len(Fbank(config).extract(padded)) == num_feature_frames(num_samples, config)


def test_tail_frames_are_those_of_silence() -> None:
    config = FeatureConfig()
    samples = make_samples(RATE_HZ, seed=5)
    values = Fbank(config).extract(pad_tail(samples, config))
    silence = Fbank(config).extract(np.zeros(1600, dtype=np.float32))[0]
    np.testing.assert_array_equal(values[-32:], np.broadcast_to(silence, (32, 80)))


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path, [0.5, 1.7, 0.9])
    fbank = Fbank()
    arrays = [compute_cut_features(cut, fbank) for cut in cuts]
    batch = collate(arrays, [[1], [1, 2], []], [c.id for c in cuts], ["a", "b", ""], [c.duration for c in cuts])
    for i, cut in enumerate(cuts):
        samples, _ = soundfile.read(cut.recording.sources[0].source, dtype="float32")
        alone = Fbank().extract(pad_tail(samples, FeatureConfig()))
        length = int(batch.feature_lens[i])
        np.testing.assert_array_equal(batch.features[i, :length].numpy(), alone)
        assert not batch.features[i, length:].any()
    assert batch.targets.tolist() == [[1, 0], [1, 2], [0, 0]]
    assert batch.target_lens.tolist() == [1, 2, 0]
    assert batch.size == 3


def test_stored_equals_computed_and_survives_its_manifest(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "audio", [0.5, 1.2, 0.7])
    stored = compute_features(cuts, tmp_path / "features", FeatureConfig(), None, 0)
    save_cuts(stored, tmp_path / "cuts.jsonl.gz")
    for cut, before in zip(load_cuts(tmp_path / "cuts.jsonl.gz"), cuts, strict=True):
        expected = compute_cut_features(before, Fbank())
        np.testing.assert_array_equal(load_stored_features(cut), expected)
        np.testing.assert_array_equal(cut.features.load(), expected)  # through lhotse's own reader
        assert cut.features.num_frames == len(expected)


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CUTS_PER_FILE", 4)
    monkeypatch.setattr(features_module, "MIN_AUDIO_PER_PROCESS_S", 1.0)
    cuts = write_cuts(tmp_path / "audio", [0.4, 0.6, 0.5, 0.8, 0.3])
    augment = AugmentConfig(speed_factors=[0.9, 1.0], noise_prob=1.0)
    one = compute_features(cuts, tmp_path / "one", FeatureConfig(), augment, 7, num_jobs=1)
    two = compute_features(cuts, tmp_path / "two", FeatureConfig(), augment, 7, num_jobs=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert len(folder_bytes(tmp_path / "one")) == 3
    assert [cut.id for cut in one] == [cut.id for cut in two]
    assert [cut.features.storage_key for cut in one] == [cut.features.storage_key for cut in two]


def test_copies_differ_and_the_seed_matters(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "audio", [0.5])
    augment = AugmentConfig(speed_factors=[1.0], copies=2, noise_prob=1.0)
    first, second = compute_features(cuts, tmp_path / "a", FeatureConfig(), augment, 0)
    again, _ = compute_features(cuts, tmp_path / "b", FeatureConfig(), augment, 0)
    other, _ = compute_features(cuts, tmp_path / "c", FeatureConfig(), augment, 1)
    np.testing.assert_array_equal(load_stored_features(first), load_stored_features(again))
    assert (load_stored_features(first) != load_stored_features(second)).any()
    assert (load_stored_features(first) != load_stored_features(other)).any()


def test_unreadable_cuts_are_reported_and_left_out(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "audio", [0.5, 0.5, 0.5])
    Path(cuts[1].recording.sources[0].source).write_text("this is no recording")
    bad: list[BadRow] = []
    augment = AugmentConfig(speed_factors=[1.0, 1.1], copies=2)
    stored = compute_features(cuts, tmp_path / "features", FeatureConfig(), augment, 0, bad_rows=bad)
    assert [cut.id for cut in stored][:4] == ["utt000", "utt002", "utt000_sp1.1", "utt002_sp1.1"]
    assert len(stored) == 8
    assert [row.file for row in bad] == [cuts[1].recording.sources[0].source]
    assert "utt001" in bad[0].reason
    with pytest.raises(UserError, match="none of the 1 cuts"):
        compute_features([cuts[1]], tmp_path / "nothing", FeatureConfig(), None, 0)
    assert not (tmp_path / "nothing").exists()


def test_an_interrupted_run_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CUTS_PER_FILE", 1)
    cuts = write_cuts(tmp_path / "audio", [0.5, 0.6])
    compute_features(cuts[:1], tmp_path / "features", FeatureConfig(), None, 0)
    before = folder_bytes(tmp_path / "features")
    compute_task = features_module._compute_task

    def interrupted(task: features_module._Task) -> list:
        if task.path.endswith("00001.f32"):
            raise KeyboardInterrupt
        return compute_task(task)

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "_compute_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute_features(cuts, tmp_path / "features", FeatureConfig(), None, 0)
        with pytest.raises(KeyboardInterrupt):
            compute_features(cuts, tmp_path / "new", FeatureConfig(), None, 0)
    assert folder_bytes(tmp_path / "features") == before
    assert not (tmp_path / "new").exists()

    stored = compute_features(cuts, tmp_path / "features", FeatureConfig(), None, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "features", "new.partial"]
    for cut, original in zip(stored, cuts, strict=True):  # the old files may be mapped still; the new ones count
        np.testing.assert_array_equal(load_stored_features(cut), compute_cut_features(original, Fbank()))


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "audio", [0.5])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write features"):
        compute_features(cuts, tmp_path / "file" / "features", FeatureConfig(), None, 0)


def test_truncated_storage_is_noticed(tmp_path: Path) -> None:
    stored = list(compute_features(write_cuts(tmp_path / "a", [0.5, 0.5]), tmp_path / "f", FeatureConfig(), None, 0))
    path = Path(stored[0].features.storage_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert load_stored_features(stored[0]).shape == (stored[0].features.num_frames, 80)
    with pytest.raises(UserError, match="end too early"):
        load_stored_features(stored[1])
    path.unlink()
    with pytest.raises(UserError, match="run the features stage"):
        load_stored_features(stored[0])


def test_features_of_other_settings_are_refused(tmp_path: Path) -> None:
    stored = compute_features(write_cuts(tmp_path / "a", [0.5]), tmp_path / "f", FeatureConfig(), None, 0)
    check_stored_features(stored, FeatureConfig())
    for other in (FeatureConfig(tail_chunk_ms=640), FeatureConfig(num_mel_bins=40)):
        with pytest.raises(UserError, match="run the features stage again"):
            check_stored_features(stored, other)


def test_audio_at_another_rate_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", make_samples(8000, 0), 8000, subtype="PCM_16")
    with pytest.raises(UserError, match="8000 Hz"):
        compute_cut_features(make_cut(tmp_path / "a.wav", "a", "ONE", 8000, rate_hz=8000), Fbank())


def test_statistics_are_those_of_the_audio_without_tails(tmp_path: Path) -> None:
    cuts = write_cuts(tmp_path / "a", [0.5, 1.5, 0.8])
    stored = compute_features(cuts, tmp_path / "f", FeatureConfig(), None, 0)
    audio = np.concatenate([load_stored_features(cut)[: num_audio_frames(cut.num_samples)] for cut in stored])
    audio = audio.astype(np.float64)
    stats = compute_stats(stored)
    assert stats.num_frames == len(audio) == 280
    np.testing.assert_allclose(stats.mean, audio.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.scale, 1 / audio.std(axis=0), rtol=1e-4)
    from_audio = compute_stats(CutSet.from_cuts(cuts))
    np.testing.assert_array_equal(from_audio.mean, stats.mean)
    stats.save(tmp_path / "stats.json")
    loaded = FeatureStats.load(tmp_path / "stats.json")
    np.testing.assert_array_equal(loaded.mean, stats.mean)
    np.testing.assert_array_equal(loaded.scale, stats.scale)
    (tmp_path / "stats.json").write_text('{"mean": [1.0], "scale": [1.0, 2.0], "num_frames": 3}')
    with pytest.raises(UserError, match="of one size"):
        FeatureStats.load(tmp_path / "stats.json")


def test_statistics_of_constant_bins_stay_finite(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), RATE_HZ, subtype="PCM_16")
    stats = compute_stats([make_cut(tmp_path / "silent.wav", "silent", "", 8000)])
    assert np.isfinite(stats.scale).all() and (stats.scale <= 10.001).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_mel_bins": 0}, "num_mel_bins=0"),
        ({"storage": "disk"}, "storage='disk'"),
        ({"tail_chunk_ms": 100}, "multiple of 40"),
        ({"num_jobs": 0}, "num_jobs=0"),
    ],
)
def test_wrong_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**values)


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    write_cuts(tmp_path / "a", [1.0] * 4)
    (tmp_path / "job.py").write_text(
        "import sys\nfrom pathlib import Path\nimport asr.data.features as f\n"
        "from tests.asr.data.speech import make_cut\n"
        "if __name__ == '__main__':\n"
        "    f.CUTS_PER_FILE, f.MIN_AUDIO_PER_PROCESS_S = 200, 1.0\n"
        "    cuts = [make_cut(Path(sys.argv[1]) / f'utt00{i % 4}.wav', f'c{i}', 'ONE', 16000) for i in range(100000)]\n"
        "    f.compute_features(cuts, sys.argv[2], f.FeatureConfig(), None, 0, 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "a"), str(out)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    partial = tmp_path / "out.partial"
    while (len(list(partial.glob("*"))) if partial.is_dir() else 0) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "processes of the pool outlive their parent"
        time.sleep(0.1)
    assert not out.exists()


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@given(
    num_samples=st.one_of(st.integers(0, 900), st.integers(900, 40000)),
    pieces=st.lists(st.integers(0, 9000), min_size=1, max_size=30),
    tail_chunk_ms=st.sampled_from([160, 320, 640]),
)
@settings(max_examples=60, deadline=None)
def test_features_of_pieces_are_those_of_the_whole(num_samples: int, pieces: list[int], tail_chunk_ms: int) -> None:
    config = FeatureConfig(tail_chunk_ms=tail_chunk_ms)
    samples = np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32) / 8
    stream = Fbank(config).stream()
    ends = np.minimum(np.cumsum(pieces), num_samples)
    found = [stream.accept(piece) for piece in np.split(samples, ends)]
    found.append(stream.finish())
    assert np.array_equal(np.concatenate(found), Fbank(config).extract(pad_tail(samples, config)))
    assert stream.num_samples == num_samples


def test_features_of_single_samples() -> None:
    samples = np.random.default_rng(0).standard_normal(1000).astype(np.float32) / 8
    stream = Fbank().stream()
    found = [stream.accept(samples[i : i + 1]) for i in range(1000)]
    # frame t is known with the sample 280 behind its time
    assert [len(rows) for rows in found] == [int(i >= 279 and (i - 279) % 160 == 0) for i in range(1000)]
    assert np.array_equal(
        np.concatenate([*found, stream.finish()]), Fbank().extract(pad_tail(samples, FeatureConfig()))
    )


def test_a_stream_refuses_what_features_cannot_hold() -> None:
    stream = Fbank().stream()
    with pytest.raises(ValueError, match="NaN or infinity"):
        stream.accept(np.array([0.0, np.nan], dtype=np.float32))
    with pytest.raises(ValueError, match=r"float32 \[N\], got float64"):
        stream.accept(np.zeros(3))
    assert stream.num_samples == 0
