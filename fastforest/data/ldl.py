"""Sets for label-distribution learning: MATLAB files with `features` [N, F] and `labels` [N, C], and a drawn one.

The files that circulate differ: variables in any order, extra ones beside these two, single or double precision, and
rows of labels that are rounded, or cut off at the ends of the scale, so that they do not sum to 1. Read here, they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .matlab import load_mat
from .pts import existing_folder
from .text import PathLike

__all__ = ["DistributionSet", "read_distributions", "read_distributions_folder", "synthetic_distributions"]

LEAST_SUM = 0.1
"""A row of labels that sums to less than this is refused, not stretched."""


class DistributionSet(NamedTuple):
    """name; features [N, F] and labels [N, C], float32; rows of labels are distributions. renormalised: how many rows
    of labels were more than a thousandth away from 1 before."""

    name: str
    features: Tensor
    labels: Tensor
    renormalised: int


def read_distributions(path: PathLike) -> DistributionSet:
    """Reads one MATLAB file (up to version 7.2; scipy does it).

    Raises:
        DataError: file missing or unreadable, a variable missing, not numbers, another number of rows in the two, NaN or
            infinity, a negative label, or labels that hardly sum to anything; or scipy is not installed.
    """
    path = Path(path)
    content = load_mat(path)
    for name in ("features", "labels"):
        if name not in content:
            found = ", ".join(sorted(key for key in content if not key.startswith("__"))) or "nothing"
            raise DataError(f"{path}: has no variable '{name}', it holds {found}")
    features, labels = (_matrix(path, name, content[name]) for name in ("features", "labels"))
    if len(features) != len(labels):
        raise DataError(f"{path}: has {len(features)} rows of features, but {len(labels)} of labels")
    if labels.shape[1] < 2:
        raise DataError(f"{path}: labels must have at least 2 classes, got {labels.shape[1]}")
    if labels.min() < 0:
        raise DataError(f"{path}: labels must not be negative, row {int(labels.min(axis=1).argmin())} is")
    total = labels.sum(axis=1)
    if total.min() < LEAST_SUM:
        row = int(total.argmin())
        raise DataError(f"{path}: labels of row {row} sum to {total[row]:g}, which is no distribution")
    renormalised = int((np.abs(total - 1) > 1e-3).sum())
    return DistributionSet(path.stem, _tensor(features), _tensor(labels / total[:, None]), renormalised)


def read_distributions_folder(path: PathLike) -> list[DistributionSet]:
    """Every .mat file of a folder, by name.

    Raises:
        DataError: no such folder, no .mat file in it, or as `read_distributions`.
    """
    folder = existing_folder(path)
    files = sorted(folder.glob("*.mat"))
    if not files:
        raise DataError(f"{folder}: holds no .mat files")
    return [read_distributions(file) for file in files]


def synthetic_distributions(seed: int = 0, count: int = 1500, features: int = 20, classes: int = 6) -> DistributionSet:
    """A drawn set: a few numbers bend a distribution over ordered classes, often with two peaks; the rest is noise.

    Row i is a function of (seed, i) and the sizes alone. The labels are a mixture of two discretised Gaussians whose
    places, widths and share are smooth, but not linear, functions of the first five features.

    Raises:
        ValueError: a negative seed, count < 1, features < 5 or classes < 2.
    """
    if seed < 0 or count < 1 or features < 5 or classes < 2:
        raise ValueError(
            "synthetic_distributions: expected seed >= 0, count >= 1, features >= 5, classes >= 2, "
            f"got {seed}, {count}, {features}, {classes}"
        )
    x = np.stack([np.random.default_rng((seed, i)).standard_normal(features) for i in range(count)])
    scale = (classes - 1) / 2
    first = scale * (1 + 0.8 * np.tanh(x[:, 0] + 2 * np.sin(2 * x[:, 1])))
    second = scale * (1 - 0.8 * np.tanh(2 * np.abs(x[:, 2]) - 1.35))
    width = 0.5 + 0.5 / (1 + np.exp(-x[:, 3]))
    share = 1 / (1 + np.exp(-2 * x[:, 4] * np.sign(x[:, 0])))
    places = np.arange(classes)
    peaks = [np.exp(-(((places - c[:, None]) / width[:, None]) ** 2) / 2) + 1e-3 for c in (first, second)]
    a, b = (peak / peak.sum(axis=1, keepdims=True) for peak in peaks)
    return DistributionSet(
        "synthetic", _tensor(x), _tensor(share[:, None] * a + (1 - share[:, None]) * b), renormalised=0
    )


def _matrix(path: Path, name: str, value: Any) -> np.ndarray:
    # sparse matrices have toarray
    array = np.asarray(value.toarray() if hasattr(value, "toarray") else value)
    if array.dtype.kind not in "fiub" or array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{path}: {name} must be a matrix of numbers, got {array.dtype} {list(array.shape)}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int((~np.isfinite(array).all(axis=1)).argmax())
        raise DataError(f"{path}: {name} of row {row} are not finite")
    return array


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
