"""Conformer encoder (Gulati et al. 2020) in a geometry that streams without retraining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.models.layers.attention import Positions, attend
from asr.models.layers.depthwise import depthwise_conv
from asr.models.layers.dropout import Dropout
from asr.models.layers.masks import attention_mask, length_mask
from asr.models.layers.rotary import rotary_tables
from asr.models.layers.subsampling import ConvSubsampling, subsampled_lens


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
