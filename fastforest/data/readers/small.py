"""Small sets with a file an image: BioID, IMM, SCUT-FBP5500, and LFPW's 35 points by three annotators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, one_line
from ..pts import existing_folder, read_pts
from ..records import Record, Records
from ..text import PathLike, read_bytes, read_lines
from .common import image_beside, image_named, images_of, numbers, points_of

__all__ = ["read_bioid", "read_imm", "read_lfpw35", "read_scut"]

LFPW_POINTS = 35


def read_bioid(folder: PathLike) -> Records:
    """BioID: bioid_NNNN.pts with 20 points (FGnet's mark-up) beside BioID_NNNN.pgm, and BioID_NNNN.eye where it is there.

    Points are taken to count from 0, as the mark-up's makers' tools do; the set does not say. attributes: left_eye and
    right_eye, the pupils (x, y) as the .eye file has them.

    Raises:
        DataError: no such folder, no .pts file in it, one without an image, as `read_pts`, or a broken .eye file.
    """
    root = existing_folder(folder)
    images = images_of(root)
    eyes = {path.stem.lower(): path for path in root.glob("*.eye")}
    records = []
    for file in _files(root, ".pts"):
        points = points_of(str(file), read_pts(file, expected=20, one_based=False))
        eye = eyes.get(file.stem.lower())
        attributes = {} if eye is None else _pupils(eye)
        seen = np.ones(len(points), dtype=bool)
        image = image_beside(file, images)
        records.append(Record(image, points, seen, source="bioid", name=image.stem, attributes=attributes))
    return Records(records)


def read_imm(folder: PathLike) -> Records:
    """IMM's .asf shapes: x and y as shares of the image's width and height, whose head is read for its size.

    Raises:
        DataError: no such folder, no .asf file in it, one that is cut or not as AAM-API writes it, or its image missing.
    """
    root = existing_folder(folder)
    records = []
    for file in _files(root, ".asf"):
        lines = [(where, line) for where, line in read_lines(file) if not line.startswith("#")]
        count = _count(*lines[0]) if lines else 0
        if count < 1 or len(lines) != count + 2:
            raise DataError(f"{file}: expected a number of points, as many lines, and an image; got {len(lines)} lines")
        shares = np.stack([_relative(where, line, number) for number, (where, line) in enumerate(lines[1:-1])])
        image = image_named(lines[-1][0], root, lines[-1][1], images=True)
        points = points_of(str(file), shares * _size(image))
        records.append(Record(image, points, np.ones(count, dtype=bool), source="imm", name=file.stem))
    return Records(records)


def read_scut(folder: PathLike) -> Records:
    """SCUT-FBP5500's binary .pts: the number of points (uint32), then x y of each (float32), least byte first.

    The values are whole pixels; they are taken to count from 0, the set does not say. The image has the file's stem.

    Raises:
        DataError: no such folder, no .pts file in it, one of another length than it says, or its image missing.
    """
    root = existing_folder(folder)
    images = images_of(root)
    records = []
    for file in _files(root, ".pts"):
        content = read_bytes(file)
        count = int.from_bytes(content[:4], "little")
        if count < 1 or len(content) != 4 + 8 * count:
            raise DataError(f"{file}: {count} points would take {4 + 8 * count} bytes, got {len(content)}")
        points = points_of(str(file), np.frombuffer(content, "<f4", offset=4).reshape(count, 2))
        seen = np.ones(count, dtype=bool)
        records.append(Record(image_beside(file, images), points, seen, source="scut", name=file.stem))
    return Records(records)


def read_lfpw35(folder: PathLike, annotator: str = "average") -> Records:
    """LFPW's first annotation: folders with img.jpg and a line of 35 points by each annotator and by their average.

    A line: the image's address, the annotator, then x y flag of each point; flag 0 says visible, 1 hidden by hair or the
    like, 2 hidden by the pose, 3 beyond the image's edge. Coordinates are kept as they stand. attributes: address.

    Args:
        folder: with the folders.
        annotator: "average", "worker_0", "worker_1", "worker_2": the file to read.

    Raises:
        DataError: no such folder, no such file in any, one that is not as above, or no image beside it.
    """
    root = existing_folder(folder)
    files = sorted(root.glob(f"*/{annotator}.txt"))
    if not files:
        raise DataError(f"{root}: holds no folder with {annotator}.txt")
    records = []
    for file in files:
        where, line = read_lines(file)[0]
        fields = line.split("\t")
        if len(fields) != 2 + 3 * LFPW_POINTS:
            raise DataError(f"{where}: expected {2 + 3 * LFPW_POINTS} fields, got {len(fields)}")
        values = numbers(where, fields[2:]).reshape(LFPW_POINTS, 3)
        if not np.isin(values[:, 2], (0, 1, 2, 3)).all():
            raise DataError(f"{where}: a flag is not 0, 1, 2 or 3")
        found = images_of(file.parent)
        if "img" not in found:
            raise DataError(f"{file}: no image named img beside it")
        visible = values[:, 2] == 0
        points = points_of(where, values[:, :2])
        name, attributes = file.parent.name, {"address": fields[0]}
        records.append(Record(found["img"], points, visible, source="lfpw35", name=name, attributes=attributes))
    return Records(records)


def _files(root: Path, suffix: str) -> Sequence[Path]:
    files = [path for path in sorted(root.iterdir()) if path.suffix.lower() == suffix and not path.name.startswith(".")]
    if not files:
        raise DataError(f"{root}: holds no {suffix} file")
    return files


def _pupils(path: Path) -> dict[str, tuple[float, float]]:
    lines = read_lines(path)
    if len(lines) != 2 or not lines[0][1].startswith("#"):
        raise DataError(f"{path}: expected a head and a line of numbers, got {len(lines)} lines")
    where, line = lines[1]
    values = numbers(where, line.split())
    if len(values) != 4:
        raise DataError(f"{where}: expected 4 numbers, got {len(values)}")
    left_x, left_y, right_x, right_y = values.tolist()
    return {"left_eye": (left_x, left_y), "right_eye": (right_x, right_y)}


def _count(where: str, line: str) -> int:
    if not (line.isascii() and line.isdecimal() and len(line) < 6):
        raise DataError(f"{where}: not a number of points: {line[:40]!r}")
    return int(line)


def _relative(where: str, line: str, number: int) -> np.ndarray:
    """x, y of a line: path, type, x, y, point, from, to, three of the user's."""
    values = numbers(where, line.split())
    if len(values) != 10 or values[4] != number:
        raise DataError(f"{where}: expected 10 numbers of point {number}, got {line[:40]!r}")
    return values[2:4]


def _size(image: Path) -> tuple[int, int]:
    try:
        with Image.open(image) as opened:
            return opened.size
    except Exception as error:
        # Pillow raises many kinds on heads that are broken
        raise DataError(f"{image}: its size cannot be read: {one_line(error)}") from error
