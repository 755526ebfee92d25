"""COFW: images, 29 landmarks, occlusion and boxes in one MATLAB 7.3 file. COFW-68: its test images with other landmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, one_line
from ..matlab import image_cell, load_mat, open_hdf5
from ..pts import existing_folder
from ..records import Record, Records
from ..text import PathLike
from .common import face_box, matrix, points_of

__all__ = ["cofw68_files", "cofw_file", "read_cofw", "read_cofw68"]

POINTS = 29

ENDINGS = {"train": "Tr", "test": "T"}


def read_cofw(path: PathLike, subset: str = "train") -> Records:
    """Faces of COFW_train.mat or COFW_test.mat (or the _color files), whose `member` is the image's number from 0.

    The file holds the images in the cells IsTr or IsT, and a row an image in phisTr or phisT (x1..x29 y1..y29, then 29
    times 1 where occluded) and in bboxesTr or bboxesT (x, y, width, height). All count pixels from 1: 1 is subtracted.
    An occluded landmark has a place all the same: only `visible` is False. No image is read.

    Args:
        path: the file, or a folder that holds it.
        subset: "train" or "test": which file of a folder, colour before grey; a file is read as what it is.

    Raises:
        DataError: file missing, not MATLAB 7.3, variables missing or of another shape, or not of equal number.
        ValueError: an unknown subset.
    """
    if subset not in ENDINGS:
        raise ValueError(f"read_cofw: subset must be train or test, got {subset!r}")
    file = Path(path)
    if file.is_dir():
        found = cofw_file(file, subset)
        if found is None:
            raise DataError(f"{path}: holds neither COFW_{subset}_color.mat nor COFW_{subset}.mat")
        file = found
    count = len(image_cell(file))
    part = "train" if _variable(file, "IsTr") is not None else "test"
    phis = _rows(file, f"phis{ENDINGS[part]}", count, 3 * POINTS)
    boxes = _rows(file, f"bboxes{ENDINGS[part]}", count, 4)
    records = []
    for member, (row, box) in enumerate(zip(phis, boxes, strict=True)):
        where = f"{file}: image {member}"
        points = points_of(where, row[: 2 * POINTS].reshape(2, POINTS).T - 1)
        visible = row[2 * POINTS :] == 0
        x, y, width, height = box
        found_box = face_box(where, x - 1, y - 1, width, height)
        records.append(Record(file, points, visible, found_box, f"cofw/{part}", f"{part}_{member:04d}", member))
    return Records(records)


def read_cofw68(folder: PathLike, images: PathLike | Literal[False] | None = None) -> Records:
    """COFW's test images with 68 landmarks: N_points.mat, N from 1, of image N - 1 of COFW_test.mat.

    A file holds Points [68, 2] (x y) and Occ [68], 1 where occluded; cofw68_test_bboxes.mat, where it is there, row N - 1
    of bboxes (x, y, width, height). All count pixels from 1: 1 is subtracted.

    Args:
        folder: of the .mat files, e.g. test_annotations of the cofw68-benchmark; the boxes may stand one folder above.
        images: COFW_test.mat; by default looked for in the folder and the one above. False: whether it is there is not
            asked.

    Raises:
        DataError: no such folder, no N_points.mat in it, one of another content, a row of boxes or an image missing.
    """
    root = existing_folder(folder)
    numbered = cofw68_files(root)
    if not numbered:
        raise DataError(f"{root}: holds no file N_points.mat")
    source = _test_images(root, images)
    count = None if images is False else len(image_cell(source))
    boxes = _test_boxes(root)
    records = []
    for number, path in sorted(numbered.items()):
        if number < 1 or (count is not None and number > count):
            raise DataError(f"{path}: {source} has no image {number}")
        if boxes is not None and number > len(boxes):
            raise DataError(f"{path}: the file of boxes has {len(boxes)} rows, none for it")
        content = load_mat(path)
        points = points_of(str(path), matrix(f"{path}: Points", content.get("Points"), (68, 2)) - 1)
        visible = matrix(f"{path}: Occ", np.ravel(content.get("Occ", ())), (68,)) == 0
        x, y, width, height = (np.nan,) * 4 if boxes is None else boxes[number - 1]
        box = None if boxes is None else face_box(str(path), x - 1, y - 1, width, height)
        records.append(Record(source, points, visible, box, "cofw68/test", f"test_{number - 1:04d}", number - 1))
    return Records(records)


def cofw68_files(folder: Path) -> dict[int, Path]:
    """The files N_points.mat of a folder by N."""
    matches = ((re.fullmatch(r"([0-9]{1,6})_points\.mat", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def cofw_file(folder: Path, subset: str) -> Path | None:
    """COFW_<subset>_color.mat or COFW_<subset>.mat in a folder, in upper or lower case."""
    names = {path.name.lower(): path for path in folder.iterdir()}
    return names.get(f"cofw_{subset}_color.mat") or names.get(f"cofw_{subset}.mat")


def _test_images(root: Path, images: PathLike | Literal[False] | None) -> Path:
    if images is not None and images is not False:
        return Path(images)
    found = cofw_file(root, "test") or cofw_file(root.absolute().parent, "test")
    if found is None and images is None:
        raise DataError(f"{root}: COFW_test.mat, which has the images, is neither here nor in the folder above")
    return found or root / "COFW_test.mat"


def _test_boxes(root: Path) -> np.ndarray | None:
    name = "cofw68_test_bboxes.mat"
    path = next((place / name for place in (root, root.absolute().parent) if (place / name).is_file()), None)
    return None if path is None else matrix(f"{path}: bboxes", load_mat(path).get("bboxes"), (None, 4))


def _variable(path: Path, name: str) -> Any:
    """The content of a variable, None where there is none."""
    file = open_hdf5(path)
    try:
        return file[name][()] if name in file else None
    except Exception as error:
        raise DataError(f"{path}: {name} cannot be read: {one_line(error)}") from error


def _rows(path: Path, name: str, count: int, columns: int) -> np.ndarray:
    """[count, columns] in MATLAB, which h5py sees transposed."""
    value = _variable(path, name)
    if value is None:
        raise DataError(f"{path}: has no variable {name}")
    return matrix(f"{path}: {name}", value, (columns, count)).T
