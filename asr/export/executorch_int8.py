"""Weights of 8 bits in ExecuTorch's programs: which layers, by the model with XNNPACK's rounding.

XNNPACK keeps int8 weights with a scale for each output, and rounds each row of a layer's input to 8 bits, from its
least to its largest value, as it comes. Here the same numbers are rounded and multiplied in float, since programs take
many seconds to make; `asr verify` runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.checkpoint import Loaded
from asr.export.eager import Heard, hear_streams
from asr.export.modules import JoinerLogits, Predictor
from asr.export.quantize import QUANTIZED, Development, Layer
from asr.export.spec import Spec
from asr.models.transducer import Transducer

SMALLEST_SCALE = torch.finfo(torch.float32).eps


def rounded_weight(weight: Tensor) -> Tensor:
    """[O, I] as int8 with a scale for each output holds it: multiples of 1/127 of the row's largest size."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
    return (weight / scale).round().clamp(-127, 127) * scale


def rounded_rows(x: Tensor) -> Tensor:
    """[..., I] with each row in 256 steps from its least value to its largest, 0 being one of them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


@contextlib.contextmanager
def in_int8(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Within it these layers compute what they would with weights of 8 bits."""

    def forward(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return F.linear(rounded_rows(x), weight, bias)

    changed = list(layers)
    try:
        for layer in changed:
            layer.forward = partial(forward, rounded_weight(layer.weight.detach()), layer.bias)  # type: ignore
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def layers_of(model: Transducer, parts: dict[str, tuple[nn.Module, dict[str, Tensor]]]) -> list[Layer]:
    """Linear layers that the parts compute, with the names that they have in the model.

    Args:
        model: of the parts.
        parts: for each part its module and examples of its arguments; of those in ``QUANTIZED``.
    """
    names = {module: name for name, module in model.named_modules()}
    found = []
    for part in QUANTIZED:
        module, examples = parts[part]
        within = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        called: list[nn.Module] = []
        hooks = [layer.register_forward_pre_hook(lambda one, _, to=called: to.append(one)) for layer in within]
        with torch.inference_mode():
            module(*examples.values())
        for hook in hooks:
            hook.remove()
        found += [Layer(names[x], part, within[x], x.weight.numel()) for x in within if x in called]
    return found


class ModelDevelopment(Development):
    """In the model, with XNNPACK's rounding."""

    def __init__(self, loaded: Loaded, spec: Spec):
        super().__init__(loaded, spec)
        self._loaded, self._chunk = loaded, (spec.chunk_ms, spec.left_context_ms)
        scanned = self._hear(self.waveforms[: self.scanned])
        self._frames = np.concatenate([heard.encoder_out for heard in scanned])
        self._context = torch.cat([self._contexts(heard) for heard in scanned])

    def _hear(self, waveforms: Sequence[np.ndarray]) -> list[Heard]:
        return [heard for (heard,) in hear_streams(self._loaded, [[samples] for samples in waveforms], *self._chunk)]

    def _contexts(self, heard: Heard) -> Tensor:
        """Predictor output [T', J] that the search has at each frame of a recording."""
        predictor: Any = self._loaded.model.predictor
        state = predictor.init_state(1)
        emitted = dict(zip(heard.frames, heard.tokens, strict=True))
        rows = []
        for frame in range(len(heard.encoder_out)):
            rows.append(state.context)
            if frame in emitted:
                state = predictor.step(torch.tensor([emitted[frame]]), state)
        with torch.inference_mode():
            found: Tensor = Predictor(self._loaded.model)(torch.cat(rows))
        return found

    def _in_int8(self, layers: Sequence[Layer]) -> contextlib.AbstractContextManager[None]:
        return in_int8(self._loaded.model.get_submodule(layer.name) for layer in layers)  # type: ignore[misc]

    def hear(self, int8: Sequence[Layer]) -> list[list[int]]:
        with self._in_int8(int8):
            return [heard.tokens for heard in self._hear(self.waveforms)]

    def log_probs(self, int8: Sequence[Layer]) -> np.ndarray:
        with self._in_int8(int8), torch.inference_mode():
            frames = self._frames
            if any(layer.part == "encoder" for layer in int8):
                frames = np.concatenate([heard.encoder_out for heard in self._hear(self.waveforms[: self.scanned])])
            logits = JoinerLogits(self._loaded.model)(torch.from_numpy(frames), self._context)
        return logits.double().log_softmax(-1).numpy()
