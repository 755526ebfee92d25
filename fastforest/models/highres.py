"""A high-resolution network: Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", 2019.

Shapes: B images of side S, branches of W, 2 W, 4 W, 8 W channels at strides 4, 8, 16, 32, map [B, C, S/4, S/4],
vector [B, F].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.norm import normalization
from fastforest.models.units import Features, Residual, Trunk, unit

__all__ = ["HighResNet"]


class HighResNet(Trunk):
    """Image -> map at stride 4 of all branches together (HRNetV2), vector of the coarsest branch, its layout kept.

    Stem of two 3 x 3 convolutions at stride 2 and `blocks` residuals, 4 W channels. Then three stages of 2, 3 and 4
    parallel branches; a stage is `modules[i]` times: `blocks` residuals (3 x 3, basic) on each branch, then every
    branch gets the sum of all, brought to its stride by strided 3 x 3 convolutions or by a 1 x 1 convolution and
    repeated cells. In the published W18 network `modules` is (1, 4, 3), blocks 4, the stem's residuals bottlenecks.

    The map is a 1 x 1 convolution of all branches upsampled and concatenated. As this commutes with repeating cells,
    each branch is convolved at its own size. Cells are repeated, not interpolated: so the gradient is deterministic on
    CUDA too.

    Args:
        image_size: S, a multiple of 32.
        width: W.
        modules: of the three stages.
        blocks: residuals of a branch in a module, and of the stem.
        channels: C.
        code: channels of the vector's map; F = code (S / 32)^2.
        norm: "batch" or "group", see `normalization`.

    Raises:
        ValueError: an argument out of range; on calling: images of another shape.
    """

    def __init__(
        self,
        image_size: int,
        *,
        width: int = 16,
        modules: Sequence[int] = (1, 1, 1),
        blocks: int = 1,
        channels: int = 64,
        code: int = 128,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"HighResNet: image_size must be a positive multiple of 32, got {image_size}")
        if min(width, blocks, channels, code) < 1:
            raise ValueError(
                "HighResNet: width, blocks, channels and code must be at least 1, "
                f"got {width}, {blocks}, {channels}, {code}"
            )
        if len(modules) != 3 or min(modules) < 1:
            raise ValueError(f"HighResNet: modules must be three numbers >= 1, got {modules!r}")
        self.image_size, self.map_channels, self.features = image_size, channels, code * (image_size // 32) ** 2
        widths = [width * 2**branch for branch in range(4)]
        stem = 4 * width
        self.stem = nn.Sequential(
            unit(3, stem, stride=2, norm=norm),
            unit(stem, stem, stride=2, norm=norm),
            *(Residual(stem, norm) for _ in range(blocks)),
        )
        self.first = unit(stem, width, norm=norm)
        self.lower = nn.ModuleList(
            unit(inner, outer, stride=2, norm=norm)
            for inner, outer in zip([stem, *widths[1:]], widths[1:], strict=False)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Exchange(widths[: stage + 2], blocks, norm) for _ in range(count)))
            for stage, count in enumerate(modules)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(outer, channels, 1, bias=False) for outer in widths)
        self.merge = nn.Sequential(normalization(channels, norm), nn.ReLU(inplace=True))
        self.narrow = unit(widths[-1], code, kernel=1, norm=norm)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Features:
        """images: [B, 3, S, S] in [0, 1] -> map [B, C, S/4, S/4], vector [B, F]."""
        coarsest = self.stem(self.prepared(images))
        branches = [self.first(coarsest)]
        for lower, stage in zip(self.lower, self.stages, strict=True):
            branches.append(lower(coarsest))
            branches = stage(branches)
            coarsest = branches[-1]
        merged = [lateral(branch) for lateral, branch in zip(self.lateral, branches, strict=True)]
        return Features(self.merge(_sum_at_finest(merged)), self.narrow(coarsest).flatten(1))


class _Exchange(nn.Module):
    """Maps of all branches -> the same after `blocks` residuals on each and a `_Fusion` for each."""

    def __init__(self, widths: Sequence[int], blocks: int, norm: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(Residual(width, norm) for _ in range(blocks))) for width in widths
        )
        self.fusions = nn.ModuleList(_Fusion(widths, branch, norm) for branch in range(len(widths)))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(entry) for branch, entry in zip(self.branches, x, strict=True)]
        return [fusion(x) for fusion in self.fusions]


class _Fusion(nn.Module):
    """Maps of all branches -> relu of their sum, each brought to the stride and channels of branch `target`."""

    def __init__(self, widths: Sequence[int], target: int, norm: str) -> None:
        super().__init__()
        self.target = target
        finer, outer, coarser = widths[:target], widths[target], widths[target + 1 :]
        self.down = nn.ModuleList(_strided(inner, outer, target - source, norm) for source, inner in enumerate(finer))
        self.up = nn.ModuleList(_linear(inner, outer, 1, norm) for inner in coarser)

    def forward(self, x: list[Tensor]) -> Tensor:
        raised = [path(entry) for path, entry in zip(self.up, x[self.target + 1 :], strict=True)]
        total = _sum_at_finest([x[self.target], *raised])
        for path, entry in zip(self.down, x[: self.target], strict=True):
            total = total + path(entry)
        return functional.relu(total)


def _sum_at_finest(maps: Sequence[Tensor]) -> Tensor:
    """Sum of maps of equal channels, each of half the side of the one before, at the first one's side."""
    total = maps[-1]
    for finer in reversed(maps[:-1]):
        total = finer + functional.interpolate(total, scale_factor=2.0)
    return total


def _linear(inner: int, outer: int, kernel: int, norm: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False), normalization(outer, norm))


def _strided(inner: int, outer: int, halvings: int, norm: str) -> nn.Sequential:
    """`halvings` 3 x 3 convolutions at stride 2; all but the last keep the channels and end in ReLU."""
    before = (unit(inner, inner, stride=2, norm=norm) for _ in range(halvings - 1))
    return nn.Sequential(*before, _linear(inner, outer, 3, norm, stride=2))
