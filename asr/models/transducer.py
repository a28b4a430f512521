"""The transducer: encoder, predictor, joiner, and an optional CTC head on the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from asr.models.encoders import ENCODERS, ConformerConfig
from asr.models.joiner import Joiner, JoinerConfig, init_blank_bias
from asr.models.predictors import PREDICTORS, PredictorConfig
from losses import TransducerLossOptions, TransducerLossOutput
from losses.api import USE_SIMPLE

if TYPE_CHECKING:  # asr.config imports this module
    from asr.config import Experiment


@dataclass
class ModelConfig:
    """What is built.

    Args:
        preset: named sizes (xs, s, m, l, xl, xxl); explicit values below win over it.
        encoder_type: a key of ENCODERS.
        num_mel_bins: F, of the features that the encoder reads.
        encoder: sizes of the encoder.
        predictor: sizes of the predictor.
        joiner: sizes of the joiner.
        ctc: add a linear CTC head on the encoder frames.
    """

    preset: Literal["xs", "s", "m", "l", "xl", "xxl"] = "s"
    encoder_type: Literal["conformer"] = "conformer"
    num_mel_bins: int = 80
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    joiner: JoinerConfig = field(default_factory=JoinerConfig)
    ctc: bool = False


@dataclass
class LossConfig:
    """The training objective.

    Args:
        method: a key of losses.LOSSES. "fused", "batched" and "samplewise" give the same loss; "pruned" (Kuang et al.
            2022) gives the model a trivial joiner, and computes prune_range columns of each frame.
        topology: "modified" spends a frame on every token, as all searches here and on devices do; "regular" (Graves
            2012) may emit several in one frame. A predictor of short context cannot tell the second of two equal
            words from the first: "regular" then has to spread each over several frames, none of them sure, since a
            sure emission would be sure again in the same frame; "modified" lets it be sure.
        fastemit_lambda: FastEmit regularisation (Yu et al. 2021); 0 is off.
        delay_penalty: lambda of the delay-penalized transducer (Kang et al. 2023); 0 is off.
        clamp: limit of each entry of the gradient by the logits; 0 is off.
        alignment_power: gamma in -(1 / gamma) log sum over alignments of P(alignment)^gamma; above 1, emissions grow
            sharp: one frame instead of several.
        shaping_from: fraction of the run after which delay_penalty and alignment_power act; they disturb a model that
            does not know its tokens yet.
        occupancy_threshold: cells of the lattice up to this occupancy are left out of the gradient; null is the
            method's default.
        memory_limit: memory that the loss may take, such as "500MB", for methods that can keep to one; null is none.
        prune_range: of "pruned": columns of each frame, 2 or more.
        lm_only_scale: of "pruned": share of the predictor-only log-probs in the simple loss (Kuang et al. 2022, sec.
            3.2).
        am_only_scale: of "pruned": share of the encoder-only log-probs in the simple loss.
        simple_loss_scale: of "pruned": weight of the simple loss, the trivial joiner's, after the warm-up.
        simple_warmup: of "pruned": fraction of the run in which the weight of the simple loss falls from 1 to
            simple_loss_scale and that of the pruned loss rises from 0.1 to 1, since bounds mean little before the
            trivial joiner has learnt. icefall counts 2,000 steps; a fraction, as shaping_from and the fall of the
            learning rate are, also fits a run of 400 steps.
        ctc_weight: the CTC loss enters with this weight; needs ``model.ctc``.
        ctc_targets: what CTC writes: the "tokens", or the "characters" (of byte_bpe, bytes) that spell them, as
            hierarchical CTC (Sanabria and Metze 2018) does in one of its layers. A model learns to hear from few hours
            by characters, each of which it meets far more often than a word piece.
    """

    method: str = "fused"
    topology: Literal["regular", "modified", "constrained"] = "modified"
    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    clamp: float = 0.0
    alignment_power: float = 1.0
    shaping_from: float = 0.0
    occupancy_threshold: float | None = None
    memory_limit: str | None = None
    prune_range: int = 5
    lm_only_scale: float = 0.25
    am_only_scale: float = 0.0
    simple_loss_scale: float = 0.5
    simple_warmup: float = 0.1
    ctc_weight: float = 0.0
    ctc_targets: Literal["tokens", "characters"] = "tokens"

    def options(self, done: float = 1.0) -> TransducerLossOptions:
        """What the loss teaches when the fraction ``done`` of the run lies behind.

        Raises:
            ValueError: a value out of range, by name.
        """
        shaping = done >= self.shaping_from
        return TransducerLossOptions(
            fastemit_lambda=self.fastemit_lambda,
            delay_penalty=self.delay_penalty if shaping else 0.0,
            alignment_power=self.alignment_power if shaping else 1.0,
            clamp=self.clamp,
            occupancy_threshold=self.occupancy_threshold,
            prune_range=self.prune_range,
            lm_only_scale=self.lm_only_scale,
            am_only_scale=self.am_only_scale,
        )

    def scales(self, done: float = 1.0) -> tuple[float, float]:
        """Weights of the simple and of the pruned loss when the fraction ``done`` of the run lies behind."""
        warm = min(1.0, done / self.simple_warmup) if self.simple_warmup else 1.0
        return 1.0 - warm * (1.0 - self.simple_loss_scale), 0.1 + 0.9 * warm


class TransducerLosses(NamedTuple):
    """Sums over the batch's utterances, to be divided by the trainer; loss is what is minimised.

    loss = transducer + ctc_weight * ctc; with a simple loss, simple_scale * simple + pruned_scale * transducer +
    ctc_weight * ctc, by ``LossConfig.scales``. simple and ctc are None where there is none.
    """

    loss: Tensor
    transducer: Tensor
    simple: Tensor | None
    ctc: Tensor | None


class Transducer(nn.Module):
    """RNN transducer (Graves 2012) with a Conformer encoder.

    Args:
        config: architecture.
        vocab_size: V, blank (id 0) included.
        feature_mean, feature_scale: float [F], fixed buffers of the encoder; None for zeros and ones.
        simple_joiner: add the trivial joiner that loss.method=pruned trains along.
        spelling: of each token the tokens of its characters, as `Tokenizer.spelling`, for loss.ctc_targets=characters;
            not among the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        *,
        simple_joiner: bool = False,
        spelling: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.encoder = ENCODERS[config.encoder_type](config.encoder, config.num_mel_bins, feature_mean, feature_scale)
        self.predictor = PREDICTORS[config.predictor.kind](config.predictor, vocab_size)
        self.joiner = Joiner(config.joiner, self.encoder.dim, config.predictor.dim, vocab_size, simple_joiner)
        self.ctc_head = nn.Linear(self.encoder.dim, vocab_size) if config.ctc else None
        if self.ctc_head is not None:
            init_blank_bias(self.ctc_head)
        self.spelling: Tensor | None
        self.register_buffer("spelling", None if spelling is None else _padded(spelling), persistent=False)

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_frames: int = 0,
        left_context_frames: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, F] and [B] to encoder frames [B, T', D] and their lengths [B]; see the encoder's forward."""
        return self.encoder(features, feature_lens, chunk_frames, left_context_frames)

    def ctc_log_probs(self, enc: Tensor) -> Tensor | None:
        """[B, T', D] to float32 log-probabilities [B, T', V], or None when the model has no CTC head."""
        if self.ctc_head is None:
            return None
        return self.ctc_head(enc).float().log_softmax(-1)

    def transducer_loss(
        self, enc: Tensor, enc_lens: Tensor, targets: Tensor, target_lens: Tensor, loss: LossConfig, done: float = 1.0
    ) -> TransducerLossOutput:
        """Summed transducer loss, and simple loss, of encoder frames [B, T', D] that are already there."""
        return self.joiner(
            enc,
            self.predictor(targets),
            targets,
            enc_lens,
            target_lens,
            method=loss.method,
            topology=loss.topology,
            reduction="sum",
            options=loss.options(done),
            memory_limit=loss.memory_limit,
        )

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        targets: Tensor,
        target_lens: Tensor,
        loss: LossConfig,
        chunk_frames: int = 0,
        left_context_frames: int = -1,
        done: float = 1.0,
    ) -> TransducerLosses:
        """Losses of one batch.

        Args:
            features: [B, T, F] float.
            feature_lens: [B] int64.
            targets: [B, U] int64, padded with 0.
            target_lens: [B] int64.
            loss: method and weights.
            chunk_frames, left_context_frames: chunk mask of this batch, see the encoder's forward.
            done: fraction of the run that lies behind, for what ``loss`` changes on the way.
        """
        enc, enc_lens = self.encode(features, feature_lens, chunk_frames, left_context_frames)
        result = self.transducer_loss(enc, enc_lens, targets, target_lens, loss, done)
        total = result.loss
        if result.simple_loss is not None:
            simple_scale, pruned_scale = loss.scales(done)
            total = simple_scale * result.simple_loss + pruned_scale * result.loss
        if loss.ctc_weight == 0.0:
            return TransducerLosses(total, result.loss, result.simple_loss, None)
        log_probs = self.ctc_log_probs(enc)
        if log_probs is None:
            raise ValueError(f"loss.ctc_weight={loss.ctc_weight} needs a CTC head; set model.ctc=true")
        if loss.ctc_targets == "characters":
            if self.spelling is None:
                raise ValueError("loss.ctc_targets=characters needs the spelling of the tokens, which is not given")
            targets, target_lens = spell(targets, target_lens, self.spelling)
        with torch.autocast(features.device.type, enabled=False):
            ctc = F.ctc_loss(
                log_probs.transpose(0, 1), targets, enc_lens, target_lens, blank=0, reduction="sum", zero_infinity=True
            )
        return TransducerLosses(total + loss.ctc_weight * ctc, result.loss, result.simple_loss, ctc)


def _padded(spelling: Sequence[Sequence[int]]) -> Tensor:
    """[V, L] int64, padded with 0."""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in spelling], batch_first=True)


