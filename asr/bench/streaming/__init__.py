"""Measurements of decoding streams."""

from __future__ import annotations

MEASUREMENTS = {
    "chunk": "how long does one chunk of one stream take?",
    "rate": "how many times real time do whole utterances, and many streams at once, decode?",
}
