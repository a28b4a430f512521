"""Measurements of training on several processes, and within a limit of memory."""

from __future__ import annotations

MEASUREMENTS = {
    "combinations": "do all ways to spread a step over processes train what one process trains?",
    "limit": "what does memory.limit choose, does it hold, and is the loss the same?",
    "speed": "how much faster is a step in bf16?",
    "throughput": "audio seconds a second, memory, and overlap, by ZeRO stage and loss",
}
