"""What the lattice says of when each token is emitted: best path, posteriors, expected frames, delays, pictures.

All of it comes from the forward-backward of losses/lattice.py (Graves 2012, eq. 16-18), whatever the topology, from
blank and label log-probs or, in `align`, from joiner inputs. Nothing here has a gradient.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import backends, batched, joint, shapes
from losses.lattice import forward_backward, step_scores
from losses.options import TransducerLossOptions
from losses.shapes import Lengths, check_lattice


class Occupancy(NamedTuple):
    """Posterior probability of each transition given the whole utterance; 0 in the padding."""

    label: Tensor  # [B, T, U]: label u is emitted at frame t; sums to 1 over t for each label
    blank: Tensor  # [B, T, U+1]: blank is taken at frame t after u labels


class Alignment(NamedTuple):
    """The most probable alignment of each utterance."""

    frames: Tensor  # [B, U] int64: frame of each label, -1 in the padding
    score: Tensor  # [B] float64: log-prob of that alignment


class PosteriorAlignment(NamedTuple):
    """The most probable alignment of each utterance, and how all alignments together spread each label over frames."""

    frames: Tensor  # [B, U] int64: frame of each label in the best alignment, -1 in the padding
    score: Tensor  # [B] float64: log-prob of the best alignment
    occupancy: Occupancy
    expected_frames: Tensor  # [B, U] float64: see `expected_frames`


class EmissionDelay(NamedTuple):
    """By how much labels are emitted after their reference frames; negative where they are emitted before."""

    frames: Tensor  # [B, U] float64, NaN in the padding
    mean_frames: Tensor  # [B] float64: mean over the tokens of an utterance, NaN without any
    mean_ms: Tensor  # [B] float64


@torch.no_grad()
def occupancy(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    topology: str = "regular",
    backend: str | None = None,
) -> Occupancy:
    """Posterior of each label's and blank's emission per frame; arguments and errors as in `lattice_loss`.

    float64 for float64 log-probs, else float32. NaN for an utterance without any possible alignment.
    """
    lengths = check_lattice(blank_log_probs, label_log_probs, enc_lens, target_lens, topology=topology)
    return _occupancy(blank_log_probs, label_log_probs, lengths, topology, backend)


def _occupancy(blank_lp: Tensor, label_lp: Tensor, lengths: Lengths, topology: str, backend: str | None) -> Occupancy:
    _, blank, label = forward_backward(blank_lp, label_lp, lengths, topology=topology, backend=backend)
    assert blank is not None and label is not None
    return Occupancy(label, blank)


@torch.no_grad()
def viterbi_alignment(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    topology: str = "regular",
) -> Alignment:
    """The most probable alignment; arguments and errors as in `lattice_loss`. Of equal ones, the earlier emission.

    Runs on the CPU, wherever the log-probs are; the result is on their device. The frames of an utterance without any
    possible alignment (score -inf) mean nothing.
    """
    lengths = check_lattice(blank_log_probs, label_log_probs, enc_lens, target_lens, topology=topology)
    return _viterbi(blank_log_probs, label_log_probs, lengths, topology)


def _viterbi(blank_lp: Tensor, label_lp: Tensor, lengths: Lengths, topology: str) -> Alignment:
    dtype = torch.float64 if blank_lp.dtype == torch.float64 else torch.float32
    blank, label = (x.to("cpu", dtype).contiguous() for x in (blank_lp, label_lp))
    kernels = backends.load("lattice", "numba", blank.device, dtype)
    frames, score = kernels.viterbi(blank, step_scores(blank, label, topology), lengths, topology != "regular")
    return Alignment(frames.to(blank_lp.device), score.to(blank_lp.device))


def token_times(frames: Tensor, *, frame_shift_ms: float, offset_ms: float = 0.0) -> Tensor:
    """Seconds of frames, float64 in their shape: (offset_ms + frame * frame_shift_ms) / 1000; NaN in the padding.

    Args:
        frames: of `viterbi_alignment` (integers, -1 in the padding) or `expected_frames` (NaN in the padding).
        frame_shift_ms: between encoder frames, above 0.
        offset_ms: time of frame 0, for example the middle of what it has seen, or the start of a segment.

    Raises:
        ValueError: when frame_shift_ms is not above 0.
    """
    _check_shift(frame_shift_ms)
    times = (offset_ms + frames.double() * frame_shift_ms) / 1000
    return times if frames.is_floating_point() else times.masked_fill(frames < 0, torch.nan)


def expected_frames(label_occupancy: Tensor, target_lens: Tensor) -> Tensor:
    """Mean frame of each label over all alignments, sum over t of t * occupancy; float64 [B, U], NaN in the padding.

    label_occupancy [B, T, U] is that of `occupancy`, target_lens [B] its lengths. NaN where an utterance has no
    possible alignment. Raises ValueError for other shapes.
    """
    if label_occupancy.ndim != 3 or target_lens.shape != label_occupancy.shape[:1]:
        raise ValueError(
            f"label_occupancy has shape {tuple(label_occupancy.shape)} and target_lens {tuple(target_lens.shape)}; "
            "pass [B, T, U] and [B]"
        )
    device = label_occupancy.device
    t = torch.arange(label_occupancy.shape[1], dtype=torch.float64, device=device)
    u = torch.arange(label_occupancy.shape[2], device=device)
    mean = torch.einsum("t,btu->bu", t, label_occupancy.double())
    return mean.masked_fill(u >= target_lens.to(device)[:, None], torch.nan)


def emission_delay(
    alignment: PosteriorAlignment, reference_frames: Tensor | None = None, *, frame_shift_ms: float
) -> EmissionDelay:
    """Expected frame of each label minus its reference frame, and its mean over the tokens of each utterance.

    Args:
        alignment: of `align` or `posterior_alignment`.
        reference_frames: [B, U], integers or floating, for example the frames at which a forced alignment ends the
            tokens; the padding may hold anything. A token of which it holds NaN is left out. None takes the frames of
            the best alignment, so that the delay says to which side of it the other alignments lie.
        frame_shift_ms: between encoder frames, above 0.

    Returns:
        EmissionDelay. An utterance without tokens has no delay: NaN, so that torch.nanmean over utterances leaves it
        out.

    Raises:
        ValueError: when reference_frames has another shape, or frame_shift_ms is not above 0.
    """
    _check_shift(frame_shift_ms)
    expected = alignment.expected_frames
    reference = alignment.frames if reference_frames is None else reference_frames
    if reference.shape != expected.shape:
        raise ValueError(
            f"reference_frames has shape {tuple(reference.shape)}, the alignment {tuple(expected.shape)}; "
            "pass one frame for each token, [B, U]"
        )
    delay = expected - reference.to(expected)
    mean = delay.nanmean(1)
    return EmissionDelay(delay, mean, mean * frame_shift_ms)


def _check_shift(frame_shift_ms: float) -> None:
    if not frame_shift_ms > 0:
        raise ValueError(
            f"frame_shift_ms={frame_shift_ms} is not above 0; pass the milliseconds between encoder frames"
        )


@torch.no_grad()
def posterior_alignment(
    blank_log_probs: Tensor,
    label_log_probs: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    topology: str = "regular",
    backend: str | None = None,
) -> PosteriorAlignment:
    """Best alignment, occupancies and expected frames together; arguments and errors as in `lattice_loss`."""
    lengths = check_lattice(blank_log_probs, label_log_probs, enc_lens, target_lens, topology=topology)
    return _posterior_alignment(blank_log_probs, label_log_probs, lengths, topology, backend)


def _posterior_alignment(
    blank_lp: Tensor, label_lp: Tensor, lengths: Lengths, topology: str, backend: str | None
) -> PosteriorAlignment:
    best = _viterbi(blank_lp, label_lp, lengths, topology)
    found = _occupancy(blank_lp, label_lp, lengths, topology, backend)
    lens = torch.tensor(lengths.target, dtype=torch.int64)
    return PosteriorAlignment(best.frames, best.score, found, expected_frames(found.label, lens))


@torch.no_grad()
def align(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    activation: str = "tanh",
    topology: str = "regular",
    blank: int = 0,
    backend: str | None = None,
) -> PosteriorAlignment:
    """Align targets with frames by the joiner activation(enc[t] + pred[u]) @ weight.T + bias.

    The log-probs are computed in tiles of lattice cells: memory grows with B * T * (U+1), not with that times V.

    Args: those of `transducer_loss`, with its shapes, dtypes, padding and errors.
        backend: a name of BACKENDS; None takes numba on CPU (float16: torch) and torch elsewhere.

    Returns:
        PosteriorAlignment, occupancies in float64 for float64 inputs, else float32.
    """
    shapes.check_choice("activation", activation, batched.ACTIVATIONS)
    lengths, blank = shapes.check_inputs(
        enc, pred, weight, bias, targets, enc_lens, target_lens, topology=topology, blank=blank
    )
    shapes.check_targets(targets, lengths.target, weight.shape[0], blank)
    options = TransducerLossOptions(backend=backend)
    settings = joint.Settings(lengths, activation, topology, blank, options, shared_upstream=False)
    blank_lp, label_lp = _joint_log_probs(enc, pred, weight, bias, targets, settings)
    return _posterior_alignment(blank_lp, label_lp, lengths, topology, backend)


def _joint_log_probs(
    enc: Tensor, pred: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: joint.Settings
) -> tuple[Tensor, Tensor]:
    """Log-probs of blank [B, T, U+1] and next label [B, T, U], 0 in cells that no alignment reaches."""
    dtype = shapes.product_dtype(enc, pred)
    with torch.autocast(enc.device.type, enabled=False):
        joiner = joint.Joint(enc, pred, weight, bias, targets.long(), dtype, settings)
        columns = joiner.columns
        blank_lp, label_lp = (enc.new_zeros(*enc.shape[:2], columns, dtype=joiner.sum_dtype) for _ in range(2))
        with joiner.kernels.parallel() as threads:
            for group in joiner.groups():
                found = joiner.start_log_probs(group, None, 0, threads)
                found.wait()
                cells = group.rows * columns + group.columns % columns
                blank_lp.view(-1)[cells] = found.blank
                label_lp.view(-1)[cells] = found.label
    return blank_lp, label_lp[:, :, :-1]


# Colours of the probabilities 0, 1/3, 2/3 and 1, RGB; between them they are mixed.
COLOURS = {
    "grey": ((255, 255, 255), (170, 170, 170), (85, 85, 85), (0, 0, 0)),
    "fire": ((0, 0, 0), (150, 20, 90), (245, 130, 30), (255, 255, 200)),
}


def occupancy_png(
    occupancy: Tensor,
    path: str | os.PathLike[str],
    *,
    scale: int = 4,
    gamma: float = 0.5,
    colours: str = "grey",
) -> None:
    """Write occupancies of one utterance as a PNG: frames to the right, tokens upward, one square for each cell.

    Args:
        occupancy: [T, U] or [T, U+1] probabilities, at least 1 x 1, of one utterance without its padding:
            `found.label[b, :frames, :tokens]`.
        path: of the file, which is replaced.
        scale: side of a square in pixels, 1 or more.
        gamma: the colour is that of probability ** gamma; below 1, small probabilities show.
        colours: "grey" (0 is white, 1 is black) or "fire" (0 is black, 1 is pale yellow).

    Raises:
        ValueError: for other shapes and values, and for NaN (an utterance without any possible alignment).
        OSError: the file cannot be written.
    """
    shapes.check_choice("colours", colours, tuple(COLOURS))
    if scale < 1:
        raise ValueError(f"scale={scale} is below 1; pass the side of a cell in pixels")
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} is not above 0; pass 1 for colours in proportion to the probability")
    if occupancy.ndim != 2 or not occupancy.numel():
        raise ValueError(
            f"occupancy has shape {tuple(occupancy.shape)}; pass one utterance, [T, U], with T and U above 0"
        )
    values = occupancy.detach().cpu().double().numpy()
    if not (values >= -1e-6).all() or not (values <= 1 + 1e-3).all():
        raise ValueError(
            f"occupancy holds values from {values.min()} to {values.max()}; pass probabilities, of an utterance "
            "that has an alignment"
        )
    shades = np.rint(255 * values.clip(0, 1).T[::-1] ** gamma).astype(np.uint8)
    stops, anchors = np.linspace(0, 255, len(COLOURS[colours])), np.array(COLOURS[colours]).T
    palette = np.stack([np.rint(np.interp(np.arange(256), stops, x)) for x in anchors], 1).astype(np.uint8)
    Path(path).write_bytes(_png(shades.repeat(scale, 0).repeat(scale, 1), palette))


def _png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """Indices [height, width] into a palette [256, 3], both uint8, as a PNG (ISO/IEC 15948), colour type 3."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, no interlacing
    rows = np.pad(pixels, ((0, 0), (1, 0)))  # each row begins with its filter: 0, none
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", palette.tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes())),
            chunk(b"IEND", b""),
        )
    )
