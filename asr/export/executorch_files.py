"""Target "executorch": .pte programs for phones and boards, on XNNPACK; one stream a call.

encoder.pte has the state of the stream as its inputs and results, in the order of ``StreamingEncoder``, the count of
frames as a float; decoder.pte is the predictor. All sizes are fixed. In int8, weights of linear layers have 8 bits,
with a scale for each output, and their inputs are rounded to 8 bits as they come.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asr.checkpoint import Loaded
from asr.export.modules import search_parts, streaming_encoder, write_geometry
from asr.export.spec import Spec, Written
from asr.export.transducer_files import PARTS, check_model, write_tokens


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


def program(module: nn.Module, inputs: Sequence[Tensor], int8: bool) -> bytes:
    """The content of a .pte file.

    Args:
        module: in evaluation mode.
        inputs: examples; their sizes are the only ones that it takes.
        int8: linear layers with weights of 8 bits.
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
            exported = torch.export.export(_int8(exported.module(), arguments), arguments, strict=False)
            partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
        lowered = to_edge_transform_and_lower(exported, partitioner=partitioners)
        return bytes(lowered.to_executorch().buffer)


def _int8(module: nn.Module, arguments: tuple[Tensor, ...]) -> nn.Module:
    """The exported module with its linear layers quantised."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    how = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_module_type(nn.Linear, how))
    prepared(*arguments)
    found: nn.Module = convert_pt2e(prepared)
    return found


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the programs into a folder."""
    model = loaded.model
    encoder, inputs, sizes = streaming_encoder(model, spec.chunk_ms, spec.left_context_ms, 1)
    write_tokens(loaded.tokenizer, folder)
    write_geometry(sizes, model.config.predictor.context_size, folder)
    # the count of frames as a float: quantised programs return whole numbers as floats
    parts = {"encoder": (encoder, {**inputs, "frames": torch.zeros(1)}), **search_parts(model, 1)}
    files: dict[str, dict[str, str]] = {}
    for precision in spec.precisions:
        infix = "" if precision == "fp32" else f".{precision}"
        files[precision] = {part: f"{part}{infix}.pte" for part in PARTS}
        for part, (module, examples) in parts.items():
            content = program(module, list(examples.values()), precision == "int8")
            (folder / files[precision][part]).write_bytes(content)
    return Written(files)
