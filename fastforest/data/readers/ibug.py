"""300-W as iBUG distributes it: afw, helen, lfpw, ibug and 300W, each face a .pts file beside its image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..matlab import load_mat
from ..pts import existing_folder, read_pts
from ..records import Box, Record, Records
from ..text import PathLike
from .common import face_box, image_beside, images_of, matrix, points_of

__all__ = ["SETS", "SUBSETS", "ibug_parts", "read_ibug"]

SETS: dict[str, tuple[str, ...]] = {
    "afw": (),
    "helen": ("trainset", "testset"),
    "lfpw": ("trainset", "testset"),
    "ibug": (),
    "300w": ("indoor", "outdoor"),
}
"""The sets and the folders in them."""

COMMON = ("helen/testset", "lfpw/testset")

SUBSETS: dict[str, tuple[str, ...]] = {
    "train": ("afw", "helen/trainset", "lfpw/trainset"),
    "common": COMMON,
    "challenge": ("ibug",),
    "full": (*COMMON, "ibug"),
    "test": ("300w/indoor", "300w/outdoor"),
}
"""The parts that make each subset of the literature; "train" has 3,148 faces, "full" 689, "test" 600."""

BOXES = {"detector": "bb_detector", "ground_truth": "bb_ground_truth"}


def read_ibug(
    folder: PathLike,
    subset: str | None = None,
    *,
    boxes: PathLike | None = None,
    box: str = "detector",
    expected: int = 68,
    one_based: bool = True,
    complete: bool = True,
) -> Records:
    """Faces of 300-W, of one of its sets alone, or of any folder of .pts files, in order of part and path.

    The folder holds those of afw, helen/trainset, helen/testset, lfpw/trainset, lfpw/testset, ibug, 300W/01_Indoor and
    300W/02_Outdoor that there are (in upper or lower case; indoor and outdoor may stand in the folder itself), or is
    one of the sets (named so), or any folder with .pts files at any depth: what belongs to no part comes last. An image
    has its .pts file's stem and stands beside it, or in imgs beside the .pts file's folder (300-VW).

    Points and boxes count pixels from 1: 1 is subtracted. Boxes come from bounding_boxes_<set>_<part>.mat, which hold
    x1 y1 x2 y2: width is x2 - x1. A face that they do not list has no box.

    Args:
        folder: where the sets are.
        subset: "train", "common", "challenge", "full", "test" (see `SUBSETS`), or None for everything there is. Of a set
            alone, its parts in that subset.
        boxes: folder of the .mat files; by default the folder itself and the folders in it.
        box: "detector": what iBUG's detector gave, or "ground_truth": around the landmarks.
        expected: number of points that every file must hold.
        one_based: False where the files count from 0; boxes keep counting from 1.
        complete: every part of the subset must be there; False takes those that are.

    Raises:
        DataError: no such folder, a part of the subset missing, no .pts file, one without an image or as `read_pts`, or
            a file of boxes that cannot be read.
        ValueError: an unknown subset or box.
    """
    if subset is not None and subset not in SUBSETS:
        raise ValueError(f"read_ibug: subset must be one of {', '.join(SUBSETS)} or None, got {subset!r}")
    if box not in BOXES:
        raise ValueError(f"read_ibug: box must be detector or ground_truth, got {box!r}")
    root = existing_folder(folder)
    places = _box_files(root if boxes is None else existing_folder(boxes))
    records: list[Record] = []
    read: set[Path] = set()
    for part, path in _chosen(root, subset, complete).items():
        listed = _boxes(places[_plain(part)], BOXES[box]) if _plain(part) in places else {}
        for file, image in _pairs(path, read):
            read.add(file)
            points = points_of(str(file), read_pts(file, expected=expected, one_based=one_based))
            name = file.relative_to(root).with_suffix("").as_posix()
            seen = np.ones(len(points), dtype=bool)
            records.append(Record(image, points, seen, listed.get(image.stem.lower()), _source(part), name))
    if not records:
        raise DataError(f"{root}: holds no .pts file")
    return Records(records)


def ibug_parts(folder: Path) -> dict[str, Path]:
    """The folders of the parts that stand in a folder, e.g. {"helen/testset": folder / "HELEN" / "testset"}; of a set
    whose .pts files stand in no part, the set's own."""
    return _found(folder)[1]


