"""Random changes of a batch of faces, vectorised: one warp for the geometry, then colour, occlusion and blur.

Shapes: B images of side S in, side T = `size` out; P landmarks. Points are (x, y), 0-based, pixel centres at integers.
With u = (2 p + 1) / S - 1 the coordinate in [-1, 1] over the image's area, the warp is u' = A u + t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .faces import rescale, resize
from .layout import FLIP_68

__all__ = ["Augment", "Plain", "horizontal_flip", "warp"]


def horizontal_flip(image: Tensor, points: Tensor, permutation: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mirror image: pixel x goes to W - 1 - x, and landmark i of the result is landmark permutation[i], mirrored.

    Args:
        image: [..., H, W], any dtype.
        points: [..., P, 2], pixels.
        permutation: P indices, e.g. `FLIP_68`.

    Raises:
        ValueError: the permutation does not hold each of 0..P-1 once.
    """
    _check_permutation("horizontal_flip", permutation, points.shape[-2])
    exchanged = points[..., list(permutation), :]
    mirrored = torch.stack([image.shape[-1] - 1 - exchanged[..., 0], exchanged[..., 1]], dim=-1)
    return image.flip(-1), mirrored


@dataclass(frozen=True)
class Plain:
    """What evaluation does: resize to `size`, scale to [0, 1], nothing random.

    `Plain(128)(images, points)`: images uint8 [B, 3, S, S], points [B, P, 2] in their pixels -> images float32
    [B, 3, size, size] in [0, 1], points in the pixels of those. A generator is accepted and not used.
    """

    size: int

    def __call__(
        self, images: Tensor, points: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        _check_batch("Plain", images, points)
        return resize(images, self.size).float().div_(255), rescale(points, images.shape[-1], self.size)


@dataclass(frozen=True)
class Augment:
    """Random geometry, colour, occlusion and blur, drawn anew for each image of a batch.

    size: side T of the result, pixels.
    rotation: degrees, uniform in [-rotation, rotation].
    scale: the face grows by a factor uniform in log between 1 / (1 + scale) and 1 + scale.
    shift: fraction of the image's side, uniform in [-shift, shift] per axis.
    flip: permutation of the landmarks for mirror images, half of the batch in the mean; None never mirrors.
    colour: strength c: brightness added in [-c/2, c/2], contrast in [1 - c, 1 + c], the gain of each channel in
        [1 - c/2, 1 + c/2]; no factor is negative.
    occlude: probability that a rectangle (sides 10 to 40 % of the image's, one random colour) hides a part.
    blur: probability of a box blur, 3 x 3 or 5 x 5 pixels, mixed in by a random weight.

    Where the warp looks outside the image the result is black before the colour change, as the crops of `RecordFaces` are.

    Calling it: (images uint8 [B, 3, S, S], points [B, P, 2], generator) -> (float32 [B, 3, size, size] in [0, 1],
    points [B, P, 2] in the new pixels, of the dtype given; they may lie outside the canvas). Equal generator states
    give equal results. Images larger than `size` are reduced with antialiasing first.

    Raises:
        ValueError: a parameter out of range; images not uint8 [B, 3, S, S], points not [B, P, 2] of the same B, or a
            permutation that does not fit P.
    """

    size: int
    rotation: float = 25.0
    scale: float = 0.15
    shift: float = 0.06
    flip: Sequence[int] | None = FLIP_68
    colour: float = 0.3
    occlude: float = 0.3
    blur: float = 0.15

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Augment: size must be at least 1, got {self.size}")
        for name in ("rotation", "scale", "shift", "colour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Augment: {name} must not be negative, got {getattr(self, name)}")
        for name in ("occlude", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Augment: {name} must be a probability in [0, 1], got {getattr(self, name)}")

    def __call__(self, images: Tensor, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        _check_batch("Augment", images, points)
        if self.flip is not None:
            _check_permutation("Augment", self.flip, points.shape[1])
        draw = _Draw(len(images), generator, images.device)
        matrix, offset, mirrored = self._geometry(draw)
        side = images.shape[-1]
        reduced = resize(images, self.size) if side > self.size else images
        result, moved = warp(reduced, rescale(points, side, reduced.shape[-1]), matrix, offset, self.size)
        if self.flip is not None:
            moved = torch.where(mirrored[:, None, None], moved[:, list(self.flip)], moved)
        if self.colour > 0:
            _recolour(result, self.colour, draw)
        if self.occlude > 0:
            _occlude(result, self.occlude, draw)
        if self.blur > 0:
            _blur(result, self.blur, draw)
        return result, moved

    def _geometry(self, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
        """A [B, 2, 2], t [B, 2] in units of half the side, and which images are mirrored [B]."""
        angle = draw.uniform(-self.rotation, self.rotation) * (math.pi / 180)
        factor = (draw.uniform(-1, 1) * math.log1p(self.scale)).exp()
        offset = draw.uniform(-2 * self.shift, 2 * self.shift, 2)
        mirrored = draw.uniform(0, 1) < (0.5 if self.flip is not None else 0.0)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        sign = 1 - 2 * mirrored.to(cos.dtype)
        matrix = torch.stack([cos * sign, -sin, sin * sign, cos], dim=-1).reshape(-1, 2, 2)
        return matrix, offset, mirrored


def warp(images: Tensor, points: Tensor, matrix: Tensor, offset: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The affine map u' = A u + t of images and points, u in [-1, 1] over the image's area.

    Args:
        images: uint8 [B, 3, S, S].
        points: [B, P, 2], pixels.
        matrix: A, float32 [B, 2, 2], invertible.
        offset: t, float32 [B, 2].
        size: side T of the result.

    Returns:
        float32 [B, 3, T, T] in [0, 1], bilinear, 0 outside the image; points [B, P, 2] in its pixels, dtype kept.
    """
    inverse = torch.linalg.inv(matrix)
    # v = A^-1 u' - A^-1 t by broadcasting: affine_grid multiplies matrices for every pixel and takes ten times as long
    unit = (2 * torch.arange(size, device=images.device, dtype=matrix.dtype) + 1) / size - 1
    along_x, along_y = (unit[:, None] * inverse.mT[:, axis, None] for axis in (0, 1))
    grid = along_x[:, None] + (along_y - (inverse @ offset[:, :, None]).mT)[:, :, None]
    result = functional.grid_sample(images.float().div_(255), grid, mode="bilinear", align_corners=False)
    before = (2 * points + 1) / images.shape[-1] - 1
    moved = before @ matrix.mT.to(points.dtype) + offset[:, None].to(points.dtype)
    return result, ((moved + 1) * size - 1) / 2


class _Draw:
    """Random numbers for B images from one generator, on its device, then moved to the images'."""

    def __init__(self, images: int, generator: torch.Generator, device: torch.device) -> None:
        self.images, self.generator, self.device = images, generator, device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        numbers = torch.rand(self.images, *shape, generator=self.generator, device=self.generator.device)
        return (numbers * (high - low) + low).to(self.device)


def _recolour(images: Tensor, strength: float, draw: _Draw) -> None:
    """x <- clamp(gain (contrast (x - 1/2) + 1/2 + brightness)), in place."""
    contrast = draw.uniform(max(0.0, 1 - strength), 1 + strength, 1)
    brightness = draw.uniform(-strength / 2, strength / 2, 1)
    gain = draw.uniform(max(0.0, 1 - strength / 2), 1 + strength / 2, 3)
    slope, bias = gain * contrast, gain * (0.5 - 0.5 * contrast + brightness)
    images.mul_(slope[:, :, None, None]).add_(bias[:, :, None, None]).clamp_(0, 1)


def _occlude(images: Tensor, probability: float, draw: _Draw) -> None:
    """Paints one rectangle of one colour over the chosen images, in place."""
    size = images.shape[-1]
    chosen = draw.uniform(0, 1) < probability
    side = draw.uniform(0.1, 0.4, 2) * size
    start = draw.uniform(0, 1, 2) * (size - side)
    colour = draw.uniform(0, 1, 3)
    cell = torch.arange(size, device=images.device, dtype=side.dtype)
    inside = (cell >= start[:, :, None]) & (cell < (start + side)[:, :, None])
    hidden = inside[:, 1, :, None] & inside[:, 0, None, :] & chosen[:, None, None]
    torch.where(hidden[:, None], colour[:, :, None, None], images, out=images)


def _blur(images: Tensor, probability: float, draw: _Draw) -> None:
    """Mixes a box blur into the chosen images, in place."""
    chance, weight, wide = draw.uniform(0, 1), draw.uniform(0.4, 1), draw.uniform(0, 1) < 0.5
    for kernel, kind in ((3, ~wide), (5, wide)):
        rows = ((chance < probability) & kind).nonzero()[:, 0]
        sharp = images[rows]
        soft = functional.avg_pool2d(sharp, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
        images[rows] = torch.lerp(sharp, soft, weight[rows, None, None, None])


def _check_batch(name: str, images: Tensor, points: Tensor) -> None:
    square = images.dim() == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3] > 0
    if images.dtype != torch.uint8 or not square:
        raise ValueError(f"{name}: images must be uint8 [B, 3, S, S], got {images.dtype} {list(images.shape)}")
    if points.dim() != 3 or points.shape[0] != images.shape[0] or points.shape[2] != 2:
        raise ValueError(f"{name}: points must be [{images.shape[0]}, P, 2], got {list(points.shape)}")


def _check_permutation(name: str, permutation: Sequence[int], count: int) -> None:
    if sorted(permutation) != list(range(count)):
        raise ValueError(f"{name}: the flip permutation must hold each of 0..{count - 1} once, got {len(permutation)}")
