"""Target "torch.export": programs of PyTorch for servers, any number of streams at once.

encoder.pt2 has the state of the streams as its inputs and results, or reads whole utterances of any length; decoder.pt2
is the predictor. ``torch.export.load`` and torch alone run them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr.checkpoint import Loaded
from asr.errors import UserError
from asr.export.modules import geometry, offline_encoder, search_parts, streaming_encoder, write_geometry
from asr.export.spec import Spec, Written
from asr.export.transducer_files import PARTS, check_model, write_tokens

MOST_STREAMS = 4096
LEAST_FRAMES, MOST_FRAMES = 4, 360000
"""Of 10 ms in one utterance: up to an hour."""


def check(loaded: Loaded, spec: Spec) -> None:
    """Raises UserError for a model or a precision that the programs cannot hold."""
    check_model(loaded, "torch.export")
    if "int8" in spec.precisions:
        raise UserError(
            "torch.export holds fp32 only, for servers; export with --precision fp32, or choose onnx for int8"
        )


def program(module: nn.Module, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, Any]]) -> Any:
    """The ``ExportedProgram`` of a module.

    Args:
        module: in evaluation mode.
        inputs: name and example of each argument.
        dynamic: of each, the axes that vary.
    """
    shapes = tuple(dict(dynamic.get(name, {})) for name in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=shapes, strict=False)


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the programs into a folder."""
    model = loaded.model
    streams = torch.export.Dim("streams", min=1, max=MOST_STREAMS)
    if spec.chunk_ms == "full":
        frames = torch.export.Dim("frames", min=LEAST_FRAMES, max=MOST_FRAMES)
        encoder = program(*offline_encoder(model), {"x": {0: streams, 1: frames}, "x_lens": {0: streams}})
        sizes = geometry(model, 0, 0)
    else:
        module, inputs, sizes = streaming_encoder(model, spec.chunk_ms, spec.left_context_ms, 2)
        encoder = program(module, inputs, dict.fromkeys(inputs, {0: streams}))
    others = search_parts(model, 2).items()
    programs = {part: program(*own, dict.fromkeys(own[1], {0: streams})) for part, own in others}
    write_tokens(loaded.tokenizer, folder)
    write_geometry(sizes, model.config.predictor.context_size, folder)
    files = {part: f"{part}.pt2" for part in PARTS}
    for part, name in files.items():
        torch.export.save({"encoder": encoder, **programs}[part], folder / name)
    return Written({"fp32": files}, [])
