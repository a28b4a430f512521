"""int8, layer by layer: what is chosen, what is left in float, and what the files keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from asr import checkpoint
from asr.checkpoint import Loaded
from asr.data.tokenizer import Tokenizer
from asr.decoding.load import load_for_decoding
from asr.errors import UserError
from asr.export.export import export
from asr.export.folder import Manifest
from asr.export.report import summary, write_report
from asr.export.spec import Spec
from asr.export.verify import verify
from tests.asr.export.conftest import with_heard_texts

onnx = pytest.importorskip("onnx", reason="pip install 'transducer-asr[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'transducer-asr[export]'")


def spec(development: CutSet | None, most: float = 100.0, *precisions: str) -> Spec:
    chosen = precisions or ("fp32", "int8")
    return Spec(320, 640, chosen, development, most)  # type: ignore[arg-type]


def test_files_in_int8(loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path) -> None:
    manifest = export(loaded, trained, "onnx", tmp_path, spec(heard))
    assert manifest.files["int8"] == {
        "encoder": "encoder.int8.onnx", "decoder": "decoder.onnx", "joiner": "joiner.int8.onnx",
    }  # fmt: skip
    whole, small = (onnx.load(tmp_path / f"encoder{infix}.onnx") for infix in ("", ".int8"))
    assert list(whole.metadata_props) == list(small.metadata_props)
    assert small.ir_version <= 8
    assert {entry.version for entry in small.opset_import if not entry.domain} == {17}
    weights = sum(layer["parameters"] for layer in json.loads((tmp_path / "int8.json").read_text())["layers"])
    sizes = [(tmp_path / f"encoder{infix}.onnx").stat().st_size for infix in ("", ".int8")]
    assert sizes[0] - sizes[1] > 2 * weights  # 3 of 4 bytes, less scales
    report = verify(loaded, trained, tmp_path, heard, max_wer_increase=100.0)
    assert [one.precision for one in report.precisions] == ["fp32", "int8"] and report.ok
    assert report.precisions[0].error_percent == 0.0
    inside = {tensor.name: tensor.largest for tensor in report.precisions[1].tensors}
    assert inside["encoder_out"] > 1e-4  # it is not float


def test_the_table(loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path) -> None:
    export(loaded, trained, "onnx", tmp_path, spec(heard, 100.0, "int8"))
    assert not (tmp_path / "encoder.onnx").exists() and (tmp_path / "decoder.onnx").exists()
    table = json.loads((tmp_path / "int8.json").read_text())
    names = {name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = [layer["name"] for layer in table["layers"]]
    assert set(found) == {name for name in names if name.startswith("encoder.")} | {
        "joiner.encoder_proj", "joiner.out",
    }  # fmt: skip
    assert len(found) == len(set(found))
    harms = [layer["harm"] for layer in table["layers"]]
    assert harms == sorted(harms, reverse=True) and harms[0] > 0
    assert all(layer["precision"] == "int8" for layer in table["layers"])
    assert table["float_wer"] == 0.0 and list(table["tries"]) == ["0"]


def test_the_worst_layer_stays_in_float(
    loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose int8 form is spoiled is found, and left in float; no other is."""
    from asr.export import onnx_int8, transducer_files

    real = onnx_int8.quantized
    spoilt = "encoder.blocks.1.ff1.down"
    matrix = loaded.model.get_submodule(spoilt).weight.detach().T.contiguous().numpy().tobytes()

    def spoiling(graph, nodes):  # type: ignore[no-untyped-def]
        weights = {entry.name: entry for entry in graph.graph.initializer}
        found = real(graph, nodes)
        for node in graph.graph.node:
            if node.name in nodes and onnx.numpy_helper.to_array(weights[node.input[1]]).tobytes() == matrix:
                for entry in found.graph.initializer:
                    if entry.name == f"{node.input[1]}_scale":
                        entry.CopyFrom(
                            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(entry) * -300, entry.name)
                        )
        return found

    for module in (onnx_int8, transducer_files):
        monkeypatch.setattr(module, "quantized", spoiling)
    manifest = export(loaded, trained, "onnx", tmp_path, spec(heard, 20.0))
    assert manifest.float_layers == [spoilt] == Manifest.load(tmp_path).float_layers
    table = json.loads((tmp_path / "int8.json").read_text())
    assert table["layers"][0]["name"] == spoilt and table["layers"][0]["precision"] == "fp32"
    assert table["tries"]["0"] > 20.0 >= table["tries"]["1"]


