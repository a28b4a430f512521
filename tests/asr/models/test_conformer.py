"""The encoder's geometry: padding, batch and future never change a frame that should not see them."""

from __future__ import annotations

import pytest
import torch

from asr.models.encoders import Conformer, ConformerConfig
from asr.models.layers.masks import attention_mask
from asr.models.layers.rotary import apply_rotary, rotary_tables
from asr.models.layers.subsampling import subsampled_lens


def make(**kwargs: object) -> Conformer:
    torch.manual_seed(0)
    config = ConformerConfig(
        dim=32, num_layers=2, num_heads=4, ff_dim=64, conv_kernel=7, subsampling_channels=4, **kwargs
    )
    mean, scale = torch.randn(80), torch.rand(80) + 0.5
    return Conformer(config, 80, mean, scale).eval()


@pytest.mark.parametrize("frames", [7, 8, 10, 11, 63, 67, 131])
def test_length_formula_is_what_the_convolutions_do(frames: int) -> None:
    enc, lens = make()(torch.randn(1, frames, 80), torch.tensor([frames]))
    assert enc.shape[1] == lens.item() == (frames - 3) // 4


def test_chunk_of_4c_plus_3_frames_gives_c_encoder_frames() -> None:
    for chunk in (1, 4, 8, 16):
        assert subsampled_lens(torch.tensor([4 * chunk + 3])).item() == chunk


@pytest.mark.parametrize("chunk,left", [(0, -1), (4, -1), (4, 4), (8, 0)])
def test_nan_padding_and_batch_mates_do_not_matter(chunk: int, left: int) -> None:
    model = make()
    lens = torch.tensor([131, 63, 8, 91])
    features = torch.full((4, 131, 80), float("nan"))
    for row, length in enumerate(lens):
        features[row, :length] = torch.randn(int(length), 80)
    enc, enc_lens = model(features, lens, chunk, left)
    assert torch.isfinite(enc).all()
    for row, length in enumerate(lens):
        alone, _ = model(features[row : row + 1, :length], lens[row : row + 1], chunk, left)
        torch.testing.assert_close(enc[row, : enc_lens[row]], alone[0], atol=2e-5, rtol=0)


def test_nan_padding_leaves_gradients_finite_and_equal() -> None:
    model = make()
    lens = torch.tensor([63, 40])
    features = torch.randn(2, 63, 80)
    gradients = []
    for filler in (float("nan"), 0.0):
        features[1, 40:] = filler
        model.zero_grad()
        enc, enc_lens = model(features, lens, 4, 4)
        sum((enc[b, : enc_lens[b]] ** 2).sum() for b in range(2)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_chunk_mask_hides_the_future() -> None:
    """Changing features that only later chunks read must not change earlier chunks."""
    model, chunk = make(), 4
    features = torch.randn(1, 4 * 16 + 3, 80)
    lens = torch.tensor([features.shape[1]])
    before, _ = model(features, lens, chunk, -1)
    changed = features.clone()
    changed[:, 4 * 8 + 3 :] += 1.0  # the first two chunks read 4 * 8 + 3 frames
    after, _ = model(changed, lens, chunk, -1)
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=0)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-3


def test_left_context_hides_the_past() -> None:
    mask = attention_mask(torch.tensor([16]), 16, chunk_frames=4, left_frames=4)
    assert mask is not None
    allowed = mask[0, 0]
    assert allowed[9].nonzero().flatten().tolist() == list(range(4, 12))
    assert attention_mask(torch.tensor([16]), 16) is None


def test_rotary_scores_depend_on_relative_position_only() -> None:
    qk = torch.randn(1, 6, 2, 1, 8, dtype=torch.float64)
    scores = []
    for start in (0, 37):
        cos, sin = rotary_tables(start, 6, 8, torch.device("cpu"))
        q, k = apply_rotary(qk, cos, sin)[0, :, :, 0].unbind(1)
        scores.append(q @ k.T)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


def test_wrong_shapes_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, T, 80\]"):
        make()(torch.randn(1, 20, 40), torch.tensor([20]))
    with pytest.raises(ValueError, match="num_heads=5"):
        ConformerConfig(dim=32, num_heads=5)
