"""Faces cut out of the images of records, when they are asked for.

Shapes: N records, P landmarks, T the side of the faces, pixels.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch.utils.data import Dataset

from .crop import Crop
from .errors import DataError
from .faces import Face, checked_index, checked_size
from .records import Record, Records, open_record_image

__all__ = ["RecordFaces"]

CROPS = ("landmarks", "box")


class RecordFaces(Dataset[Face]):
    """The face of each record, a square around its landmarks or its box, resampled to side `size` with antialiasing.

    Lazy: nothing is decoded before a face is asked for, and nothing is kept. What lies outside the image is black. A
    landmark that is unknown is NaN. One that the square leaves outside is set to NaN as well, never moved, and counted.

    Args:
        records: where the faces are.
        size: T.
        crop: "landmarks", the square `Crop.around` them, or "box", that `Crop.of_box`.
        padding: of the square, on each side, in longer sides of the landmarks' bounding box or of the box.
        fallback: "landmarks" takes those of records without a box; None refuses such records.
        keep_outside: landmarks outside the square keep their coordinates, which then lie outside the face.

    `squares`: float64 [N, 3], x and y of the centre and the side, pixels of the images. `names`: of the records.

    Raises:
        DataError: a record without a known landmark, or whose square cannot be placed: no box, a box without an area,
            landmarks that are all one point; on reading a face: an image that cannot be read or lies beside the square.
        ValueError: size < 1, padding <= -0.5, or another crop or fallback.
    """

    def __init__(
        self,
        records: Records,
        size: int = 256,
        *,
        crop: str = "landmarks",
        padding: float = 0.25,
        fallback: str | None = None,
        keep_outside: bool = False,
    ) -> None:
        checked_size("RecordFaces", size)
        if crop not in CROPS:
            raise ValueError(f"RecordFaces: crop must be one of {', '.join(CROPS)}, got {crop!r}")
        if fallback not in (None, "landmarks"):
            raise ValueError(f"RecordFaces: fallback must be landmarks or None, got {fallback!r}")
        if not padding > -0.5:
            raise ValueError(f"RecordFaces: padding must be greater than -0.5, got {padding}")
        self.records, self.size, self.keep_outside = records, size, keep_outside
        self.names = [record.name for record in records]
        crops = [_placed(record, size, crop, padding, fallback) for record in records]
        self.squares = np.array([(*placed.centre, placed.side) for placed in crops])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Face:
        index = checked_index(index, len(self))
        record, crop = self.records[index], self.crop(index)
        image = open_record_image(record)
        if crop.misses(image):
            raise DataError(
                f"{_title(record)}: the face lies outside the image of {image.width} x {image.height} pixels"
            )
        points = crop.to_crop(record.points)
        if not self.keep_outside:
            points[~crop.contains(record.points)] = np.nan
        return Face(crop.apply(image), torch.from_numpy(points).float(), record.name)

    def crop(self, index: int) -> Crop:
        """Of face `index`: takes points of the face back into its image."""
        x, y, side = (float(value) for value in self.squares[index])
        return Crop((x, y), side, self.size)

    def masked_counts(self) -> np.ndarray:
        """How many known landmarks of each record lie outside its square, int64 [N]. Decodes nothing.

        They are NaN in the faces, but with `keep_outside`.
        """
        known = np.isfinite(self.records.points).all(axis=-1)
        inside = np.stack([self.crop(index).contains(points) for index, points in enumerate(self.records.points)])
        return (known & ~inside).sum(axis=1)

    @property
    def masked(self) -> int:
        """The sum of `masked_counts`."""
        return int(self.masked_counts().sum())

    def fingerprint(self) -> str:
        """Tells sets of faces apart: changes with any record's name, points or square, with the name, size or date of
        its image file, with `size` and with `keep_outside`. The folder may move. For `DiskCache`.

        Raises:
            DataError: an image file that is missing.
        """
        digest = hashlib.sha256(repr((self.size, self.keep_outside)).encode())
        for array in (self.records.points, self.squares):
            digest.update(repr(array.shape).encode() + array.tobytes())
        for record in self.records:
            try:
                status = record.image.stat()
            except OSError:
                raise DataError(f"{record.image}: no such file") from None
            file = (record.image.name, record.member, status.st_size, status.st_mtime_ns)
            digest.update(repr((record.name, *file)).encode())
        return digest.hexdigest()


def _placed(record: Record, size: int, crop: str, padding: float, fallback: str | None) -> Crop:
    if not np.isfinite(record.points).all(axis=-1).any():
        raise DataError(f"{_title(record)}: no landmark is known")
    by_box = crop == "box" and (record.box is not None or fallback is None)
    if by_box and record.box is None:
        raise DataError(f"{_title(record)}: has no box to crop by")
    try:
        if by_box and record.box is not None:
            return Crop.of_box(record.box, size, padding=padding)
        return Crop.around(record.points, size, padding=padding)
    except ValueError as error:
        raise DataError(f"{_title(record)}: {error}") from None


def _title(record: Record) -> str:
    return f"{record.image} ({record.name})" if record.name else str(record.image)
