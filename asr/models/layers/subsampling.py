"""Convolutional subsampling by 4 without padding."""

from __future__ import annotations

from torch import Tensor, nn

SUBSAMPLING_FACTOR = 4
OVERLAP_FRAMES = 3  # a chunk of C encoder frames needs 4C + 3 feature frames


def subsampled_lens(feature_lens: Tensor) -> Tensor:
    """Encoder frames T' = (T - 3) // 4 of T feature frames, at least 0; [B] in, [B] out."""
    return (feature_lens - OVERLAP_FRAMES).div(SUBSAMPLING_FACTOR, rounding_mode="floor").clamp(min=0)


def subsampled_bins(num_mel_bins: int) -> int:
    """Frequency bins left after two unpadded 3x3 convolutions of stride 2."""
    return ((num_mel_bins - 1) // 2 - 1) // 2


class ConvSubsampling(nn.Module):
    """Two unpadded 3x3 stride-2 convolutions, a linear projection and LayerNorm.

    The norm gives the frames unit variance: without it they enter the residual stream an order of magnitude smaller
    than what the first blocks add, and the model takes many times longer to hear anything.

    Nothing is padded, so that encoder frame t depends on feature frames 4t .. 4t + 6 only, and a chunk computed alone
    equals the same frames of the whole utterance.

    Args:
        num_mel_bins: F.
        channels: channels of the second convolution; the first, at four times the frames and bins, has half as many.
        dim: model dim D.
    """

    def __init__(self, num_mel_bins: int, channels: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels // 2, 3, stride=2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2)
        self.out = nn.Linear(channels * subsampled_bins(num_mel_bins), dim)
        self.norm = nn.LayerNorm(dim)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F] float, T >= 7, to [B, (T - 3) // 4, D]."""
        # strides of a channels-last image, which .contiguous() leaves out for one channel: both convolutions keep them
        x = features.unsqueeze(3).permute(0, 3, 1, 2)
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        # channels-last memory makes [B, T', F', C] a view; no copy before the projection
        return self.norm(self.out(x.permute(0, 2, 3, 1).flatten(2)))
