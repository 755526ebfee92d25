"""Tables: a line a face, its image's name and x, y of each point, between commas. MUCT; YouTube faces with 68 points."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..records import Record, Records
from ..text import PathLike, read_text
from .common import image_named, numbers, points_of

__all__ = ["read_keypoints_csv", "read_muct", "table_kind"]


def read_muct(path: PathLike, *, root: PathLike | None = None, images: bool = True) -> Records:
    """MUCT's muct76-opencv.csv: the head name,tag,x00,y00,..., then a line a face, counted from 0 at the upper left.

    0, 0 says not annotated: such a point is NaN. The image is name.jpg. attributes: tag, as the set describes it.

    Args:
        path: the table.
        root: folder of the images; by default jpg beside the table, or the table's folder.
        images: False: whether the images are there is not asked.

    Raises:
        DataError: another head, a line of another length or with something that is not a number, or an image missing.
    """
    rows, folder = _rows(path, 2), Path(path).parent
    if root is not None or (folder / "jpg").is_dir():
        folder = folder / "jpg" if root is None else Path(root)
    records = []
    for where, row in rows:
        points = numbers(where, row[2:]).reshape(-1, 2)
        known = (points != 0).any(axis=1)
        image = image_named(where, folder, f"{row[0]}.jpg", images)
        found = points_of(where, points, known)
        records.append(Record(image, found, known, source="muct", name=row[0], attributes={"tag": row[1]}))
    return Records(records)


def read_keypoints_csv(path: PathLike, *, root: PathLike | None = None, images: bool = True) -> Records:
    """A table with the head ,0,1,2,... as pandas writes it: a line a face, its image's name, then x y of each point.

    Coordinates are taken to count from 0: the table's makers draw them on the images as they stand.

    Args: as `read_muct`; the images stand beside the table by default.

    Raises:
        DataError: as `read_muct`.
    """
    folder = Path(path).parent if root is None else Path(root)
    records = []
    for where, row in _rows(path, 1):
        points = points_of(where, numbers(where, row[1:]).reshape(-1, 2))
        image = image_named(where, folder, row[0], images)
        seen = np.ones(len(points), dtype=bool)
        records.append(Record(image, points, seen, source=Path(path).stem, name=Path(row[0]).stem))
    return Records(records)


def table_kind(head: list[str]) -> int | None:
    """How many columns stand before the points, from a table's first line; None for a table of another kind."""
    if head[:2] == ["name", "tag"] and len(head) > 2 and len(head) % 2 == 0:
        return 2
    if len(head) > 1 and len(head) % 2 and head == ["", *map(str, range(len(head) - 1))]:
        return 1
    return None


def _rows(path: PathLike, kind: int) -> list[tuple[str, list[str]]]:
    """(where, cells) of each line below the head, which must be of that kind."""
    text = read_text(path)
    try:
        rows = [(f"{path}: line {n}", row) for n, row in enumerate(csv.reader(text.splitlines()), start=1) if row]
    except csv.Error as error:
        raise DataError(f"{path}: not a table that can be read: {error}") from error
    head = [cell.strip() for cell in rows[0][1]]
    if table_kind(head) != kind:
        raise DataError(f"{path}: the head is not {'name,tag,x00,y00,...' if kind == 2 else ',0,1,2,...'}")
    if len(rows) < 2:
        raise DataError(f"{path}: holds no line below the head")
    for where, row in rows[1:]:
        if len(row) != len(head):
            raise DataError(f"{where}: expected {len(head)} fields, got {len(row)}")
    return rows[1:]
