"""Normalisation of maps [B, C, h, w] by the batch or by groups of channels."""

from __future__ import annotations

from torch import nn

__all__ = ["NORMS", "normalization"]

NORMS = ("batch", "group")
CHANNELS = 8  # in a group, at least: a group of one channel on a map of one cell would be its bias alone


def normalization(channels: int, norm: str) -> nn.BatchNorm2d | nn.GroupNorm:
    """ "batch": BatchNorm2d. "group": GroupNorm, the most groups of equal size with at least 8 channels each.

    An image's groups do not depend on the other images: for tiny batches, and for equal results on many ranks.

    Raises:
        ValueError: another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = next(count for count in range(max(1, channels // CHANNELS), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
