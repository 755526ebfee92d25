"""The faces that a configuration names, as training takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import data, training
from ..config import Config, DataConfig
from ..training import ranks
from .common import BadInput

__all__ = ["open_evaluated", "open_sets"]


def open_sets(chosen: Config) -> tuple[Any, Any]:
    """(train, held_out) of a resolved configuration; says how many faces its reader and its crops leave out, and how
    many landmarks.

    Raises:
        DataError: as `data.open_dataset`, `RecordFaces`, `DiskCache` and `training.training_sets`. BadInput: settings
            that the set does not allow.
    """
    dataset, train, size = _dataset(chosen.data), chosen.train, _size(chosen.data)
    hidden = _hidden(chosen.data, dataset) if isinstance(dataset, data.RecordFaces) else set()
    if train.cache not in ("memory", "off"):
        if not isinstance(dataset, data.RecordFaces):
            raise BadInput(f"train.cache must be memory or off for {chosen.data.path}, got {train.cache!r}")
        dataset = data.DiskCache(dataset, train.cache, size)
    kept = train.cache == "memory"
    sets = training.training_sets(
        dataset, size, chosen.data.path, keep=kept, workers=train.workers, pin=train.pin, without=hidden
    )
    fit = sets[0].capacity if kept else len(sets[0])
    if fit < len(sets[0]) and ranks.rank() == 0:
        print(
            f"{chosen.data.path}: {fit} of {len(sets[0])} faces are kept in memory, the others are decoded in every round: "
            "train.cache = FOLDER keeps all in a file",
            flush=True,
        )
    return sets


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
        if isinstance(dataset, data.RecordFaces):
            return data.RecordFaces(dataset.records, size, keep_outside=evaluated, **_crop(chosen))
    except ValueError as error:
        if isinstance(error, data.DataError):
            raise
        raise BadInput(f"{chosen.path}: {error}") from None
    changed = [name for name, value in _crop(chosen).items() if value != getattr(DataConfig, name)]
    if changed and not evaluated:
        raise BadInput(f"data.{changed[0]} is for sets of annotated photographs, which {chosen.path} is not")
    return dataset


def _crop(chosen: DataConfig) -> dict[str, Any]:
    return {"crop": chosen.crop, "padding": chosen.padding, "fallback": chosen.fallback}


def _hidden(chosen: DataConfig, faces: data.RecordFaces) -> set[int]:
    """The faces of which no landmark is seen; tells what is missing of the set."""
    masked = faces.masked_counts()
    none = masked == np.isfinite(faces.records.points).all(axis=-1).sum(axis=1)
    missing = {
        "faces without a landmark are left out": faces.records.left_out,
        "faces whose crops hold none of their landmarks are left out": int(none.sum()),
        "landmarks lie outside their crops and are masked": int(masked[~none].sum()),
    }
    for words, count in missing.items():
        if count and ranks.rank() == 0:
            print(f"{chosen.path}: {count} {words}", flush=True)
    return set(none.nonzero()[0].tolist())


def _size(chosen: DataConfig) -> int:
    assert chosen.size is not None  # a resolved configuration has it
    return chosen.size
