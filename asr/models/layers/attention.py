"""Self-attention with rotary positions, in two ways: torch's fused kernel, and one for training on CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from asr.models.layers.rotary import apply_rotary, whole_head_tables

# Not cuDNN's, torch's first choice on Hopper GPUs: with a mask, its backward pass gives NaN where all scores of a query
# are far below 0 and T % 128 is 64 (pytorch/pytorch issue 196678; two of 1963 steps of preset m on fsdd on an H100).
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Positions:
    """What all layers of one forward pass share.

    Args:
        mask: bool [B, 1, T, T], True where attention is allowed, or None.
        cos, sin: float32 [T, d / 2], angles of the frames.
    """

    def __init__(self, mask: Tensor | None, cos: Tensor, sin: Tensor):
        self.mask, self.cos, self.sin = mask, cos, sin
        # by dtype: under autocast, layers may differ in it
        self._bias: dict[tuple[int, torch.dtype], Tensor] = {}
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def bias(self, num_heads: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, [B * H, T or 1, T]: 0 where attention is allowed, else -inf."""
        if self.mask is None:
            return None
        if (num_heads, dtype) not in self._bias:
            # lengths alone are a mask of all queries alike: B H T numbers, which stay for checkpointed layers
            allowed = (
                (self.mask if self.mask.stride(2) else self.mask[:, :, :1]).expand(-1, num_heads, -1, -1).flatten(0, 1)
            )
            zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            self._bias[num_heads, dtype] = zeros.masked_fill_(~allowed, -torch.inf)
        return self._bias[num_heads, dtype]

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of whole heads, [2, 1, T, d], for queries and keys; those of queries scale the scores too."""
        if dtype not in self._tables:
            cos, sin = whole_head_tables(self.cos, self.sin)
            self._tables[dtype] = cos[:, None].to(dtype), sin[:, None].to(dtype)
        return self._tables[dtype]


def attend_window(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of a chunk's queries over a window that ends with the chunk.

    Args:
        queries: [B, H, C, d] of the chunk, rotated and scaled (``whole_head_tables``).
        keys, values: [B, H, W, d] of the window, W >= C, the keys rotated by the same clock.
        bias: [B, 1, 1, W], added to the scores.

    Returns:
        [B, C, H * d].
    """
    # by plain products: a few queries are no work for a blockwise kernel, and exporters spell one out with copies of
    # all keys
    weights = torch.softmax(queries @ keys.transpose(2, 3) + bias, dim=-1)
    heads, chunk, head_dim = (int(queries.shape[dim]) for dim in (1, 2, 3))  # numbers, also in a graph that is recorded
    return (weights @ values).transpose(1, 2).reshape(-1, chunk, heads * head_dim)


def attend(qkv: Tensor, positions: Positions) -> Tensor:
    """Multi-head attention of projected queries, keys and values [B, T, 3, H, d]; to [B, T, H * d]."""
    if qkv.device.type == "cpu" and qkv.requires_grad:
        bias = positions.bias(qkv.shape[3], qkv.dtype)
        return _TrainingAttention.apply(qkv, bias, *positions.tables(qkv.dtype))  # type: ignore[no-any-return]
    q, k = apply_rotary(qkv[:, :, :2], positions.cos, positions.sin).permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(_KERNELS) if qkv.is_cuda else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2), attn_mask=positions.mask)
    return y.transpose(1, 2).flatten(2)


class _TrainingAttention(torch.autograd.Function):
    """softmax(q k' + bias) v of rotated q and k; keeps the probabilities, B H T T numbers, for the backward pass.

    For the few hundred frames of an utterance, products of whole matrices are several times faster on CPU than the
    blockwise kernel behind scaled_dot_product_attention, above all backwards. Copies between [B, T, H, d] and
    [B, H, T, d] go one projection at a time: those of all three at once are many times slower.

    Gradients of gradients are not available: what the backward pass gives counts as a constant when it is
    differentiated in turn. ``backward()`` through it mostly raises a RuntimeError, but not where the incoming gradient
    is itself a constant (of a plain sum); ``torch.autograd.grad`` to chosen inputs may leave the term out silently.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """qkv [B, T, 3, H, d], bias [B * H, T or 1, T] or None, cos and sin [2, 1, T, d], all of one dtype."""
        batch, frames, _, heads, head_dim = qkv.shape
        unrotated = qkv.new_empty(2, batch * heads, frames, head_dim)
        for i in range(2):
            unrotated[i].view(batch, heads, frames, head_dim).copy_(qkv[:, :, i].transpose(1, 2))
        q, k = _rotate(unrotated, cos, sin)
        v = qkv[:, :, 2].transpose(1, 2).flatten(0, 1)
        scores = torch.bmm(q, k.mT) if bias is None else torch.baddbmm(bias, q, k.mT)
        # torch's bfloat16 softmax takes up to twice as long for rows that are no multiple of its vectors
        exact = torch.float32 if scores.dtype == torch.bfloat16 else scores.dtype
        weights = torch.softmax(scores, -1, dtype=exact).to(scores.dtype)
        ctx.save_for_backward(q, k, v, weights, cos, sin)
        ctx.shape = qkv.shape
        out = torch.bmm(weights, v).view(batch, heads, frames, head_dim)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, weights, cos, sin = ctx.saved_tensors
        batch, frames, _, heads, head_dim = ctx.shape
        grad = grad.view(batch, frames, heads, head_dim).transpose(1, 2).flatten(0, 1)
        d_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        d_qk = q.new_empty(2, *q.shape)
        torch.bmm(d_scores, k, out=d_qk[0])
        torch.bmm(d_scores.mT, q, out=d_qk[1])
        d_q, d_k = _rotate(d_qk, cos, -sin)
        d_qkv = grad.new_empty(ctx.shape)
        for i, part in enumerate((d_q, d_k, torch.bmm(weights.mT, grad))):
            d_qkv[:, :, i] = part.view(batch, heads, frames, head_dim).transpose(1, 2)
        return d_qkv, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [2, N, T, d] times cos, plus x with its halves of d swapped times sin, both [2, 1, T, d]."""
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).add_(x * cos)
