"""Measurements of the data's way into training."""

from __future__ import annotations

MEASUREMENTS = {
    "growth": "does memory grow over thousands of batches? (a plot)",
    "on_the_fly": "how much of a core do reading, augmentation and features take?",
    "wait": "what part of a training step is spent waiting for batches?",
}
