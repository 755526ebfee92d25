"""A file that says where the faces are: boxes by the names of images."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from ..data import DataError
from ..data.records import Box

__all__ = ["read_boxes"]


def read_boxes(path: Path) -> dict[str, Box]:
    """Boxes x, y, width, height in pixels by image name.

    .json: {"a.png": [x, y, width, height], ...}. Any other suffix: lines name,x,y,width,height; a first line whose second
    field is no number is a header.

    Raises:
        DataError: file missing, not UTF-8, not of this form, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(text)
    boxes: dict[str, Box] = {}
    for where, name, values in rows:
        if name in boxes:
            raise DataError(f"{path}: {where}: has a second box for {name!r}")
        boxes[name] = _box(path, where, values)
    return boxes


def _json_rows(path: Path, text: str) -> list[tuple[str, str, Any]]:
    try:
        content = json.loads(text, object_pairs_hook=_Pairs)  # a dict would keep the last of equal names
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, _Pairs):
        raise DataError(f'{path}: expected {{"name": [x, y, width, height], ...}}, got a {type(content).__name__}')
    return [(repr(name), name, values) for name, values in content]


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON."""


def _csv_rows(text: str) -> list[tuple[str, str, Any]]:
    lines = [(number, row) for number, row in enumerate(csv.reader(text.splitlines()), start=1) if row]
    if lines and len(lines[0][1]) == 5 and not _is_number(lines[0][1][1]):
        lines = lines[1:]
    return [(f"line {number}", row[0], row[1:]) for number, row in lines]


def _box(path: Path, where: str, values: Any) -> Box:
    try:
        x, y, width, height = (float(value) for value in values)
    except (TypeError, ValueError):
        raise DataError(f"{path}: {where}: expected x, y, width, height, got {values!r}") from None
    return x, y, width, height


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
