"""What the readers share: numbers, points, boxes and images, each with an error that names the place.

`where` begins an error's sentence: the file, or the file and the line or entry in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..faces import IMAGE_SUFFIXES
from ..records import Box

__all__ = [
    "face_box",
    "image_beside",
    "image_named",
    "images_of",
    "matrix",
    "numbers",
    "points_of",
]

FAR = 1e6
"""Pixels from the origin at which no image has a landmark, however far outside it lies."""


def numbers(where: str, fields: Iterable[str]) -> np.ndarray:
    """Fields of text as float64. Raises DataError where one is not a number; NaN and infinity are none either."""
    texts = list(fields)
    values = np.array([_number(text) for text in texts], dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(f"{where}: not a number: {texts[int(bad.argmax())][:40]!r}")
    return values


def matrix(where: str, value: Any, shape: Sequence[int | None]) -> np.ndarray:
    """Numbers of that shape (None: any) as float64. Raises DataError."""
    try:
        array = np.asarray(value)
    except ValueError:  # a list of lists of different lengths
        array = np.empty(0, dtype=object)
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype.kind not in "fiub" or not fits:
        expected = " x ".join("any" if want is None else str(want) for want in shape)
        raise DataError(f"{where}: expected {expected} numbers, got {array.dtype} {list(array.shape)}")
    return array.astype(np.float64)


def points_of(where: str, points: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Points [P, 2] as float32, NaN where not known [P]. Raises DataError where a known one is no place in an image."""
    known = np.ones(len(points), dtype=bool) if known is None else known
    bad = known & ~(np.abs(points) < FAR).all(axis=1)
    if bad.any():
        number = int(bad.argmax())
        x, y = points[number]
        raise DataError(f"{where}: point {number} is at ({x:g}, {y:g}), which no image has")
    if not known.any():
        raise DataError(f"{where}: none of the {len(points)} points is annotated")
    return np.where(known[:, None], points, np.nan).astype(np.float32)


def face_box(where: str, x: float, y: float, width: float, height: float) -> Box | None:
    """A box that is finite; None for one without area. Raises DataError."""
    box = (float(x), float(y), float(width), float(height))
    if not all(abs(value) < FAR for value in box):
        raise DataError(f"{where}: the box is {box}, which no image has")
    return box if width > 0 and height > 0 else None


def images_of(folder: Path) -> dict[str, Path]:
    """The images in a folder (not below it) by stem, as it is and in lower case; of two the better-known format."""
    order = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
    files = [path for path in folder.iterdir() if path.suffix.lower() in order] if folder.is_dir() else []
    ranked = sorted(files, key=lambda path: (order[path.suffix.lower()], path.name), reverse=True)
    return {path.stem.lower(): path for path in ranked} | {path.stem: path for path in ranked}


def image_beside(path: Path, images: dict[str, Path]) -> Path:
    """The image of a file's stem among `images_of` a folder. Raises DataError."""
    found = images.get(path.stem) or images.get(path.stem.lower())
    if found is None:
        raise DataError(f"{path}: no image of the same name beside it")
    return found


def image_named(where: str, folder: Path, name: Any, images: bool) -> Path:
    """folder / name; a file where `images` asks for it. Raises DataError."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: not the name of an image: {str(name)[:40]!r}")
    path = folder / name.strip()
    if images and not _is_file(path):
        raise DataError(f"{where}: names the image {path}, which is not there")
    return path


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