def spell(targets: Tensor, target_lens: Tensor, spelling: Tensor) -> tuple[Tensor, Tensor]:
    """Targets written in characters.

    Args:
        targets: [B, U] int64, padded with anything.
        target_lens: [B] int64.
        spelling: [V, L] int64, of each token those of its characters, padded with 0.

    Returns:
        The characters of all utterances one after the other, [N] int64, and their number in each, [B] int64.
    """
    inside = torch.arange(targets.size(1), device=targets.device) < target_lens[:, None]
    characters = spelling[targets * inside]
    there = (characters != 0) & inside[:, :, None]
    return characters[there], there.sum((1, 2))


def build_model(
    experiment: Experiment,
    vocab_size: int,
    feature_mean: Tensor | None = None,
    feature_scale: Tensor | None = None,
    spelling: Sequence[Sequence[int]] | None = None,
) -> Transducer:
    """The model of an experiment: its architecture, and the trivial joiner if its loss needs one."""
    simple = experiment.loss.method in USE_SIMPLE
    return Transducer(
        experiment.model, vocab_size, feature_mean, feature_scale, simple_joiner=simple, spelling=spelling
    )


def parameter_counts(model: Transducer) -> dict[str, int]:
    """Trainable parameters by part, and their sum under "total"; "simple", the trivial joiner, is not in "joiner"."""
    parts = {
        "encoder": model.encoder,
        "predictor": model.predictor,
        "joiner": model.joiner,
        "simple": model.joiner.simple,
        "ctc": model.ctc_head,
    }
    counts = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in parts.items()
        if part is not None
    }
    counts["joiner"] -= counts.get("simple", 0)
    counts["total"] = sum(counts.values())
    return counts
