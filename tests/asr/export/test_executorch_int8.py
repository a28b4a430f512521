"""int8 of ExecuTorch's programs: the model with XNNPACK's rounding chooses the layers, and the programs keep to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from torch import nn

from asr.checkpoint import Loaded
from asr.export import executorch_int8
from asr.export.executorch_files import program
from asr.export.executorch_int8 import ModelDevelopment, in_int8, layers_of, rounded_rows, rounded_weight
from asr.export.export import export
from asr.export.modules import search_parts, streaming_encoder
from asr.export.quantize import Layer, choose_int8
from asr.export.spec import Spec
from asr.export.verify import verify

SPOILT = "encoder.blocks.1.ff1.down"


def layers(loaded: Loaded) -> list[Layer]:
    encoder, inputs, _ = streaming_encoder(loaded.model, 320, 640, 1)
    return layers_of(loaded.model, {"encoder": (encoder, inputs), **search_parts(loaded.model, 1)})


def test_the_layers_are_those_that_programs_compute(loaded: Loaded) -> None:
    names = {name for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear)}
    found = layers(loaded)
    assert {layer.name for layer in found} == {name for name in names if name.startswith("encoder.")} | {
        "joiner.encoder_proj", "joiner.out",
    }  # fmt: skip
    assert len({layer.name for layer in found}) == len(found)
    nodes = {layer.name: layer.node for layer in found}
    assert nodes["joiner.encoder_proj"] == "joiner_proj" and nodes[SPOILT] == SPOILT


def test_rounding_has_so_many_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(5, 4000, generator=generator) - 1) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    x[4] = x[4].abs() + 3
    rows, weight = rounded_rows(x), rounded_weight(x)
    for i in (0, 1, 2):
        assert 200 < len(rows[i].unique()) <= 256 and 200 < len(weight[i].unique()) <= 255
        assert (rows[i] - x[i]).abs().max() <= 0.5001 * (x[i].max() - x[i].min()) / 255
        assert (weight[i] - x[i]).abs().max() <= 0.5001 * x[i].abs().max() / 127
    assert rows[3].abs().max() == 0 == weight[3].abs().max()  # nothing divided by 0
    assert (rows[4] - x[4]).abs().max() <= 0.5001 * x[4].max() / 255  # 0 is one of the steps


def test_the_model_is_itself_again(loaded: Loaded) -> None:
    layer = loaded.model.joiner.encoder_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = layer(x)
        with pytest.raises(RuntimeError, match="stop"), in_int8([layer]):
            assert 0 < (layer(x) - before).abs().max() < 0.1 * before.abs().max()
            raise RuntimeError("stop")
        assert torch.equal(layer(x), before)


def test_the_worst_layer_stays_in_float(loaded: Loaded, heard: CutSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose int8 form is spoiled is found, and left in float; no other is."""
    matrix, real = loaded.model.get_submodule(SPOILT).weight.detach(), rounded_weight

    def spoiling(weight: torch.Tensor) -> torch.Tensor:
        return real(weight) * (-300 if torch.equal(weight, matrix) else 1)

    monkeypatch.setattr(executorch_int8, "rounded_weight", spoiling)
    development = ModelDevelopment(loaded, Spec(320, 640, ("int8",), heard, 20.0))
    choice = choose_int8(development, layers(loaded), 20.0)
    assert choice.float_rate == 0.0 and choice.tries[0] > 20.0 >= choice.tries[1]
    assert choice.float_layers == [SPOILT] == [choice.layers[0].name]
    assert SPOILT not in choice.int8_nodes("encoder") and "joiner_proj" in choice.int8_nodes("encoder")
    assert choice.int8_nodes("joiner") == ["joiner.out"]


@pytest.mark.slow
def test_programs_keep_to_the_choice(loaded: Loaded, trained: Path, heard: CutSet, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="pip install 'transducer-asr[executorch]'")
    from executorch.runtime import Runtime

    def run(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        program = Runtime.get().load_program(path)
        found = program.load_method("forward").execute([x.clone() for x in inputs.values()])
        return found[0].clone()

    manifest = export(loaded, trained, "executorch", tmp_path / "all", Spec(320, 640, ("int8",), heard, 100.0))
    assert manifest.files["int8"] == {
        "encoder": "encoder.int8.pte", "decoder": "decoder.pte", "joiner": "joiner.int8.pte",
    }  # fmt: skip
    report = verify(loaded, trained, tmp_path / "all", heard, max_wer_increase=100.0)
    assert report.ok and [one.precision for one in report.precisions] == ["int8"]

    # the rounding that chooses is the program's: apart by far less than either is from float
    encoder, inputs, _ = streaming_encoder(loaded.model, 320, 640, 1)
    inputs = {**inputs, "frames": torch.zeros(1)}
    inputs["x"] = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(0))
    chosen = [loaded.model.get_submodule(layer.name) for layer in layers(loaded) if layer.part == "encoder"]
    with torch.no_grad():
        whole = encoder(*inputs.values())[0]
        with in_int8(chosen):  # type: ignore[arg-type]
            small = encoder(*inputs.values())[0]
    found = run(tmp_path / "all" / "encoder.int8.pte", inputs)
    assert (found - small).norm() < 0.02 * (found - whole).norm()

    # and one layer alone is no other
    (one,) = [layer for layer in layers(loaded) if layer.name == SPOILT]
    content = program(encoder, list(inputs.values()), [one.node])
    rest = sum(layer.parameters for layer in layers(loaded) if layer.part == "encoder") - one.parameters
    more = len(content) - (tmp_path / "all" / "encoder.int8.pte").stat().st_size
    assert 2 * rest < more < 4 * rest
