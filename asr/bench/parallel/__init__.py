"""Measurements of training on several processes, and within a limit of memory."""

from __future__ import annotations

MEASUREMENTS = {
    "checkpointing": "what does each mode of activation checkpointing keep, and how long does a step take?",
    "combinations": "do all ways to spread a step over processes train what one process trains?",
    "largest": "how large a batch does the memory of a GPU hold, by loss and vocabulary?",
    "limit": "what does memory.limit choose, does it hold, and is the loss the same?",
    "offload": "how much memory does the optimizer's state in a file save, with the same weights?",
    "shares": "bytes of weights, gradients and optimizer state on each process, and its resident memory",
    "speed": "how much faster is a step in bf16?",
    "throughput": "audio seconds a second, memory, and overlap, by ZeRO stage and loss",
}
