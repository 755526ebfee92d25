"""dlib's XML, as imglab writes it: images, boxes, and numbered parts in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from defusedxml import ElementTree

from ..errors import DataError, one_line
from ..records import Record, Records
from ..text import PathLike, read_bytes
from .common import face_box, image_named, numbers, points_of

__all__ = ["read_dlib"]


def read_dlib(path: PathLike, *, root: PathLike | None = None, images: bool = True) -> Records:
    """Faces of an imglab file: every box with parts, that is not marked ignore, in the file's order.

    A box has left, top, width, height; parts are named by numbers (00, 01, ...), which give the order. All count from 0.
    A part that a box lacks is NaN. Boxes without parts are left out and counted in `Records.left_out`.

    Args:
        path: the file.
        root: folder that the images' names are relative to; by default the file's.
        images: False: whether the images are there is not asked.

    Raises:
        DataError: not XML, or XML that declares a document type (entities are never expanded); no box with parts; an
            attribute missing or not a number; parts that are not numbered without a gap, or one of them twice; an image
            that is not there.
    """
    folder = Path(path).parent if root is None else Path(root)
    boxes = [
        (f"{path}: image {number}, box {place}", image.get("file"), box, _parts(f"{path}: image {number}", box))
        for number, image in enumerate(_root(path).iter("image"))
        for place, box in enumerate(image.iter("box"))
        if box.get("ignore", "0") != "1"
    ]
    order = sorted({part for _, _, _, parts in boxes for part in parts})
    if not order:
        raise DataError(f"{path}: holds no box with parts")
    if order != list(range(order[0], order[0] + len(order))):
        raise DataError(f"{path}: the parts {order[0]} to {order[-1]} are {len(order)}, they have gaps")
    records: list[Record] = []
    for where, name, box, parts in boxes:
        if parts:
            points = np.array([parts.get(part, (np.nan, np.nan)) for part in order])
            known = np.isfinite(points).all(axis=1)
            place = face_box(where, *numbers(where, (box.get(key, "") for key in ("left", "top", "width", "height"))))
            image = image_named(where, folder, name, images)
            source, tag = Path(path).stem, f"{image.stem}_{len(records)}"
            records.append(Record(image, points_of(where, points, known), known, place, source, tag))
    return Records(records, left_out=len(boxes) - len(records))


def _root(path: PathLike) -> Any:
    try:
        # a string of bytes: the parser then goes by the encoding that the file declares
        return ElementTree.fromstring(read_bytes(path), forbid_dtd=True)
    except DataError:
        raise
    except Exception as error:
        # ParseError, DefusedXmlException, LookupError and ValueError for encodings that are unknown or multi-byte
        raise DataError(f"{path}: not an XML file that can be read: {one_line(error)}") from error


def _parts(where: str, box: Any) -> dict[int, tuple[float, float]]:
    parts: dict[int, tuple[float, float]] = {}
    for part in box.iter("part"):
        name = part.get("name", "")
        if not (name.isascii() and name.isdecimal() and len(name) < 6):
            raise DataError(f"{where}: parts must be named by numbers, got {name[:40]!r}")
        if int(name) in parts:
            raise DataError(f"{where}: a box has part {int(name)} twice")
        x, y = numbers(where, (part.get("x", ""), part.get("y", "")))
        parts[int(name)] = (x, y)
    return parts
