"""One annotated face as every reader gives it, and many of them in arrays.

Shapes: N records, P landmarks. Points are (x, y) in the pixels of the image file, 0-based, pixel centres at integers; a
landmark that was not annotated is NaN in both coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from .errors import DataError
from .matlab import read_member
from .pts import open_image

__all__ = ["Box", "Record", "Records", "open_record_image"]

Box = tuple[float, float, float, float]
"""x, y, width, height, pixels; x and y of the corner, 0-based."""


@dataclass(frozen=True, eq=False)
class Record:
    """An annotated face.

    image: the file. member: which image of a file that holds many (a .mat file), else None. points: float32 [P, 2], NaN
    where not annotated. visible: bool [P], False where hidden by something (its place may be known nevertheless) or not
    annotated. box: of the face, as the set gives it, or None. source: the set and its part, e.g. "300w/helen". name: tells
    records of a set apart. attributes: what else the set says, e.g. {"blur": True}.
    """

    image: Path
    points: np.ndarray
    visible: np.ndarray
    box: Box | None = None
    source: str = ""
    name: str = ""
    member: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def open_record_image(record: Record) -> Image.Image:
    """The picture that a record is of, decoded, a Pillow image of mode RGB.

    Raises:
        DataError: as `read_image` for a file of its own, `matlab.read_member` for a member of a file of many.
    """
    return open_image(record.image) if record.member is None else read_member(record.image, record.member)


class Records(Sequence[Record]):
    """Records with equally many points, in arrays: 10,000 of 68 points take about 8 MB.

    left_out: how many faces their reader left out because nothing of them is annotated.

    Raises:
        DataError: no record, or a number of points that differs from the first record's.
    """

    def __init__(self, records: Iterable[Record], left_out: int = 0) -> None:
        rows = list(records)
        if not rows:
            raise DataError("no record: there is nothing to read")
        self.landmarks, self.left_out = len(rows[0].points), left_out
        for row in rows:
            if len(row.points) != self.landmarks:
                expected = f"expected {self.landmarks} points as of {rows[0].name or rows[0].image}"
                raise DataError(f"{row.image}: {expected}, got {len(row.points)}")
        self.points = np.stack([np.asarray(row.points, dtype=np.float32) for row in rows])
        self.visible = np.stack([np.asarray(row.visible, dtype=bool) for row in rows])
        nowhere = (np.nan,) * 4
        self.boxes = np.array([nowhere if row.box is None else row.box for row in rows], dtype=np.float64)
        self._rest = [(row.image, row.source, row.name, row.member, row.attributes) for row in rows]

    def __len__(self) -> int:
        return len(self._rest)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self[i] for i in range(*index.indices(len(self))))
        image, source, name, member, attributes = self._rest[index]
        x, y, width, height = (float(value) for value in self.boxes[index])
        return Record(
            image,
            self.points[index].copy(),
            self.visible[index].copy(),
            None if np.isnan(self.boxes[index]).any() else (x, y, width, height),
            source,
            name,
            member,
            attributes,
        )
