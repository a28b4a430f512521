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
from asr.export.modules import (
    Geometry,
    JoinerLogits,
    OfflineEncoder,
    Predictor,
    StreamingEncoder,
    geometry,
    write_geometry,
)
from asr.export.spec import Spec, Written
from asr.export.transducer_files import PARTS, check_model, write_tokens
from asr.models.context import context

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


def encoder_inputs(loaded: Loaded, spec: Spec, batch_size: int) -> tuple[nn.Module, dict[str, Tensor], Geometry]:
    """The streaming encoder, examples of its arguments, and its sizes."""
    sizes = geometry(loaded.model, *context(spec.chunk_ms, spec.left_context_ms))
    state = loaded.model.encoder.init_state(batch_size, sizes.left_frames)
    features = torch.zeros(batch_size, sizes.feature_frames, sizes.num_mel_bins)
    return StreamingEncoder(loaded.model), {"x": features, **state._asdict()}, sizes


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the programs into a folder."""
    model = loaded.model
    streams = torch.export.Dim("streams", min=1, max=MOST_STREAMS)
    any_number = {0: streams}
    if spec.chunk_ms == "full":
        frames = torch.export.Dim("frames", min=LEAST_FRAMES, max=MOST_FRAMES)
        inputs = {"x": torch.zeros(2, 67, model.config.num_mel_bins), "x_lens": torch.tensor([67, 59])}
        encoder = program(OfflineEncoder(model), inputs, {"x": {0: streams, 1: frames}, "x_lens": any_number})
        sizes = geometry(model, 0, 0)
    else:
        module, inputs, sizes = encoder_inputs(loaded, spec, 2)
        encoder = program(module, inputs, dict.fromkeys(inputs, any_number))
    tokens = {"y": torch.zeros(2, model.config.predictor.context_size, dtype=torch.int64)}
    states = {name: torch.zeros(2, model.config.joiner.dim) for name in ("encoder_out", "decoder_out")}
    programs = {
        "encoder": encoder,
        "decoder": program(Predictor(model), tokens, dict.fromkeys(tokens, any_number)),
        "joiner": program(JoinerLogits(model), states, dict.fromkeys(states, any_number)),
    }
    write_tokens(loaded.tokenizer, folder)
    write_geometry(sizes, model.config.predictor.context_size, folder)
    for part in PARTS:
        torch.export.save(programs[part], folder / f"{part}.pt2")
    return Written({"fp32": {part: f"{part}.pt2" for part in PARTS}})
