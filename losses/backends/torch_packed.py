"""Normaliser, gather and gradient of packed logits [N, V] in torch operations, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from losses.backends import GRADIENT_FLOOR

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Bytes of logits: few large operations, since each of them costs a launch.
TILE, GROUP, CACHE, CACHE_OF_ONE, CHUNK = 2**26, 2**27, 2**27, 2**28, 2**27
LEAST_TILE = {2: 128, 4: 128, 8: 128}


def parallel() -> nullcontext[int]:
    """Torch shares out the work of each operation by itself."""
    return nullcontext(1)


def start(tasks: Sequence[Callable[[], None]], threads: int) -> Callable[[], None]:
    """Call each of the tasks; there is nothing to wait for."""
    for task in tasks:
        task()
    return lambda: None


def shares(size: int, threads: int, most: int) -> list[slice]:
    """See losses/backends/__init__.py."""
    return [slice(i, min(i + most, size)) for i in range(0, size, most)]


def hidden(enc: Tensor, pred: Tensor, rows: Tensor, columns: Tensor, activation: str, out: Tensor) -> None:
    """See losses/backends/__init__.py."""
    total = enc.index_select(0, rows) + pred.index_select(0, columns)
    out.copy_(total.tanh_() if activation == "tanh" else total.relu_())


def width(vocab_size: int, dtype: torch.dtype) -> int:
    """See losses/backends/__init__.py."""
    return vocab_size


def readable(x: Tensor) -> Tensor:
    """See losses/backends/__init__.py."""
    return x


def estimates(dtype: torch.dtype) -> torch.dtype | None:
    """See losses/backends/__init__.py."""
    return None


def scores(
    enc: Tensor,
    pred: Tensor,
    rows: Tensor,
    columns: Tensor,
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    blank: int,
    out: Tensor,
    logits: tuple[Tensor, Tensor],
) -> None:
    """See losses/backends/__init__.py."""
    total = enc.index_select(0, rows).float() + pred.index_select(0, columns).float()
    states = total.tanh_() if activation == "tanh" else total.relu_()
    out.copy_(states)
    waiting, taken = labels >= 0, labels.clamp(min=0)
    of_blank, of_label = logits
    torch.mv(states, weight[blank].float(), out=of_blank)
    torch.sum(states.mul_(weight.index_select(0, taken)), dim=1, out=of_label)
    if bias is not None:
        of_blank += bias[blank]
        of_label += bias.index_select(0, taken)
    of_label.masked_fill_(~waiting, 0.0)


def pack(weight: Tensor, rows: int) -> Tensor:
    """See losses/backends/__init__.py."""
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """See losses/backends/__init__.py."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def gather(logits: Tensor, labels: Tensor, blank: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """See losses/backends/__init__.py."""
    blank_lp, label_lp, normalizer = out
    cells = logits.to(normalizer.dtype)
    torch.logsumexp(cells, dim=1, out=normalizer)
    torch.sub(cells[:, blank], normalizer, out=blank_lp)
    of_label = cells.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) - normalizer
    label_lp.copy_(of_label.masked_fill_(labels < 0, 0.0))


def normalize(logits: Tensor, vocab_size: int, labels: Tensor, blank: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """See losses/backends/__init__.py."""
    blank_lp, label_lp, normalizer = out
    own = logits[:, :vocab_size]
    own[:, blank] = -torch.inf
    waiting = labels >= 0
    at = labels.masked_fill(~waiting, blank)[:, None]  # blank's column once more where no label is left
    own.scatter_(1, at, -torch.inf)
    of_label = label_lp.masked_fill(~waiting, -torch.inf)
    parts = torch.stack([torch.logsumexp(own.to(normalizer.dtype), dim=1), blank_lp, of_label])
    torch.logsumexp(parts, dim=0, out=normalizer)
    blank_lp -= normalizer
    label_lp.copy_((of_label - normalizer).masked_fill_(~waiting, 0.0))


def gradient(
    logits: Tensor,
    vocab_size: int,
    at: Tensor,
    labels: Tensor,
    blank: int,
    normalizer: Tensor,
    blank_lp: Tensor,
    label_lp: Tensor,
    blank_occ: Tensor,
    label_occ: Tensor,
    scale: Tensor,
    clamp: float,
    out: Tensor,
) -> Tensor:
    """See losses/backends/__init__.py."""
    inner = scale if clamp <= 0 else torch.ones_like(scale)
    blanks, labelled = blank_occ * inner, label_occ * inner
    taken = blanks + labelled
    work = logits[:, :vocab_size].index_select(0, at).to(normalizer.dtype)
    work.sub_(normalizer[:, None]).exp_().mul_(taken[:, None])
    floor = GRADIENT_FLOOR[normalizer.dtype] * inner.abs()[:, None]
    work.masked_fill_(work.abs() <= floor, 0.0)
    waiting = labels >= 0
    at_label = labels.masked_fill(~waiting, blank)[:, None]  # where no label is left, blank follows and is right
    work.scatter_(1, at_label, (label_lp.exp() * taken - labelled)[:, None])
    work[:, blank] = blank_lp.exp() * taken - blanks
    if clamp > 0:
        work.clamp_(-clamp, clamp).mul_(scale[:, None])
    out[:, :vocab_size] = work
    out[:, vocab_size:] = 0
    return work.sum(0)


def add(
    gradient: Tensor,
    hidden: Tensor,
    first: int,
    rows: Tensor,
    columns: Tensor,
    activation: str,
    enc_gradient: Tensor,
    pred_gradient: Tensor,
) -> None:
    """See losses/backends/__init__.py."""
    part = slice(first, first + gradient.shape[1])
    h = hidden[:, part].to(enc_gradient.dtype)
    g = gradient.to(enc_gradient.dtype)
    g = g * (1 - h * h) if activation == "tanh" else g * (h > 0)
    enc_gradient[:, part].index_add_(0, rows, g)
    pred_gradient[:, part].index_add_(0, columns, g)
