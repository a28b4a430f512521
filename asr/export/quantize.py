"""Weights of 8 bits for ONNX files, layer by layer: those that do most harm stay in float until word errors hold.

Weight matrices become int8 with a scale for each column, of 7 bits, since the 16-bit sums of processors without VNNI
overflow with more; activations are rounded to 8 bits as they come (onnxruntime's dynamic quantisation). What each
matrix costs is measured on recordings with texts, in onnxruntime, with the search of ``asr.export.onnx_runner``.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asr.checkpoint import Loaded
from asr.data.features import load_samples
from asr.decoding.score import ErrorCounts, align, count_errors, total, words_of
from asr.errors import UserError
from asr.export.eager import pad_for_devices
from asr.export.onnx_runner import Recognizer, Stream
from asr.export.spec import Spec

TABLE = "int8.json"
QUANTIZED = ("encoder", "joiner")
"""Parts whose matrices may be int8; the predictor of a stateless model is a lookup and one small product."""
MOST_UTTERANCES = 200
SCAN_UTTERANCES = 16
"""Of the development set: for word errors, and for the harm of single layers."""
BATCH = 16


@dataclass
class Layer:
    """One weight matrix.

    Args:
        name: of the layer in the model.
        part: "encoder" or "joiner".
        node: of the graph.
        parameters: numbers of the matrix.
        harm: mean Kullback-Leibler divergence, nats a frame, of the next token's distribution when this layer alone
            is int8, from that in float.
        precision: "int8" or "fp32", as chosen.
    """

    name: str
    part: str
    node: str
    parameters: int
    harm: float = 0.0
    precision: str = "int8"


@dataclass
class Choice:
    """What was tried and chosen; int8.json.

    Args:
        utterances: of the development set, that word errors are of.
        scanned: those among them that harm is measured on.
        float_wer: percent, of the float files.
        tries: for each number of layers that stayed in float, the worst ones first, the word error rate in percent.
        layers: all matrices, the most harmful first.
    """

    utterances: int
    scanned: int
    max_wer_increase: float
    float_wer: float
    tries: dict[int, float] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def float_layers(self) -> list[str]:
        """Names of the layers that stay in float."""
        return [layer.name for layer in self.layers if layer.precision == "fp32"]

    def table(self, rows: int = 8) -> str:
        """The most harmful layers, for a terminal."""
        lines = [f"  {'layer':<32} {'parameters':>10} {'harm, nats':>11}  precision"]
        for layer in self.layers[:rows]:
            lines.append(f"  {layer.name:<32} {layer.parameters:>10,} {layer.harm:>11.2e}  {layer.precision}")
        rest = self.layers[rows:]
        if rest:
            lines.append(f"  and {len(rest)} more, {sum(x.precision == 'int8' for x in rest)} of them int8")
        return "\n".join(lines)


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


class _Development:
    """Recordings with texts, and what float files hear in them."""

    def __init__(self, loaded: Loaded, folder: Path, spec: Spec):
        assert spec.development is not None
        cuts = [cut for cut in spec.development if cut.supervisions]
        if not cuts:
            raise UserError("int8 needs a development set, and it holds no recording with a text; pass other --cuts")
        step = max(1, math.ceil(len(cuts) / MOST_UTTERANCES))
        self.cuts = cuts[::step]
        self.texts = [" ".join(part.text for part in cut.supervisions) for cut in self.cuts]
        self.waveforms = [pad_for_devices(load_samples(cut), spec.chunk_ms) for cut in self.cuts]
        self.tokenizer = loaded.tokenizer
        self.recognizer = Recognizer(folder)
        self._float = self.recognizer._encoder, self.recognizer._joiner
        self.float_errors = self.errors()
        self.scanned = min(SCAN_UTTERANCES, len(self.cuts))
        self._frames = self._encoded()
        self._context = self._contexts()
        self._log_probs = self._distribution(self._frames)

    def _streams(self, waveforms: Sequence[np.ndarray]) -> list[Stream]:
        streams = []
        for samples in waveforms:
            stream = self.recognizer.open()
            stream.accept(samples)
            stream.finish(tail=False)
            streams.append(stream)
        return streams

    def errors(self) -> ErrorCounts:
        """Word errors of the recognizer as it is."""
        counts = []
        for start in range(0, len(self.cuts), BATCH):
            part = slice(start, start + BATCH)
            streams = self._streams(self.waveforms[part])
            while self.recognizer.advance(streams):
                pass
            for stream, text in zip(streams, self.texts[part], strict=True):
                counts.append(count_errors(align(words_of(text), words_of(self.tokenizer.decode(stream.tokens)))))
        return total(counts)

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

    def _distribution(self, frames: list[np.ndarray]) -> np.ndarray:
        """Log-probabilities [T, V] of the next token, float64."""
        logits = self.recognizer._join(np.concatenate(frames), self._context).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def harm(self) -> float:
        """Divergence of the recognizer as it is from the float files, nats a frame."""
        encoder = self.recognizer._encoder is not self._float[0]
        now = self._distribution(self._encoded() if encoder else self._frames)
        return float((np.exp(self._log_probs) * (self._log_probs - now)).sum(1).mean())

    def use(self, graphs: dict[str, Any]) -> None:
        """Let the recognizer run these graphs, and the float files of the other parts."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        sessions = {
            part: onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for part, graph in graphs.items()
        }
        self.recognizer._encoder = sessions.get("encoder", self._float[0])
        self.recognizer._joiner = sessions.get("joiner", self._float[1])


