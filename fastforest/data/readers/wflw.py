"""WFLW: 98 landmarks, a box and six attributes a line of a text file, images in WFLW_images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError
from ..records import Record, Records
from ..text import PathLike, read_lines
from .common import face_box, image_named, numbers, points_of

__all__ = ["ATTRIBUTES", "read_wflw", "wflw_list"]

POINTS = 98

ATTRIBUTES = ("pose", "expression", "illumination", "make-up", "occlusion", "blur")
"""In the order of the columns; each is True where the face is hard in that way."""

FIELDS = 2 * POINTS + 4 + len(ATTRIBUTES) + 1

LIST = "list_98pt_rect_attr_{}.txt"


def read_wflw(path: PathLike, subset: str = "train", *, root: PathLike | None = None, images: bool = True) -> Records:
    """Faces of list_98pt_rect_attr_train.txt or .._test.txt; an image may have several.

    A line: x0 y0 .. x97 y97, the box x1 y1 x2 y2, six attributes (0 or 1; `ATTRIBUTES`), the image's path. The
    coordinates are taken to count from 0, as they stand. The set's README does not say; HRNet's published loader reads
    them so (it adds 1 before a transform that counts from 1).

    Args:
        path: WFLW's folder, that holds WFLW_annotations (or the lists at any depth) and WFLW_images; or a list.
        subset: "train" or "test": which list of a folder; a list is read as what it is.
        root: folder that the paths are relative to; by default WFLW_images in or above the list's folder.
        images: False: whether the images are there is not asked.

    Raises:
        DataError: no list, an image that is not there, or a line that is not as above.
        ValueError: an unknown subset.
    """
    if subset not in ("train", "test"):
        raise ValueError(f"read_wflw: subset must be train or test, got {subset!r}")
    file = Path(path)
    if file.is_dir():
        found = wflw_list(file, subset)
        if found is None:
            raise DataError(f"{path}: holds no {LIST.format(subset)}")
        file = found
    part = next((part for part in ("train", "test") if part in file.stem), "")
    folder = _images_folder(file) if root is None else Path(root)
    return Records(_record(where, line, folder, part, images) for where, line in read_lines(file))


def wflw_list(folder: Path, subset: str) -> Path | None:
    """The list of a subset in a folder or up to two folders below."""
    patterns = (prefix + LIST.format(subset) for prefix in ("", "*/", "*/*/"))
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _record(where: str, line: str, folder: Path, part: str, images: bool) -> Record:
    fields = line.split(maxsplit=FIELDS - 1)
    if len(fields) != FIELDS:
        raise DataError(f"{where}: expected {FIELDS} fields, got {len(fields)}")
    values = numbers(where, fields[:-1])
    x1, y1, x2, y2 = values[2 * POINTS : 2 * POINTS + 4]
    flags = values[2 * POINTS + 4 :]
    if not np.isin(flags, (0, 1)).all():
        raise DataError(f"{where}: an attribute is neither 0 nor 1")
    points = points_of(where, values[: 2 * POINTS].reshape(POINTS, 2))
    return Record(
        image_named(where, folder, fields[-1], images),
        points,
        np.ones(POINTS, dtype=bool),
        face_box(where, x1, y1, x2 - x1, y2 - y1),
        f"wflw/{part}" if part else "wflw",
        f"{Path(fields[-1]).stem}_{where.rpartition(' ')[2]}",
        attributes=dict(zip(ATTRIBUTES, (flags == 1).tolist(), strict=True)),
    )


def _images_folder(file: Path) -> Path:
    """WFLW_images in the nearest folder above a list that has it, else beside the list."""
    above = list(file.absolute().parents)[:3]
    return next((place / "WFLW_images" for place in above if (place / "WFLW_images").is_dir()), above[0])
