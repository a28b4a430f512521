"""The transducer: encoder, predictor, joiner, and an optional CTC head on the encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.models.encoders import ENCODERS, ConformerConfig
from asr.models.joiner import Joiner, JoinerConfig, init_blank_bias
from asr.models.predictors import PREDICTORS, PredictorConfig
from losses import TransducerLossOptions, TransducerLossOutput


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
        method: a key of losses.LOSSES.
        topology: "modified" spends a frame on every token, as all searches here and on devices do; "regular" (Graves
            2012) may emit several in one frame. A predictor of short context cannot tell the second of two equal
            words from the first: "regular" then has to spread each over several frames, none of them sure, since a
            sure emission would be sure again in the same frame; "modified" lets it be sure.
        fastemit_lambda: FastEmit regularisation (Yu et al. 2021); 0 is off.
        delay_penalty: lambda of the delay-penalized transducer (Kang et al. 2023); 0 is off.
        alignment_power: gamma in -(1 / gamma) log sum over alignments of P(alignment)^gamma; above 1, emissions grow
            sharp: one frame instead of several.
        shaping_from: fraction of the run after which delay_penalty and alignment_power act; they disturb a model that
            does not know its tokens yet.
        ctc_weight: the CTC loss enters with this weight, the transducer loss with weight 1; needs ``model.ctc``.
    """

    method: str = "fused"
    topology: Literal["regular", "modified", "constrained"] = "modified"
    fastemit_lambda: float = 0.0
    delay_penalty: float = 0.0
    alignment_power: float = 1.0
    shaping_from: float = 0.0
    ctc_weight: float = 0.0


class TransducerLosses(NamedTuple):
    """Sums over the batch's utterances. loss = transducer + ctc_weight * ctc, to be divided by the trainer."""

    loss: Tensor
    transducer: Tensor
    ctc: Tensor | None


class Transducer(nn.Module):
    """RNN transducer (Graves 2012) with a Conformer encoder.

    Args:
        config: architecture.
        vocab_size: V, blank (id 0) included.
        feature_mean, feature_scale: float [F], fixed buffers of the encoder; None for zeros and ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
    ):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.encoder = ENCODERS[config.encoder_type](config.encoder, config.num_mel_bins, feature_mean, feature_scale)
        self.predictor = PREDICTORS[config.predictor.kind](config.predictor, vocab_size)
        self.joiner = Joiner(config.joiner, self.encoder.dim, config.predictor.dim, vocab_size)
        self.ctc_head = nn.Linear(self.encoder.dim, vocab_size) if config.ctc else None
        if self.ctc_head is not None:
            init_blank_bias(self.ctc_head)

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_frames: int | None = None,
        left_context_frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, F] and [B] to encoder frames [B, T', D] and their lengths [B]; see the encoder's forward."""
        return self.encoder(features, feature_lens, chunk_frames, left_context_frames)

    def ctc_log_probs(self, enc: Tensor) -> Tensor | None:
        """[B, T', D] to float32 log-probabilities [B, T', V], or None when the model has no CTC head."""
        if self.ctc_head is None:
            return None
        return self.ctc_head(enc).float().log_softmax(-1)

    def transducer_loss(
        self, enc: Tensor, enc_lens: Tensor, targets: Tensor, target_lens: Tensor, loss: LossConfig
    ) -> TransducerLossOutput:
        """Summed transducer loss of encoder frames [B, T', D] that are already there."""
        return self.joiner(
            enc,
            self.predictor(targets),
            targets,
            enc_lens,
            target_lens,
            method=loss.method,
            topology=loss.topology,
            reduction="sum",
            options=TransducerLossOptions(loss.fastemit_lambda, loss.delay_penalty, loss.alignment_power),
        )

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        targets: Tensor,
        target_lens: Tensor,
        loss: LossConfig,
        chunk_frames: int | None = None,
        left_context_frames: int | None = None,
    ) -> TransducerLosses:
        """Losses of one batch.

        Args:
            features: [B, T, F] float.
            feature_lens: [B] int64.
            targets: [B, U] int64, padded with 0.
            target_lens: [B] int64.
            loss: method and weights.
            chunk_frames, left_context_frames: chunk mask of this batch; None takes the encoder's configuration.
        """
        enc, enc_lens = self.encode(features, feature_lens, chunk_frames, left_context_frames)
        result = self.transducer_loss(enc, enc_lens, targets, target_lens, loss)
        if loss.ctc_weight == 0.0:
            return TransducerLosses(result.loss, result.loss, None)
        log_probs = self.ctc_log_probs(enc)
        if log_probs is None:
            raise ValueError(f"loss.ctc_weight={loss.ctc_weight} needs a CTC head; set model.ctc=true")
        with torch.autocast(features.device.type, enabled=False):
            ctc = F.ctc_loss(
                log_probs.transpose(0, 1), targets, enc_lens, target_lens, blank=0, reduction="sum", zero_infinity=True
            )
        return TransducerLosses(result.loss + loss.ctc_weight * ctc, result.loss, ctc)


def parameter_counts(model: Transducer) -> dict[str, int]:
    """Trainable parameters by part, and their sum under "total"."""
    parts = {"encoder": model.encoder, "predictor": model.predictor, "joiner": model.joiner, "ctc": model.ctc_head}
    counts = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in parts.items()
        if part is not None
    }
    counts["total"] = sum(counts.values())
    return counts
