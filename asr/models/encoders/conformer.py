"""Conformer encoder (Gulati et al. 2020) in a geometry that streams without retraining."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.models.encoders import conformer_kernel
from asr.models.layers.attention import Positions, attend, attend_window
from asr.models.layers.depthwise import depthwise_conv, depthwise_conv_after
from asr.models.layers.dropout import Dropout
from asr.models.layers.masks import attention_mask, length_mask
from asr.models.layers.rotary import rotary_rates, rotary_tables, rotate_step, whole_head_tables
from asr.models.layers.subsampling import ConvSubsampling, subsampled_lens

TURN = 2 * math.pi


@dataclass
class ConformerConfig:
    """Sizes of a Conformer encoder. A preset (``model.preset``) sets them all; what is given here wins.

    Args:
        dim: model dimension D.
        num_layers: Conformer blocks.
        num_heads: attention heads; divides dim, and dim / num_heads is even.
        ff_dim: inner size of each of the two feed-forward modules.
        conv_kernel: frames that the causal depthwise convolution sees.
        subsampling_channels: channels of the second stride-2 convolution, even; the first has half as many.
        dropout: probability, in every residual branch.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ff_dim: int = 512
    conv_kernel: int = 15
    subsampling_channels: int = 32
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(
                f"model.encoder.num_heads={self.num_heads} does not divide dim={self.dim} into heads of even size;"
                " choose num_heads so that dim / num_heads is an even whole number"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.encoder.dropout={self.dropout} is outside [0, 1)")


class BlockState(NamedTuple):
    """What a block remembers of B streams: the latest frames, oldest first, and zeros before the first of a stream.

    keys: [B, H, L, d] of H heads and L frames of left context, rotated by the stream's clock.
    values: [B, H, L, d].
    conv: [B, K - 1, D], inputs of the convolution of K frames.
    """

    keys: Tensor
    values: Tensor
    conv: Tensor


class ConformerState(NamedTuple):
    """What a batch of streams remembers; a stream is a row of each tensor, so rows may be taken, moved and put back.

    Each block has tensors of its own, which a step replaces one by one: all in one would be copied once more in each.

    blocks: of each block, first to last.
    frames: [B] int64, encoder frames so far, at most L.
    clock: [B, d / 2] float32, angles in [0, 2 pi) by which the next frame is rotated. Only differences enter a score,
        and whole turns do not, so that angles stay small and exact however long a stream is.
    """

    blocks: tuple[BlockState, ...]
    frames: Tensor
    clock: Tensor


class Window:
    """The chunk of a step and the cached frames before it, as all blocks see them.

    Args:
        chunk_frames: C.
        lens: [B] int64, frames of the chunk that are there, or None for all of them.
        bias: [B, 1, 1, L + C], added to the scores of the cached frames and the chunk.
        angle: [B, C, d / 2], by which the chunk's frames are rotated.
    """

    def __init__(self, chunk_frames: int, lens: Tensor | None, bias: Tensor, angle: Tensor):
        self.chunk_frames, self.lens, self.bias = chunk_frames, lens, bias
        self.cos, self.sin = (table[:, :, None] for table in whole_head_tables(angle.cos(), angle.sin()))

    def latest(self, x: Tensor) -> Tensor:
        """Of a cache with the chunk behind it [B, ..., L + C, d]: the L frames up to the chunk's last that is there."""
        if self.lens is None:
            return x[..., self.chunk_frames :, :]
        kept = torch.arange(x.shape[-2] - self.chunk_frames, device=x.device) + self.lens[:, None]
        kept = kept.view(kept.shape[0], *[1] * (x.dim() - 3), -1, 1)
        return x.gather(-2, kept.expand(*x.shape[:-2], -1, x.shape[-1]))


class FeedForward(nn.Module):
    """LayerNorm, linear, SiLU, linear; [B, T, D] in and out."""

    def __init__(self, dim: int, inner: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.up(self.norm(x)))))


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary relative positions; [B, T, D] in and out."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        return self.dropout(self.out(attend(qkv, positions)))

    def step(self, x: Tensor, window: Window, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk [B, C, D] after cached keys and values [B, H, L, d]; the result, and the caches after it."""
        shape = -1, window.chunk_frames, 3, self.num_heads, self.out.in_features // self.num_heads
        qkv = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        q, k = rotate_step(qkv[:2], window.cos, window.sin).unbind(0)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, qkv[2]], dim=2)
        return self.out(attend_window(q, keys, values, window.bias)), window.latest(keys), window.latest(values)


class ConvModule(nn.Module):
    """Gated pointwise, causal depthwise convolution, LayerNorm, SiLU, pointwise; [B, T, D] in and out.

    Causal, and normalised over channels only, so that neither padding nor batch nor future changes a frame.
    """

    def __init__(self, dim: int, kernel: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel), groups=dim)
        self.conv_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.gated(self.norm(x)), dim=-1)
        x = depthwise_conv(x, self.depthwise.weight, self.depthwise.bias)
        return self.dropout(self.out(F.silu(self.conv_norm(x))))

    def step(self, x: Tensor, window: Window, before: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk [B, C, D] after the cached K - 1 inputs of the convolution; the result, and the cache after it."""
        x = torch.cat([before, F.glu(self.gated(self.norm(x)), dim=-1)], dim=1)
        y = depthwise_conv_after(x, self.depthwise.weight, self.depthwise.bias)
        return self.out(F.silu(self.conv_norm(y))), window.latest(x)


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward (Gulati et al. 2020, eq. 1), all pre-norm.

    The paper's LayerNorm at the end of each block is left out, at the encoder's end too: an untrained model first
    learns what all frames have in common (mostly blank), and a norm of the output then keeps the little in which
    they differ little for thousands of steps. The branches start small for the same reason (Xiong et al. 2020).
    """

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.ff1 = FeedForward(config.dim, config.ff_dim, config.dropout)
        self.attention = SelfAttention(config.dim, config.num_heads, config.dropout)
        self.conv = ConvModule(config.dim, config.conv_kernel, config.dropout)
        self.ff2 = FeedForward(config.dim, config.ff_dim, config.dropout)
        with torch.no_grad():
            for last in (self.ff1.down, self.attention.out, self.conv.out, self.ff2.down):
                last.weight.mul_((4 * config.num_layers) ** -0.5)
                last.bias.zero_()

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        x = torch.add(x, self.ff1(x), alpha=0.5)
        x = x + self.attention(x, positions)
        x = x + self.conv(x)
        return torch.add(x, self.ff2(x), alpha=0.5)

    def step(self, x: Tensor, window: Window, state: BlockState) -> tuple[Tensor, BlockState]:
        """A chunk [B, C, D] after what the state holds: ``forward`` without dropout, and the new state."""
        x = torch.add(x, self.ff1(x), alpha=0.5)
        y, keys, values = self.attention.step(x, window, state.keys, state.values)
        x = x + y
        y, conv = self.conv.step(x, window, state.conv)
        x = x + y
        return torch.add(x, self.ff2(x), alpha=0.5), BlockState(keys, values, conv)


class Conformer(nn.Module):
    """Features to encoder frames of 40 ms.

    The feature mean and scale are buffers, fixed before training: no utterance-level normalisation, so that a stream
    and a file see the same numbers.

    Args:
        config: sizes.
        num_mel_bins: F.
        feature_mean: float [F], or None for zeros.
        feature_scale: float [F], multiplied after the mean is subtracted, or None for ones.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        config: ConformerConfig,
        num_mel_bins: int,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
    ):
        super().__init__()
        self.config = config
        self.dim = config.dim
        mean = torch.zeros(num_mel_bins) if feature_mean is None else feature_mean.float().clone()
        scale = torch.ones(num_mel_bins) if feature_scale is None else feature_scale.float().clone()
        self.register_buffer("feature_mean", mean)
        self.register_buffer("feature_scale", scale)
        self.subsampling = ConvSubsampling(num_mel_bins, config.subsampling_channels, config.dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_layers))

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_frames: int = 0,
        left_context_frames: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances, under the chunk mask if one is asked for.

        Args:
            features: [B, T, F] float; what lies behind an utterance's length is never read (NaN there is harmless).
            feature_lens: [B] int64, feature frames of 10 ms.
            chunk_frames: encoder frames in a chunk, all of which see each other; 0 is full context.
            left_context_frames: encoder frames before the chunk that its frames see; -1 is all.

        Returns:
            enc: [B, T', D] with T' = (T - 3) // 4, finite behind each length too.
            enc_lens: [B] int64.
        """
        if features.dim() != 3 or features.shape[-1] != self.feature_mean.numel():
            raise ValueError(
                f"features has shape {tuple(features.shape)}; expected [B, T, {self.feature_mean.numel()}]"
            )
        if features.shape[1] < 7:  # one encoder frame sees 7 feature frames
            features = F.pad(features, (0, 0, 0, 7 - features.shape[1]))
        inside = length_mask(feature_lens, features.shape[1])[..., None]
        x = (features - self.feature_mean) * self.feature_scale
        x = self.dropout(self.subsampling(x.masked_fill(~inside, 0.0)))
        enc_lens = subsampled_lens(feature_lens)
        # an utterance too short for one frame still needs one key, or its softmax would be over nothing
        mask = attention_mask(enc_lens.clamp(min=1), x.shape[1], chunk_frames, left_context_frames)
        positions = Positions(mask, *rotary_tables(0, x.shape[1], self.dim // self.config.num_heads, x.device))
        for block in self.blocks:
            x = block(x, positions)
        return x, enc_lens

    def init_state(self, batch_size: int, left_context_frames: int) -> ConformerState:
        """The state of streams that have not begun.

        Args:
            batch_size: B.
            left_context_frames: encoder frames before a chunk that it sees, 0 or more; the state holds as many.
        """
        if left_context_frames < 0:
            raise ValueError(f"left_context_frames={left_context_frames}; a stream remembers a number of 0 or more")
        config, like = self.config, self.feature_mean
        frames = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        clock = like.new_zeros(batch_size, self.dim // config.num_heads // 2)
        heads = config.num_heads, left_context_frames, config.dim // config.num_heads
        shapes = heads, heads, (config.conv_kernel - 1, config.dim)
        blocks = tuple(BlockState(*(like.new_zeros(batch_size, *shape) for shape in shapes)) for _ in self.blocks)
        return ConformerState(blocks, frames, clock)

    def restart(self, state: ConformerState, row: int) -> None:
        """Makes a row of a state a stream that has not begun, in place.

        Cached keys and values stay: nobody sees those of before ``frames``.
        """
        state.frames[row] = 0
        state.clock[row] = 0
        for block in state.blocks:
            block.conv[row] = 0

    def step(
        self,
        features: Tensor,
        state: ConformerState,
        enc_lens: Tensor | None = None,
        *,
        threads: int | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, ConformerState]:
        """Encodes the next chunk of each stream.

        One chunk after another gives what ``forward`` gives under the mask of these chunks and this left context.
        Streams begin when they like: rows of a state of ``init_state`` may replace any others.

        Args:
            features: [B, 4 C + 3, F] float, of which the last 3 frames are the first of the next chunk.
            state: of B streams.
            enc_lens: [B] int64, encoder frames that are there, 0 to C, for streams that end within the chunk or have
                nothing to say (0 leaves a stream as it was); of these, features are there up to frame 4 n + 3, and
                what stands behind is not heard. None is C for all.
            threads: on CPU, how many share out the streams; None is as many as torch has.
            in_place: whether the tensors of ``state`` may be written over, which saves time; it is of no use then.

        Returns:
            enc: [B, C, D], finite behind ``enc_lens`` too.
            state: of the streams after the chunk.
        """
        batch_size, num_frames, num_bins = features.shape
        if num_bins != self.feature_mean.numel() or num_frames < 7 or num_frames % 4 != 3:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; expected [B, 4 C + 3, {self.feature_mean.numel()}]"
            )
        frames, clock = state.frames, state.clock
        if frames.shape[0] != batch_size:
            raise ValueError(f"features are of {batch_size} streams, the state of {frames.shape[0]}")
        # numbers, also in a graph that is recorded
        left, chunk = int(state.blocks[0].keys.shape[2]), int(num_frames) // 4
        lens = None if enc_lens is None else enc_lens.to(frames)
        x = (features - self.feature_mean) * self.feature_scale
        if lens is not None:
            there = torch.where(lens > 0, 4 * lens + 3, 0)
            x = x.masked_fill(~length_mask(there, num_frames)[..., None], 0.0)
        x = self.subsampling(x)
        rates = rotary_rates(self.dim // self.config.num_heads, x.device)
        angle = clock[:, None] + torch.arange(chunk, device=x.device)[:, None] * rates
        clock = clock + (chunk if lens is None else lens[:, None]) * rates
        heard = (frames + (chunk if lens is None else lens)).clamp(max=left)
        clock = clock - TURN * (clock / TURN).floor()
        weights = conformer_kernel.weights_for(x, self.blocks)
        if weights is not None:
            threads = threads or torch.get_num_threads()
            x, caches = conformer_kernel.step_blocks(x, weights, state.blocks, lens, frames, angle, threads, in_place)
            return x, ConformerState(tuple(BlockState(*own) for own in caches), heard, clock)
        frame = torch.arange(left + chunk, device=x.device)
        allowed = frame >= left - frames[:, None]
        if lens is not None:
            # who has nothing to say still needs one key, or its softmax would be over nothing
            allowed &= frame < left + lens.clamp(min=1)[:, None]
        # as numbers to add: attention would turn it into them in each block
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, -torch.inf)
        window = Window(chunk, lens, bias[:, None, None], angle)
        after = []
        for block, own in zip(self.blocks, state.blocks, strict=True):
            x, kept = block.step(x, window, own)  # type: ignore[operator]
            after.append(kept)
        return x, ConformerState(tuple(after), heard, clock)
