"""What the lattice says of when tokens are emitted: against the reference, by enumeration, and pictures read back."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import (
    align,
    emission_delay,
    expected_frames,
    occupancy,
    occupancy_png,
    posterior_alignment,
    reference,
    token_times,
    viterbi_alignment,
)
from tests.losses.problems import CASES, OWN_BACKENDS, Problem, assert_close, make


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_occupancy_is_a_probability_of_each_emission(topology: str) -> None:
    problem = make(topology, "ragged")
    lens = problem.enc_lens, problem.target_lens
    found = [occupancy(*problem.log_probs(), *lens, topology=topology, backend=b) for b in OWN_BACKENDS]
    for x, y in itertools.pairwise(found):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    for b, (t, u) in enumerate(zip(*(n.tolist() for n in lens), strict=True)):
        torch.testing.assert_close(found[0].label[b, :, :u].sum(0), torch.ones(u, dtype=torch.float64))
        # every frame of "regular" ends with one blank; every frame of "modified" takes a blank or a label
        taken = found[0].blank[b, :t].sum(1) + (found[0].label[b, :t].sum(1) if topology == "modified" else 0)
        torch.testing.assert_close(taken, torch.ones(t, dtype=torch.float64))
        assert not found[0].label[b, t:].any() and not found[0].blank[b, :, u + 1 :].any()


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("seed", range(5))
def test_viterbi_alignment_is_the_best_of_all(topology: str, seed: int) -> None:
    problem = make(topology, "ragged", seed=seed)
    blank, label = problem.log_probs()
    frames, score = viterbi_alignment(blank, label, problem.enc_lens, problem.target_lens, topology=topology)
    assert frames.dtype == torch.int64 and frames.shape == problem.targets.shape
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        best, emitted = reference.best_alignment(blank[b, :t, : u + 1].numpy(), label[b, :t, :u].numpy(), topology)
        assert frames[b].tolist() == emitted + [-1] * (frames.shape[1] - u)
        assert score[b].item() == pytest.approx(best, abs=1e-12)


def test_viterbi_alignment_prefers_the_earlier_of_equal_ones_and_reports_none() -> None:
    lens = torch.tensor([4]), torch.tensor([2])
    frames, score = viterbi_alignment(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), *lens)
    assert frames.tolist() == [[0, 0]] and score.tolist() == [0.0]
    frames, score = viterbi_alignment(torch.zeros(1, 4, 3), torch.full((1, 4, 2), -torch.inf), *lens)
    assert score.tolist() == [-torch.inf]


def lattice_products(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Occupancies of blank and label and expected frames by the reference; 0, and NaN, in the padding."""
    blank, label = (x.numpy() for x in problem.log_probs())
    by_blank, by_label = np.zeros(blank.shape), np.zeros(label.shape)
    expected = np.full(problem.targets.shape, np.nan)
    for b, (t, u) in enumerate(zip(problem.enc_lens.tolist(), problem.target_lens.tolist(), strict=True)):
        found = reference.lattice(blank[b, :t, : u + 1], label[b, :t, :u], problem.topology)
        _, by_blank[b, :t, : u + 1], by_label[b, :t, :u] = found
        for i in range(u):
            expected[b, i] = sum(frame * by_label[b, frame, i] for frame in range(t))
    return by_blank, by_label, expected


