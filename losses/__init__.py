"""Transducer (RNN-T) losses: one call, `transducer_loss`, for joiner inputs, and `rnnt_loss` for logits.

    from losses import transducer_loss, rnnt_loss

Both are exact, check what they are given, never read padding, and work on CPU and CUDA in float64, float32, bfloat16
and float16 (lattice in float64). `lattice_loss`, `occupancy`, `viterbi_alignment` and `posterior_alignment` work on
blank and label log-probs; `align` gives all that the lattice says of when each token is emitted from the inputs of
`transducer_loss`, and `token_times`, `expected_frames`, `emission_delay` and `occupancy_png` say it in other forms.
"""

from losses.alignment import (
    Alignment,
    EmissionDelay,
    Occupancy,
    PosteriorAlignment,
    align,
    emission_delay,
    expected_frames,
    occupancy,
    occupancy_png,
    posterior_alignment,
    token_times,
    viterbi_alignment,
)
from losses.api import LOSSES, TransducerLossOptions, TransducerLossOutput, log_probs, rnnt_loss, transducer_loss
from losses.lattice import lattice_loss

__all__ = [
    "LOSSES",
    "Alignment",
    "EmissionDelay",
    "Occupancy",
    "PosteriorAlignment",
    "TransducerLossOptions",
    "TransducerLossOutput",
    "align",
    "emission_delay",
    "expected_frames",
    "lattice_loss",
    "log_probs",
    "occupancy",
    "occupancy_png",
    "posterior_alignment",
    "rnnt_loss",
    "token_times",
    "transducer_loss",
    "viterbi_alignment",
]
