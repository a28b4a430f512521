"""One chunk after another gives what the encoder gives of the whole utterance under the mask of these chunks."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from asr.models.encoders import conformer_kernel
from asr.models.encoders.conformer import Conformer, ConformerState
from tests.asr.models.test_conformer import make

FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def model() -> Conformer:
    return make()


@torch.no_grad()
def whole(model: Conformer, features: Tensor, chunk: int, left: int) -> Tensor:
    """[T', D] of one utterance [T, F]."""
    enc, lens = model(features[None], torch.tensor([len(features)]), chunk, left)
    return enc[0, : int(lens[0])]


def moved(state: ConformerState) -> ConformerState:
    """As another process reads it."""
    file = io.BytesIO()
    tensors, form = tree_flatten(state)
    torch.save(tensors, file)
    file.seek(0)
    return tree_unflatten(torch.load(file, weights_only=True), form)  # type: ignore[no-any-return]


@torch.no_grad()
def streamed(
    model: Conformer,
    utterances: list[Tensor],
    starts: list[int],
    chunk: int,
    left: int,
    rows: int,
    *,
    compiled: bool = True,
    in_place: bool = False,
    threads: int = 1,
) -> list[Tensor]:
    """Each utterance from the step on at which it starts, or once a row is free; garbage where nothing is to hear."""
    state, fresh = model.init_state(rows, left), model.init_state(1, left)
    waiting = sorted(range(len(utterances)), key=lambda i: starts[i])
    at: dict[int, tuple[int, int]] = {}  # by row: utterance, encoder frames heard
    outputs: list[list[Tensor]] = [[] for _ in utterances]
    step = 0
    while waiting or at:
        for row in range(rows):
            if row not in at and waiting and starts[waiting[0]] <= step:
                at[row] = (waiting.pop(0), 0)
                if waiting and len(waiting) % 2:
                    model.restart(state, row)
                    continue
                for old, new in zip(tree_leaves(state), tree_leaves(fresh), strict=True):
                    old[row : row + 1] = new
        features = torch.full((rows, 4 * chunk + 3, 80), float("nan"))
        counts = [0] * rows
        for row, (i, heard) in at.items():
            counts[row] = min(chunk, (len(utterances[i]) - 3) // 4 - heard)
            part = utterances[i][4 * heard : 4 * (heard + counts[row]) + 3]
            features[row, : len(part)] = part
        lens = torch.tensor(counts)
        before = moved(state) if step % 3 == 2 else state
        was = moved(before) if in_place else before
        missing = None if min(counts) == chunk else lens
        with torch.set_grad_enabled(not compiled):  # compiled loops have no gradients
            enc, state = model.step(features, before, missing, threads=threads, in_place=in_place)
        enc, state = enc.detach(), tree_map(Tensor.detach, state)
        assert torch.isfinite(enc).all()
        for row in range(rows):
            if counts[row] == 0:
                pairs = zip(tree_leaves(was), tree_leaves(state), strict=True)
                assert all(torch.equal(old[row], new[row]) for old, new in pairs)
        for row, (i, heard) in list(at.items()):
            outputs[i].append(enc[row, : counts[row]])
            at[row] = (i, heard + counts[row])
            if heard + counts[row] == (len(utterances[i]) - 3) // 4:
                del at[row]
        step += 1
    return [torch.cat(parts) for parts in outputs]


@given(
    chunk=st.integers(1, 20),
    left=st.integers(0, 50),
    rows=st.integers(1, 4),
    utterances=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 6)), min_size=1, max_size=6),
    seed=st.integers(0, 9),
    compiled=st.booleans(),
    in_place=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_chunks_equal_the_whole(
    chunk: int,
    left: int,
    rows: int,
    utterances: list[tuple[int, int]],
    seed: int,
    compiled: bool,
    in_place: bool,
    threads: int,
) -> None:
    model = make()
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(4 * frames + 3, 80, generator=generator) * 2 for frames, _ in utterances]
    starts = [start for _, start in utterances]
    ways = {"compiled": compiled, "in_place": in_place, "threads": threads}
    found = streamed(model, features, starts, chunk, left, rows, **ways)  # type: ignore[arg-type]
    for one, out in zip(features, found, strict=True):
        assert (out - whole(model, one, chunk, left)).abs().max() < FLOAT32


