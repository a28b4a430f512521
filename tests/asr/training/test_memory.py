"""Freed memory is kept where the C library can; activations are computed again where that is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from asr.config import load_experiment
from asr.models.transducer import build_model
from asr.training.benchmark import random_batch
from asr.training.memory import checkpoint_activations

# in a process of its own: the setting stays for good
CODE = """
import resource, torch
from asr.training.memory import keep_freed_memory
kept = keep_freed_memory()
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sorted(faults)[len(faults) // 2])
"""


def test_large_tensors_reuse_freed_pages() -> None:
    shown = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == str(platform.libc_ver()[0] == "glibc")
    if shown[0] == "True":
        assert int(shown[1]) < 1000  # of 16384 pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_keeps_a_fifteenth_and_the_same_gradients(dtype: torch.dtype) -> None:
    """With dropout, which must fall on the same elements; in the encoder's blocks, of 12 layers as in preset m."""
    settings = ["model.preset=xs", "model.encoder={num_layers: 12, dropout: 0.1}"]
    experiment = load_experiment(None, settings)
    batch = random_batch(40.0, 8.0, 3.0, 50, 80)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = build_model(experiment, 50).train()
        names = list(model.state_dict())
        if checkpointing:
            checkpoint_activations(model.encoder)
        assert list(model.state_dict()) == names
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> torch.Tensor:
            place = x.untyped_storage().data_ptr()
            if place not in weights:
                kept[place] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                hidden, lens = model.encode(batch.features, batch.feature_lens)
            result = model.transducer_loss(hidden, lens, batch.targets, batch.target_lens, experiment.loss)
        result.loss.backward()
        found.append((result.loss.detach(), [p.grad for p in model.parameters()], sum(kept.values())))
    (loss, gradients, everything), (again, others, little) = found
    assert torch.equal(loss, again)
    for left, right in zip(gradients, others, strict=True):
        assert torch.equal(left, right)
    assert little < everything / 15
