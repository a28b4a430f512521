"""Layers that train on CPU by a path of their own give what torch's own operations give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from asr.models.layers.attention import Positions, attend
from asr.models.layers.depthwise import depthwise_conv
from asr.models.layers.dropout import Dropout
from asr.models.layers.masks import attention_mask
from asr.models.layers.rotary import rotary_tables
from asr.models.layers.subsampling import ConvSubsampling

TOLERANCES = {torch.float64: 1e-7, torch.float32: 5e-6, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lens,chunk", [([37, 37, 37], 0), ([37, 20, 1], 0), ([37, 20, 1], 4)])
def test_training_attention_equals_fused_attention(dtype: torch.dtype, lens: list[int], chunk: int) -> None:
    torch.manual_seed(0)
    mask = attention_mask(torch.tensor(lens), 37, chunk, 8)
    tables = rotary_tables(0, 37, 16, torch.device("cpu"))
    qkv = torch.randn(3, 37, 3, 4, 16, dtype=dtype)
    with torch.no_grad():
        expected = attend(qkv, Positions(mask, *tables))
    found = attend(qkv.requires_grad_(), Positions(mask, *tables))
    torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=0)


def test_gradient_of_training_attention() -> None:
    mask = attention_mask(torch.tensor([5, 3]), 5, 2, 2)
    tables = rotary_tables(0, 5, 4, torch.device("cpu"))
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, Positions(mask, *tables)), (qkv,))


@pytest.mark.parametrize("kernel,frames", [(3, 6), (5, 2), (1, 3)])
def test_gradient_of_depthwise_convolution(kernel: int, frames: int) -> None:
    shapes = ((2, frames, 4), (4, 1, 1, kernel), (4,))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(depthwise_conv, inputs)


def test_depthwise_convolution_sees_the_past_only() -> None:
    x, weight, bias = torch.randn(2, 9, 4), torch.randn(4, 1, 1, 3), torch.randn(4)
    expected = F.conv1d(F.pad(x.mT, (2, 0)), weight[:, :, 0], bias, groups=4).mT
    for source in (x, x.clone().requires_grad_()):
        torch.testing.assert_close(depthwise_conv(source, weight, bias), expected)


def test_subsampling_runs_channels_last() -> None:
    """Both convolutions see channels-last strides; the flattened channels are then a view."""
    module, seen = ConvSubsampling(80, 8, 16), []
    for conv in (module.conv1, module.conv2):
        conv.register_forward_hook(lambda _m, _i, out: seen.append(out.stride(1)))
    module(torch.randn(2, 23, 80))
    assert seen == [1, 1]


def test_positions_serve_layers_of_several_dtypes() -> None:
    mask = attention_mask(torch.tensor([9, 4]), 9, 0, 0)
    positions = Positions(mask, *rotary_tables(0, 9, 4, torch.device("cpu")))
    for dtype in (*TOLERANCES, torch.float32):
        qkv = torch.randn(2, 9, 3, 2, 4, dtype=dtype)
        with torch.no_grad():
            expected = attend(qkv, positions)
        found = attend(qkv.requires_grad_(), positions)
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("p,dropped", [(0.001, 1), (0.1, 26), (0.5, 128), (0.9999, 255)])
def test_dropout_keeps_the_mean_at_any_probability(p: float, dropped: int) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1_000_000, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 256 / (256 - dropped)}
    deviation = (dropped / (256 - dropped) / y.numel()) ** 0.5
    assert abs(y.mean().item() - 1) < 5 * deviation


def test_dropout_of_nothing() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    Dropout(0.1)(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 3)
