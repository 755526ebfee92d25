"""Dense landmarks: the 68 points carried along their contours by splines, and tables of faces with any number of them.

P landmarks; points are (x, y), 0-based pixels, pixel centres at integers.

Where the points of a dense face lie: the 68 come first, in their order, unchanged. The others are inner points of the
63 segments between neighbours on the contours of `LINES_68`, segment after segment, at even arc length of a cubic
spline through the contour (centripetal; natural ends, periodic where the contour is closed). How many a segment has is
the same for all faces: see `allotment`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch.utils.data import Dataset

from .errors import DataError
from .faces import Face, FaceDataset
from .layout import FLIP_68, LINES_68
from .pts import open_image, to_tensor
from .synthetic import mean_shape_68
from .text import PathLike

__all__ = ["SEGMENTS_68", "CsvFaces", "DenseFaces", "allotment", "dense_flip", "interpolate", "write_csv"]

Array = np.ndarray

SEGMENTS_68: tuple[tuple[int, int], ...] = tuple(pair for line in LINES_68 for pair in pairwise(line))
"""The two landmarks of the 68 that each segment joins, contour by contour."""

SUBSTEPS = 16
"""Chords that measure the arc between two landmarks."""

SAME = 1e-6
"""Neighbours closer than this share of their contour's length are one point of the spline."""

BLOCK = 1 << 23  # bytes that pyarrow parses at once: a row of 971 landmarks has 19,000, and small blocks cost a third


class _Curve(NamedTuple):
    """A contour by arc length: `at(s)` gives points; landmark k of the contour lies at s = landmarks[k]."""

    at: Callable[[Array], Array]
    landmarks: Array


@lru_cache(maxsize=16)
def allotment(landmarks: int = 971) -> tuple[int, ...]:
    """How many inner points each of `SEGMENTS_68` has, so that a face has `landmarks` points in all.

    Each next point goes to the segment whose points lie furthest apart on the mean face (`mean_shape_68`), together
    with one for the mirrored segment, so that a mirrored face is a permutation; a last odd one goes to the nose's bridge.

    Raises:
        ValueError: fewer than 68 landmarks.

    >>> sum(allotment(971)), max(allotment(68))
    (903, 0)
    """
    if landmarks < 68:
        raise ValueError(f"allotment: landmarks must be at least 68, got {landmarks}")
    mean = mean_shape_68().astype(np.float64)
    lengths = np.concatenate([np.diff(_curve(mean[list(line)]).landmarks) for line in LINES_68])
    groups = sorted({tuple(sorted({i, _mirrored(i)[0]})) for i in range(len(SEGMENTS_68))})
    counts, left = np.zeros(len(SEGMENTS_68), int), landmarks - 68
    while left > 0:
        group = max((g for g in groups if len(g) <= left), key=lambda g: lengths[g[0]] / (counts[g[0]] + 1))
        counts[list(group)] += 1
        left -= len(group)
    return tuple(counts.tolist())


@lru_cache(maxsize=16)
def dense_flip(landmarks: int = 971) -> tuple[int, ...]:
    """Landmark i of a mirrored dense face is landmark dense_flip(P)[i] of the original; an involution."""
    counts = allotment(landmarks)
    starts = [68 + sum(counts[:i]) for i in range(len(counts))]
    flip = list(FLIP_68)
    for i, count in enumerate(counts):
        other, turned = _mirrored(i)
        inner = range(starts[other], starts[other] + count)
        flip.extend(reversed(inner) if turned else inner)
    return tuple(flip)


def interpolate(points: Array, landmarks: int = 971) -> Array:
    """A face of 68 landmarks [68, 2] with `landmarks` of them: float32 [landmarks, 2], as this module's head says.

    A segment whose two ends are the same point has its inner points there too.

    Raises:
        ValueError: points not finite [68, 2], or fewer than 68 landmarks.

    >>> face = mean_shape_68()
    >>> dense = interpolate(face, 971)
    >>> dense.shape, bool((dense[:68] == face).all())
    ((971, 2), True)
    """
    points = np.asarray(points)
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise ValueError(f"interpolate: points must be finite [68, 2], got {list(points.shape)}")
    counts, found = iter(allotment(landmarks)), [points.astype(np.float64)]
    for line in LINES_68:
        curve = _curve(found[0][list(line)])
        ends = zip(curve.landmarks[:-1], curve.landmarks[1:], strict=True)
        arcs = [np.linspace(low, high, next(counts) + 2)[1:-1] for low, high in ends]
        found.append(curve.at(np.concatenate(arcs)))
    return np.concatenate(found).astype(np.float32)


