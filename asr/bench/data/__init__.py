"""Measurements of the data's way into training."""

from __future__ import annotations

MEASUREMENTS = {
    "growth": "does memory grow over thousands of batches? (a plot)",
    "manifest": "how long does it take, and how much memory, to open a manifest of 300,000 cuts?",
    "on_the_fly": "how much of a core do reading, augmentation and features take?",
    "resume": "how long does it take to go on at batch 5,000, and are the batches the same?",
    "wait": "what part of a training step is spent waiting for batches?",
}
