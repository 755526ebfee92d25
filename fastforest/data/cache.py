"""Faces kept once they are decoded: in memory, or in a file.

Shapes: N faces, P landmarks, T the side of the kept images, pixels. An unknown landmark is NaN and is kept as such.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .faces import Face, FaceDataset, checked_index, checked_size, resized
from .text import PathLike

__all__ = ["Cached", "DiskCache"]


class FingerprintedFaces(FaceDataset, Protocol):
    """Faces that can be told from others without decoding them, as `RecordFaces`."""

    names: list[str]

    def fingerprint(self) -> str: ...


class Cached(Dataset[Face]):
    """A dataset resized to one size and kept in memory as uint8, up to a bound.

    The first `max_bytes // (3 size^2)` faces have a place in one tensor that is allocated once; each is decoded when
    it is first asked for (or by `load`). Faces beyond them are decoded every time.

    Args:
        dataset: faces that all have the same number of points.
        size: side of the kept images, pixels.
        max_bytes: bound of the image memory, bytes; 0 keeps nothing.

    Raises:
        ValueError: size < 1 or negative max_bytes.
        DataError: on reading a face: as the dataset, or a number of points that differs from the first face read.
    """

    def __init__(self, dataset: FaceDataset, size: int, max_bytes: int = 1 << 30) -> None:
        checked_size("Cached", size)
        if max_bytes < 0:
            raise ValueError(f"Cached: max_bytes must not be negative, got {max_bytes}")
        self.dataset, self.size = dataset, size
        self.capacity = min(len(dataset), max_bytes // (3 * size * size))
        self.images = torch.empty(self.capacity, 3, size, size, dtype=torch.uint8)
        self._points: Tensor | None = None
        self._names: list[str | None] = [None] * self.capacity
        self._count: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Face:
        index = checked_index(index, len(self))
        if index < self.capacity and self._points is not None and (name := self._names[index]) is not None:
            return Face(self.images[index].clone(), self._points[index].clone(), name)
        face = self._read(index)
        if index < self.capacity:
            if self._points is None:
                self._points = torch.empty(self.capacity, *face.points.shape)
            self.images[index], self._points[index] = face.image, face.points
            self._names[index] = face.name
        return face

    def load(self) -> Cached:
        """Decodes every face that has a place, so that a broken file shows at once. Returns self."""
        for index in range(self.capacity):
            if self._names[index] is None:
                self[index]
        return self

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Faces by index: images uint8 [B, 3, size, size] and points float32 [B, P, 2], copies.

        Raises:
            ValueError: no index. IndexError: an index outside the dataset. DataError: as the dataset.
        """
        order = [checked_index(int(index), len(self)) for index in indices]
        if not order:
            raise ValueError("Cached.batch: indices must hold at least one index, got none")
        if self._points is not None and all(i < self.capacity and self._names[i] is not None for i in order):
            rows = torch.tensor(order)
            return self.images[rows], self._points[rows]
        faces = [self[index] for index in order]
        return torch.stack([face.image for face in faces]), torch.stack([face.points for face in faces])

    def batches(self, orders: Iterable[Sequence[int] | Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each order. Nothing is read ahead: what is in memory needs no worker."""
        return map(self.batch, orders)

    def _read(self, index: int) -> Face:
        face = resized(self.dataset[index], self.size)
        self._count = len(face.points) if self._count is None else self._count
        if len(face.points) != self._count:
            raise DataError(f"{face.name}: expected {self._count} points as in the other faces, got {len(face.points)}")
        return face


class DiskCache(Dataset[Face]):
    """A dataset resized to one size and kept in a file, each face from the first time that it is asked for.

    The file is mapped, so that processes share what of it is in memory, and takes N (4 + 8 P + 3 T^2) bytes of the disk
    when every face is in it; it is sparse before. A row holds a face and its checksum, in one write: a row that is
    missing, half written (by a process that was killed, or one that writes it at this moment) or damaged is decoded and
    written again. Any number of processes may use the file at once. Its name holds a fingerprint of the faces, of P and
    of T, so that it is never read for others; files of others are left alone, delete the folder for its space.

    Args:
        dataset: faces that all have the same number of points, e.g. `RecordFaces`. Its face 0 is read at once.
        folder: made if missing.
        size: T.

    Raises:
        ValueError: size < 1.
        DataError: no face; the folder cannot be made or the file not be written (a full disk, say), or is longer than
            its faces; on reading a face: as the dataset, or another number of points than face 0 has.
    """

    def __init__(self, dataset: FingerprintedFaces, folder: PathLike, size: int) -> None:
        checked_size("DiskCache", size)
        if len(dataset) == 0:
            raise DataError(f"{folder}: there is no face to keep")
        self.dataset, self.size, self.names = dataset, size, dataset.names
        first = resized(dataset[0], size)
        self.row = np.dtype(
            [("check", "<u4"), ("points", "<f4", first.points.shape), ("image", "u1", first.image.shape)]
        )
        said = f"{dataset.fingerprint()} {self.row}".encode()
        self.path = Path(folder) / f"{hashlib.sha256(said).hexdigest()[:32]}.faces"
        self._make()
        self._rows = self._map()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Face:
        index = checked_index(index, len(self))
        row = self._rows[index].copy()  # what is checked must not change under the check
        if row["check"] == _checksum(row):
            return Face(torch.from_numpy(row["image"]), torch.from_numpy(row["points"]), self.names[index])
        face = resized(self.dataset[index], self.size)
        if face.points.shape != row["points"].shape:
            expected = f"expected {len(row['points'])} points as in the other faces"
            raise DataError(f"{face.name}: {expected}, got {len(face.points)}")
        self._write(index, face)
        return face

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the file itself."""
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._map()

    def _make(self) -> None:
        """Brings the file to its length; two processes that do so at once do the same."""
        length = len(self) * self.row.itemsize
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                found = file.tell()
                if found < length:
                    file.truncate(length)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be made: {error.strerror}") from None
        if found > length:
            raise DataError(f"{self.path}: expected at most {length} bytes for {len(self)} faces, got {found}")

    def _map(self) -> np.ndarray:
        return np.memmap(self.path, self.row, mode="r", shape=(len(self),))

    def _write(self, index: int, face: Face) -> None:
        """By `write`, not through the map: on a full disk it raises where the map would kill the process."""
        row = np.zeros((), self.row)
        row["points"], row["image"] = face.points.numpy(), face.image.numpy()
        row["check"] = _checksum(row)
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(index * self.row.itemsize)
                file.write(row.tobytes())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from None


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.tobytes()[4:])
