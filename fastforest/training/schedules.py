"""Schedules: pure functions of progress in [0, 1], so that a run's position is one number and resuming is exact."""

from __future__ import annotations

import math

__all__ = ["ANNEALINGS", "LEARNING_RATES", "anneal", "learning_rate_factor"]

LEARNING_RATES = ("cosine", "step", "constant")
ANNEALINGS = ("linear", "exponential")

STEPS = (0.5, 0.75, 0.9)
"""Where "step" divides the learning rate."""


def learning_rate_factor(kind: str, progress: float, floor: float = 0.01) -> float:
    """What multiplies the learning rate at `progress` t.

    "cosine": floor + (1 - floor) (1 + cos(pi t)) / 2. "step": 1, then a factor 0.3 at each of `STEPS`. "constant": 1.

    Raises:
        ValueError: unknown kind.

    >>> [round(learning_rate_factor("cosine", t, 0.0), 3) for t in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    if kind not in LEARNING_RATES:
        raise ValueError(f"learning_rate_factor: kind must be one of {', '.join(LEARNING_RATES)}, got {kind!r}")
    t = min(1.0, max(0.0, progress))
    if kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2
    if kind == "step":
        return max(floor, 0.3 ** sum(t >= step for step in STEPS))
    return 1.0


def anneal(kind: str, start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1: "linear", or "exponential" (equal ratios in equal times).

    Raises:
        ValueError: unknown kind, or a bound that is not positive for "exponential".

    >>> anneal("linear", 1.0, 9.0, 0.5), round(anneal("exponential", 1.0, 9.0, 0.5), 12)
    (5.0, 3.0)
    """
    if kind not in ANNEALINGS:
        raise ValueError(f"anneal: kind must be one of {', '.join(ANNEALINGS)}, got {kind!r}")
    t = min(1.0, max(0.0, progress))
    if kind == "linear":
        return start + (end - start) * t
    if start <= 0 or end <= 0:
        raise ValueError(f"anneal: exponential needs positive bounds, got {start} and {end}")
    return start * (end / start) ** t
