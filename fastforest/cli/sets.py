"""The faces that a configuration names, as training takes them."""

from __future__ import annotations

from typing import Any

from .. import data, training
from ..config import Config, DataConfig
from ..training import ranks
from .common import BadInput

__all__ = ["open_evaluated", "open_sets"]


def open_sets(chosen: Config) -> tuple[Any, Any]:
    """(train, held_out) of a resolved configuration; says how many faces its reader leaves out, and how many
    landmarks its crops.

    Raises:
        DataError: as `data.open_dataset`, `RecordFaces`, `DiskCache` and `training.training_sets`. BadInput: settings
            that the set does not allow.
    """
    dataset, train, size = _dataset(chosen.data), chosen.train, _size(chosen.data)
    if isinstance(dataset, data.RecordFaces) and ranks.rank() == 0:
        _tell(chosen.data.path, dataset)
    if train.cache not in ("memory", "off"):
        if not isinstance(dataset, data.RecordFaces):
            raise BadInput(f"train.cache must be memory or off for {chosen.data.path}, got {train.cache!r}")
        dataset = data.DiskCache(dataset, train.cache, size)
    kept = train.cache == "memory"
    return training.training_sets(dataset, size, chosen.data.path, keep=kept, workers=train.workers, pin=train.pin)


def open_evaluated(chosen: DataConfig) -> Any:
    """The set whole, for a checkpoint's evaluation: `crop`, `padding` and `fallback` count where the set has any.

    Landmarks outside their crops stay: an evaluation without them would leave out the worst.

    Raises:
        DataError, BadInput: as `open_sets`.
    """
    return _dataset(chosen, evaluated=True)


def _dataset(chosen: DataConfig, *, evaluated: bool = False) -> Any:
    size = max(16, _size(chosen))
    try:
        dataset = data.open_dataset(
            chosen.path, size=size, count=chosen.faces, seed=chosen.face_seed, subset=chosen.subset
        )
        crop = {"crop": chosen.crop, "padding": chosen.padding, "fallback": chosen.fallback}
        if isinstance(dataset, data.RecordFaces):
            return data.RecordFaces(dataset.records, size, keep_outside=evaluated, **crop)  # type: ignore[arg-type]
    except ValueError as error:
        if isinstance(error, data.DataError):
            raise
        raise BadInput(f"{chosen.path}: {error}") from None
    changed = [name for name, value in crop.items() if value != getattr(DataConfig, name)]
    if changed and not evaluated:
        raise BadInput(f"data.{changed[0]} is for sets of annotated photographs, which {chosen.path} is not")
    return dataset


def _tell(path: str, faces: data.RecordFaces) -> None:
    """What is missing of a set."""
    left_out, masked = faces.records.left_out, faces.masked
    if left_out:
        print(f"{path}: {left_out} faces without a landmark are left out", flush=True)
    if masked:
        print(f"{path}: {masked} landmarks lie outside their crops and are masked", flush=True)


def _size(chosen: DataConfig) -> int:
    assert chosen.size is not None  # a resolved configuration has it
    return chosen.size
