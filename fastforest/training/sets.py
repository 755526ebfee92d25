"""The two parts of a set of faces, read before anything starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.utils.data import Subset

from ..data import Cached, DataError, FaceLoader, split
from .report import Bar

__all__ = ["read", "training_sets"]


def training_sets(
    dataset: Any,
    size: int,
    name: str,
    *,
    keep: bool = True,
    workers: int = 0,
    pin: bool = False,
    without: Collection[int] = (),
) -> tuple[Any, Any]:
    """(train, held_out) at side `size`: every tenth face (index % 10 == 9) is held out.

    Args:
        dataset: a `data` set.
        name: of the set, for the error's sentence.
        keep: gives `Cached`, all read now; False: `FaceLoader` with `workers` and `pin`, which reads when asked.
        without: faces that neither part gets. The others stay in the part that they are in without it.

    Raises:
        DataError: fewer than 10 faces, a part of which none is left, or as `read`.
    """
    if len(dataset) < 10:
        raise DataError(f"{name}: needs at least 10 faces to hold every tenth out, got {len(dataset)}")
    train, held_out = (Subset(p.dataset, [i for i in p.indices if i not in without]) for p in split(dataset))
    if not (len(train) and len(held_out)):
        raise DataError(f"{name}: of {len(dataset)} faces, {len(train)} are left to train and {len(held_out)} held out")
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
