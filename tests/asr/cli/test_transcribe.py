"""``asr transcribe`` as one types it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr import checkpoint
from asr.cli.main import main
from asr.config import load_experiment
from tests.asr.data.test_audio import FakeSoundDevice
from tests.asr.decoding.corpus import bursts, tokenizer
from tests.asr.decoding.test_real_model import SETTINGS, make_model


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("exp") / "average.pt"
    model = make_model(blank_bias=2.0)
    payload = checkpoint.make_payload(model.state_dict(), load_experiment(None, SETTINGS), tokenizer(), step=7, epoch=1)
    checkpoint.atomic_save(payload, path)
    return ["transcribe", "--device", "cpu", "--checkpoint", str(path)]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    for i, name in enumerate(("one.wav", "b/two.flac", "b/one.flac")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / name, bursts(16000, seed=i), 16000)
    return tmp_path / "in"


def test_a_folder_into_files(
    command: list[str], audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (audio / "broken.wav").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert main([*command, str(audio), "--out-dir", str(out), "--format", "json,srt"]) == 3
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(audio / name) for name in ("b/one.flac", "b/two.flac", "one.wav")
    ]
    assert said.err.startswith(f"error: {audio / 'broken.wav'}: not readable") and said.err.count("\n") == 1
    names = {"one", "two", "one.wav"}
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("json", "srt")}
    assert lines[2].endswith(json.loads((out / "one.wav.json").read_text())["text"])


def test_a_stream_prints_segments(command: list[str], audio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = audio / "one.wav"
    soundfile.write(path, np.concatenate([bursts(32000, 1), np.zeros(32000), bursts(16000, 2)]), 16000)
    words = [*command, str(path), "--set", "decoding.endpoint.max_segment_s=1.5"]
    assert main([*words, "--stream"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and all(line.startswith(f"{path}: ") for line in lines)
    assert main([*words, "--set", "decoding.chunk_ms=640"]) == 0
    found = capsys.readouterr().out.removesuffix("\n")
    assert found == f"{path}: " + " ".join(line.removeprefix(f"{path}: ") for line in lines)


def test_ctrl_c_ends_the_microphone_with_its_last_words(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Microphone(FakeSoundDevice):
        def __enter__(self) -> None:
            super().__enter__()
            signal.raise_signal(signal.SIGINT)

    sound = bursts(12000, seed=1)
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone([sound[:5000], sound[5000:]]))
    before = signal.getsignal(signal.SIGINT)
    assert main([*command, "--mic", "--out-dir", str(tmp_path)]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    text = capsys.readouterr().out
    assert text.strip() and (tmp_path / "microphone.txt").read_text() == text


def test_wrong_input_is_one_line(
    command: list[str], audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    (tmp_path / "empty").mkdir()
    path, file = str(audio), str(audio / "one.wav")
    for words, message in (
        ([], "FILE, or --mic"),
        ([str(tmp_path / "absent")], "absent: no such file or folder"),
        ([str(tmp_path / "empty")], "empty holds no audio files"),
        ([path, "--out-dir", path, "--format", "docx"], "unknown format docx; valid: txt"),
        ([path, "--format", "srt"], "needs --out-dir"),
        ([path, "--out-dir", f"{file}/out"], "out cannot be written"),
        ([path, "--mic"], f"leave out {path}"),
        (["--mic"], "pip install 'transducer-asr[mic]'"),
        ([path, "--stream", "--search", "modified_beam_search"], "modified_beam_search cannot stream"),
    ):
        assert main([*command, *words]) == 2, words
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
        assert said.out == ""
