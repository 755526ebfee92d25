"""Stacked hourglasses: Newell, Yang, Deng, "Stacked Hourglass Networks for Human Pose Estimation", 2016.

Shapes: B images of side S, C = width channels, map [B, C, S/4, S/4], vector [B, F].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from fastforest.models.norm import normalization
from fastforest.models.units import Features, Trunk, unit

__all__ = ["StackedHourglass"]


class StackedHourglass(Trunk):
    """Image -> maps at stride 4, one of each stack; vector of the last hourglass's coarsest cells, their layout kept.

    Stem (7 x 7 at stride 2, residuals, pooling), then `stacks` times: an hourglass, a residual, a 1 x 1 unit whose
    output is that stack's map. The map of a stack, through a 1 x 1 convolution, is added to what entered the stack and
    enters the next. The last map is `map`, those before are `earlier`: a head on each supervises all stacks, as the
    paper does; where the paper re-injects the heads' maps, here the features do. Residuals are pre-activation
    bottlenecks with half the channels inside; upsampling repeats cells. The vector is the innermost map of the last
    hourglass, narrowed to `code` channels and flattened.

    Args:
        image_size: S, a multiple of 4 2^depth.
        stacks: 1 to 8.
        depth: halvings within an hourglass; 4 in the paper, at S = 256.
        width: C, a multiple of 4; 256 in the paper.
        code: channels of the vector's map; F = code (S / (4 2^depth))^2.
        norm: "batch" or "group", see `normalization`.
        checkpoint: keep only what enters each stack and compute the rest again in the backward pass: less memory, one
            more forward pass, the same gradients and running statistics. A compiled forward pass ignores it.

    Cost: parameters; multiply-adds of an image, 96 x 96 and 256 x 256.
        default: 1.3 M; 0.30 G, 2.1 G. One stack: 0.7 M; 0.19 G, 1.3 G.
        width 256, depth 4, at 256 x 256: 2 stacks 6.6 M, 8.3 G; 4 stacks 12.8 M, 14.6 G; 8 stacks, as published,
        25.3 M, 27.2 G. At 105 TFLOP/s (35 % of 300), 60 epochs of 1,800 faces then train in 51, 90 and 168 seconds.

    Raises:
        ValueError: an argument out of range; on calling: images of another shape.
    """

    def __init__(
        self,
        image_size: int,
        *,
        stacks: int = 2,
        depth: int = 3,
        width: int = 128,
        code: int = 128,
        norm: str = "batch",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= stacks <= 8:
            raise ValueError(f"StackedHourglass: stacks must be 1 to 8, got {stacks}")
        if depth < 1 or code < 1:
            raise ValueError(f"StackedHourglass: depth and code must be at least 1, got {depth} and {code}")
        if width < 4 or width % 4:
            raise ValueError(f"StackedHourglass: width must be a positive multiple of 4, got {width}")
        coarsest = self.stride * 2**depth
        if image_size < coarsest or image_size % coarsest:
            raise ValueError(
                f"StackedHourglass: image_size must be a positive multiple of {coarsest} at depth {depth}, got {image_size}"
            )
        self.image_size, self.map_channels, self.checkpoint = image_size, width, checkpoint
        self.earlier = stacks - 1
        self.features = code * (image_size // coarsest) ** 2
        self.stem = nn.Sequential(
            unit(3, width // 4, kernel=7, stride=2, norm=norm),
            _Residual(width // 4, width // 2, norm),
            nn.MaxPool2d(2),
            _Residual(width // 2, width // 2, norm),
            _Residual(width // 2, width, norm),
        )
        self.stacks = nn.ModuleList(_Stack(depth, width, norm) for _ in range(stacks))
        self.inject = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(stacks - 1))
        self.narrow = unit(width, code, kernel=1, norm=norm)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Features:
        """images: [B, 3, S, S] in [0, 1] -> map [B, C, S/4, S/4], vector [B, F], earlier: stacks - 1 maps."""
        x, earlier = self._before_last(images)
        found, coarse = self._run(self.stacks[-1], x)
        return Features(found, self.narrow(coarse).flatten(1), tuple(earlier))

    def vector(self, images: Tensor) -> Tensor:
        """The vector alone [B, F], without the way up of the last hourglass."""
        last: Any = self.stacks[-1]
        return self.narrow(last.hourglass.innermost(self._before_last(images)[0])).flatten(1)

    def _before_last(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What enters the last stack, and the maps of those before."""
        x = self.stem(self.prepared(images))
        earlier: list[Tensor] = []
        for stack, inject in zip(self.stacks, self.inject, strict=False):
            earlier.append(self._run(stack, x)[0])
            x = x + inject(earlier[-1])
        return x, earlier

    def _run(self, stack: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.checkpoint and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return stack(x)
        return recomputed(stack, x, use_reentrant=False, context_fn=lambda: _once(stack))


class _Stack(nn.Module):
    """[B, C, h, w] -> (map of the stack [B, C, h, w], innermost map [B, C, h / 2^depth, w / 2^depth])."""

    def __init__(self, depth: int, width: int, norm: str) -> None:
        super().__init__()
        self.hourglass = _Hourglass(depth, width, norm)
        self.after = nn.Sequential(_Residual(width, width, norm), unit(width, width, kernel=1, norm=norm))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, coarse = self.hourglass(x)
        return self.after(found), coarse


class _Hourglass(nn.Module):
    """One halving: a residual beside at full size, and below it the next halving; both added. Also the innermost map."""

    def __init__(self, depth: int, width: int, norm: str) -> None:
        super().__init__()
        self.beside, self.down, self.up = (_Residual(width, width, norm) for _ in range(3))
        self.below = _Hourglass(depth - 1, width, norm) if depth > 1 else _Innermost(width, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, coarse = self.below(self.down(functional.max_pool2d(x, 2)))
        return self.beside(x) + functional.interpolate(self.up(found), scale_factor=2.0), coarse

    def innermost(self, x: Tensor) -> Tensor:
        return self.below.innermost(self.down(functional.max_pool2d(x, 2)))


class _Innermost(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.residual = _Residual(width, width, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.innermost(x)
        return x, x

    def innermost(self, x: Tensor) -> Tensor:
        return self.residual(x)


class _Residual(nn.Module):
    """skip(x) + three convolutions, 1 x 1, 3 x 3, 1 x 1, each after normalisation and ReLU; half the channels inside."""

    def __init__(self, inner: int, outer: int, norm: str) -> None:
        super().__init__()
        half = outer // 2
        self.branch = nn.Sequential(
            *_activated(inner, half, 1, norm), *_activated(half, half, 3, norm), *_activated(half, outer, 1, norm)
        )
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


def _activated(inner: int, outer: int, kernel: int, norm: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False)
    return normalization(inner, norm), nn.ReLU(inplace=True), convolution


def _once(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the pass forward and of its repetition, in which running statistics must not move a second time."""
    return nullcontext(), _running_statistics_kept(module)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Momentum 0, nothing counted; without running statistics other tensors would be saved than the first time."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    kept = [(part.momentum, part.num_batches_tracked) for part in norms]
    for part in norms:
        part.momentum, part.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for part, (momentum, counted) in zip(norms, kept, strict=True):
            part.momentum, part.num_batches_tracked = momentum, counted