def test_nothing_can_be_int8(
    loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asr.decoding.score import ErrorCounts
    from asr.export import quantize

    real = quantize.Development.errors

    def worse(self, int8) -> ErrorCounts:  # type: ignore[no-untyped-def]
        found = real(self, int8)
        return dataclasses.replace(found, substitutions=found.substitutions + 99) if int8 else found

    monkeypatch.setattr(quantize.Development, "errors", worse)
    with pytest.raises(
        UserError, match="no layer can be int8: .*export.max_wer_increase=0.3; export fp32, or allow more"
    ):
        export(loaded, trained, "onnx", tmp_path / "out", spec(heard, 0.3))
    assert not list(tmp_path.iterdir())


def test_a_development_set_without_texts(loaded: Loaded, trained: Path, cuts: CutSet, tmp_path: Path) -> None:
    bare = CutSet.from_cuts(dataclasses.replace(cut, supervisions=[]) for cut in cuts)
    with pytest.raises(UserError, match="holds no recording with a text"):
        export(loaded, trained, "onnx", tmp_path / "out", spec(bare))
    assert not list(tmp_path.iterdir())


def test_the_limit_is_held_in_verification(
    loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(loaded, trained, "onnx", tmp_path, spec(heard))
    graph = onnx.load(tmp_path / "joiner.int8.onnx")
    for entry in graph.graph.initializer:
        if entry.name.endswith("_scale"):
            entry.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(entry), entry.name))
    onnx.save(graph, tmp_path / "joiner.int8.onnx")
    report = verify(loaded, trained, tmp_path, heard, max_wer_increase=0.3)
    whole, small = report.precisions
    assert whole.ok and not small.ok and "word errors rise by" in small.reason and "the limit is 0.3" in small.reason


def test_texts_without_spaces_are_counted_in_characters(
    trained: Path, cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoint.load(trained, "cpu")
    config = dataclasses.replace(
        found.config, training=dataclasses.replace(found.config.training, errors_in="characters")
    )
    path = tmp_path / "characters.pt"
    tokens = Tokenizer("char", ["<blk>", "你", "好", "吗", "们"])
    checkpoint.atomic_save(checkpoint.make_payload(found.model.state_dict(), config, tokens, step=7, epoch=1), path)
    loaded = load_for_decoding(path, "cpu")
    chinese = list(with_heard_texts(loaded, cuts))
    text = chinese[0].supervisions[0].text
    wrong = dataclasses.replace(chinese[0].supervisions[0], text="那" + text[1:])
    chinese[0] = dataclasses.replace(chinese[0], supervisions=[wrong])
    cuts = CutSet.from_cuts(chinese)
    length = sum(len(cut.supervisions[0].text) for cut in cuts)
    assert length > 2 * len(cuts)
    out = tmp_path / "out"
    export(loaded, path, "onnx", out, spec(cuts))
    assert "character errors on" in capsys.readouterr().out
    table = json.loads((out / "int8.json").read_text())
    assert table["errors_in"] == "characters" and "float_wer" not in table
    assert table["float_cer"] == pytest.approx(100 / length, abs=0.01)
    report = verify(loaded, path, out, cuts, max_wer_increase=100.0)
    assert report.ok and report.precisions[0].error_percent == pytest.approx(100 / length)
    assert "character errors of PyTorch" in summary(report) and "word errors" not in summary(report)
    write_report(report, tmp_path)
    described = json.loads((tmp_path / "verify.json").read_text())
    assert described["errors_in"] == "characters"
    one = described["precisions"][0]
    assert one["cer_percent"] == one["eager_cer_percent"] == report.precisions[0].error_percent
    assert one["characters"] == report.precisions[0].errors and "words" not in one and "wer_percent" not in one
    page = (tmp_path / "verify.html").read_text()
    assert "character errors" in page and "word errors" not in page
    # a limit of characters: the joiner's signs are turned in int8
    spoil = onnx.load(out / "joiner.int8.onnx")
    for entry in spoil.graph.initializer:
        if entry.name.endswith("_scale"):
            entry.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(entry), entry.name))
    onnx.save(spoil, out / "joiner.int8.onnx")
    small = verify(loaded, path, out, cuts, max_wer_increase=0.3).precisions[1]
    assert not small.ok and "character errors rise by" in small.reason