def choose_int8(
    loaded: Loaded, graphs: dict[str, Any], folder: Path, spec: Spec, say: Callable[[str], None] = print
) -> tuple[dict[str, Any], Choice]:
    """Graphs of the parts in ``QUANTIZED`` with as many matrices in int8 as word errors allow, and how it was chosen.

    Args:
        loaded: the model of the graphs.
        graphs: "encoder", "decoder" and "joiner" in float.
        folder: where the float files are.
        spec: chunk, development set, and how many percent more of its words may be wrong.

    Raises:
        UserError: no development set, or no matrix can be int8 within the limit.
    """
    development = _Development(loaded, folder, spec)
    most = development.float_errors.rate + spec.max_wer_increase / 100
    layers = layers_of(loaded.model, graphs)
    words = f"{len(development.cuts)} recordings: {development.float_errors}"
    say(f"int8: {len(layers)} layers one by one on {development.scanned} recordings; word errors on {words}")
    for layer in layers:
        development.use({layer.part: quantized(graphs[layer.part], [layer.node])})
        layer.harm = development.harm()
    layers.sort(key=lambda layer: -layer.harm)
    choice = Choice(
        len(development.cuts),
        development.scanned,
        spec.max_wer_increase,
        round(100 * development.float_errors.rate, 3),
        layers=layers,
    )

    def attempt(left: int) -> dict[str, Any] | None:
        """Graphs with the ``left`` most harmful layers in float, if they hold."""
        chosen = {
            part: quantized(graphs[part], [layer.node for layer in layers[left:] if layer.part == part])
            for part in QUANTIZED
        }
        development.use(chosen)
        errors = development.errors()
        choice.tries[left] = round(100 * errors.rate, 3)
        say(f"int8: {left} of {len(layers)} layers in float: {errors}")
        return chosen if errors.rate <= most + 1e-9 else None

    held, left = attempt(0), 0
    low, step = -1, 1
    while held is None:
        low, left = left, min(left + step, len(layers))
        if left == len(layers):
            raise UserError(
                f"no layer can be int8: word errors rise by more than export.max_wer_increase={spec.max_wer_increase}; "
                "export fp32, or allow more"
            )
        held, step = attempt(left), 2 * step
    while left - low > 1:  # fewer may do
        middle = (low + left) // 2
        better = attempt(middle)
        if better is None:
            low = middle
        else:
            held, left = better, middle
    for layer in layers[:left]:
        layer.precision = "fp32"
    say(choice.table())
    return held, choice


def save_choice(choice: Choice, folder: Path) -> None:
    """Writes int8.json."""
    (folder / TABLE).write_text(json.dumps(asdict(choice), indent=1) + "\n", encoding="utf-8")
