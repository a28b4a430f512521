"""Modules to ONNX graphs that old and new runtimes load.

torch's exporter by tracing (``dynamo=False``) with opset 17 writes IR version 8; the newer one writes IR 10, which
runtimes of two years ago refuse.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 17


def onnx_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, object],
) -> Any:
    """The ``onnx.ModelProto`` of a module in evaluation mode.

    Args:
        module: takes the inputs in their order and returns one tensor or a tuple of them.
        inputs: name and example of each.
        outputs: names of the results.
        dynamic: for inputs and outputs, names of the axes that vary.
        metadata: written as text.
    """
    import onnx

    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # of the exporter's age, and of shape checks in Python, which hold for every input of a graph
        for category in (DeprecationWarning, UserWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
        )
    graph = onnx.load_from_string(buffer.getvalue())
    found = [entry.name for entry in graph.graph.input]
    if found != list(inputs):
        raise RuntimeError(
            f"the exporter changed the inputs from {list(inputs)} to {found}; runtimes bind them by order"
        )
    for key, value in metadata.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.checker.check_model(graph)
    return graph
