"""What every search shares: its configuration, its result, and the model that it asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from asr.errors import UserError
from asr.models.context import Context, Milliseconds, check_chunk, check_left_context, context

BLANK = 0


@dataclass
class EndpointConfig:
    """When a stretch of a stream is over, as device runtimes decide it; silence is time without a token.

    Args:
        silence_s: silence after which a stretch without text ends.
        silence_after_text_s: silence after the last token of a stretch with text.
        max_segment_s: longest stretch; a longer one is cut in its widest pause between words in the second half.
    """

    silence_s: float = 2.4
    silence_after_text_s: float = 1.2
    max_segment_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("silence_s", "silence_after_text_s", "max_segment_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"decoding.endpoint.{name}={getattr(self, name)} must be above 0")


@dataclass
class DecodingConfig:
    """How encoder output becomes tokens.

    Args:
        search: a name of ``asr.decoding.SEARCHES``: ``greedy`` takes the best symbol at each step,
            ``modified_beam_search`` sums the alignments of equal token sequences.
        max_symbols_per_frame: most tokens that greedy search emits at one encoder frame, at least 1. With 1, an
            emission consumes its frame. ``modified_beam_search`` knows only 1.
        batch_duration_s: audio seconds (padding included) that are encoded in one batch.
        beam: hypotheses kept per utterance by ``modified_beam_search``, at least 1.
        chunk_ms: what the encoder hears at a time: full for whole utterances, or a multiple of 40 ms for the result of
            a stream in such chunks. A model that was trained with several (training.chunk_ms) decodes at all of them.
        left_context_ms: with a chunk, how far the encoder hears back beyond it: a multiple of 40 ms, or full.
        endpoint: when a stretch of a stream ends.
    """

    search: Literal["greedy", "modified_beam_search"] = "greedy"
    max_symbols_per_frame: int = 1
    batch_duration_s: float = 600
    beam: int = 4
    chunk_ms: Milliseconds = "full"
    left_context_ms: Milliseconds = 5120
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        for name, least in (("max_symbols_per_frame", 1), ("beam", 1), ("batch_duration_s", 0.1)):
            value = getattr(self, name)
            if not value >= least:
                raise UserError(f"decoding.{name}={value} must be at least {least}; raise it")
        check_chunk("decoding.chunk_ms", self.chunk_ms)
        check_left_context("decoding.left_context_ms", self.left_context_ms)

    @property
    def context(self) -> Context:
        """Chunk and left context in encoder frames."""
        return context(self.chunk_ms, self.left_context_ms)


@dataclass
class Hypothesis:
    """One decoded token sequence.

    ``score`` is a natural-log probability: of the one path taken (greedy), or of all alignments that the beam kept
    (modified_beam_search). ``frames[i]`` is the encoder frame that emitted ``tokens[i]``, and ``confidences[i]`` the
    probability in (0, 1] that the model gave the token there.
    """

    tokens: list[int]
    frames: list[int]
    score: float
    confidences: list[float] = field(default_factory=list)


class Predictor(Protocol):
    """The label side of a transducer. A state is a named tuple of tensors whose dimension 0 is the batch."""

    def init_state(self, batch_size: int, device: Any) -> Any: ...

    def output(self, state: Any) -> torch.Tensor: ...

    def step(self, tokens: torch.Tensor, state: Any) -> Any: ...


class Joiner(Protocol):
    def project_encoder(self, enc: torch.Tensor) -> torch.Tensor: ...

    def project_predictor(self, pred: torch.Tensor) -> torch.Tensor: ...

    def logits(self, enc: torch.Tensor, pred: torch.Tensor) -> torch.Tensor: ...


class SearchModel(Protocol):
    """The two parts of a transducer that a search calls."""

    @property
    def predictor(self) -> Any: ...  # Predictor; Any because nn.Module attributes are not typed

    @property
    def joiner(self) -> Any: ...  # Joiner


def check_search_inputs(enc: torch.Tensor, enc_lens: torch.Tensor) -> torch.Tensor:
    """Check ``enc [B, T, D]`` and ``enc_lens [B]``; return the lengths as int64 on the device of ``enc``."""
    if enc.dim() != 3:
        raise ValueError(f"enc must be [B, T, D], but has shape {list(enc.shape)}; pass the encoder's output")
    if enc_lens.shape != enc.shape[:1]:
        raise ValueError(f"enc_lens must be [B] = [{enc.shape[0]}], but is {list(enc_lens.shape)}; pass one per row")
    lens = enc_lens.to(device=enc.device, dtype=torch.int64)
    if lens.numel() and (int(lens.max()) > enc.shape[1] or int(lens.min()) < 0):
        raise ValueError(f"enc_lens must lie in 0..T={enc.shape[1]}, but are in {int(lens.min())}..{int(lens.max())}")
    return lens


def project_valid_frames(joiner: Joiner, enc: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Joiner's projection ``[B, T, J]`` of the encoder frames; padding is taken as 0, whatever it holds."""
    padding = torch.arange(enc.shape[1], device=enc.device)[None, :] >= lens[:, None]
    return joiner.project_encoder(enc.masked_fill(padding[:, :, None], 0.0))


def select_rows(state: Any, rows: torch.Tensor) -> Any:
    """Rows of a predictor state, in the order given."""
    return type(state)(*(tensor[rows] for tensor in state))


def replace_rows(state: Any, rows: torch.Tensor, new: Any) -> Any:
    """A predictor state with some rows exchanged. The old tensors stay as they were: they may be shared or expanded."""
    pairs = zip(state, new, strict=True)
    return type(state)(*(old.index_copy(0, rows, fresh.to(old.dtype)) for old, fresh in pairs))
