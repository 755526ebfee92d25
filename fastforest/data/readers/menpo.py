"""menpo's .ljson: points as rows and columns (y before x) in named groups, beside their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..records import Record, Records
from ..text import PathLike
from .coco import read_json
from .common import image_beside, images_of, matrix, points_of

__all__ = ["read_ljson"]


def read_ljson(path: PathLike, group: str | None = None) -> Records:
    """The face of an .ljson file of version 2 or 3, or those of all such files in a folder, in order of name.

    Points are [y, x] and count from 0; null says not annotated: such a point is NaN. The image has the file's stem.

    Args:
        path: a file, or a folder of such files beside their images.
        group: which group of points of a file of version 3; by default LJSON, or the only one.

    Raises:
        DataError: no such file, none in the folder, not JSON of that shape, no such group, or no image beside it.
    """
    place = Path(path)
    files = sorted(place.glob("*.ljson")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{path}: holds no .ljson file")
    images = images_of(files[0].parent)
    records = []
    for file in files:
        points = _points(file, group)
        known = np.isfinite(points).all(axis=1)
        found = points_of(str(file), points, known)
        records.append(Record(image_beside(file, images), found, known, source="menpo", name=file.stem))
    return Records(records)


def _points(file: Path, group: str | None) -> np.ndarray:
    """x, y [P, 2], NaN where not annotated."""
    content = read_json(file)
    groups: Any = content.get("groups", {"LJSON": content})
    if not isinstance(groups, dict):
        raise DataError(f"{file}: groups must be an object, got {type(groups).__name__}")
    name = group or ("LJSON" if "LJSON" in groups or len(groups) != 1 else next(iter(groups)))
    if name not in groups:
        raise DataError(f"{file}: has no group {name}, it has {', '.join(map(str, groups)) or 'none'}")
    try:
        rows = groups[name]["landmarks"]["points"]
        rows = [[np.nan if value is None else value for value in row] for row in rows]
    except (TypeError, KeyError):
        raise DataError(f"{file}: group {name} has no list of points under landmarks") from None
    return matrix(f"{file}: points of {name}", rows or np.empty((0, 0)), (None, 2))[:, ::-1]
