"""Argument checks shared by the operators: errors that repeat the pattern and the shape."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object, pattern: str, like: Tensor | None = None) -> Tensor:
    """``value`` must be a floating tensor of as many dimensions as the pattern names, e.g. "[B, P, 2]".

    A number in the pattern must be met exactly. TypeError for a wrong type or dtype, ValueError for a wrong shape or
    a device other than that of ``like``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {pattern}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {str(value.dtype)[6:]}")
    sizes = [word.strip() for word in pattern.strip("[]").split(",")]
    fits = value.dim() == len(sizes)
    for i, word in enumerate(sizes):
        fits = fits and (not word.isdigit() or value.shape[i] == int(word))
    if not fits:
        raise ValueError(f"{op}: {name} must be {pattern}, got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as the first argument, got {value.device}")
    return value


def check_same(op: str, name: str, got: object, expected: object, why: str) -> None:
    """ValueError "op: name must be <expected> (<why>), got <got>" unless equal."""
    if got != expected:
        raise ValueError(f"{op}: {name} must be {expected} ({why}), got {got}")


def check_number(op: str, name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """A finite number, optionally bounded below. TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{op}: {name} must be above {above:g}, got {value:g}")
    if least is not None and not value >= least:
        raise ValueError(f"{op}: {name} must be at least {least:g}, got {value:g}")
    return float(value)


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_size(name: str, size: object) -> tuple[int, int]:
    """(H, W) as positive ints."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"{name}: size must be (H, W), got {size!r}")
    for word, value in zip("HW", size, strict=True):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {word} of size must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: {word} of size must be at least 1, got {value}")
    if size[0] * size[1] >= 2**30:
        raise ValueError(f"{name}: size must be below 2^30 pixels, got {tuple(size)}")
    return size[0], size[1]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
