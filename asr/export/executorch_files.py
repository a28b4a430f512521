"""Target "executorch": .pte programs for phones and boards, on XNNPACK; one stream a call.

encoder.pte has the state of the stream as its inputs and results, in the order of ``StreamingEncoder``, the count of
frames as a float; decoder.pte is the predictor. All sizes are fixed. In int8, weights of the linear layers that
``quantize`` chose have 8 bits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from asr.checkpoint import Loaded
from asr.export.executorch_int8 import SMALLEST_SCALE, ModelDevelopment, layers_of
from asr.export.modules import search_parts, streaming_encoder, write_geometry
from asr.export.quantize import QUANTIZED, choose_int8
from asr.export.spec import Spec, Written
from asr.export.transducer_files import check_model, write_tokens


def check(loaded: Loaded, spec: Spec) -> None:
    """Raises UserError for a model that the programs cannot hold."""
    check_model(loaded, "executorch")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the packages say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def program(module: nn.Module, inputs: Sequence[Tensor], int8: Collection[str] = ()) -> bytes:
    """The content of a .pte file.

    Args:
        module: in evaluation mode.
        inputs: examples; their sizes are the only ones that it takes.
        int8: names, in the module, of linear layers with weights of 8 bits.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower

    arguments = tuple(inputs)
    partitioners = [XnnpackPartitioner()]
    with _quietly(), torch.no_grad():
        exported = torch.export.export(module.eval(), arguments, strict=False)
        if int8:
            exported = torch.export.export(_int8(exported.module(), arguments, int8), arguments, strict=False)
            partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
        lowered = to_edge_transform_and_lower(exported, partitioner=partitioners)
        return bytes(lowered.to_executorch().buffer)


def _int8(module: nn.Module, arguments: tuple[Tensor, ...], layers: Collection[str]) -> nn.Module:
    """The exported module with these linear layers quantised."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    weights = {f"{name}.weight" for name in layers}

    def chosen(node: torch.fx.Node) -> bool:
        return any(isinstance(x, torch.fx.Node) and str(x.target) in weights for x in node.args)

    how = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    # its own least scale is 2**-12: of rows all below 0.03 it would leave a few steps of the 255
    observer = PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE)
    how = replace(how, weight=replace(how.weight, observer_or_fake_quant_ctr=observer))
    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_module_type(nn.Linear, how).set_filter_function(chosen))
    prepared(*arguments)
    found: nn.Module = convert_pt2e(prepared)
    return found


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the programs into a folder."""
    model = loaded.model
    encoder, inputs, sizes = streaming_encoder(model, spec.chunk_ms, spec.left_context_ms, 1)
    # the count of frames as a float: quantised programs return whole numbers as floats
    parts = {"encoder": (encoder, {**inputs, "frames": torch.zeros(1)}), **search_parts(model, 1)}
    write_tokens(loaded.tokenizer, folder)
    write_geometry(sizes, model.config.predictor.context_size, folder)
    files = {"fp32": {part: f"{part}.pte" for part in parts}}
    int8: dict[str, Collection[str]] = {}  # of files that are not in float
    float_layers: list[str] = []
    if "int8" in spec.precisions:
        choice = choose_int8(ModelDevelopment(loaded, spec), layers_of(model, parts), spec.max_wer_increase)
        choice.save(folder)
        files["int8"] = files["fp32"] | {part: f"{part}.int8.pte" for part in QUANTIZED}
        int8 = {files["int8"][part]: choice.int8_nodes(part) for part in QUANTIZED}
        float_layers = choice.float_layers
    files = {precision: files[precision] for precision in spec.precisions}
    for part, (module, examples) in parts.items():
        for name in {names[part] for names in files.values()}:
            (folder / name).write_bytes(program(module, list(examples.values()), int8.get(name, ())))
    return Written(files, float_layers)
