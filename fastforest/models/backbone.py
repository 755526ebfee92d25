"""Backbones by name, and the smallest: a residual network for faces, quick on a CPU.

Shapes: B images of side S, C = 2 width channels, map [B, C, S/4, S/4], vector [B, F].
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.highres import HighResNet
from fastforest.models.hourglass import StackedHourglass
from fastforest.models.units import Features, Residual, Trunk, unit

__all__ = ["BACKBONES", "Backbone", "Features", "Trunk", "build_backbone"]


class Backbone(Trunk):
    """Image -> (map at stride 4 that has seen the coarse levels too, vector that keeps the coarse map's layout).

    Stem 5 x 5 at stride 2, then four levels at strides 4, 8, 16, 32, each a strided convolution and `blocks[i]`
    residual blocks (3 x 3, BatchNorm, ReLU). The map adds the levels top-down (1 x 1 convolutions, upsampling). The
    vector is the coarsest level, narrowed to `code` channels and flattened: where a thing is stays visible.

    Args:
        image_size: S, a multiple of 32.
        width: channels of the stem; the levels have 2, 4, 8, 8 times as many.
        blocks: residual blocks of the four levels.
        code: channels of the vector's map.
        norm: "batch" or "group", see `normalization`.

    Cost: 3.8 M parameters; multiply-adds of an image 0.21 G at 96 x 96, 1.5 G at 256 x 256.

    Raises:
        ValueError: an argument out of range; on calling: images of another shape.
    """

    def __init__(
        self,
        image_size: int,
        *,
        width: int = 32,
        blocks: Sequence[int] = (1, 1, 1, 1),
        code: int = 128,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"Backbone: image_size must be a positive multiple of 32, got {image_size}")
        if len(blocks) != 4 or min(blocks) < 0 or min(width, code) < 1:
            raise ValueError(f"Backbone: expected width, code >= 1, four blocks >= 0, got {width}, {code}, {blocks!r}")
        self.image_size = image_size
        channels = [2 * width, 4 * width, 8 * width, 8 * width]
        self.map_channels, self.features = channels[0], code * (image_size // 32) ** 2
        self.stem = unit(3, width, kernel=5, stride=2, norm=norm)
        self.levels = nn.ModuleList(
            nn.Sequential(unit(inner, outer, stride=2, norm=norm), *(Residual(outer, norm) for _ in range(count)))
            for inner, outer, count in zip([width, *channels], channels, blocks, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(outer, channels[0], 1, bias=False) for outer in channels)
        self.merge = unit(channels[0], channels[0], norm=norm)
        self.narrow = unit(channels[-1], code, kernel=1, norm=norm)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Features:
        """images: [B, 3, S, S] in [0, 1] -> map [B, C, S/4, S/4], vector [B, F]."""
        levels = self._levels(images)
        merged: Tensor | None = None
        for lateral, level in zip(reversed(self.lateral), reversed(levels), strict=True):
            here = lateral(level)
            merged = here if merged is None else here + functional.interpolate(merged, scale_factor=2.0)
        return Features(self.merge(merged), self.narrow(levels[-1]).flatten(1))

    def vector(self, images: Tensor) -> Tensor:
        """The vector alone [B, F], without the way top-down."""
        return self.narrow(self._levels(images)[-1]).flatten(1)

    def _levels(self, images: Tensor) -> list[Tensor]:
        """Maps at strides 4, 8, 16, 32."""
        x = self.stem(self.prepared(images))
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found


BACKBONES: dict[str, Callable[..., Trunk]] = {
    "small": Backbone,
    "hourglass": partial(StackedHourglass, stacks=1),
    "stacked": StackedHourglass,
    "highres": HighResNet,
}


def build_backbone(name: str, image_size: int, **options: Any) -> Trunk:
    """The backbone of that name in `BACKBONES`; `options` are its constructor's keywords, as from a file.

    Raises:
        ValueError: a name or an option that is unknown, with the nearest that is not; an option of another type than
            its default, or out of range.
    """
    if name not in BACKBONES:
        raise ValueError(f"build_backbone: unknown backbone {name!r}, {_nearest(name, BACKBONES)}")
    known = inspect.signature(BACKBONES[name]).parameters
    defaults = {key: parameter.default for key, parameter in known.items() if key != "image_size"}
    for key, value in options.items():
        if key not in defaults:
            raise ValueError(f"build_backbone: '{name}' has no option {key!r}, {_nearest(key, defaults)}")
        if not _alike(value, defaults[key]):
            example = defaults[key]
            raise ValueError(
                f"build_backbone: '{name}': {key} must be of its default's type, as {example!r}, got {value!r}"
            )
    return BACKBONES[name](image_size, **options)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _alike(value: Any, default: Any) -> bool:
    """Of the same type; a list of whole numbers stands for a tuple."""
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(type(entry) is int for entry in value)
    return type(value) is type(default)
