"""Where in an utterance a transducer wants to emit the reference tokens, and how sure it is against blank.

Greedy search deletes a token whose emission is spread: with 0.37 at each of three frames, blank wins every time,
although the token is due with probability 0.78. Among the word errors it is a deletion like any other; here it shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import MonoCut
from matplotlib import colormaps
from matplotlib.figure import Figure

from asr.data.loader import eval_loader
from asr.data.tokenizer import Tokenizer, UnknownToken
from asr.decoding.decode import Decoded, evaluation_mode
from asr.decoding.fonts import drawable, families
from asr.decoding.score import ErrorUnit, worst_utterances
from asr.decoding.search import BLANK
from asr.models.context import ENCODER_FRAME_MS, Context
from losses import occupancy

if TYPE_CHECKING:  # asr.config imports asr.decoding
    from asr.config import Experiment

# Logits of one block of frames: about 64 MB in float32.
_BLOCK_LOGITS = 16_000_000


@dataclass(frozen=True)
class EmissionPosteriors:
    """One utterance, T encoder frames, U reference tokens. All values are probabilities, float64.

    "On arrival at frame t" means: before the symbols of that frame, after the reference tokens emitted so far (how many
    those are is weighted by its posterior, given the whole utterance and reference).
    """

    cut_id: str
    text: str
    symbols: list[str]  # U, the reference tokens
    blank: np.ndarray  # [T] the model's probability of blank on arrival at each frame
    next_label: np.ndarray  # [T] its probability of the reference token that is due there
    label_posterior: np.ndarray  # [T, U] posterior that token u is emitted at frame t; sums to 1 over t

    @property
    def confidence(self) -> np.ndarray:
        """[U] how much of each token falls on its likeliest frame: below about 0.6 the emission is spread."""
        return self.label_posterior.max(axis=0, initial=0.0)


@torch.inference_mode()
def emission_posteriors(
    model: Any,
    features: torch.Tensor,
    targets: Sequence[int],
    *,
    cut_id: str = "",
    text: str = "",
    symbols: Sequence[str] = (),
    topology: str = "regular",
    context: Context | None = None,
) -> EmissionPosteriors:
    """Forward-backward over all alignments of one reference (Graves 2012, section 2.4), as training sees them.

    Args:
        model: a transducer in evaluation mode.
        features: ``[T_features, F]`` of the utterance with its silent tail, on the model's device.
        targets: token ids of the reference, no blanks; may be empty.
        cut_id, text: for the plot.
        symbols: of the vocabulary, to name the tokens; ids are shown without it.
        topology: of the lattice that the model was trained on, see losses/lattice.py.
        context: what the encoder hears at a time; None is all.

    Raises:
        ValueError: the reference has more tokens than the topology allows, or the utterance is too short for a single
            encoder frame.
    """
    lens = torch.tensor([features.shape[0]], device=features.device)
    enc, enc_lens = model.encode(features[None], lens, *(context or Context()))
    frames = int(enc_lens[0])
    if frames < 1:
        name = cut_id or "the utterance"
        raise ValueError(f"{name} has {features.shape[0]} feature frames, too few for an encoder frame; append silence")
    blank_lp, label_lp = _lattice_log_probs(model, enc[0, :frames], targets)
    one = torch.tensor([len(targets)])
    found = occupancy(blank_lp[None], label_lp[None], torch.tensor([frames]), one, topology=topology)
    # Who arrives at frame t with u tokens has taken the blank of frame t - 1 after u tokens, or in "modified" the
    # label of frame t - 1 after u - 1 tokens.
    arrival = torch.zeros(frames, len(targets) + 1, dtype=torch.float64)
    arrival[0, 0] = 1.0
    arrival[1:] = found.blank[0, :-1]
    if topology == "modified":
        arrival[1:, 1:] += found.label[0, :-1]
    return EmissionPosteriors(
        cut_id=cut_id,
        text=text,
        symbols=[symbols[token] if symbols else str(token) for token in targets],
        blank=(arrival * blank_lp.exp()).sum(1).numpy(),
        next_label=(arrival[:, :-1] * label_lp.exp()).sum(1).numpy(),
        label_posterior=found.label[0].double().numpy(),
    )


def _lattice_log_probs(model: Any, enc: torch.Tensor, targets: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of blank ``[T, U + 1]`` and of the next reference token ``[T, U]``, float64 on the CPU."""
    tokens = torch.tensor(list(targets), dtype=torch.int64, device=enc.device)
    state = model.predictor.init_state(1, enc.device)
    outputs = [model.predictor.output(state)]
    for token in tokens:
        state = model.predictor.step(token[None], state)
        outputs.append(model.predictor.output(state))
    pred_p = model.joiner.project_predictor(torch.cat(outputs))
    enc_p = model.joiner.project_encoder(enc)
    vocab_size = model.joiner.logits(enc_p[:1], pred_p[:1]).shape[-1]
    block = max(1, _BLOCK_LOGITS // (vocab_size * len(pred_p)))
    blanks, labels = [], []
    for part in enc_p.split(block):
        log_probs = model.joiner.logits(part[:, None], pred_p[None]).double().log_softmax(-1)
        blanks.append(log_probs[..., BLANK])
        labels.append(log_probs[:, :-1].gather(2, tokens.expand(len(part), -1)[..., None])[..., 0])
    return torch.cat(blanks).cpu(), torch.cat(labels).cpu()


def emission_figure(posteriors: EmissionPosteriors) -> Figure:
    """Above: what greedy search weighs, blank against the token that is due. Below: where each token is emitted.

    Drawn through matplotlib's objects, without pyplot and its global state; ``figure.savefig(path)`` works anywhere.
    """
    times = ENCODER_FRAME_MS / 1000 * np.arange(len(posteriors.blank))
    width = float(np.clip(0.12 * len(times), 7, 24))
    figure = Figure(figsize=(width, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(times, posteriors.blank, color="0.55", label="blank")
    upper.plot(times, posteriors.next_label, color="C3", marker=".", label="token that is due")
    upper.set_ylabel("probability on arrival")
    upper.legend(loc="center right", fontsize="small")
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    # parse_math: a dollar sign in a token must not start mathematical text.
    plain = {"parse_math": False, "fontfamily": families()}
    for u, symbol in enumerate(posteriors.symbols):
        colour = colours[u % len(colours)]
        values = posteriors.label_posterior[:, u]
        peak = int(values.argmax())
        lower.plot(times, values, color=colour)
        lower.fill_between(times, values, color=colour, alpha=0.2)
        style = {"ha": "center", "va": "bottom", "color": colour, "fontsize": "small"} | plain
        lower.annotate(drawable(symbol), (times[peak], values[peak]), **style)
    lower.set_ylabel("emission posterior")
    lower.set_xlabel("seconds")
    for axes in (upper, lower):
        axes.set_ylim(-0.02, 1.12)
        axes.grid(alpha=0.3)
    title = f"{posteriors.cut_id}: {posteriors.text}" if posteriors.cut_id else posteriors.text
    upper.set_title(drawable(title[:120])[:120], fontsize="small", loc="left", **plain)
    return figure


def emissions_to_dict(utterances: Iterable[EmissionPosteriors]) -> dict[str, Any]:
    """For JSON: ``{"utterances": [{cut_id, text, frame_shift_s, series: [{symbol, posterior: [T]}]}]}``.

    The first series of each utterance is blank's probability on arrival, then come the tokens' emission posteriors.
    """

    def rounded(values: np.ndarray) -> list[float]:
        return [round(float(value), 4) for value in values]

    found = []
    for one in utterances:
        series = [{"symbol": "<blk>", "posterior": rounded(one.blank)}]
        series += [
            {"symbol": symbol, "posterior": rounded(one.label_posterior[:, u])} for u, symbol in enumerate(one.symbols)
        ]
        row = {"cut_id": one.cut_id, "text": one.text, "frame_shift_s": ENCODER_FRAME_MS / 1000, "series": series}
        found.append(row)
    return {"utterances": found}


def worst_cuts(
    cuts: Iterable[MonoCut], results: Sequence[Decoded], count: int, errors_in: ErrorUnit = "words"
) -> list[MonoCut]:
    """The cuts of the ``count`` worst utterances; where fewer have errors, the first ones by id follow."""
    worst = [utterance.cut_id for utterance in worst_utterances(results, count, errors_in)]
    chosen = list(dict.fromkeys(worst + sorted(result.cut_id for result in results)))[:count]
    by_id = {cut.id: cut for cut in cuts if cut.id in set(chosen)}
    return [by_id[cut_id] for cut_id in chosen]


def write_emissions(
    out_dir: Path,
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    cuts: Iterable[MonoCut],
    config: Experiment,
    device: str | torch.device = "cpu",
) -> list[EmissionPosteriors]:
    """Posteriors of some utterances, as ``emissions-NAME.json`` and a picture ``emissions-NAME-N.png`` of each.

    A reference that the tokenizer cannot spell has no alignment and is left out.

    Raises:
        OSError: a file cannot be written.
    """
    found = []
    with evaluation_mode(model):
        for cut in cuts:
            batch = next(iter(eval_loader([cut], None, config.data, num_workers=0))).to(device)
            text, symbols = batch.texts[0], [tokenizer.shown(token) for token in range(tokenizer.vocab_size)]
            try:
                targets = tokenizer.encode(text)
            except UnknownToken:
                continue
            features = batch.features[0, : int(batch.feature_lens[0])]
            found.append(
                emission_posteriors(
                    model,
                    features,
                    targets,
                    cut_id=cut.id,
                    text=text,
                    symbols=symbols,
                    topology=config.loss.topology,
                    context=config.decoding.context,
                )
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"emissions-{name}.json"
    path.write_text(json.dumps(emissions_to_dict(found), ensure_ascii=False), encoding="utf-8")
    for number, one in enumerate(found, 1):
        emission_figure(one).savefig(out_dir / f"emissions-{name}-{number}.png", dpi=100)
    return found
