"""Named model sizes. Parameters are counted with V = 500, stateless predictor and joiner included, without CTC head."""

from __future__ import annotations

from typing import Any

REFERENCE_VOCAB_SIZE = 500


def _sizes(dim: int, layers: int, heads: int, ff: int, kernel: int, channels: int, context_dim: int) -> dict[str, Any]:
    return {
        "encoder": {
            "dim": dim,
            "num_layers": layers,
            "num_heads": heads,
            "ff_dim": ff,
            "conv_kernel": kernel,
            "subsampling_channels": channels,
        },
        "predictor": {"dim": context_dim},
        "joiner": {"dim": context_dim},
    }


# nominal parameters in millions: xs 0.3, s 2, m 12, l 30.9, xl 80, xxl 118; a test holds each to 2%
PRESETS: dict[str, dict[str, Any]] = {
    "xs": _sizes(dim=64, layers=2, heads=4, ff=256, kernel=15, channels=16, context_dim=64),
    "s": _sizes(dim=128, layers=6, heads=4, ff=320, kernel=15, channels=32, context_dim=128),
    "m": _sizes(dim=256, layers=8, heads=4, ff=896, kernel=15, channels=64, context_dim=256),
    "l": _sizes(dim=384, layers=10, heads=6, ff=1248, kernel=15, channels=64, context_dim=320),
    "xl": _sizes(dim=512, layers=14, heads=8, ff=1792, kernel=31, channels=128, context_dim=384),
    "xxl": _sizes(dim=512, layers=19, heads=8, ff=2048, kernel=31, channels=128, context_dim=512),
}
PRESET_MILLIONS = {"xs": 0.3, "s": 2.0, "m": 12.0, "l": 30.9, "xl": 80.0, "xxl": 118.0}
