"""Beam search that sums the alignments of equal token sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from asr.decoding.search import (
    BLANK,
    DecodingConfig,
    Hypothesis,
    SearchModel,
    check_search_inputs,
    project_valid_frames,
    replace_rows,
    select_rows,
)

NO_TOKEN = -1


class Beam(NamedTuple):
    """Hypotheses of every utterance: B utterances, K slots, capacity for U tokens.

    A slot whose ``score`` is -inf is dead: it holds no hypothesis. Live slots of an utterance hold distinct sequences.
    """

    score: torch.Tensor  # [B, K] log of the sum over the alignments kept
    best: torch.Tensor  # [B, K] log-probability of the best single alignment; it says where the tokens stand
    length: torch.Tensor  # [B, K] number of tokens
    tokens: torch.Tensor  # [B, K, U], NO_TOKEN after the last
    frames: torch.Tensor  # [B, K, U] frame of each token on the best alignment
    log_probs: torch.Tensor  # [B, K, U] log-probability of each token there


@torch.inference_mode()
def modified_beam_search(
    model: SearchModel, enc: torch.Tensor, enc_lens: torch.Tensor, config: DecodingConfig
) -> list[Hypothesis]:
    """Beam search over token sequences, at most one token a frame, for all utterances of a batch at once.

    Greedy search follows one alignment. A model that spreads a token over three frames, 0.37 at each against 0.6 for
    blank, is sure of it (1 - 0.6^3 = 0.78), but no single frame is: greedy deletes the token. Here hypotheses with
    equal tokens become one, whose probability is the sum of theirs, as in icefall's search of this name (Kang et al.
    2023, "Fast and parallel decoding for transducer"); unlike there, before the beam is cut, not after. With a beam
    that holds every sequence the score is exactly the log of the sum over all alignments.

    The most probable sequence wins; scores are not divided by length.

    Args:
        model: anything with the ``predictor`` and ``joiner`` of a transducer.
        enc: encoder output ``[B, T, D]``, float. Frames at or after ``enc_lens`` are never used (NaN may be there).
        enc_lens: ``[B]``, integers in 0..T.
        config: ``beam`` is used; ``max_symbols_per_frame`` must be 1.

    Returns:
        One hypothesis per row. ``frames`` and ``confidences`` are those of the best single alignment of the winner.

    Raises:
        ValueError: for wrong shapes, lengths over T, or ``max_symbols_per_frame`` above 1.
    """
    if config.max_symbols_per_frame != 1:
        raise ValueError(
            f"max_symbols_per_frame={config.max_symbols_per_frame}, but modified_beam_search emits at most 1 token a"
            " frame; set it to 1 or use search=greedy"
        )
    lens = check_search_inputs(enc, enc_lens)
    batch_size, num_frames, _ = enc.shape
    if batch_size == 0 or num_frames == 0:
        return [Hypothesis([], [], 0.0) for _ in range(batch_size)]

    enc_p = project_valid_frames(model.joiner, enc, lens)
    beam = _first_beam(batch_size, config.beam, enc_p)
    state = model.predictor.init_state(batch_size * config.beam, enc.device)  # row b * K + k
    pred_p = model.joiner.project_predictor(model.predictor.output(state))
    for t in range(int(lens.max())):
        logits = model.joiner.logits(enc_p[:, t, None], pred_p.unflatten(0, (batch_size, config.beam)))
        log_probs = logits.to(beam.score.dtype).log_softmax(-1)  # [B, K, V]
        ended = t >= lens
        if bool(ended.any()):  # a sure blank carries the beams of ended utterances through unchanged
            log_probs = log_probs.masked_fill(ended[:, None, None], -torch.inf)
            log_probs[..., BLANK].masked_fill_(ended[:, None], 0.0)
        beam, parents, symbols = _advance(beam, log_probs, t)
        state, pred_p = _step_predictor(model, state, pred_p, parents, symbols)
    return _winners(beam)


def _first_beam(batch_size: int, beam_size: int, like: torch.Tensor) -> Beam:
    """The empty sequence in slot 0, the other slots dead."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    score = torch.full((batch_size, beam_size), -torch.inf, dtype=dtype, device=like.device)
    score[:, 0] = 0.0
    length = torch.zeros(batch_size, beam_size, dtype=torch.int64, device=like.device)
    tokens = length.new_full((batch_size, beam_size, 1), NO_TOKEN)
    log_probs = score.new_zeros(batch_size, beam_size, 1)
    return Beam(score, score.clone(), length, tokens, torch.zeros_like(tokens), log_probs)


