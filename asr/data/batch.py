"""What the loader hands to the trainer and to decoding: utterances padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """Utterances padded to one length. Features are raw log-mel energies; the model normalises them.

    Args:
        features: float32 [B, T, F], zero after the end of each utterance (the silent tail belongs to the utterance).
        feature_lens: int64 [B], frames of each utterance with its tail.
        targets: int64 [B, U], token ids, padded with 0.
        target_lens: int64 [B].
        cut_ids: id of each utterance.
        texts: transcript of each utterance.
        durations_s: audio of each utterance in seconds, without the tail.
    """

    features: Tensor
    feature_lens: Tensor
    targets: Tensor
    target_lens: Tensor
    cut_ids: list[str]
    texts: list[str]
    durations_s: list[float]

    @property
    def size(self) -> int:
        """Number of utterances."""
        return len(self.cut_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on another device; ``non_blocking`` needs pinned memory to have an effect."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            feature_lens=self.feature_lens.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            target_lens=self.target_lens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; also called by torch's DataLoader when it pins memory."""
        return replace(
            self,
            features=self.features.pin_memory(),
            feature_lens=self.feature_lens.pin_memory(),
            targets=self.targets.pin_memory(),
            target_lens=self.target_lens.pin_memory(),
        )


def collate(
    features: Sequence[np.ndarray],
    targets: Sequence[Sequence[int]],
    cut_ids: Sequence[str],
    texts: Sequence[str],
    durations_s: Sequence[float],
) -> Batch:
    """Pad utterances into one batch.

    Args:
        features: float32 [T_i, F] of each utterance.
        targets: token ids of each utterance; may be empty.
        cut_ids: id of each utterance.
        texts: transcript of each utterance.
        durations_s: audio of each utterance in seconds.
    """
    feature_lens = [array.shape[0] for array in features]
    padded = np.empty((len(features), max(feature_lens), features[0].shape[1]), dtype=np.float32)
    for row, array in zip(padded, features, strict=True):
        row[: len(array)] = array
        row[len(array) :] = 0.0
    target_lens = [len(tokens) for tokens in targets]
    padded_targets = np.zeros((len(targets), max(target_lens)), dtype=np.int64)
    for i, tokens in enumerate(targets):
        padded_targets[i, : len(tokens)] = tokens
    return Batch(
        features=torch.from_numpy(padded),
        feature_lens=torch.tensor(feature_lens, dtype=torch.int64),
        targets=torch.from_numpy(padded_targets),
        target_lens=torch.tensor(target_lens, dtype=torch.int64),
        cut_ids=list(cut_ids),
        texts=list(texts),
        durations_s=list(durations_s),
    )