def _found(root: Path) -> tuple[str | None, dict[str, Path]]:
    """The set that the folder itself is, if it is one, and the folders of the parts."""
    folders = {_plain(path.name): path for path in root.iterdir() if path.is_dir()}
    inside = {} if "300w" in folders else _parts("300w", root)
    parts = {part: path for part, path in inside.items() if path != root}
    alone = "300w" if parts else None
    for name in SETS:
        if name in folders:
            parts, alone = parts | _parts(name, folders[name]), None
    if not parts and _plain(root.name) in SETS:
        alone = _plain(root.name)
        parts = _parts(alone, root)
    return alone, parts


def _chosen(root: Path, subset: str | None, complete: bool) -> dict[str, Path]:
    """The folders to read by part, e.g. {"helen/testset": ...}; "" is what belongs to none."""
    alone, parts = _found(root)
    if subset is None:
        return parts | {"": root}
    wanted = [part for part in SUBSETS[subset] if alone is None or part.split("/")[0] == alone]
    there = [part for part in wanted if part in parts]
    if not wanted or not (there or complete):
        raise DataError(f"{root}: holds no part of subset {subset!r}, which is {', '.join(SUBSETS[subset])}")
    for part in wanted:
        if complete and part not in parts:
            raise DataError(f"{root}: has no folder {part}, which belongs to subset {subset!r}")
    return {part: parts[part] for part in there}


def _parts(name: str, folder: Path) -> dict[str, Path]:
    folders = {_plain(path.name).lstrip("0123456789"): path for path in folder.iterdir() if path.is_dir()}
    found = {f"{name}/{part}": folders[part] for part in SETS[name] if part in folders}
    flat = not found and next(folder.glob("*.pts"), None) is not None
    return {name: folder} if flat or not SETS[name] else found


def _pairs(folder: Path, without: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Each .pts file at any depth, but those `without`, and its image."""
    files: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*.pts")):
        if path.is_file() and not path.name.startswith(".") and path not in without:
            files.setdefault(path.parent, []).append(path)
    for place, paths in files.items():
        images = images_of(place) or images_of(place.parent / "imgs")
        for path in paths:
            yield path, image_beside(path, images)


def _box_files(root: Path) -> dict[str, Path]:
    """Files of boxes in a folder and the folders in it, by set and part without marks, e.g. "helentestset"."""
    prefix = "boundingboxes"
    files = [path for pattern in ("*.mat", "*/*.mat") for path in sorted(root.glob(pattern))]
    return {_plain(path.stem)[len(prefix) :]: path for path in files if _plain(path.stem).startswith(prefix)}


def _boxes(path: Path, field: str) -> dict[str, Box | None]:
    """Boxes by the image's stem in lower case."""
    content: Any = load_mat(path, simplify=True).get("bounding_boxes")
    if isinstance(content, np.ndarray):
        content = content.ravel().tolist()
    if isinstance(content, dict):  # of a list of one entry scipy leaves the entry alone
        content = [content]
    entries: list[Any] = content if isinstance(content, list) else []
    boxes = {}
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("imgName"), str) or field not in entry:
            raise DataError(f"{where}: expected the fields imgName and {field}")
        x1, y1, x2, y2 = matrix(where, entry[field], (4,))
        boxes[Path(entry["imgName"]).stem.lower()] = face_box(where, x1 - 1, y1 - 1, x2 - x1, y2 - y1)
    if not boxes:
        raise DataError(f"{path}: holds no list of boxes named bounding_boxes")
    return boxes


def _source(part: str) -> str:
    return f"300w/{part.removeprefix('300w/')}" if part else ""


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
