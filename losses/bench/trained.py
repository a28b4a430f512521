"""The lattices of a trained model: enc, pred and weight of a case, trained as free parameters.

Adam from the case's own seeded tensors on the loss (method "fused", products in bfloat16, one thread, so that a run
repeats itself bit for bit on one machine), until it is below NATS_PER_TOKEN: 20 steps for M, 18 for L. Cells with an
occupancy over 1e-6:

        before    after    a single alignment, (T_i + U_i) of T_i * (U_i+1)
    M   39%       4.0%     3.0%
    L   30%       1.9%     1.5%

Transducers trained on speech have a few percent at 40 ms a frame, so this is as peaked, or more: what widens a real
lattice, tokens that could as well be emitted a few frames later and words that sound alike, is hardly there, since
every frame is a free parameter. Take these cases as the end that training goes to. At 0.3 nats a token there are 4.8%
and 2.0%, but the rounding of bfloat16 logits alone then moves a gradient by 1.1% of its largest entry, over the 1% that
the benchmark allows, whatever the method. The learning rate matters: at 0.01, 0.2 nats a token come with 22% of the
cells of M over 1e-6.

The trivial joiner of a trained model, for method "pruned": am is 0.5 * N(0, 1) plus SIMPLE at blank and at the tokens
that the best alignment of the trained joiner emits in that frame; lm stays 0.5 * N(0, 1).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from losses import log_probs, transducer_loss, viterbi_alignment
from losses.bench.cases import Case, make, tensors_path

NATS_PER_TOKEN = 1.0
RATE = 0.003
MOST_STEPS = 300
SIMPLE = 6.0


def train(case: Case) -> int:
    """Trains the tensors of the case in place; the number of steps. RuntimeError when they do not get there."""
    enc, pred, weight = sources = [x.requires_grad_() for x in (case.enc, case.pred, case.weight)]
    optimizer = torch.optim.Adam(sources, lr=RATE)
    for step in range(MOST_STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            arguments = enc, pred, weight, None, case.targets, case.enc_lens, case.target_lens
            loss = transducer_loss(*arguments, method="fused", reduction="mean-per-token").loss
        if loss.item() < NATS_PER_TOKEN:
            for x in sources:
                x.grad = None
                x.requires_grad_(False)
            return step
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"{case.name}: {loss.item():.2f} nats a token after {MOST_STEPS} steps, not {NATS_PER_TOKEN}")


@torch.no_grad()
def point(case: Case) -> None:
    """Makes am point at the best alignment of the trained joiner."""
    assert case.am is not None
    for b in range(case.enc.shape[0]):
        one = case.utterance(b)
        logits = torch.tanh(one.enc[:, :, None] + one.pred[:, None]) @ one.weight.T
        lens = one.enc_lens, one.target_lens
        frames = viterbi_alignment(*log_probs(logits, one.targets, *lens), *lens).frames[0]
        case.am[b, :, 0] += SIMPLE
        case.am[b, frames, one.targets[0]] += SIMPLE


def write(name: str, vocab_size: int | None, folder: Path) -> None:
    """Trains a case whose name ends in "-trained" (or "-trained-first") into the folder, unless it is there."""
    path = tensors_path(folder, name)
    if path.exists():
        return
    case = make(name.removesuffix("-first"), vocab_size=vocab_size, simple=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(case)
    torch.set_num_threads(threads)
    point(case)
    torch.save({field.name: getattr(case, field.name) for field in fields(case)}, path)
