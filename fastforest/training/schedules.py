"""Schedules: pure functions of progress in [0, 1] or of the rounds' errors, so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["ANNEALINGS", "LEARNING_RATES", "anneal", "learning_rate_factor", "plateau_factor", "stale_rounds"]

LEARNING_RATES = ("cosine", "step", "constant", "multistep")
ANNEALINGS = ("linear", "exponential")

STEPS = (0.5, 0.75, 0.9)
"""Where "step" divides the learning rate."""


def learning_rate_factor(
    kind: str, progress: float, floor: float = 0.01, *, milestones: Sequence[float] = STEPS, drop: float = 0.1
) -> float:
    """What multiplies the learning rate at `progress` t.

    "cosine": floor + (1 - floor) (1 + cos(pi t)) / 2. "step": 1, then a factor 0.3 at each of `STEPS`. "constant": 1.
    "multistep": 1, then a factor `drop` at each of `milestones`. The floor is of "cosine" and "step".

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
    if kind == "multistep":
        return drop ** sum(t >= milestone for milestone in milestones)
    return 1.0


def plateau_factor(
    errors: Iterable[float], patience: int, *, drop: float = 0.1, min_delta: float = 0.0, floor: float = 0.01
) -> float:
    """What multiplies the learning rate after rounds with these errors: `drop`, once for every `patience` rounds in a
    row without an improvement by more than `min_delta`; at least `floor`. NaN improves nothing.

    >>> plateau_factor([0.5, 0.4, 0.4, 0.41], patience=2, drop=0.5)
    0.5
    """
    best, waited, factor = math.inf, 0, 1.0
    for error in errors:
        if error < best - min_delta:
            best, waited = error, 0
            continue
        waited += 1
        if waited == patience:
            factor, waited = factor * drop, 0
    return max(floor, factor)


def stale_rounds(errors: Iterable[float], min_delta: float = 0.0) -> int:
    """Rounds since the last improvement by more than `min_delta`; 0: the last round improved. NaN improves nothing.

    >>> stale_rounds([0.5, 0.4, 0.45, 0.4])
    2
    """
    best, waited = math.inf, 0
    for error in errors:
        improved = error < best - min_delta
        best, waited = (error, 0) if improved else (best, waited + 1)
    return waited


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
