"""From a photograph to landmarks: find the face, crop as the training sets do, predict, map back.

Shapes: an image of H x W pixels, uint8 RGB [H, W, 3]; P landmarks; the model's images have side S. Points are (x, y),
0-based, pixel centres at integers; a box is (x, y, width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage.data import lbp_frontal_face_cascade_filename
from skimage.feature import Cascade

from ..data import Plain, crop_box

__all__ = ["Box", "Prediction", "find_faces", "locate"]

Box = tuple[float, float, float, float]

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

PASSES = 3
SETTLED = 0.02
"""Landmarks that move by less than this share of their box from one crop to the next have found a face."""


class Prediction(NamedTuple):
    """points: float32 [P, 2], pixels of the photograph. covariance: float32 [P, 2, 2], pixels squared, or None where
    the model has none. box: the face's box that was cropped around."""

    points: np.ndarray
    covariance: np.ndarray | None
    box: Box


def find_faces(image: np.ndarray) -> list[Box]:
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


def locate(model: Any, size: int, image: np.ndarray, box: Box | None = None) -> Prediction | None:
    """Landmarks of one face; None where no box is given and no face is found.

    A given box is used as it is. Found ones are only near the landmarks' own boxes, and some show no face. So each is
    predicted `PASSES` times, every crop taken around the landmarks of the one before: on a face they settle. The
    largest that settles is taken, or the one that moved least.

    Args:
        model: in evaluation mode; its images have side `size`.
        image: uint8 [H, W, 3].
        box: around the landmarks (brows to chin), pixels of `image`.

    Raises:
        ValueError: a box that is not finite, is empty, much larger than the image or beside it; a prediction that is
            not finite.
    """
    if box is not None:
        _check_box(box, image)
        return _predict(model, size, image, [box])[0]
    boxes = find_faces(image)
    if not boxes:
        return None
    found = _predict(model, size, image, boxes)
    for _ in range(PASSES - 1):
        before = found
        found = _predict(model, size, image, [_box_around(prediction.points, image) for prediction in before])
    moved = [_moved(first, last) for first, last in zip(before, found, strict=True)]
    settled = next((i for i, distance in enumerate(moved) if distance < SETTLED), int(np.argmin(moved)))
    return found[settled]


@torch.no_grad()
def _predict(model: Any, size: int, image: np.ndarray, boxes: Sequence[Box]) -> list[Prediction]:
    """One prediction a box, all in one batch."""
    device, picture = next(model.parameters()).device, Image.fromarray(image)
    squares = [crop_box(np.array([[x, y], [x + width, y + height]])) for x, y, width, height in boxes]
    plain, prepared = Plain(size), []
    for x0, y0, side in squares:
        pixels = torch.from_numpy(np.array(picture.crop((x0, y0, x0 + side, y0 + side)))).permute(2, 0, 1)[None]
        prepared.append(plain(pixels, torch.zeros(1, 1, 2))[0])
    batch = torch.cat(prepared).to(device)
    spread = None
    if hasattr(model, "distribution"):
        predicted, spread = (tensor.double().cpu().numpy() for tensor in model.distribution(batch))
    else:
        predicted = model(batch).double().cpu().numpy()
    if not np.isfinite(predicted).all():
        raise ValueError("the model predicts points that are not finite")
    predictions = []
    for row, (box, (x0, y0, side)) in enumerate(zip(boxes, squares, strict=True)):
        points = (predicted[row] + 0.5) * (side / size) - 0.5 + np.array([x0, y0])
        covariance = None if spread is None else (spread[row] * (side / size) ** 2).astype(np.float32)
        predictions.append(Prediction(points.astype(np.float32), covariance, box))
    return predictions


def _box_around(points: np.ndarray, image: np.ndarray) -> Box:
    """Of the landmarks; never larger than the image, however wild they are."""
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = (min(float(extent), float(max(image.shape[:2]))) for extent in high - low)
    return float(low[0]), float(low[1]), width, height


def _moved(first: Prediction, last: Prediction) -> float:
    """Mean distance of the landmarks, over the longer side of their box."""
    distance = np.linalg.norm(last.points - first.points, axis=1).mean()
    return float(distance / max(1e-6, float(np.ptp(last.points, axis=0).max())))


def _landmark_box(square: dict[str, float], factor: float) -> Box:
    side = square["width"] * SIDE_RATIO * factor
    centre_x = (square["c"] + square["width"] / 2) * factor - 0.5
    centre_y = (square["r"] + square["height"] / 2 + DROP * square["width"]) * factor - 0.5
    return centre_x - side / 2, centre_y - side / 2, side, side


def _check_box(box: Box, image: np.ndarray) -> None:
    x, y, width, height = box
    shown = " ".join(f"{value:g}" for value in box)
    if not all(math.isfinite(value) for value in box) or width <= 0 or height <= 0:
        raise ValueError(f"the box must be finite with positive width and height, got {shown}")
    rows, columns = image.shape[:2]
    if x >= columns or y >= rows or x + width <= 0 or y + height <= 0 or max(width, height) > 1.5 * max(rows, columns):
        raise ValueError(f"the box {shown} does not lie in the image of {columns} x {rows} pixels")


@lru_cache(maxsize=1)
def _cascade() -> Cascade:
    return Cascade(lbp_frontal_face_cascade_filename())
