"""Networks for many landmarks, in plain torch.nn: maps at the image's own side, or coordinates.

Shapes: B images of side S, P landmarks. Points [B, P, 2] are (x, y) in image pixels, 0-based, pixel centres at integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.units import unit

__all__ = ["ResNet", "UNet"]


class UNet(nn.Module):
    """Image [B, 3, S, S] in [0, 1] -> maps [B, P, S, S]: heatmaps or logits, as the loss has it.

    Encoder and decoder of `levels` resolutions, two convolutions (3 x 3, BatchNorm, ReLU) each; max pooling down,
    nearest upsampling and the encoder's map beside it up (Ronneberger et al., U-Net, 2015). The maps are contiguous, one
    plane a landmark, which is how the losses read them; channels_last was no faster on a CPU.

    Args:
        landmarks: P.
        width: channels at full resolution; each level down has twice as many.
        levels: S must be a multiple of 2^(levels - 1).
        features: channels that the maps are linear in; below P the maps share them.

    Raises:
        ValueError: an argument below 1; on calling: images of another shape.
    """

    def __init__(self, landmarks: int, *, width: int = 32, levels: int = 5, features: int = 64) -> None:
        super().__init__()
        if min(landmarks, width, levels, features) < 1:
            raise ValueError(
                "UNet: landmarks, width, levels and features must be at least 1, "
                f"got {landmarks}, {width}, {levels}, {features}"
            )
        channels = [width * 2**level for level in range(levels)]
        self.multiple = 2 ** (levels - 1)
        self.down = nn.ModuleList(_double(inner, outer) for inner, outer in zip([3, *channels], channels, strict=False))
        above = list(reversed(channels))
        self.up = nn.ModuleList(_double(inner + outer, outer) for inner, outer in pairwise(above))
        self.head = unit(width, features)
        self.maps = nn.Conv2d(features, landmarks, 1)

    def forward(self, images: Tensor) -> Tensor:
        _check_images("UNet", images, self.multiple)
        x = 2 * images - 1
        kept: list[Tensor] = []
        for level in self.down:
            x = level(functional.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for level, beside in zip(self.up, reversed(kept[:-1]), strict=True):
            x = level(torch.cat([functional.interpolate(x, scale_factor=2.0), beside], dim=1))
        return self.maps(self.head(x))


class ResNet(nn.Module):
    """Image [B, 3, S, S] in [0, 1] -> points [B, P, 2]: the mean shape and S / 8 times a linear map of pooled features.

    As ResNet-34 (He et al., 2016): 7 x 7 convolution and pooling at stride 4, four stages of basic blocks with 1, 2, 4
    and 8 times `width` channels, global average. It predicts the mean shape before it is trained.

    Args:
        mean_shape: [P, 2], image pixels.
        image_size: S.
        width: channels of the first stage; 64 in the original.
        blocks: of the four stages.

    Raises:
        ValueError: a mean shape that is not finite [P, 2], an argument out of range; on calling: images of another
            shape.
    """

    mean_shape: Tensor

    def __init__(
        self, mean_shape: Tensor, image_size: int, *, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        if mean_shape.dim() != 2 or mean_shape.shape[1] != 2 or not bool(mean_shape.isfinite().all()):
            raise ValueError(f"ResNet: mean_shape must be finite [P, 2], got {list(mean_shape.shape)}")
        if min(image_size, width) < 1 or len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(
                f"ResNet: expected image_size, width >= 1, four blocks >= 1, got {image_size}, {width}, {blocks!r}"
            )
        self.image_size = image_size
        self.register_buffer("mean_shape", mean_shape.detach().float().clone())
        self.stem = nn.Sequential(unit(3, width, kernel=7, stride=2), nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        inner = width
        for level, count in enumerate(blocks):
            outer = width * 2**level
            stages.append(_Basic(inner, outer, 1 if level == 0 else 2))
            stages.extend(_Basic(outer, outer, 1) for _ in range(count - 1))
            inner = outer
        self.stages = nn.Sequential(*stages)
        self.points = nn.Linear(inner, mean_shape.numel())
        nn.init.zeros_(self.points.weight)
        nn.init.zeros_(self.points.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        _check_images("ResNet", images, self.image_size, exactly=True)
        x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        found = self.points(self.stages(self.stem(x)).mean((2, 3))).float()
        return self.mean_shape + self.image_size / 8 * found.unflatten(1, (-1, 2))


class _Basic(nn.Module):
    """relu(shortcut(x) + conv(conv(x))); the branch starts at 0. The shortcut is 1 x 1 where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = unit(inner, outer, stride=stride)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        nn.init.zeros_(self.norm.weight)
        self.shortcut: nn.Module = nn.Identity()
        if inner != outer or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.norm(self.second(self.first(x))))


def _double(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(unit(inner, outer), unit(outer, outer))


def _check_images(name: str, images: Tensor, multiple: int, exactly: bool = False) -> None:
    side = images.shape[-1] if images.dim() == 4 else 0
    fits = side == multiple if exactly else side > 0 and side % multiple == 0
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side) or not fits:
        rule = f"S = {multiple}" if exactly else f"S a multiple of {multiple}"
        raise ValueError(f"{name}: images must be [B, 3, S, S], {rule}, got {list(images.shape)}")
