"""What the layers refuse, in the same words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAIRS = {"kl": "bounding", "l2": "least_squares"}


def looked_at(values: Tensor) -> bool:
    """Whether values are checked that only the data can tell: on the CPU; CUDA never waits, and a trace has none."""
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_batchedtensor(values)
    )


def check_positive(layer: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{layer}: {name} must be a positive finite number, got {value!r}")


def check_integer(layer: str, name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{layer}: {name} must be an integer {bounds}, got {value!r}")


def check_features(layer: str, features: Tensor, in_features: int) -> None:
    if not features.is_floating_point():
        raise TypeError(f"{layer}: features must be floating-point, got {features.dtype}")
    if features.dim() != 2 or features.shape[1] != in_features:
        raise ValueError(f"{layer}: features must be [N, {in_features}], got {list(features.shape)}")


def paired(layer: str, name: str, loss: str, leaf_update: str | None, allow_mismatch: bool) -> str:
    """The leaf update that goes with a loss, called `name` there; another one only where it is asked for."""
    if loss not in PAIRS:
        raise ValueError(f"{layer}: {name} must be 'kl' or 'l2', got {loss!r}")
    if leaf_update is None:
        return PAIRS[loss]
    if leaf_update not in PAIRS.values():
        raise ValueError(f"{layer}: leaf_update must be 'bounding' or 'least_squares', got {leaf_update!r}")
    if leaf_update != PAIRS[loss] and not allow_mismatch:
        raise ValueError(
            f"{layer}: {name} {loss!r} goes with leaf_update {PAIRS[loss]!r}, got {leaf_update!r}, which "
            "minimises another loss; allow_mismatch=True pairs them all the same"
        )
    return leaf_update
