"""What the backbones share: their contract, a convolution with its normalisation, a residual block.

Shapes: B images of side S, C channels of the map, h = w = S / stride, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.norm import normalization

__all__ = ["Features", "Residual", "Trunk", "unit"]


class Features(NamedTuple):
    """What a backbone says of a batch.

    map: [B, C, h, w]. vector: [B, F]. earlier: maps [B, C, h, w] of stacks before the last, for losses of their own.
    A module that is exported must return plain tuples, `tuple(features[:2])`: `torch.export.save` knows no named ones.
    """

    map: Tensor
    vector: Tensor
    earlier: tuple[Tensor, ...] = ()


class Trunk(nn.Module):
    """A backbone: images [B, 3, S, S] in [0, 1] -> `Features`. Another's fits if it has these attributes."""

    stride = 4
    """Image pixels per cell of the map."""

    image_size: int
    """S."""

    map_channels: int
    """C."""

    features: int
    """F."""

    earlier: int = 0
    """Maps of stacks before the last."""

    narrow: nn.Module
    """What the vector alone passes through; freeze it where only the map is used."""

    def vector(self, images: Tensor) -> Tensor:
        """The vector alone [B, F]; a backbone overrides it that then has less to compute."""
        return self(images).vector

    def prepared(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], channels last. ValueError unless [B, 3, S, S]."""
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            expected = f"[B, 3, {self.image_size}, {self.image_size}]"
            raise ValueError(f"{type(self).__name__}: images must be {expected}, got {list(images.shape)}")
        return (2 * images - 1).contiguous(memory_format=torch.channels_last)


class Residual(nn.Module):
    """relu(x + conv(conv(x))), 3 x 3, normalised; the branch starts at 0."""

    def __init__(self, channels: int, norm: str = "batch") -> None:
        super().__init__()
        self.first = unit(channels, channels, norm=norm)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = normalization(channels, norm)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


def unit(inner: int, outer: int, *, kernel: int = 3, stride: int = 1, norm: str = "batch") -> nn.Sequential:
    """Convolution (same padding), `normalization`, ReLU."""
    convolution = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, normalization(outer, norm), nn.ReLU(inplace=True))
