"""The parts of a transducer as graphs see them: plain tensors in, plain tensors out.

One file of a target holds one of these modules. They call the model's own ``step``, ``output`` and ``logits``, so that
a file computes what decoding computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.models.context import Milliseconds, context
from asr.models.encoders.conformer import BlockState, Conformer, ConformerState
from asr.models.joiner import Joiner
from asr.models.layers.subsampling import OVERLAP_FRAMES, SUBSAMPLING_FACTOR, subsampled_lens
from asr.models.predictors import StatelessState
from asr.models.transducer import Transducer


class Geometry(NamedTuple):
    """Sizes of a streaming encoder. Frames of a chunk C and of the left context L are encoder frames of 40 ms."""

    chunk_frames: int
    left_frames: int
    num_layers: int
    num_heads: int
    dim: int
    conv_kernel: int
    num_mel_bins: int
    joiner_dim: int

    @property
    def feature_frames(self) -> int:
        """Feature frames that a call reads: those of the chunk, and 3 of the next."""
        return SUBSAMPLING_FACTOR * self.chunk_frames + OVERLAP_FRAMES

    @property
    def shift_frames(self) -> int:
        """Feature frames from one call to the next."""
        return SUBSAMPLING_FACTOR * self.chunk_frames

    @property
    def clock_size(self) -> int:
        """Angles of a stream's clock."""
        return self.dim // self.num_heads // 2

    @property
    def row_size(self) -> int:
        """Numbers in a row of the packed caches: the keys of a block, or its values."""
        return self.left_frames * self.dim

    @property
    def conv_size(self) -> int:
        """Numbers in all caches of convolutions."""
        return self.num_layers * (self.conv_kernel - 1) * self.dim

    @property
    def num_rows(self) -> int:
        """Rows of a packed cache: one of each block, and those that the caches of convolutions fill, or the clock."""
        return self.num_layers + max(1, -(-self.conv_size // self.row_size))


def geometry(model: Transducer, chunk_frames: int, left_frames: int) -> Geometry:
    """Of a model that is exported for chunks of this many frames."""
    encoder = model.config.encoder
    return Geometry(
        chunk_frames,
        left_frames,
        encoder.num_layers,
        encoder.num_heads,
        encoder.dim,
        encoder.conv_kernel,
        model.config.num_mel_bins,
        model.config.joiner.dim,
    )


def write_geometry(sizes: Geometry, context_size: int, folder: Path) -> None:
    """Writes geometry.json, by which runners make the first state of a stream; chunk_frames is 0 for whole
    utterances."""
    text = json.dumps({**sizes._asdict(), "context_size": context_size}, indent=1)
    (folder / "geometry.json").write_text(text + "\n", encoding="utf-8")


class StreamingEncoder(nn.Module):
    """One chunk of each stream, with the joiner's projection of the encoder's output.

    Inputs are the features [N, 4 C + 3, F] and what a ``ConformerState`` holds, that of the blocks in one: keys and
    values [N, B, H, L, d] of B blocks, conv [N, B, K - 1, D], frames [N] int64, clock [N, d / 2]; results are
    encoder_out [N, C, J] and the same of the next state.
    """

    def __init__(self, model: Transducer):
        super().__init__()
        self.encoder: Conformer = model.encoder
        self.joiner_proj = model.joiner.encoder_proj

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, conv: Tensor, frames: Tensor, clock: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        caches = (cache.unbind(1) for cache in (keys, values, conv))
        blocks = tuple(BlockState(*own) for own in zip(*caches, strict=True))
        enc, state = self.encoder.step(x, ConformerState(blocks, frames, clock))
        return (self.joiner_proj(enc), *plain_state(state).values())  # type: ignore[return-value]


def plain_state(state: ConformerState) -> dict[str, Tensor]:
    """A state as files take it: by name, keys, values and conv of the blocks in one tensor each."""
    caches = {name: torch.stack([getattr(block, name) for block in state.blocks], dim=1) for name in BlockState._fields}
    return {**caches, "frames": state.frames, "clock": state.clock}


class PackedStreamingEncoder(nn.Module):
    """The same with its state packed into the two caches that sherpa-onnx keeps for model type "conformer".

    That runtime makes the first caches of zeros, of sizes that the metadata give, and hands each call's caches to the
    next; so they hold what we like. Both are [R, 1, N, L D], with one row of each of the B blocks and some more: a row
    is [N, H, L, d] as it stands, and nothing of it has to be moved. ``cached_attn`` holds the keys, and behind them the
    caches of all convolutions, one after another; ``cached_conv`` the values, and behind them the count of frames so
    far, at most L, and the clock. The runtime's own ``processed_lens`` starts at 0 again at an endpoint while the
    caches stay, so it cannot say how much of them is speech.
    """

    def __init__(self, model: Transducer, sizes: Geometry):
        super().__init__()
        self.encoder: Conformer = model.encoder
        self.joiner_proj = model.joiner.encoder_proj
        self.sizes = sizes

    def forward(
        self, x: Tensor, cached_attn: Tensor, cached_conv: Tensor, processed_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.sizes
        heads = sizes.num_heads, sizes.left_frames, sizes.dim // sizes.num_heads
        rows = [1] * sizes.num_layers + [sizes.num_rows - sizes.num_layers]
        attn, conv = cached_attn.split(rows), cached_conv.split(rows)
        keys, values = ([row.reshape(-1, *heads) for row in cache[:-1]] for cache in (attn, conv))
        convs, clocks = (cache[-1].permute(2, 1, 0, 3).flatten(1) for cache in (attn, conv))  # of each stream
        convs = convs[:, : sizes.conv_size].reshape(-1, sizes.num_layers, sizes.conv_kernel - 1, sizes.dim)
        blocks = tuple(BlockState(*own) for own in zip(keys, values, convs.unbind(1), strict=True))
        frames, clock = clocks[:, 0].long(), clocks[:, 1 : 1 + sizes.clock_size]
        enc, state = self.encoder.step(x, ConformerState(blocks, frames, clock))
        # an input that nothing reads would be dropped from the file, and the runtime would end the process
        out = self.joiner_proj(enc) + 0 * processed_lens.to(x.dtype)[:, None, None]
        convs = torch.cat([block.conv.flatten(1) for block in state.blocks], dim=1)
        clocks = torch.cat([state.frames.to(x.dtype)[:, None], state.clock], dim=1)
        return (
            out,
            self._packed([block.keys for block in state.blocks], convs),
            self._packed([block.values for block in state.blocks], clocks),
        )

    def _packed(self, blocks: list[Tensor], rest: Tensor) -> Tensor:
        """[R, 1, N, L D] of a cache of each block [N, H, L, d], and the rest [N, at most (R - B) L D] behind them."""
        row, more = self.sizes.row_size, self.sizes.num_rows - self.sizes.num_layers
        rest = F.pad(rest, (0, more * row - int(rest.shape[1]))).reshape(-1, more, row).transpose(0, 1)
        return torch.cat([*(block.reshape(1, 1, -1, row) for block in blocks), rest[:, None]])

    def first_state(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """cached_attn, cached_conv and processed_lens of streams that have not begun."""
        cache = torch.zeros(self.sizes.num_rows, 1, batch_size, self.sizes.row_size)
        return cache, cache.clone(), torch.zeros(batch_size, dtype=torch.int64)


class OfflineEncoder(nn.Module):
    """Whole utterances in full context: x [N, T, F] and x_lens [N] int64 to encoder_out [N, T', J] and its lengths."""

    def __init__(self, model: Transducer):
        super().__init__()
        self.encoder: Conformer = model.encoder
        self.joiner_proj = model.joiner.encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        # one encoder frame reads 7 feature frames: with so many more behind, a graph needs no case for short ones
        enc, _ = self.encoder(F.pad(x, (0, 0, 0, 7)), x_lens)
        return self.joiner_proj(enc), subsampled_lens(x_lens)


class Predictor(nn.Module):
    """y [N, context_size] int64, the last tokens, to decoder_out [N, J], projected for the joiner."""

    def __init__(self, model: Transducer):
        super().__init__()
        self.predictor: nn.Module = model.predictor
        self.joiner_proj = model.joiner.predictor_proj

    def forward(self, y: Tensor) -> Tensor:
        return self.joiner_proj(self.predictor.output(StatelessState(y)))  # type: ignore[operator]


class JoinerLogits(nn.Module):
    """encoder_out and decoder_out [N, J], both projected, to logit [N, V]."""

    def __init__(self, model: Transducer):
        super().__init__()
        self.joiner: Joiner = model.joiner

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        # of three axes: exporters make a product and a sum of that, whose weights can be int8, and one node of two axes
        return self.joiner.logits(encoder_out[:, None], decoder_out[:, None])[:, 0]


def streaming_encoder(
    model: Transducer, chunk_ms: Milliseconds, left_context_ms: Milliseconds, batch_size: int
) -> tuple[nn.Module, dict[str, Tensor], Geometry]:
    """The encoder of streams with plain state, examples of its arguments, and its sizes."""
    sizes = geometry(model, *context(chunk_ms, left_context_ms))
    state = model.encoder.init_state(batch_size, sizes.left_frames)
    features = torch.zeros(batch_size, sizes.feature_frames, sizes.num_mel_bins)
    return StreamingEncoder(model), {"x": features, **plain_state(state)}, sizes


def offline_encoder(model: Transducer) -> tuple[nn.Module, dict[str, Tensor]]:
    """The encoder of whole utterances, and examples of its arguments."""
    return OfflineEncoder(model), {"x": torch.zeros(2, 67, model.config.num_mel_bins), "x_lens": torch.tensor([67, 59])}


def search_parts(model: Transducer, batch_size: int) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Predictor, named "decoder" as in runtimes, and joiner, with examples of their arguments: each a tensor of its
    own, since exporters take one tensor twice for one input."""
    config = model.config
    tokens = torch.zeros(batch_size, config.predictor.context_size, dtype=torch.int64)
    states = {name: torch.zeros(batch_size, config.joiner.dim) for name in ("encoder_out", "decoder_out")}
    return {"decoder": (Predictor(model), {"y": tokens}), "joiner": (JoinerLogits(model), states)}
