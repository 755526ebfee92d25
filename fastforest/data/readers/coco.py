"""COCO's JSON for faces, as MMPose distributes 300-W, WFLW, COFW and AFLW: images and annotations of keypoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, one_line
from ..records import Record, Records
from ..text import PathLike, read_text
from .common import face_box, image_named, matrix, points_of

__all__ = ["read_coco", "read_json"]


def read_coco(path: PathLike, *, root: PathLike | None = None, images: bool = True, one_based: bool = False) -> Records:
    """Faces of a COCO file in the order of its annotations; an image may have several.

    An annotation has image_id, keypoints [x y v] * P and mostly bbox (x, y, width, height). v = 0 says not annotated: the
    point is NaN. v = 1 says annotated but hidden, v = 2 visible; in files that never say 2, as MMPose's of 300-W, 1 says
    no more than annotated, and such points are visible. Annotations without a point are left out and counted in
    `Records.left_out`.

    Args:
        path: the file.
        root: folder that the images' names are relative to; by default the file's.
        images: False: whether the images are there is not asked.
        one_based: the points count from 1 and 1 is subtracted from them; COCO's count from 0, but MMPose's of 300-W and
            300-VW repeat the .pts files. Boxes stay as they are: these are drawn wide around the points.

    Raises:
        DataError: not JSON, of another shape, keypoints that are not 3 P numbers with one P for all, an image_id that no
            image has, or an image that is not there.
    """
    content = read_json(path)
    folder = Path(path).parent if root is None else Path(root)
    names = {_key(image.get("id")): image.get("file_name") for image in _list(path, content, "images")}
    annotations = [
        (f"{path}: annotation {number}", entry) for number, entry in enumerate(_list(path, content, "annotations"))
    ]
    keypoints = [_keypoints(where, entry) for where, entry in annotations]
    says_visible = any((points[:, 2] == 2).any() for points in keypoints)
    records: list[Record] = []
    for (where, entry), points in zip(annotations, keypoints, strict=True):
        if len(points) != len(keypoints[0]):
            raise DataError(f"{where}: expected {len(keypoints[0])} keypoints as in the first, got {len(points)}")
        identity = _key(entry.get("image_id"))
        if identity not in names:
            raise DataError(f"{where}: no image has its image_id {identity[:40]}")
        known = points[:, 2] > 0
        if known.any():
            place = points_of(where, points[:, :2] - (1 if one_based else 0), known)
            image = image_named(where, folder, names[identity], images)
            box = None if entry.get("bbox") is None else face_box(where, *matrix(where, entry["bbox"], (4,)))
            visible = points[:, 2] == 2 if says_visible else known
            records.append(Record(image, place, visible, box, Path(path).stem, f"{image.stem}_{len(records)}"))
    if not records:
        raise DataError(f"{path}: holds no annotation with keypoints")
    return Records(records, left_out=len(annotations) - len(records))


def read_json(path: PathLike) -> dict[str, Any]:
    """A JSON object. Raises DataError."""
    try:
        content = json.loads(read_text(path), parse_constant=_refuse)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file that can be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _refuse(constant: str) -> float:
    """JSON has no NaN and no infinity, though Python's parser takes them."""
    raise ValueError(f"{constant} is not a number")


def _list(path: PathLike, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: {key} must be a list of objects, got {type(entries).__name__}")
    return entries


def _key(identity: Any) -> str:
    """Identities compare as they are written: 1 is not "1"."""
    return repr(identity)


def _keypoints(where: str, entry: dict[str, Any]) -> np.ndarray:
    """[P, 3]"""
    values = _numbers(where, entry.get("keypoints"))
    if len(values) == 0 or len(values) % 3:
        raise DataError(f"{where}: keypoints must be x y v of each, got {len(values)} numbers")
    return values.reshape(-1, 3)


def _numbers(where: str, value: Any) -> np.ndarray:
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise DataError(f"{where}: keypoints must be a list of numbers, got {type(value).__name__}")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        raise DataError(f"{where}: a number of keypoints is too large") from None
