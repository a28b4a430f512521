"""Searches, scoring and the two ways to use them: decode a cut set, transcribe files."""

from __future__ import annotations

from collections.abc import Callable

import torch

from asr.decoding.greedy import greedy
from asr.decoding.merge_search import modified_beam_search
from asr.decoding.search import DecodingConfig, Hypothesis, SearchModel

Search = Callable[[SearchModel, torch.Tensor, torch.Tensor, DecodingConfig], list[Hypothesis]]

SEARCHES: dict[str, Search] = {
    "greedy": greedy,
    "modified_beam_search": modified_beam_search,
}

__all__ = ["SEARCHES", "DecodingConfig", "Hypothesis", "Search", "SearchModel", "greedy", "modified_beam_search"]
