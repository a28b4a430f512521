"""Encoders: features to frames."""

from asr.models.encoders.conformer import Conformer, ConformerConfig

ENCODERS = {"conformer": Conformer}

__all__ = ["ENCODERS", "Conformer", "ConformerConfig"]
