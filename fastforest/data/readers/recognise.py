"""Which reader a file or a folder asks for, from its name and what lies in it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from ..errors import DataError
from ..matlab import is_hdf5
from ..records import Records
from ..text import PathLike
from .aflw2000 import read_aflw2000
from .coco import read_coco
from .cofw import cofw68_files, cofw_file, read_cofw, read_cofw68
from .common import images_of
from .dlib import read_dlib
from .ibug import SUBSETS, ibug_parts, read_ibug
from .menpo import read_ljson
from .small import read_bioid, read_imm, read_lfpw35, read_scut
from .tables import read_keypoints_csv, read_muct, table_kind
from .wflw import FIELDS, read_wflw, wflw_list

__all__ = ["LOOKED_FOR", "find_reader", "read_records"]

LOOKED_FOR = (
    "the folders afw, helen, lfpw (300-W), COFW_train.mat, N_points.mat (COFW-68), list_98pt_rect_attr_train.txt (WFLW), "
    "image and .mat pairs (AFLW2000), .asf, .ljson, .eye and .pts pairs (BioID), average.txt (LFPW), binary .pts"
)
"""What `find_reader` knows of folders."""

FILES = ".xml (dlib), .json (COCO), .ljson (menpo), .mat (COFW), .csv (MUCT) or a list of WFLW"
"""What it knows of files."""

Reader = Callable[[], Records]


def read_records(path: PathLike, subset: str | None = None) -> Records:
    """The records of any file or folder that a reader knows, else of a folder's .pts files as `read_ibug` reads them.

    subset: which part of 300-W (`ibug.SUBSETS`), COFW or WFLW ("train", "test"); None reads "train" of those. A folder
    that holds some sets of 300-W alone gives their training parts where it has others too, else all there is.

    Raises:
        DataError: nothing known there, a subset of something that has none, or as the reader.
        ValueError: an unknown subset.
    """
    reader = find_reader(path, subset)
    if reader is not None:
        return reader()
    place = Path(path)
    if place.is_dir() and next(place.rglob("*.pts"), None) is not None:
        return read_ibug(place)
    if place.is_dir():
        raise DataError(f"{path}: holds no .pts files and none of: {LOOKED_FOR}")
    raise DataError(f"{path}: {f'is not a folder, nor {FILES}' if place.exists() else 'no such file or folder'}")


def find_reader(path: PathLike, subset: str | None = None) -> Reader | None:
    """The reader bound to its place, None where none of them knows it (folders of .pts files are no set of their own).

    Raises:
        DataError: a subset is asked of something that has none.
    """
    place = Path(path)
    if subset is None and place.is_dir() and cofw68_files(place):
        return lambda: read_cofw68(place)
    reader = _with_subset(place, subset) if place.is_dir() else None
    if reader is not None:
        return reader
    if subset is not None:
        raise DataError(f"{path}: is no folder of 300-W, COFW or WFLW, so that it has no subset {subset!r}")
    return _folder(place) if place.is_dir() else _file(place)


def _with_subset(folder: Path, subset: str | None) -> Reader | None:
    if any(wflw_list(folder, part) for part in ("train", "test")):
        return lambda: read_wflw(folder, subset or "train")
    if any(cofw_file(folder, part) for part in ("train", "test")):
        return lambda: read_cofw(folder, subset or "train")
    if subset in SUBSETS:
        return lambda: read_ibug(folder, subset)
    parts = ibug_parts(folder).keys()
    tested = {*SUBSETS["full"], *SUBSETS["test"]}
    if subset is None and parts & tested and parts & set(SUBSETS["train"]):
        whole = {part.split("/")[0] for part in SUBSETS["train"]} <= {part.split("/")[0] for part in parts}
        return lambda: read_ibug(folder, "train", complete=whole)
    return None


def _folder(folder: Path) -> Reader | None:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    endings = {Path(name).suffix.lower() for name in names}
    if ".asf" in endings:
        return lambda: read_imm(folder)
    if ".ljson" in endings and ".pts" not in endings:
        return lambda: read_ljson(folder)
    if {".eye", ".pts"} <= endings:
        return lambda: read_bioid(folder)
    if next(folder.glob("*/average.txt"), None) is not None:
        return lambda: read_lfpw35(folder)
    points = [folder / name for name in names if name.lower().endswith(".pts")]
    if points and _binary(points[0]):
        return lambda: read_scut(folder)
    if ".mat" in endings and images_of(folder):
        return lambda: read_aflw2000(folder)
    return None


def _file(file: Path) -> Reader | None:
    ending = file.suffix.lower()
    by_name: dict[str, Callable[[PathLike], Records]] = {".xml": read_dlib, ".json": read_coco, ".ljson": read_ljson}
    if not file.is_file():
        return None
    if ending in by_name:
        return lambda: by_name[ending](file)
    if ending == ".mat" and is_hdf5(file):
        return lambda: read_cofw(file)
    if ending == ".csv" and (kind := table_kind(next(csv.reader([_first_line(file)]), []))):
        return lambda: read_muct(file) if kind == 2 else read_keypoints_csv(file)
    if ending == ".txt" and len(_first_line(file).split(maxsplit=FIELDS - 1)) == FIELDS:
        return lambda: read_wflw(file)
    return None


def _binary(path: Path) -> bool:
    """Whether a .pts file has the length that its first four bytes announce."""
    with open(path, "rb") as file:
        count = int.from_bytes(file.read(4), "little")
    return count > 0 and path.stat().st_size == 4 + 8 * count


def _first_line(path: Path) -> str:
    with open(path, "rb") as file:
        return file.readline(1 << 16).decode("utf-8-sig", errors="replace").strip()