@pytest.mark.parametrize("backend", [None, *OWN_BACKENDS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_align_equals_the_lattice_of_all_logits(topology: str, name: str, bias: bool, backend: str | None) -> None:
    """The padding of encoder and predictor output holds NaN."""
    problem = make(topology, name, blank=-1)
    if not bias:
        problem.bias = torch.zeros_like(problem.bias)
    enc, pred, weight, offset = problem.parameters
    found = align(
        enc,
        pred,
        weight,
        offset if bias else None,
        problem.targets,
        problem.enc_lens,
        problem.target_lens,
        topology=topology,
        blank=-1,
        backend=backend,
    )
    by_blank, by_label, expected = lattice_products(problem)
    assert_close(found.occupancy.blank, by_blank)
    assert_close(found.occupancy.label, by_label)
    assert torch.equal(found.expected_frames.isnan(), torch.from_numpy(expected).isnan())
    assert_close(found.expected_frames.nan_to_num(-1.0), np.nan_to_num(expected, nan=-1.0))
    best = viterbi_alignment(*problem.log_probs(), problem.enc_lens, problem.target_lens, topology=topology)
    assert torch.equal(found.frames, best.frames)
    torch.testing.assert_close(found.score, best.score, rtol=1e-12, atol=1e-12)
    assert not any(x.requires_grad for x in (found.score, found.expected_frames, *found.occupancy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_align_in_other_dtypes(dtype: torch.dtype) -> None:
    problem = make("modified", "odd sizes")
    exact, cast = (
        align(*(x.to(dtype).to(y) if x.is_floating_point() else x for x in problem.arguments()), topology="modified")
        for y in (torch.float64, dtype)
    )
    assert cast.occupancy.label.dtype == torch.float32 and cast.expected_frames.dtype == torch.float64
    logits_round = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]  # frames
    difference = (cast.expected_frames - exact.expected_frames).abs()
    assert torch.equal(difference.isnan(), exact.expected_frames.isnan())
    assert difference.nan_to_num(0.0).max() < logits_round


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that an operation within returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_align_never_holds_all_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    enc, pred = torch.randn(2, 150, 8, generator=generator), torch.randn(2, 31, 8, generator=generator)
    weight = torch.randn(3000, 8, generator=generator)
    targets = torch.randint(1, 3000, (2, 30), generator=generator)
    lens = torch.tensor([150, 140]), torch.tensor([30, 25])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that all is computed in this thread, which is watched
    try:
        with LargestTensor() as largest:
            align(enc, pred, weight, None, targets, *lens)
    finally:
        torch.set_num_threads(threads)
    assert 2 * 150 * 31 <= largest.entries < 2 * 150 * 31 * 3000 / 8


def test_align_checks_its_arguments() -> None:
    problem = make("regular", "ragged")
    with pytest.raises(ValueError, match="activation='gelu' does not exist"):
        align(*problem.arguments(), activation="gelu")
    with pytest.raises(ValueError, match=r"target_lens\[1\]=9 exceeds targets.shape\[1\]=6"):
        align(*problem.arguments()[:6], torch.tensor([3, 9, 2, 0]))


def test_align_of_an_empty_batch() -> None:
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 3)
    found = align(empty, torch.zeros(0, 3, 3), torch.zeros(5, 3), None, torch.zeros(0, 2).long(), none, none)
    assert found.frames.shape == (0, 2) and found.score.shape == (0,) and found.expected_frames.shape == (0, 2)
    assert found.occupancy.label.shape == (0, 4, 2) and found.occupancy.blank.shape == (0, 4, 3)
    assert emission_delay(found, frame_shift_ms=40).mean_ms.shape == (0,)


def test_without_an_alignment_expected_frames_are_nan_and_the_best_score_is_minus_infinity() -> None:
    blank, label = torch.zeros(2, 3, 3), torch.full((2, 3, 2), -1.0)
    label[0] = -torch.inf
    found = posterior_alignment(blank, label, torch.tensor([3, 3]), torch.tensor([2, 2]))
    assert found.score[0] == -torch.inf and found.expected_frames[0].isnan().all()
    assert found.expected_frames[1].isfinite().all()


def test_token_times_are_seconds_with_an_offset_and_nan_in_the_padding() -> None:
    frames = torch.tensor([[0, 3, 10], [2, -1, -1]])
    times = token_times(frames, frame_shift_ms=40, offset_ms=20)
    assert times.dtype == torch.float64
    torch.testing.assert_close(
        times,
        torch.tensor([[0.02, 0.14, 0.42], [0.1, torch.nan, torch.nan]]).double(),
        equal_nan=True,
        rtol=0,
        atol=1e-7,
    )
    fractions = token_times(torch.tensor([[0.5, torch.nan]], dtype=torch.float64), frame_shift_ms=10)
    assert fractions[0, 0] == 0.005 and fractions[0, 1].isnan()
    # a mean frame may be below 0 by rounding, and is no padding
    assert token_times(torch.tensor([-1e-9]), frame_shift_ms=10).isfinite().all()
    with pytest.raises(ValueError, match="frame_shift_ms=0 is not above 0"):
        token_times(frames, frame_shift_ms=0)


def test_expected_frames_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"label_occupancy has shape \(3, 2\)"):
        expected_frames(torch.zeros(3, 2), torch.tensor([2]))


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_emission_delay_is_measured_from_the_reference_or_else_the_best_alignment(topology: str) -> None:
    problem = make(topology, "ragged")
    lens = problem.target_lens.tolist()
    found = posterior_alignment(*problem.log_probs(), problem.enc_lens, problem.target_lens, topology=topology)
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(0, 7, problem.targets.shape, generator=generator).double()
    _, _, expected = lattice_products(problem)
    for references in (None, given):
        delay = emission_delay(found, references, frame_shift_ms=40)
        origin = (found.frames if references is None else references).numpy()
        for b, u in enumerate(lens):
            own = expected[b, :u] - origin[b, :u]
            np.testing.assert_allclose(delay.frames[b, :u].numpy(), own, atol=1e-10)
            assert delay.frames[b, u:].isnan().all()
            if u:
                assert delay.mean_frames[b].item() == pytest.approx(own.mean(), abs=1e-10)
                assert delay.mean_ms[b].item() == pytest.approx(40 * own.mean(), abs=1e-8)
            else:
                assert delay.mean_frames[b].isnan() and delay.mean_ms[b].isnan()


def test_a_token_without_a_reference_frame_is_left_out_of_the_mean() -> None:
    frames, lens = torch.tensor([[1, 3]]), (torch.tensor([6]), torch.tensor([2]))
    label = torch.full((1, 6, 2), -torch.inf)
    label[0, 2, 0] = label[0, 5, 1] = 0.0  # emissions at frames 2 and 5, certain
    found = posterior_alignment(torch.zeros(1, 6, 3), label, *lens)
    assert emission_delay(found, frames, frame_shift_ms=10).mean_ms.tolist() == pytest.approx([15.0])
    partly = torch.tensor([[torch.nan, 3.0]])
    delay = emission_delay(found, partly, frame_shift_ms=10)
    assert delay.mean_ms.tolist() == pytest.approx([20.0]) and delay.frames[0, 0].isnan()
    assert emission_delay(found, frame_shift_ms=10).mean_ms.tolist() == pytest.approx([0.0])
    with pytest.raises(ValueError, match=r"reference_frames has shape \(2,\).*pass one frame for each token"):
        emission_delay(found, frames[0], frame_shift_ms=10)
    with pytest.raises(ValueError, match="frame_shift_ms=-1 is not above 0"):
        emission_delay(found, frame_shift_ms=-1)


def read_png(data: bytes) -> np.ndarray:
    """Pixels [height, width, 3] of a PNG with a palette, 8 bits a pixel, unfiltered; checks every checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        assert kind not in chunks
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 3, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return np.frombuffer(chunks[b"PLTE"], dtype=np.uint8).reshape(-1, 3)[rows[:, 1:]]


def test_a_picture_has_frames_to_the_right_and_tokens_upward(tmp_path: Path) -> None:
    probabilities = torch.tensor([[1.0, 0.0], [0.25, 0.0], [0.0, 0.01]])  # 3 frames, 2 tokens
    occupancy_png(probabilities, tmp_path / "a.png", scale=1, gamma=0.5)
    black, white, half, faint = (0, 0, 0), (255, 255, 255), (127, 127, 127), (229, 229, 229)
    expected = np.array([[white, white, faint], [black, half, white]])
    assert np.abs(read_png((tmp_path / "a.png").read_bytes()).astype(int) - expected).max() <= 1
    occupancy_png(probabilities, tmp_path / "b.png", scale=3, gamma=0.5)
    assert (
        read_png((tmp_path / "b.png").read_bytes())[1::3, 1::3] == read_png((tmp_path / "a.png").read_bytes())
    ).all()
    assert read_png((tmp_path / "b.png").read_bytes()).shape == (6, 9, 3)
    occupancy_png(probabilities, tmp_path / "c.png", scale=1, gamma=1.0, colours="fire")
    fire = read_png((tmp_path / "c.png").read_bytes())
    assert tuple(fire[1, 0]) == (255, 255, 200) and tuple(fire[0, 0]) == black
    assert fire.sum(2)[1, 1] > fire.sum(2)[0, 2] > 0  # brighter with the probability


def test_another_reader_agrees(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    generator = torch.Generator().manual_seed(0)
    occupancy_png(torch.rand(31, 7, generator=generator), tmp_path / "a.png", colours="fire")
    pixels = image.imread(tmp_path / "a.png")
    np.testing.assert_array_equal(
        np.rint(255 * pixels[..., :3]).astype(np.uint8), read_png((tmp_path / "a.png").read_bytes())
    )


def test_a_picture_of_a_real_lattice(tmp_path: Path) -> None:
    """Rounding takes sums of float32 a little over 1; every column of pixels belongs to one frame."""
    problem = make("regular", "odd sizes", dtype=torch.float32)
    found = occupancy(*(x.float() for x in problem.log_probs()), problem.enc_lens, problem.target_lens)
    frames, tokens = int(problem.enc_lens[1]), int(problem.target_lens[1])
    occupancy_png(found.label[1, :frames, :tokens], tmp_path / "a.png", scale=2)
    shades = 255 - read_png((tmp_path / "a.png").read_bytes())[::-2, ::2, 0].astype(int)
    np.testing.assert_allclose(shades, 255 * found.label[1, :frames, :tokens].T.double() ** 0.5, atol=0.51)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(2, 3, 4), {}, r"occupancy has shape \(2, 3, 4\); pass one utterance"),
        (torch.zeros(4, 0), {}, "T and U above 0"),
        (torch.full((2, 2), torch.nan), {}, "holds values from nan"),
        (torch.full((2, 2), 1.5), {}, "holds values from 1.5 to 1.5; pass probabilities"),
        (torch.full((2, 2), -0.5), {}, "pass probabilities"),
        (torch.zeros(2, 2), {"scale": 0}, "scale=0 is below 1"),
        (torch.zeros(2, 2), {"gamma": 0.0}, "gamma=0.0 is not above 0"),
        (torch.zeros(2, 2), {"colours": "blue"}, "colours='blue' does not exist; choose one of: grey, fire"),
    ],
)
def test_a_picture_refuses(values: Tensor, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        occupancy_png(values, tmp_path / "a.png", **options)
    assert not (tmp_path / "a.png").exists()
