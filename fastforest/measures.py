"""Measures of predicted distributions and scores: the six of label-distribution learning, errors, interval coverage.

Shapes: N samples, C classes. Values come as torch tensors or numpy arrays of any floating dtype and are compared in
float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .metrics import Array

__all__ = [
    "DISTRIBUTION_MEASURES",
    "SMALLER_IS_BETTER",
    "calibrate_linear",
    "coverage",
    "distribution_measures",
    "score_measures",
]

DISTRIBUTION_MEASURES = ("kl", "euclidean", "sorensen", "squared_chi2", "fidelity", "intersection")
SMALLER_IS_BETTER = {name: name not in ("fidelity", "intersection") for name in DISTRIBUTION_MEASURES}

SUM_TOLERANCE = 1e-3
LEAST = 1e-12  # of a predicted probability in the Kullback-Leibler divergence: one zero must not hide the other samples


def distribution_measures(pred: Array, target: Array) -> dict[str, Tensor]:
    """The six measures of the field between a true distribution d and a predicted one p, for each sample.

    kl: sum d ln(d / p), with 0 ln 0 = 0 and p at least 1e-12; euclidean: sqrt(sum (d - p)^2);
    sorensen: sum |d - p| / sum (d + p); squared_chi2: sum (d - p)^2 / (d + p), with 0 / 0 = 0;
    fidelity: sum sqrt(d p); intersection: sum min(d, p). The first four are 0 for equal distributions, the others 1.
    Source: X. Geng, Label Distribution Learning, TKDE 2016; W. Shen et al., Label Distribution Learning Forests, NIPS
    2017 (their tables give the mean over samples).

    Args:
        pred, target: [N, C], rows >= 0 that sum to 1.

    Returns:
        by name, in the order of `DISTRIBUTION_MEASURES`: [N] float64. A row with NaN in `pred` is NaN.

    Raises:
        ValueError: wrong or unequal shapes, no sample, a row that is no distribution. TypeError: not floating-point.

    >>> import torch
    >>> found = distribution_measures(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    >>> {name: round(float(value), 4) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'kl': 0.6931, 'euclidean': 0.7071, 'sorensen': 0.5, 'squared_chi2': 0.6667, 'fidelity': 0.7071,
     'intersection': 0.5}
    """
    p, d = (_distributions(name, value) for name, value in (("pred", pred), ("target", target)))
    if p.shape != d.shape:
        raise ValueError(
            f"distribution_measures: pred and target must have the same shape, got {list(p.shape)} and {list(d.shape)}"
        )
    both, apart = d + p, d - p
    values = (
        (torch.xlogy(d, d) - d * p.clamp_min(LEAST).log()).sum(-1),
        torch.linalg.vector_norm(apart, dim=-1),
        apart.abs().sum(-1) / both.sum(-1),
        torch.where(both == 0, 0.0, apart.square() / torch.where(both == 0, 1.0, both)).sum(-1),
        (d * p).sqrt().sum(-1),
        torch.minimum(d, p).sum(-1),
    )
    return dict(zip(DISTRIBUTION_MEASURES, values, strict=True))


def score_measures(pred: Array, target: Array) -> dict[str, float]:
    """mae, rmse (in units of the score) and pearson's correlation of N predicted scores; NaN where one side is constant.

    Args:
        pred, target: [N].

    Raises:
        ValueError: wrong or unequal shapes, no sample. TypeError: not floating-point.

    >>> import torch
    >>> score_measures(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
    {'mae': 1.0, 'rmse': 1.0, 'pearson': 1.0}
    """
    p, t = _pair("score_measures", pred, target)
    error = p - t
    a, b = p - p.mean(), t - t.mean()
    pearson = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    return {"mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt()), "pearson": float(pearson)}


def coverage(low: Array, high: Array, target: Array) -> float:
    """The share of N samples whose target lies in [low, high]: for an honest 90 % interval, 0.9.

    Raises:
        ValueError: wrong or unequal shapes, no sample. TypeError: not floating-point.

    >>> import torch
    >>> coverage(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]))
    0.5
    """
    lower, value = _pair("coverage", low, target)
    upper, _ = _pair("coverage", high, target)
    return float(((lower <= value) & (value <= upper)).double().mean())


def calibrate_linear(pred: Array, target: Array) -> tuple[float, float]:
    """k, b of ``y = k x + b``: least squares of the targets y on the predictions x, in closed form.

    For a second group of annotators, whose scale is another: the model that learned the first group's is frozen, and
    two numbers are fitted.

    Raises:
        ValueError: wrong or unequal shapes, or all predictions equal, for which k is anything. TypeError: not
            floating-point.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 4.0])
    >>> k, b = calibrate_linear(x, 0.5 * x + 2)
    >>> round(k, 9), round(b, 9)
    (0.5, 2.0)
    """
    x, y = _pair("calibrate_linear", pred, target)
    apart = x - x.mean()
    spread = float(apart.square().sum())
    if not spread > 0:
        raise ValueError("calibrate_linear: pred must hold at least two different numbers")
    k = float((apart * (y - y.mean())).sum()) / spread
    return k, float(y.mean()) - k * float(x.mean())


def _pair(function: str, first: Array, second: Array) -> tuple[Tensor, Tensor]:
    a, b = (_floating(function, value) for value in (first, second))
    if a.dim() != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"{function}: expected two [N] with N > 0, got {list(a.shape)} and {list(b.shape)}")
    return a, b


def _distributions(name: str, value: Array) -> Tensor:
    rows = _floating("distribution_measures", value)
    if rows.dim() != 2 or 0 in rows.shape:
        raise ValueError(f"distribution_measures: {name} must be [N, C] with N, C > 0, got {list(rows.shape)}")
    if bool((rows < 0).any()):
        raise ValueError(f"distribution_measures: {name} must not be negative, got {float(rows.min())}")
    worst = float((rows.sum(-1) - 1).abs().nan_to_num(0.0).max())
    if worst > SUM_TOLERANCE:
        raise ValueError(f"distribution_measures: rows of {name} must sum to 1, one is {worst:g} away")
    return rows


def _floating(function: str, value: Array) -> Tensor:
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{function}: expected tensors or numpy arrays, got {type(value).__name__}")
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        raise TypeError(f"{function}: expected floating-point numbers, got {tensor.dtype}")
    return tensor.double()
