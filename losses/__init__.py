"""Transducer (RNN-T) losses: one call, `transducer_loss`, for joiner inputs, and `rnnt_loss` for logits.

    from losses import transducer_loss, rnnt_loss

Both are exact, check what they are given, never read padding, and work on CPU and CUDA in float64, float32, bfloat16
and float16 (lattice in float64). `lattice_loss`, `occupancy` and `viterbi_alignment` work on blank and label log-probs.
"""

from losses.api import LOSSES, TransducerLossOptions, TransducerLossOutput, log_probs, rnnt_loss, transducer_loss
from losses.lattice import Alignment, Occupancy, lattice_loss, occupancy, viterbi_alignment

__all__ = [
    "LOSSES",
    "Alignment",
    "Occupancy",
    "TransducerLossOptions",
    "TransducerLossOutput",
    "lattice_loss",
    "log_probs",
    "occupancy",
    "rnnt_loss",
    "transducer_loss",
    "viterbi_alignment",
]
