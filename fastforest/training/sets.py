"""The two parts of a set of faces, read before anything starts."""

from __future__ import annotations

from typing import Any

from ..data import Cached, DataError, FaceLoader, split
from .report import Bar

__all__ = ["read", "training_sets"]


def training_sets(
    dataset: Any, size: int, name: str, *, keep: bool = True, workers: int = 0, pin: bool = False
) -> tuple[Any, Any]:
    """(train, held_out) at side `size`: every tenth face (index % 10 == 9) is held out.

    Args:
        dataset: a `data` set.
        name: of the set, for the error's sentence.
        keep: gives `Cached`, all read now; False: `FaceLoader` with `workers` and `pin`, which reads when asked.

    Raises:
        DataError: fewer than 10 faces, or as `read`.
    """
    if len(dataset) < 10:
        raise DataError(f"{name}: needs at least 10 faces to hold every tenth out, got {len(dataset)}")
    train, held_out = split(dataset)
    if not keep:
        return FaceLoader(train, size, workers=workers, pin=pin), FaceLoader(held_out, size, workers=workers, pin=pin)
    return read(Cached(train, size), name), read(Cached(held_out, size), name)


def read(faces: Cached, name: str) -> Cached:
    """Reads every face that has a place in memory, so that a broken file shows at once. Returns `faces`.

    Raises:
        DataError: a file that cannot be read, or a face of which no landmark is known.
    """
    bar = Bar(f"reading {name}", faces.capacity)
    for index in range(faces.capacity):
        face = faces[index]
        if not bool(face.points.isfinite().all(dim=-1).any()):
            raise DataError(f"{face.name}: no landmark is known")
        bar.show(index + 1)
    bar.close()
    return faces
