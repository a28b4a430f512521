"""Weights of 8 bits in ONNX files.

Weight matrices become int8 with a scale for each column, of 7 bits, since the 16-bit sums of processors without VNNI
overflow with more; activations are rounded to 8 bits as they come (onnxruntime's dynamic quantisation). Which ones is
chosen in onnxruntime, with the search of ``asr.export.onnx_runner``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import nn

from asr.checkpoint import Loaded
from asr.export.onnx_runner import Recognizer, Stream
from asr.export.quantize import QUANTIZED, Development, Layer
from asr.export.spec import Spec

BATCH = 16


def quantized(graph: Any, nodes: Sequence[str]) -> Any:
    """The graph with the weights of these MatMul nodes in int8; metadata and opset stay, and so does ``graph``."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not nodes:
        return graph
    every = [node.name for node in graph.graph.node if node.op_type == "MatMul"]
    copied = onnx.ModelProto()  # what is quantised is changed
    copied.CopyFrom(graph)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that changes nothing for these graphs
    try:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "int8.onnx"
            quantize_dynamic(
                copied,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=[node for node in every if node not in set(nodes)],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
            found = onnx.load(path)
    finally:
        root.setLevel(level)
    del found.metadata_props[:]
    found.metadata_props.extend(graph.metadata_props)
    return found


def layers_of(model: nn.Module, graphs: dict[str, Any]) -> list[Layer]:
    """Weight matrices of the graphs' products, with the names that they have in the model."""
    import onnx

    names = {
        module.weight.detach().T.contiguous().numpy().tobytes(): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = []
    for part in QUANTIZED:
        weights = {entry.name: entry for entry in graphs[part].graph.initializer}
        for node in graphs[part].graph.node:
            if node.op_type == "MatMul" and node.input[1] in weights:
                matrix = onnx.numpy_helper.to_array(weights[node.input[1]])
                found.append(Layer(names.get(matrix.tobytes(), node.name), part, node.name, matrix.size))
    return found


class OnnxDevelopment(Development):
    """In onnxruntime.

    Args:
        graphs: "encoder", "decoder" and "joiner" in float.
        folder: where their files are.
    """

    def __init__(self, loaded: Loaded, graphs: dict[str, Any], folder: Path, spec: Spec):
        super().__init__(loaded, spec)
        self.graphs = graphs
        self.recognizer = Recognizer(folder)
        self._float = self.recognizer._encoder, self.recognizer._joiner
        self._frames = self._encoded()
        self._context = self._contexts()

    def _streams(self, waveforms: Sequence[np.ndarray]) -> list[Stream]:
        streams = []
        for samples in waveforms:
            stream = self.recognizer.open()
            stream.accept(samples)
            stream.finish(tail=False)
            streams.append(stream)
        return streams

    def hear(self, int8: Sequence[Layer]) -> list[list[int]]:
        self._use(int8)
        tokens = []
        for start in range(0, len(self.waveforms), BATCH):
            streams = self._streams(self.waveforms[start : start + BATCH])
            while self.recognizer.advance(streams):
                pass
            tokens += [stream.tokens for stream in streams]
        return tokens

    def log_probs(self, int8: Sequence[Layer]) -> np.ndarray:
        self._use(int8)
        frames = self._encoded() if any(layer.part == "encoder" for layer in int8) else self._frames
        log_probs: np.ndarray = log_softmax(
            self.recognizer._join(np.concatenate(frames), self._context).astype(np.float64), axis=1
        )
        return log_probs

    def _encoded(self) -> list[np.ndarray]:
        """Encoder frames [T', J] of each recording of the scan."""
        streams = self._streams(self.waveforms[: self.scanned])
        outs: list[list[np.ndarray]] = [[] for _ in streams]
        while ready := [i for i, stream in enumerate(streams) if stream.ready]:
            for i, frames in zip(ready, self.recognizer.encode([streams[i] for i in ready]), strict=True):
                outs[i].append(frames)
        return [np.concatenate(parts) for parts in outs if parts]

    def _contexts(self) -> np.ndarray:
        """Predictor output [T, J] that the search of the float files has at each frame of the scan."""
        found = []
        for frames in self._frames:
            stream = self.recognizer.open()
            for frame in frames:
                found.append(stream.decoder_out)
                self.recognizer._search(stream, frame[None])
        return np.stack(found)

    def _use(self, int8: Sequence[Layer]) -> None:
        """Let the recognizer run graphs with these layers in int8, and the float files of the other parts."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        sessions = {}
        for part in QUANTIZED:
            nodes = [layer.node for layer in int8 if layer.part == part]
            if nodes:
                graph = quantized(self.graphs[part], nodes).SerializeToString()
                sessions[part] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.recognizer._encoder = sessions.get("encoder", self._float[0])
        self.recognizer._joiner = sessions.get("joiner", self._float[1])
