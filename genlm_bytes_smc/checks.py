"""Checks of numbers that users give, in the same words everywhere."""

from __future__ import annotations

import math
from typing import Any


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`.

    Raises:
        TypeError: no integer. ValueError: too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_threshold(value: Any) -> None:
    """Raise unless `value` is a number in [0, 1].

    Raises:
        TypeError: no number. ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"ess_threshold must be a number in [0, 1], got {value!r}")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"ess_threshold must be in [0, 1], got {value}")
