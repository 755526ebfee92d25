"""A small residual network for faces, quick on a CPU.

Shapes: B images of side S, C = 2 width channels, map [B, C, S/4, S/4], vector [B, F].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Image -> (map at stride 4 that has seen the coarse levels too, vector that keeps the coarse map's layout).

    Stem 5 x 5 at stride 2, then four levels at strides 4, 8, 16, 32, each a strided convolution and `blocks[i]`
    residual blocks (3 x 3, BatchNorm, ReLU). The map adds the levels top-down (1 x 1 convolutions, upsampling). The
    vector is the coarsest level, narrowed to `code` channels and flattened: where a thing is stays visible.

    Args:
        image_size: S, a multiple of 32.
        width: channels of the stem; the levels have 2, 4, 8, 8 times as many.
        blocks: residual blocks of the four levels.
        code: channels of the vector's map.
    """

    stride = 4
    """Image pixels per cell of the map."""

    def __init__(
        self, image_size: int, *, width: int = 32, blocks: Sequence[int] = (1, 1, 1, 1), code: int = 128
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"Backbone: image_size must be a positive multiple of 32, got {image_size}")
        if len(blocks) != 4 or min(blocks) < 0 or min(width, code) < 1:
            raise ValueError(f"Backbone: expected width, code >= 1, four blocks >= 0, got {width}, {code}, {blocks!r}")
        self.image_size = image_size
        channels = [2 * width, 4 * width, 8 * width, 8 * width]
        self.map_channels, self.features = channels[0], code * (image_size // 32) ** 2
        self.stem = unit(3, width, kernel=5, stride=2)
        self.levels = nn.ModuleList(
            nn.Sequential(unit(inner, outer, stride=2), *(Residual(outer) for _ in range(count)))
            for inner, outer, count in zip([width, *channels], channels, blocks, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(outer, channels[0], 1, bias=False) for outer in channels)
        self.merge = unit(channels[0], channels[0])
        self.narrow = unit(channels[-1], code, kernel=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: [B, 3, S, S] in [0, 1] -> map [B, C, S/4, S/4], vector [B, F]."""
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            expected = f"[B, 3, {self.image_size}, {self.image_size}]"
            raise ValueError(f"Backbone: images must be {expected}, got {list(images.shape)}")
        x = self.stem((2 * images - 1).contiguous(memory_format=torch.channels_last))
        levels = []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        merged: Tensor | None = None
        for lateral, level in zip(reversed(self.lateral), reversed(levels), strict=True):
            here = lateral(level)
            merged = here if merged is None else here + functional.interpolate(merged, scale_factor=2.0)
        return self.merge(merged), self.narrow(x).flatten(1)


class Residual(nn.Module):
    """relu(x + conv(conv(x))), 3 x 3, BatchNorm; the branch starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = unit(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


def unit(inner: int, outer: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution (same padding), BatchNorm, ReLU."""
    convolution = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer), nn.ReLU(inplace=True))
