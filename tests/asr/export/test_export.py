"""Files of each target in their real runtime, and all that is refused before or after they are written."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from lhotse import CutSet

from asr.checkpoint import Loaded
from asr.cli.main import main
from asr.config import load_experiment
from asr.decoding.load import load_for_decoding
from asr.errors import UserError
from asr.export import TARGETS
from asr.export.export import export
from asr.export.folder import MANIFEST, Manifest
from asr.export.report import write_report
from asr.export.spec import Spec
from asr.export.verify import RuntimeFailed, verify
from tests.asr.decoding.test_real_model import make_model
from tests.asr.export.conftest import write_checkpoint

LEFT_MS = 640
IN_CHUNKS = Spec(320, LEFT_MS)


def need(target: str) -> None:
    for package in TARGETS[target].packages:
        pytest.importorskip(package, reason=f"pip install 'transducer-asr[{TARGETS[target].extra}]'")


def combinations() -> list[Any]:
    found = []
    for name, target in TARGETS.items():
        for chunk in (320, 640, "full"):
            if target.offline is None and chunk == "full":
                continue
            slow = name == "executorch" or chunk == 640 or (name, chunk) == ("torch.export", "full")
            found.append(pytest.param(name, chunk, marks=[pytest.mark.slow] if slow else [], id=f"{name}-{chunk}"))
    return found


@pytest.mark.parametrize(("target", "chunk_ms"), combinations())
def test_runtimes_hear_what_the_model_hears(
    target: str, chunk_ms: Any, loaded: Loaded, trained: Path, cuts: CutSet, tmp_path: Path
) -> None:
    need(target)
    manifest = export(loaded, trained, target, tmp_path / "out", Spec(chunk_ms, LEFT_MS))
    assert Manifest.load(tmp_path / "out") == manifest
    report = verify(loaded, trained, tmp_path / "out", cuts)
    (one,) = report.precisions
    assert one.ok, one.reason
    names = {"alone", "silence"} | ({"batch"} if chunk_ms == "full" else {"pieces", "streams", "after an endpoint"})
    assert set(one.same_tokens) == names
    for found in one.same_tokens.values():
        equal, _, count = found.partition("/")
        assert equal == count != "0"
    by_name = {tensor.name: tensor for tensor in one.tensors}
    # runtimes compute theirs with kaldi-native-fbank, whose FFT rounds otherwise
    assert by_name["features"].largest < 1e-3
    assert by_name["encoder_out"].largest < 1e-4
    assert one.bytes > 0 and one.step_ms_median > 0 and one.cold_start_s > 0
    write_report(report, tmp_path / "report")
    said = json.loads((tmp_path / "report" / "verify.json").read_text())
    assert said["ok"] and said["precisions"][0]["precision"] == "fp32"
    assert "holds" in (tmp_path / "report" / "verify.html").read_text()


def test_metadata_are_those_of_the_interface(loaded: Loaded, trained: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    need("sherpa-onnx")
    export(loaded, trained, "sherpa-onnx", tmp_path, IN_CHUNKS)
    graph = onnx.load(tmp_path / "encoder.onnx")
    found = {entry.key: entry.value for entry in graph.metadata_props}
    encoder = loaded.config.model.encoder
    expected = {"model_type": "conformer", "T": 35, "decode_chunk_len": 32, "pad_length": 3}
    rows = encoder.num_layers + -(-encoder.num_layers * (encoder.conv_kernel - 1) // 16)
    expected |= {"num_encoder_layers": rows, "left_context": 1, "cnn_module_kernel": 2, "encoder_dim": 16 * encoder.dim}
    assert {key: found[key] for key in expected} == {key: str(value) for key, value in expected.items()}
    assert graph.ir_version <= 8 and graph.opset_import[0].version == 17
    names = [entry.name for entry in graph.graph.input]
    assert names == ["x", "cached_attn", "cached_conv", "processed_lens"]
    symbols = [line.rsplit(" ", 1)[0] for line in (tmp_path / "tokens.txt").read_text().splitlines()]
    assert symbols == loaded.tokenizer.symbols


def test_a_stream_longer_than_its_left_context_stays_equal(loaded: Loaded, trained: Path, cuts: CutSet, tmp_path: Path):
    """The least context: the caches turn over in every chunk."""
    need("onnx")
    export(loaded, trained, "onnx", tmp_path, Spec(160, 40))
    report = verify(loaded, trained, tmp_path, cuts)
    assert report.ok, report.precisions[0].reason


@pytest.mark.parametrize(
    ("settings", "target", "spec", "says"),
    [
        ([], "tflite", IN_CHUNKS, "unknown target 'tflite'; choose one of sherpa-onnx, onnx"),
        (["decoding.max_symbols_per_frame=3"], "onnx", IN_CHUNKS, "at most one token a frame.*max_symbols_per_frame=1"),
        (["model.encoder.conv_kernel=1"], "torch.export", IN_CHUNKS, "conv_kernel=1.*train with 2 or more"),
        ([], "torch.export", dataclasses.replace(IN_CHUNKS, precisions=("int8",)), "holds fp32 only.*choose onnx"),
        ([], "executorch", Spec("full", LEFT_MS), "executorch holds only streams: set a chunk in ms"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_hold(
    settings: list[str], target: str, spec: Spec, says: str, loaded: Loaded, trained: Path, tmp_path: Path
) -> None:
    if target in TARGETS:
        need(target)
    config = load_experiment(None, ["model.preset=xs", *settings])
    with pytest.raises(UserError, match=says):
        export(dataclasses.replace(loaded, config=config), trained, target, tmp_path / "out", spec)
    assert not list(tmp_path.iterdir())


def test_a_predictor_with_memory_is_refused(tmp_path: Path) -> None:
    need("onnx")
    path = write_checkpoint(tmp_path / "lstm.pt", make_model("lstm"), "model.predictor.kind=lstm")
    with pytest.raises(UserError, match="cannot hold model.predictor.kind=lstm.*kind=stateless"):
        export(load_for_decoding(path, "cpu"), path, "onnx", tmp_path / "out", IN_CHUNKS)


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.packages])
def test_a_missing_package_is_named_with_its_command(
    target: str, loaded: Loaded, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = TARGETS[target].packages[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    extra = TARGETS[target].extra
    with pytest.raises(UserError, match=rf"needs .*{missing}.*pip install 'transducer-asr\[{extra}\]'$"):
        export(loaded, trained, target, tmp_path / "out", IN_CHUNKS)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(
    loaded: Loaded, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    need("onnx")
    out = tmp_path / "out"
    export(loaded, trained, "onnx", out, IN_CHUNKS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save = onnx.save

    def full(graph: Any, path: Path) -> None:
        if "joiner" in Path(path).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(graph, path)

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(UserError, match="cannot write .*out: No space left on device"):
        export(loaded, trained, "onnx", out, Spec(640, LEFT_MS))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_left_alone(loaded: Loaded, trained: Path, tmp_path: Path) -> None:
    need("onnx")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else; choose an empty or a new folder"):
        export(loaded, trained, "onnx", tmp_path, IN_CHUNKS)
    with pytest.raises(UserError, match="is a file; choose a folder"):
        export(loaded, trained, "onnx", tmp_path / "thesis.txt", IN_CHUNKS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def spoil(folder: Path, name: str, factor: float) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / name)
    for entry in graph.graph.initializer:
        values = numpy_helper.to_array(entry)
        if values.ndim == 2:
            entry.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), entry.name))
    onnx.save(graph, folder / name)


def test_commands(trained: Path, cuts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export, proof, and a file that was changed afterwards: where it parts, and exit code 1."""
    need("onnx")
    out = tmp_path / "out"
    checkpoint = ["--checkpoint", str(trained)]
    assert main(["export", *checkpoint, "--target", "onnx", "--out", str(out), "--chunk-ms", "320"]) == 0
    assert "encoder.onnx" in capsys.readouterr().out
    command = ["verify", str(out), *checkpoint, "--cuts", str(cuts_file)]
    assert main(command) == 0
    assert "fp32: holds" in capsys.readouterr().out and (out / "verify.html").is_file()
    spoil(out, "joiner.onnx", -1.0)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "fp32: FAILS: " in said and "token 0 is" in said and "in PyTorch" in said
    assert not json.loads((out / "verify.json").read_text())["ok"]