class DenseFaces(Dataset[Face]):
    """The faces of a set of 68 landmarks with `landmarks` of them, interpolated when a face is asked for.

    Raises:
        ValueError: fewer than 68 landmarks.
        DataError: on reading a face: as the set, or its points are not 68 finite ones.
    """

    def __init__(self, dataset: FaceDataset, landmarks: int = 971) -> None:
        allotment(landmarks)
        self.dataset, self.landmarks = dataset, landmarks

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Face:
        face = self.dataset[index]
        if tuple(face.points.shape) != (68, 2) or not bool(face.points.isfinite().all()):
            raise DataError(f"{face.name}: expected 68 finite points to interpolate, got {list(face.points.shape)}")
        return face._replace(points=torch.from_numpy(interpolate(face.points.numpy(), self.landmarks)))


class CsvFaces(Dataset[Face]):
    """Faces cropped beforehand, in a table: a line an image, its path relative to the table's folder and its landmarks.

        image,x0,y0,x1,y1,...
        faces/000000.png,12.5,30.25,...

    The numbers are read at once (pyarrow), into one tensor [N, P, 2]; an image is decoded when its face is asked for.

    Args:
        path: the table.
        landmarks: P that it must have; None takes any.

    Raises:
        DataError: no such table or no pyarrow, another header, no lines; a line that is cut, has too many fields, or
            holds what is not a finite number or the name of a file (the message names the line); on reading a face:
            an image that is broken or not square.
    """

    def __init__(self, path: PathLike, landmarks: int | None = None) -> None:
        self.path = Path(path)
        names = _header(self.path, landmarks)
        self.names, self.points = _read_table(self.path, names)
        for row, name in enumerate(self.names):
            if not (self.path.parent / name).is_file():
                raise DataError(f"{self.path}: {_line(self.path, row)}: {self.path.parent / name}: no such file")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Face:
        if not -len(self) <= index < len(self):
            raise IndexError(f"face index must be in [{-len(self)}, {len(self)}), got {index}")
        path = self.path.parent / self.names[index]
        image = open_image(path)
        if image.width != image.height:
            raise DataError(f"{path}: a cropped face must be square, got {image.width} x {image.height}")
        return Face(to_tensor(image), self.points[index].clone(), self.names[index])


def write_csv(dataset: FaceDataset, path: PathLike, indices: Sequence[int] | None = None) -> Path:
    """Writes faces as `CsvFaces` reads them, bit for bit: the table, and PNG files in a folder of the table's stem.

    Args:
        dataset: faces that all have the same number of points.
        path: the table; its folder is made if missing. The table is written last, so it never names missing images.
        indices: which faces; None: all.

    Raises:
        DataError: as the set, no face, no pyarrow, or a face with another number of points or points not finite.
        OSError: the files cannot be written.
    """
    from ..training.checkpoint import write_atomically  # that package imports this one
    from ..training.report import save_png

    arrow, arrow_csv = _pyarrow(path)
    table = Path(path)
    folder = table.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    rows: list[torch.Tensor] = []
    for index in range(len(dataset)) if indices is None else indices:
        face = dataset[index]
        if (rows and face.points.shape != rows[0].shape) or not bool(face.points.isfinite().all()):
            raise DataError(
                f"{face.name}: expected finite points, as many as the others', got {list(face.points.shape)}"
            )
        picture = folder / f"{index:06d}.png"
        save_png(picture, face.image.permute(1, 2, 0).numpy())
        names.append(picture.relative_to(table.parent).as_posix())
        rows.append(face.points.float())
    if not rows:
        raise DataError(f"{table}: no face to write")
    numbers = torch.stack(rows).flatten(1).T.contiguous().numpy()
    columns = [arrow.array(names), *(arrow.array(column) for column in numbers)]
    content = arrow.table(columns, names=_columns(len(rows[0])))
    write_atomically(table, lambda temporary: arrow_csv.write_csv(content, temporary))
    return table


