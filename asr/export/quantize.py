"""Weights of 8 bits, layer by layer: those that do most harm stay in float until errors hold.

What each weight matrix costs is measured on recordings with texts, by a ``Development`` of the target: that of
``onnx_int8`` runs the files themselves, that of ``executorch_int8`` the model with the same rounding.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from asr.checkpoint import Loaded
from asr.data.features import load_samples
from asr.decoding.score import ErrorCounts, ErrorUnit, errors_name, rate_name, text_errors
from asr.errors import UserError
from asr.export.eager import pad_for_devices
from asr.export.spec import Spec

TABLE = "int8.json"
QUANTIZED = ("encoder", "joiner")
"""Parts whose matrices may be int8; the predictor of a stateless model is a lookup and one small product."""
MOST_UTTERANCES = 200
SCAN_UTTERANCES = 16
"""Of the development set: for errors, and for the harm of single layers."""


@dataclass
class Layer:
    """One weight matrix.

    Args:
        name: of the layer in the model.
        part: "encoder" or "joiner".
        node: of the graph in the part's file, by which the target finds it.
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
        utterances: of the development set, that errors are of.
        scanned: those among them that harm is measured on.
        float_rate: error rate of the float files, in percent; "float_wer" or "float_cer" in the file.
        errors_in: what errors are counted in.
        tries: for each number of layers that stayed in float, the worst ones first, the error rate in percent.
        layers: all matrices, the most harmful first.
    """

    utterances: int
    scanned: int
    max_wer_increase: float
    float_rate: float
    errors_in: ErrorUnit = "words"
    tries: dict[int, float] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def float_layers(self) -> list[str]:
        """Names of the layers that stay in float."""
        return [layer.name for layer in self.layers if layer.precision == "fp32"]

    def int8_nodes(self, part: str) -> list[str]:
        """Nodes of a part's file that are int8."""
        return [layer.node for layer in self.layers if layer.part == part and layer.precision == "int8"]

    def save(self, folder: Path) -> None:
        """Writes int8.json."""
        name = f"float_{rate_name(self.errors_in).lower()}"
        described = {name if key == "float_rate" else key: value for key, value in asdict(self).items()}
        (folder / TABLE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    def table(self, rows: int = 8) -> str:
        """The most harmful layers, for a terminal."""
        lines = [f"  {'layer':<32} {'parameters':>10} {'harm, nats':>11}  precision"]
        for layer in self.layers[:rows]:
            lines.append(f"  {layer.name:<32} {layer.parameters:>10,} {layer.harm:>11.2e}  {layer.precision}")
        rest = self.layers[rows:]
        if rest:
            lines.append(f"  and {len(rest)} more, {sum(x.precision == 'int8' for x in rest)} of them int8")
        return "\n".join(lines)


class Development(ABC):
    """Recordings with texts, and what a target hears in them with some layers in int8.

    Raises:
        UserError: no recording has a text.
    """

    def __init__(self, loaded: Loaded, spec: Spec):
        assert spec.development is not None
        cuts = [cut for cut in spec.development if cut.supervisions]
        if not cuts:
            raise UserError("int8 needs a development set, and it holds no recording with a text; pass other --cuts")
        step = max(1, math.ceil(len(cuts) / MOST_UTTERANCES))
        self.texts = [" ".join(part.text for part in cut.supervisions) for cut in cuts[::step]]
        self.waveforms = [pad_for_devices(load_samples(cut), spec.chunk_ms) for cut in cuts[::step]]
        self.scanned = min(SCAN_UTTERANCES, len(self.texts))
        self._tokenizer = loaded.tokenizer
        self.errors_in = loaded.config.training.errors_in

    @abstractmethod
    def hear(self, int8: Sequence[Layer]) -> list[list[int]]:
        """Tokens of each recording with these layers in int8."""

    @abstractmethod
    def log_probs(self, int8: Sequence[Layer]) -> np.ndarray:
        """Log-probabilities [T, V] of the next token, float64, at all frames of the recordings of the scan: of the
        encoder's frames and the joiner with these layers in int8, after the tokens that the float files hear."""

    @cached_property
    def _float_log_probs(self) -> np.ndarray:
        return self.log_probs([])

    def errors(self, int8: Sequence[Layer]) -> ErrorCounts:
        """Errors with these layers in int8, in words or in characters (``errors_in``)."""
        return text_errors(self.texts, [self._tokenizer.decode(tokens) for tokens in self.hear(int8)], self.errors_in)

    def harm(self, layer: Layer) -> float:
        """Divergence from float, nats a frame, with this layer alone in int8."""
        before, now = self._float_log_probs, self.log_probs([layer])
        return float((np.exp(before) * (before - now)).sum(1).mean())


def choose_int8(
    development: Development, layers: Sequence[Layer], max_wer_increase: float, say: Callable[[str], None] = print
) -> Choice:
    """As many layers in int8 as errors allow.

    Args:
        development: of the target.
        layers: all that may be int8.
        max_wer_increase: how many percent more of the development set's words or characters may be wrong.

    Raises:
        UserError: no layer can be int8 within the limit.
    """
    layers = list(layers)
    float_errors = development.errors([])
    most = float_errors.rate + max_wer_increase / 100
    errors_are = errors_name(development.errors_in)
    found = f"{errors_are} on {len(development.texts)} recordings: {float_errors}"
    say(f"int8: {len(layers)} layers one by one on {development.scanned} recordings; {found}")
    for layer in layers:
        layer.harm = development.harm(layer)
    layers.sort(key=lambda layer: -layer.harm)
    counts = len(development.texts), development.scanned
    rate = round(100 * float_errors.rate, 3)
    choice = Choice(*counts, max_wer_increase, rate, development.errors_in, layers=layers)

    def holds(left: int) -> bool:
        """Whether errors are within the limit with the ``left`` most harmful layers in float."""
        errors = development.errors(layers[left:])
        choice.tries[left] = round(100 * errors.rate, 3)
        say(f"int8: {left} of {len(layers)} layers in float: {errors}")
        return errors.rate <= most + 1e-9

    low, left, step = -1, 0, 1
    while not holds(left):
        low, left, step = left, min(left + step, len(layers)), 2 * step
        if left == len(layers):
            raise UserError(
                f"no layer can be int8: {errors_are} rise by more than export.max_wer_increase={max_wer_increase}; "
                "export fp32, or allow more"
            )
    while left - low > 1:  # fewer may do
        middle = (low + left) // 2
        if holds(middle):
            left = middle
        else:
            low = middle
    for layer in layers[:left]:
        layer.precision = "fp32"
    say(choice.table())
    return choice