def test_a_long_stream_stays_exact_and_takes_no_more_memory(model: Conformer) -> None:
    """Positions are those of the window, so that an hour is as exact as a second."""
    chunk, left, repeats = 8, 16, 1500  # 8 minutes
    sound = torch.randn(4 * chunk * 10, 80)
    state = model.init_state(1, left)
    sizes = [tensor.shape for tensor in tree_leaves(state)]
    outputs = []
    with torch.no_grad():
        features = torch.cat([sound, sound[:3]])
        for repeat in range(repeats):
            at = 4 * chunk * (repeat % 10)
            enc, state = model.step(features[None, at : at + 4 * chunk + 3], state)
            if repeat in (10 * 3 + 9, repeats - 1):
                outputs.append(enc)
    assert [tensor.shape for tensor in tree_leaves(state)] == sizes
    assert (outputs[0] - outputs[1]).abs().max() < FLOAT32


def test_what_is_no_chunk_is_refused(model: Conformer) -> None:
    state = model.init_state(2, 8)
    for shape in ((2, 32, 80), (2, 3, 80), (2, 35, 40)):
        with pytest.raises(ValueError, match=r"expected \[B, 4 C \+ 3, 80\]"):
            model.step(torch.zeros(shape), state)
    with pytest.raises(ValueError, match="features are of 3 streams, the state of 2"):
        model.step(torch.zeros(3, 35, 80), state)
    with pytest.raises(ValueError, match="left_context_frames=-1"):
        model.init_state(2, -1)


@torch.no_grad()
def test_compiled_loops_follow_the_weights() -> None:
    model, other = make(), make(dropout=0.0)
    for parameter in other.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    features, state = torch.randn(1, 35, 80), model.init_state(1, 16)
    assert conformer_kernel.weights_of(model.blocks[0]) is not None
    model.step(features, state)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.step(features, state)[0], other.step(features, state)[0])
    # other memory: of a parameter of its own, and of the same one
    model.blocks[0].ff1.up.weight = torch.nn.Parameter(torch.zeros_like(model.blocks[0].ff1.up.weight))
    other.blocks[0].ff1.up.weight.zero_()
    assert torch.equal(model.step(features, state)[0], other.step(features, state)[0])
    model.blocks[0].ff1.up.bias.data = torch.ones_like(model.blocks[0].ff1.up.bias)
    other.blocks[0].ff1.up.bias.fill_(1)
    assert torch.equal(model.step(features, state)[0], other.step(features, state)[0])


@torch.no_grad()
def test_what_is_no_plain_layer_is_left_to_torch() -> None:
    model = make()
    features, state = torch.randn(1, 35, 80), model.init_state(1, 16)
    layer = model.blocks[0].ff2.down
    seen: list[object] = []
    hook = layer.register_forward_pre_hook(lambda *_: seen.append(0))
    model.step(features, state)
    assert seen
    hook.remove()
    layer.forward = lambda x: torch.nn.functional.linear(x, 0 * layer.weight, 0 * layer.bias)  # type: ignore
    changed = model.step(features, state)[0]
    del layer.forward
    assert not torch.equal(changed, model.step(features, state)[0])
    assert model.double().step(features.double(), model.init_state(1, 16))[0].dtype == torch.float64


@torch.no_grad()
def test_a_state_is_left_alone_unless_it_may_be_written_over(model: Conformer) -> None:
    features, state = torch.randn(2, 35, 80), model.init_state(2, 16)
    _, state = model.step(features, state)
    before = moved(state)
    first, after = model.step(features, state)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(state), strict=True))
    again, written = model.step(features, state, in_place=True)
    assert torch.equal(first, again) and written.blocks[0].keys.data_ptr() == state.blocks[0].keys.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(after), tree_leaves(written), strict=True))


@torch.no_grad()
def test_exported_models_count_frames_in_float(model: Conformer) -> None:
    features = torch.randn(2, 35, 80)
    _, state = model.step(features, model.init_state(2, 16))
    counted = state._replace(frames=state.frames.float())
    assert torch.equal(model.step(features, state)[0], model.step(features, counted)[0])
