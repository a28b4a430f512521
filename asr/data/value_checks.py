"""Checks that configurations of augmentation share: of ranges and of probabilities."""

from __future__ import annotations

from collections.abc import Sequence


def check_range(name: str, values: Sequence[float], *, least: float | None = None, or_empty: str | None = None) -> None:
    """Raises ValueError unless ``values`` are two numbers (low, high), or none where ``or_empty`` names the effect."""
    if not values and or_empty is not None:
        return
    if len(values) != 2:
        alternative = "" if or_empty is None else f", or [] for {or_empty}"
        raise ValueError(f"{name}={values}; pass two numbers (low, high){alternative}")
    if values[0] > values[1]:
        raise ValueError(f"{name}={values}; the first number must not exceed the second")
    if least is not None and values[0] < least:
        raise ValueError(f"{name}={values}; the first number must be at least {least}")


def check_probability(name: str, value: float) -> None:
    """Raises ValueError unless it lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}; a probability lies in [0, 1]")
