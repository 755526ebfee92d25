"""A square cut out of an image, as a similarity between the image's pixels and the crop's.

Shapes: S the side of the square in the image, T = `size` the side of the crop, P landmarks. Points are (x, y), 0-based,
pixel centres at integers. An upright square whose first pixel is (x0, y0) maps a point to (p - (x0, y0) + 0.5) T / S - 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pts import to_tensor

if TYPE_CHECKING:
    from .records import Box

__all__ = ["Crop", "crop_box"]

LARGEST = 8
"""Side of a square, in longer sides of the image, that a wrong annotation is suspected beyond."""
PIXELS = 1 << 27
"""Of a square, four bytes each, beyond which no memory is spent on it; Pillow refuses little more."""


def crop_box(points: np.ndarray, padding: float = 0.25) -> tuple[int, int, int]:
    """The square (x0, y0, S) around landmarks [P, 2], in whole pixels: S = ceil((1 + 2 padding) x the longer side of
    their bounding box), centred on the box: x0 = round(cx - S / 2).

    A crop resampled to side T maps points by (p - (x0, y0) + 0.5) T / S - 0.5.
    """
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    side = max(1, math.ceil((1 + 2 * padding) * float((high - low).max())))
    x0, y0 = (round(float(center) - side / 2) for center in (low + high) / 2)
    return x0, y0, side


@dataclass(frozen=True)
class Crop:
    """q = (T / S) R(-angle) (p - centre) + (T - 1) / 2 for a point p of the image and q of the crop.

    centre: (x, y), pixels of the image. side: S > 0, pixels of the image, may be fractional. size: T, pixels. angle:
    degrees; the crop's x axis points along (cos angle, sin angle) in the image, so that a face that is turned clockwise
    by this angle, as seen on the screen, stands upright in the crop.

    Raises:
        ValueError: size < 1, a side that is not positive, or a number that is not finite.

    >>> crop = Crop(centre=(49.5, 49.5), side=100, size=50)
    >>> crop.to_crop(np.array([[0.0, 99.0]])).tolist()
    [[-0.25, 49.25]]
    """

    centre: tuple[float, float]
    side: float
    size: int
    angle: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Crop: size must be at least 1, got {self.size}")
        if not 0 < self.side < math.inf:
            raise ValueError(f"Crop: side must be positive and finite, got {self.side}")
        for name, value in (("centre", self.centre[0]), ("centre", self.centre[1]), ("angle", self.angle)):
            if not math.isfinite(value):
                raise ValueError(f"Crop: {name} must be finite, got {getattr(self, name)}")

    @classmethod
    def around(cls, points: np.ndarray | Tensor, size: int, *, padding: float = 0.25) -> Crop:
        """The upright square that `crop_box` places around the known landmarks, [P, 2].

        padding: on each side, in longer sides of the landmarks' bounding box.

        Raises:
            ValueError: no landmark is known, all known ones are the same point, or padding <= -0.5.
        """
        array = np.asarray(points)
        known = array[np.isfinite(array).all(axis=1)]
        if len(known) == 0:
            raise ValueError("no landmark is known")
        if float(np.ptp(known, axis=0).max()) == 0:
            raise ValueError("all landmarks are the same point")
        return cls._of_square(crop_box(known, _checked_padding(padding)), size)

    @classmethod
    def of_box(cls, box: Box, size: int, *, padding: float) -> Crop:
        """The upright square around a box (x, y, width, height): that around its corners (x, y), (x + width, y + height).

        padding: on each side, in longer sides of the box.

        Raises:
            ValueError: a box that is not finite or not of positive width and height, or padding <= -0.5.
        """
        x, y, width, height = box
        if not all(math.isfinite(value) for value in box) or width <= 0 or height <= 0:
            shown = " ".join(f"{value:g}" for value in box)
            raise ValueError(f"the box must be finite with positive width and height, got {shown}")
        corners = np.array([[x, y], [x + width, y + height]], dtype=np.float64)
        return cls._of_square(crop_box(corners, _checked_padding(padding)), size)

    @classmethod
    def _of_square(cls, square: tuple[int, int, int], size: int) -> Crop:
        x0, y0, side = square
        return cls((x0 + (side - 1) / 2, y0 + (side - 1) / 2), side, size)

    @property
    def scale(self) -> float:
        """Pixels of the crop per pixel of the image, T / S."""
        return self.size / self.side

    def to_crop(self, points: np.ndarray | Tensor) -> np.ndarray:
        """Points [..., 2] of the image in the pixels of the crop, float64. NaN stays NaN."""
        return (_numbers(points) - self.centre) @ self._rotation() * self.scale + (self.size - 1) / 2

    def to_image(self, points: np.ndarray | Tensor) -> np.ndarray:
        """Points [..., 2] of the crop in the pixels of the image, float64: the inverse of `to_crop`."""
        return (_numbers(points) - (self.size - 1) / 2) / self.scale @ self._rotation().T + self.centre

    def contains(self, points: np.ndarray | Tensor) -> np.ndarray:
        """Which points [..., 2] of the image lie on the crop's area, bool [...]; unknown ones do not."""
        moved = self.to_crop(points)
        return np.all((moved >= -0.5) & (moved <= self.size - 0.5), axis=-1)

    def misses(self, image: Image.Image) -> bool:
        """Whether the square shows nothing of the image, or is so large that the annotation must be wrong."""
        reach = self.side * (abs(math.cos(self._radians)) + abs(math.sin(self._radians))) / 2
        (x, y), (width, height) = self.centre, image.size
        beside = max(-0.5 - x, x - width + 0.5, -0.5 - y, y - height + 0.5) >= reach
        return beside or self.side > min(LARGEST * max(image.size), math.sqrt(PIXELS))

    def apply(self, image: Image.Image) -> Tensor:
        """The crop's pixels, uint8 [3, T, T], of a Pillow image of mode RGB; black outside the image.

        Bicubic, antialiased where it shrinks. A turned crop is cut upright at the crop's scale first, then turned.

        Raises:
            ValueError: the square `misses` the image.
        """
        if self.misses(image):
            raise ValueError(f"the square at {self.centre} of side {self.side:g} does not lie in the image")
        if self.angle % 360 == 0:
            return to_tensor(_upright(image, self.centre, self.side, self.size))
        cos, sin = math.cos(self._radians), math.sin(self._radians)
        # one pixel more on each side, so that the bicubic kernel sees the image's own neighbours
        wide = math.ceil(self.size * (abs(cos) + abs(sin))) + 2
        straight = _upright(image, self.centre, wide / self.scale, wide)
        x, y = (wide / 2 - (a + b) * self.size / 2 for a, b in ((cos, -sin), (sin, cos)))
        affine = (cos, -sin, x, sin, cos, y)  # Pillow counts from the corner of the first pixel
        size = (self.size, self.size)
        return to_tensor(straight.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))

    @property
    def _radians(self) -> float:
        return math.radians(self.angle)

    def _rotation(self) -> np.ndarray:
        """R(angle)."""
        cos, sin = math.cos(self._radians), math.sin(self._radians)
        return np.array([[cos, -sin], [sin, cos]])


def _upright(image: Image.Image, centre: tuple[float, float], side: float, size: int) -> Image.Image:
    """The square's pixels; what lies outside the image is black and blends in as black pixels would."""
    left, top = (value + 0.5 - side / 2 for value in centre)
    x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(left + side), math.ceil(top + side)
    box = (left - x0, top - y0, min(left - x0 + side, x1 - x0), min(top - y0 + side, y1 - y0))
    return image.crop((x0, y0, x1, y1)).resize((size, size), Image.Resampling.BICUBIC, box)


def _numbers(points: np.ndarray | Tensor) -> np.ndarray:
    array = points.detach().cpu().numpy() if isinstance(points, torch.Tensor) else points
    return np.asarray(array, dtype=np.float64)


def _checked_padding(padding: float) -> float:
    if not -0.5 < padding < math.inf:
        raise ValueError(f"padding must be greater than -0.5 and finite, got {padding}")
    return padding
