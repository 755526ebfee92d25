"""Photographs: as arrays, their faces found, and crops of them as the training sets have them.

Shapes: an image of H x W pixels, uint8 RGB [H, W, 3]; P landmarks; crops have side S. Points are (x, y), 0-based, pixel
centres at integers; a box is (x, y, width, height) in pixels, around the landmarks: brows to chin.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.data import lbp_frontal_face_cascade_filename
from skimage.feature import Cascade
from torch import Tensor

from .data import crop_box, read_image, resize
from .data.records import Box

__all__ = ["Box", "Picture", "as_image", "box_around", "box_showing", "check_box", "crop", "find_faces", "overlap"]

Picture = np.ndarray
"""uint8 [H, W, 3], RGB."""

# The cascade's square against the box of the 68 landmarks, medians over 144 faces of the 300-W training set: the box's
# longer side is 1.02 squares (80 % of the faces: 0.94 to 1.3), its centre 0.16 squares lower.
SIDE_RATIO = 1.02
DROP = 0.16

SEARCH_SIDE = 480
"""Photographs are searched at this longer side: a face of 1/10 of it is still larger than the cascade's window."""
WINDOW = 24

# (smallest face as a share of the shorter side, step between scales, overlapping finds that make a face). Tolerant, for
# the landmarks tell faces from false finds; several, because windows inside a face compete with the face's own.
SEARCHES = ((0.45, 1.05, 2), (0.25, 1.05, 3), (0.1, 1.06, 2))
CANDIDATES = 8


def as_image(image: Any) -> Picture:
    """A path, a Pillow image, a numpy array uint8 [H, W, 3] or [H, W], or a tensor uint8 [3, H, W], as a `Picture`.

    Raises:
        DataError: a file that cannot be read. TypeError: none of these. ValueError: of another shape or dtype; a Pillow
            image of more than 8 bits.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"the image must have 8 bits a channel, got Pillow's mode {image.mode!r}")
        return np.array(image.convert("RGB"))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"the image must be uint8 [3, H, W], got a tensor {image.dtype} {list(image.shape)}")
        return image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2
        if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
            got = f"{image.dtype} {list(image.shape)}"
            raise ValueError(f"the image must be uint8 [H, W, 3] or [H, W], got an array {got}")
        return np.repeat(image[..., None], 3, axis=2) if grey else image
    raise TypeError(f"the image must be a path, a Pillow image, an array or a tensor, got {type(image).__name__}")


def find_faces(image: Picture) -> list[Box]:
    """What scikit-image's frontal cascade takes for faces, largest first, as the boxes that landmarks should fill.

    Up to `CANDIDATES`, false ones among them; empty where none of `SEARCHES` finds any.
    """
    height, width = image.shape[:2]
    factor = min(1.0, SEARCH_SIDE / max(height, width))
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    shrunk = np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BOX)) if factor < 1 else image
    largest = min(shrunk.shape[:2])
    if largest <= WINDOW + 1:
        return []
    squares = []
    for share, scale_factor, neighbours in SEARCHES:
        smallest = max(WINDOW, int(share * largest))
        squares += _cascade().detect_multi_scale(
            img=np.ascontiguousarray(shrunk),
            scale_factor=scale_factor,
            step_ratio=1,
            min_size=(smallest, smallest),
            max_size=(largest, largest),
            min_neighbor_number=neighbours,
        )
    squares.sort(key=lambda square: (-square["width"], square["r"], square["c"]))
    return [_landmark_box(square, 1 / factor) for square in squares[:CANDIDATES]]


def crop(image: Picture, box: Box, size: int, padding: float = 0.25) -> tuple[Tensor, tuple[int, int, int]]:
    """(uint8 [3, S, S], the square (x0, y0, side) that it shows), as `data.crop_box` has it; black beside the image.

    A point p of the crop is the image's (p + 0.5) side / S - 0.5 + (x0, y0).
    """
    x, y, width, height = box
    x0, y0, side = crop_box(np.array([[x, y], [x + width, y + height]]), padding)
    pixels = np.zeros((side, side, 3), np.uint8)
    left, top = max(0, -x0), max(0, -y0)
    seen = image[max(0, y0) : max(0, y0 + side), max(0, x0) : max(0, x0 + side)]
    pixels[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
    return resize(torch.from_numpy(pixels).permute(2, 0, 1), size), (x0, y0, side)


def box_around(points: np.ndarray, image: Picture) -> Box:
    """Of landmarks [P, 2]; never larger than the image, however wild they are."""
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = (min(float(extent), float(max(image.shape[:2]))) for extent in high - low)
    return float(low[0]), float(low[1]), width, height


def box_showing(box: Box, shape: np.ndarray, size: int, padding: float) -> Box:
    """The square box whose `crop` shows the landmarks that fill `box` where `shape`, [P, 2], pixels of a crop, has its own:
    the same centre, the same longer side."""
    low, high = shape.min(axis=0), shape.max(axis=0)
    scale = max(box[2:]) / float((high - low).max())
    middle, shift = np.array(box[:2]) + np.array(box[2:]) / 2, (size - 1) / 2 - (low + high) / 2
    side = size * scale / (1 + 2 * padding)
    x, y = (float(value) - side / 2 for value in middle + shift * scale)
    return x, y, side, side


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Of two faces' landmarks [P, 2]: the area that their boxes share, over their union's."""
    low = np.maximum(first.min(axis=0), second.min(axis=0))
    high = np.minimum(first.max(axis=0), second.max(axis=0))
    shared = float(np.maximum(high - low, 0).prod())
    union = float(np.ptp(first, axis=0).prod() + np.ptp(second, axis=0).prod()) - shared
    return shared / union if union > 0 else 0.0


def check_box(box: Box, image: Picture) -> None:
    """ValueError where it is not finite, is empty, much larger than the image or beside it."""
    x, y, width, height = box
    shown = " ".join(f"{value:g}" for value in box)
    if not all(math.isfinite(value) for value in box) or width <= 0 or height <= 0:
        raise ValueError(f"the box must be finite with positive width and height, got {shown}")
    rows, columns = image.shape[:2]
    if x >= columns or y >= rows or x + width <= 0 or y + height <= 0 or max(width, height) > 1.5 * max(rows, columns):
        raise ValueError(f"the box {shown} does not lie in the image of {columns} x {rows} pixels")


def _landmark_box(square: dict[str, float], factor: float) -> Box:
    side = square["width"] * SIDE_RATIO * factor
    centre_x = (square["c"] + square["width"] / 2) * factor - 0.5
    centre_y = (square["r"] + square["height"] / 2 + DROP * square["width"]) * factor - 0.5
    return centre_x - side / 2, centre_y - side / 2, side, side


@lru_cache(maxsize=1)
def _cascade() -> Cascade:
    return Cascade(lbp_frontal_face_cascade_filename())