def test_files_that_the_runtime_cannot_load(loaded: Loaded, trained: Path, cuts: CutSet, tmp_path: Path) -> None:
    need("onnx")
    export(loaded, trained, "onnx", tmp_path, IN_CHUNKS)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeFailed, match=r"onnx ended with 1 on .*it cannot run these files$"):
        verify(loaded, trained, tmp_path, cuts)


def test_proofs_of_nothing(loaded: Loaded, trained: Path, cuts: CutSet, tmp_path: Path) -> None:
    need("onnx")
    with pytest.raises(UserError, match=f"holds no {MANIFEST}; pass a folder that `asr export` wrote"):
        verify(loaded, trained, tmp_path, cuts)
    path = write_checkpoint(tmp_path / "silent.pt", make_model(blank_bias=100.0))
    silent = load_for_decoding(path, "cpu")
    export(silent, path, "onnx", tmp_path / "out", IN_CHUNKS)
    with pytest.raises(UserError, match="was exported from another checkpoint .*; export again"):
        verify(loaded, trained, tmp_path / "out", cuts)
    report = verify(silent, path, tmp_path / "out", cuts)
    assert not report.ok and "nothing is proved" in report.precisions[0].reason


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--chunk-ms", "three"], "--chunk-ms three is neither a number of milliseconds nor full"),
        (["--chunk-ms", "50"], "50"),
        (["--precision", "int4"], "unknown precision 'int4'; choose from fp32, int8"),
        (["--precision", "int8"], "pass --cuts"),
        (["--left-context-ms", "0"], "at least 40 ms"),
    ],
)
def test_options_that_do_not_exist(
    options: list[str], says: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--checkpoint", str(trained), "--target", "onnx", "--out", str(tmp_path / "out"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
