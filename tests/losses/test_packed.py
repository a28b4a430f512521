"""Packing: which cells are computed, and what leaving out rare ones does to the gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losses import packed, transducer_loss
from losses.cells import OCCUPANCY_THRESHOLD
from losses.packed import reachable_cells
from losses.shapes import Lengths
from tests.losses.problems import cells_by_enumeration

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("topology", ["regular", "modified"])
def test_cells_are_those_that_an_alignment_passes(topology: str) -> None:
    lengths = Lengths([4, 2, 3, 1], [2, 2, 0, 1])
    cells = reachable_cells(lengths, 5, 4, topology)
    found = {(int(at) // 20, int(at) % 20 // 4, int(at) % 4) for at in cells.at}
    expected = {
        (b, t, u)
        for b, (frames, tokens) in enumerate(zip(*lengths, strict=True))
        for t, u in cells_by_enumeration(frames, tokens, topology)
    }
    assert found == expected
    assert cells.rows.tolist() == [b * 5 + t for b, t, u in sorted(expected)]
    assert cells.columns.tolist() == [b * 4 + u for b, t, u in sorted(expected)]


@pytest.mark.parametrize("topology", ["regular", "modified"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_bfloat16_gradients_without_rare_cells(topology: str, activation: str) -> None:
    """A sharp model, most of whose cells fall under the floor, against float64, which leaves none out."""
    torch.manual_seed(0)
    batch, frames, tokens, dim, vocab_size = 2, 30, 12, 16, 40
    enc, pred = torch.randn(batch, frames, dim), torch.randn(batch, tokens + 1, dim)
    weight, bias = torch.randn(vocab_size, dim), torch.randn(vocab_size)
    sources = [x.bfloat16() for x in (enc, pred, weight, bias)]
    targets = torch.randint(1, vocab_size, (batch, tokens))
    lens = torch.tensor([30, 25]), torch.tensor([12, 7])
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in sources]
        transducer_loss(*inputs, targets, *lens, activation=activation, topology=topology).loss.backward()
        gradients.append([x.grad.double() for x in inputs])
    assert OCCUPANCY_THRESHOLD[torch.float64] == 0
    for exact, found in zip(*gradients, strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_bfloat16_where_the_processor_has_no_instructions_for_it() -> None:
    script = """
import torch
from losses import transducer_loss
torch.manual_seed(0)
inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((1, 9, 8), (1, 4, 8), (5, 8))]
loss = transducer_loss(*inputs, None, torch.tensor([[1, 2, 3]]), torch.tensor([9]), torch.tensor([3])).loss
loss.backward()
assert all(x.grad.isfinite().all() for x in inputs)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=True, timeout=120)


def test_bfloat16_products_come_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = set()
    real = packed._linear
    monkeypatch.setattr(packed, "_linear", lambda x, *others: (rows.add(len(x)), real(x, *others))[1])
    for frames in range(20, 40):
        enc, pred, weight = (
            torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((2, frames, 8), (2, 11, 8), (5, 8))
        )
        lens = torch.tensor([frames, frames - 7]), torch.tensor([10, 4])
        transducer_loss(enc, pred, weight, None, torch.ones(2, 10, dtype=torch.int64), *lens).loss.backward()
    assert all(n % packed.BLOCK_ROWS == 0 for n in rows) and len(rows) <= 3