def _advance(beam: Beam, log_probs: torch.Tensor, t: int) -> tuple[Beam, torch.Tensor, torch.Tensor]:
    """Take every hypothesis through frame ``t`` and keep the K best sequences.

    Args:
        beam: before the frame.
        log_probs: ``[B, K, V]``.

    Returns:
        The new beam, and for each of its slots ``[B, K]`` the old slot that it continues and its symbol.
    """
    beam_size, vocab_size = log_probs.shape[1:]
    extended = beam.score[..., None] + log_probs  # [B, K, V]; column BLANK: the same sequence, one frame later
    extended_best = beam.best[..., None] + log_probs

    # Two candidates have the same tokens only where hypothesis i is hypothesis j plus one token: i after a blank, and j
    # after the last token of i. Move the mass of the second into the first.
    last = beam.tokens.gather(2, (beam.length - 1).clamp(min=0)[..., None])[..., 0].clamp(min=0)  # [B, K]
    child = _is_one_longer(beam)  # [B, i, j], at most one j per i
    via_index = last[:, None, :].expand(-1, beam_size, -1)  # [B, j, i] -> symbol last_i
    into = extended.gather(2, via_index).transpose(1, 2).masked_fill(~child, -torch.inf)  # [B, i, j]
    into_best = extended_best.gather(2, via_index).transpose(1, 2).masked_fill(~child, -torch.inf)
    stay_best = extended_best[..., BLANK]
    moved_best, moved_from = into_best.max(2)
    moves = moved_best > stay_best  # the better single alignment of i emits its last token at this frame
    extended[..., BLANK] = torch.logaddexp(extended[..., BLANK], into.logsumexp(2))
    extended_best[..., BLANK] = torch.maximum(stay_best, moved_best)
    merged = torch.zeros_like(extended).scatter_add_(2, via_index, child.transpose(1, 2).to(extended.dtype)) > 0
    extended.masked_fill_(merged, -torch.inf)

    score, index = extended.flatten(1).topk(beam_size, dim=1)
    parents = index // vocab_size
    symbols = index % vocab_size
    # Where the best alignment came through the merge, frames and log-probs are those of j plus the token at this frame.
    moved = moves.gather(1, parents) & (symbols == BLANK)
    source = torch.where(moved, moved_from.gather(1, parents), parents)
    grows = symbols != BLANK
    token = torch.where(grows, symbols, last.gather(1, parents))
    token_log_prob = log_probs.flatten(1).gather(1, source * vocab_size + token)
    length = beam.length.gather(1, parents) + grows.long()
    new = Beam(
        score,
        extended_best.flatten(1).gather(1, index),
        length,
        _take_slots(beam.tokens, parents),
        _take_slots(beam.frames, source),
        _take_slots(beam.log_probs, source),
    )
    return _write_last(new, grows, moved, token, t, token_log_prob), parents, symbols


def _is_one_longer(beam: Beam) -> torch.Tensor:
    """``[B, i, j]``: both slots live, and sequence i is sequence j and one token more."""
    one_longer = beam.length[:, :, None] == beam.length[:, None, :] + 1
    # The extra token always differs from the padding of j. Any second difference means another sequence.
    differences = (beam.tokens[:, :, None] != beam.tokens[:, None, :]).sum(-1)
    live = beam.score > -torch.inf
    return one_longer & (differences == 1) & live[:, :, None] & live[:, None, :]


def _take_slots(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return values.gather(1, slots[..., None].expand(-1, -1, values.shape[2]))


def _write_last(
    beam: Beam, grows: torch.Tensor, moved: torch.Tensor, token: torch.Tensor, t: int, log_prob: torch.Tensor
) -> Beam:
    """Write each slot's last token where it is new, and its frame and log-probability where they changed."""
    capacity = int(beam.length.max())
    tokens, frames, log_probs = beam.tokens, beam.frames, beam.log_probs
    if capacity > tokens.shape[2]:  # double, so that growing costs O(1) a token
        extra = (0, tokens.shape[2])
        tokens = torch.nn.functional.pad(tokens, extra, value=NO_TOKEN)
        frames, log_probs = torch.nn.functional.pad(frames, extra), torch.nn.functional.pad(log_probs, extra)
    at_last = torch.arange(tokens.shape[2], device=tokens.device) == (beam.length - 1)[..., None]
    changed = at_last & (grows | moved)[..., None]
    return beam._replace(
        tokens=torch.where(at_last & grows[..., None], token[..., None], tokens),
        frames=frames.masked_fill(changed, t),
        log_probs=torch.where(changed, log_prob[..., None], log_probs),
    )


def _step_predictor(
    model: SearchModel, state: Any, pred_p: torch.Tensor, parents: torch.Tensor, symbols: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """Follow the slots' parents, then step the predictor where a token was emitted."""
    batch_size, beam_size = parents.shape
    rows = (parents + beam_size * torch.arange(batch_size, device=parents.device)[:, None]).flatten()
    state, pred_p = select_rows(state, rows), pred_p[rows]
    emitting = (symbols.flatten() != BLANK).nonzero()[:, 0]
    if emitting.numel():
        stepped = model.predictor.step(symbols.flatten()[emitting], select_rows(state, emitting))
        state = replace_rows(state, emitting, stepped)
        fresh = model.joiner.project_predictor(model.predictor.output(stepped))
        pred_p = pred_p.index_copy(0, emitting, fresh.to(pred_p.dtype))
    return state, pred_p


def _winners(beam: Beam) -> list[Hypothesis]:
    rows = torch.arange(beam.score.shape[0], device=beam.score.device)
    winner = beam.score.argmax(1)
    lengths = beam.length[rows, winner].tolist()
    columns = (beam.tokens, beam.frames, beam.log_probs.exp())
    tokens, frames, confidences = (column[rows, winner].tolist() for column in columns)
    return [
        Hypothesis(tokens[b][:n], frames[b][:n], score, confidences[b][:n])
        for b, (n, score) in enumerate(zip(lengths, beam.score[rows, winner].tolist(), strict=True))
    ]