def _mirrored(segment: int) -> tuple[int, bool]:
    """The segment that mirrors this one, and whether it runs the other way."""
    first, last = (FLIP_68[end] for end in SEGMENTS_68[segment])
    if (first, last) in SEGMENTS_68:
        return SEGMENTS_68.index((first, last)), False
    return SEGMENTS_68.index((last, first)), True


def _curve(points: Array) -> _Curve:
    """The spline through a contour [K, 2], float64; it is closed where its last landmark is its first."""
    chords = np.linalg.norm(np.diff(points, axis=0), axis=1)
    apart = np.concatenate([[True], chords > SAME * chords.sum()])
    knots, closed = points[apart], len(points) > 2 and bool((points[0] == points[-1]).all())
    if len(knots) == 1:
        return _Curve(lambda s: np.broadcast_to(points[0], (len(s), 2)), np.zeros(len(points)))
    if closed:
        knots[-1] = knots[0]
    # Centripetal: the square root keeps the curve from overshooting where short chords meet long ones.
    times = np.concatenate([[0], np.cumsum(np.sqrt(np.linalg.norm(np.diff(knots, axis=0), axis=1)))])
    spline = CubicSpline(times, knots, bc_type="periodic" if closed else "natural")
    steps = np.arange((len(knots) - 1) * SUBSTEPS + 1) / SUBSTEPS
    fine = np.interp(steps, np.arange(len(knots)), times)
    arcs = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(spline(fine), axis=0), axis=1))])
    return _Curve(lambda s: spline(np.interp(s, arcs, fine)), arcs[::SUBSTEPS][np.cumsum(apart) - 1])


def _columns(landmarks: int) -> list[str]:
    return ["image", *(f"{axis}{i}" for i in range(landmarks) for axis in "xy")]


def _header(path: Path, landmarks: int | None) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = [name.strip() for name in next(csv.reader(file), [])]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a table") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: not a table of text") from None
    count = (len(names) - 1) // 2
    if count < 1 or names != _columns(count):
        raise DataError(f"{path}: the first line must be image,x0,y0,x1,y1,... with an x and a y for each landmark")
    if landmarks is not None and count != landmarks:
        raise DataError(f"{path}: expected {landmarks} landmarks, got {count}")
    return names


def _read_table(path: Path, names: list[str]) -> tuple[list[str], torch.Tensor]:
    arrow, arrow_csv = _pyarrow(path)
    types = dict.fromkeys(names, arrow.float32()) | {"image": arrow.string()}
    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=BLOCK, column_names=names, skip_rows=1),
            convert_options=arrow_csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except arrow.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            raise DataError(f"{path}: holds no faces") from None
        raise DataError(f"{path}: {_complaint(path, names) or ' '.join(str(error).split())[:200]}") from None
    numbers = np.empty((table.num_rows, len(names) - 1), np.float32)
    for column in range(numbers.shape[1]):
        numbers[:, column] = table.column(column + 1).to_numpy()
    if len(numbers) == 0:
        raise DataError(f"{path}: holds no faces")
    if not np.isfinite(numbers).all():
        raise DataError(f"{path}: {_complaint(path, names)}")
    return table.column(0).to_pylist(), torch.from_numpy(numbers).unflatten(1, (-1, 2))


def _complaint(path: Path, names: list[str]) -> str:
    """The first line that cannot be used, in words; read slowly, because pyarrow's threads do not number lines."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for row in reader:
            if row and len(row) != len(names):
                return f"line {reader.line_num} has {len(row)} fields, not {len(names)}"
            for name, cell in zip(names[1:], row[1:], strict=False):
                if not _is_number(cell):
                    return f"line {reader.line_num}: {name} must be a finite number, got {cell[:40]!r}"
    return ""


def _is_number(cell: str) -> bool:
    """A number that float32 holds."""
    try:
        return math.isfinite(float(cell)) and abs(float(cell)) < 3e38
    except ValueError:
        return False


def _line(path: Path, row: int) -> str:
    """ "line N" of the table's row: empty lines are skipped."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        filled = (reader.line_num for cells in reader if cells)
        return f"line {next(number for i, number in enumerate(filled) if i == row + 1)}"


def _pyarrow(path: PathLike) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.csv
    except ImportError:
        raise DataError(f"{path}: tables of landmarks need pyarrow: pip install 'fastforest[csv]'") from None
    return pyarrow, pyarrow.csv
