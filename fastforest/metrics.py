"""Landmark metrics: normalised mean error, failure rate, area under the cumulative error distribution; and how well an
uncertainty tells good predictions from bad ones.

Shapes: B images, P landmarks, points (x, y) in pixels. Points come as torch tensors or numpy arrays [B, P, 2] of any
floating dtype and are compared in float64. NME is a fraction (0.05 is 5 %).

A true landmark with a coordinate that is not finite is unknown, and an image's error is that of its known landmarks. An
image whose NME cannot be computed (normaliser 0 or not finite, no known landmark, a prediction of a known one that is
not finite) has NME = NaN, and every aggregate counts it as a failure: above any threshold for `failure_rate`, worth the
threshold for `auc`, never reached by `ced`. Only the mean NME of `evaluate` leaves it out, and says of how many images
it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from .data.layout import layout_of

__all__ = [
    "KINDS",
    "Metrics",
    "auc",
    "auc_from_ced",
    "aurc",
    "ced",
    "evaluate",
    "failure_auroc",
    "failure_rate",
    "landmark_errors",
    "nme",
    "normalizer_distance",
    "region_nme",
    "risk_coverage",
]

KINDS = ("inter_ocular", "inter_pupil", "box")
"""The normalisers that have a name."""

OUTER_EYE_CORNERS = {count: layout.outer_eyes for count in (68, 98, 29) if (layout := layout_of(count))}
"""Of the layouts whose errors the literature divides by their distance; AFLW's 19 are divided by the face's size."""
EYES_68 = (slice(36, 42), slice(42, 48))

Array = Tensor | np.ndarray


def normalizer_distance(points68: Array, kind: str) -> Tensor:
    """Distance d in pixels that divides an image's error.

    "inter_ocular": |a - b|, a and b the outer eye corners: 36, 45 of 68 points (300-W), 60, 72 of 98 (WFLW), 8, 9 of
    29 (COFW). "inter_pupil": the same with the means of points 36..41 and 42..47 (68 points only). "box": sqrt(w h),
    w and h the sides of the known landmarks' bounding box (any P): unknown ones can only make d smaller, so they never
    flatter an error.

    Args:
        points68: [B, P, 2] true landmarks, pixels; despite the name, P is what `kind` allows.
        kind: one of `KINDS`.

    Returns:
        [B] float64, pixels; NaN where an eye's landmark is unknown, and for "box" where all are.

    Raises:
        ValueError: unknown kind, wrong shape, or a number of points that the kind does not know.
        TypeError: not a floating-point array.

    >>> import torch
    >>> eyes = torch.zeros(1, 68, 2); eyes[0, 45, 0] = 3.0; eyes[0, 45, 1] = 4.0
    >>> normalizer_distance(eyes, "inter_ocular").tolist()
    [5.0]
    """
    points = _points("normalizer_distance", "points68", points68)
    count = points.shape[1]
    if kind == "inter_ocular":
        if count not in OUTER_EYE_CORNERS:
            raise ValueError(
                f"normalizer_distance: points68 must have 68, 98 or 29 points for 'inter_ocular', got {count}"
            )
        right, left = OUTER_EYE_CORNERS[count]
        return torch.linalg.vector_norm(points[:, right] - points[:, left], dim=-1)
    if kind == "inter_pupil":
        if count != 68:
            raise ValueError(f"normalizer_distance: points68 must have 68 points for 'inter_pupil', got {count}")
        right_eye, left_eye = (points[:, eye].mean(dim=1) for eye in EYES_68)
        return torch.linalg.vector_norm(right_eye - left_eye, dim=-1)
    if kind == "box":
        known = points.isfinite().all(dim=-1, keepdim=True)
        high = torch.where(known, points, -torch.inf).amax(dim=1)
        low = torch.where(known, points, torch.inf).amin(dim=1)
        return torch.where(known.any(dim=1), high - low, torch.nan).prod(dim=-1).sqrt()
    raise ValueError(f"normalizer_distance: kind must be one of {', '.join(KINDS)}, got {kind!r}")


def nme(pred: Array, target: Array, normalizer: str | Array | float) -> Tensor:
    """Normalised mean error of each image: mean_k |p_k - g_k| / d over its known landmarks k.

    Args:
        pred: [B, P, 2] predicted points, pixels.
        target: [B, P, 2] true points, pixels; NaN where unknown.
        normalizer: one of `KINDS` (d from `target`), or d itself in pixels: [B], or one number for all images.

    Returns:
        [B] float64, a fraction. NaN where d is 0, negative or not finite, where no landmark is known, or the prediction
        of a known one is not finite.

    Raises:
        ValueError: shapes that are not [B, P, 2] or differ, no image, no point, unknown kind, or a normalizer that is
            not [B].
        TypeError: not floating-point.

    >>> import torch
    >>> truth = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [float("nan"), float("nan")]]])
    >>> nme(truth.nan_to_num() + 1.0, truth, 2 ** 0.5).tolist()
    [1.0]
    """
    return _finite_mean(_landmark_errors("nme", pred, target, normalizer))


def landmark_errors(pred: Array, target: Array, normalizer: str | Array | float) -> Tensor:
    """|p_k - g_k| / d of each landmark: [B, P] float64, fractions. Arguments and errors as `nme`.

    NaN where the landmark is unknown or the image has no d; inf where its prediction is not finite.
    """
    return _landmark_errors("landmark_errors", pred, target, normalizer)


def region_nme(
    pred: Array, target: Array, normalizer: str | Array | float, regions: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """`nme` of each region's landmarks, divided by the whole face's d: by name, [B] float64.

    Args:
        pred, target, normalizer: as `nme`.
        regions: by name, indices of landmarks, as `data.REGIONS_68`.

    Returns:
        NaN where a region has no known landmark, and as `nme`.

    Raises:
        ValueError, TypeError: as `nme`; a region without an index or with one outside 0..P - 1.
    """
    errors = _landmark_errors("region_nme", pred, target, normalizer)
    for name, indices in regions.items():
        if not indices or min(indices) < 0 or max(indices) >= errors.shape[1]:
            expected = f"must hold indices in 0..{errors.shape[1] - 1}"
            raise ValueError(f"region_nme: regions[{name!r}] {expected}, got {list(indices)}")
    return {name: _finite_mean(errors[:, list(indices)]) for name, indices in regions.items()}


def failure_rate(nme: Array, a: float) -> float:
    """FR@a: the share of images with NME > a. An image whose NME is NaN counts as a failure.

    Args:
        nme: [B] fractions.
        a: threshold, a fraction, > 0.

    Raises:
        ValueError: empty or not one-dimensional `nme`, or `a` not a positive finite number.

    >>> import torch
    >>> failure_rate(torch.tensor([0.02, 0.08, 0.09, float("nan")]), 0.08)
    0.5
    """
    errors = _errors("failure_rate", nme, a)
    return float((errors > a).double().mean())


def auc(nme: Array, a: float) -> float:
    """AUC@a: (1/a) times the integral of the cumulative error distribution from 0 to a, in [0, 1].

    Computed as 1 - E[min(NME, a)] / a, which equals the integral exactly (`auc_from_ced` is the other side). An image
    whose NME is NaN counts as a failure and adds nothing. Arguments and errors as `failure_rate`.

    >>> import torch
    >>> round(auc(torch.tensor([0.0, 0.04, 0.5]), 0.08), 6)
    0.5
    """
    return float(1 - _errors("auc", nme, a).clamp(max=a).mean() / a)


def ced(nme: Array, a: float, points: int = 1000) -> tuple[Tensor, Tensor]:
    """Cumulative error distribution: the share of images with NME <= t, at `points` even thresholds t from 0 to a.

    Returns:
        thresholds [points] and fractions [points], float64; the last fraction is 1 - FR@a. NaN images are never
        reached.

    Raises:
        ValueError: as `failure_rate`, or fewer than 2 points.
    """
    errors = _errors("ced", nme, a)
    if points < 2:
        raise ValueError(f"ced: points must be at least 2, got {points}")
    thresholds = torch.linspace(0, a, points, dtype=torch.float64, device=errors.device)
    thresholds[-1] = a
    reached = torch.searchsorted(errors.sort().values, thresholds, right=True)
    return thresholds, reached.double() / len(errors)


def auc_from_ced(nme: Array, a: float) -> float:
    """AUC@a by integrating the step function CED from 0 to a, step by step: the check on `auc`.

    With e_1 <= ... <= e_m the errors below a, e_(m+1) = a and B images, the CED is i / B on [e_i, e_(i+1)).
    """
    errors = _errors("auc_from_ced", nme, a)
    below = errors[errors < a].sort().values
    edges = torch.cat([below, below.new_tensor([a])])
    heights = torch.arange(1, len(below) + 1, dtype=torch.float64, device=errors.device) / len(errors)
    return float((heights * edges.diff()).sum() / a)


def risk_coverage(error: Array, uncertainty: Array) -> tuple[Tensor, Tensor]:
    """The risk-coverage curve: the mean error of the share of images that are predicted with most certainty.

    risk_k = E[mean of the k errors of least uncertainty], k = 1..B, at coverage k / B. Equal uncertainties come in random
    order: the risk is the expected one, so the order of the images does not matter.

    Source: Geifman & El-Yaniv, Selective classification for deep neural networks, 2017.

    Args:
        error: [B], finite, e.g. NME; leave images without one out.
        uncertainty: [B], any unit, more is worse; NaN is as uncertain as infinity.

    Returns:
        coverage [B] and risk [B], float64.

    Raises:
        ValueError: empty or not one-dimensional, different lengths, or an error that is not finite.
        TypeError: not floating-point.

    >>> import torch
    >>> coverage, risk = risk_coverage(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.1, 0.7, 0.7]))
    >>> risk.tolist()  # the second is 3 or 5
    [1.0, 2.5, 3.0]
    """
    errors, doubt = _error_and_doubt("risk_coverage", error, uncertainty)
    if not bool(errors.isfinite().all()):
        raise ValueError("risk_coverage: error must be finite, leave images without one out")
    _, group, count = torch.unique(doubt, return_inverse=True, return_counts=True)
    mean = torch.zeros_like(count, dtype=torch.float64).index_add_(0, group, errors) / count
    expected = mean.repeat_interleave(count)  # of the image at each place of the order
    images = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return images / len(errors), expected.cumsum(0) / images


def aurc(error: Array, uncertainty: Array) -> float:
    """Area under the risk-coverage curve: the mean of `risk_coverage`'s risks; its unit is the error's.

    `aurc(error, error)` is the least there is, that of an oracle; the excess over it is what better uncertainties could
    win. An uncertainty that tells nothing has the mean error. Arguments and errors as `risk_coverage`.

    Source: Geifman, Uziel & El-Yaniv, Bias-reduced uncertainty estimation for deep neural classifiers, 2019.

    >>> import torch
    >>> error = torch.tensor([1.0, 3.0, 5.0])
    >>> aurc(error, error), aurc(error, torch.zeros(3)), aurc(error, -error)
    (2.0, 3.0, 4.0)
    """
    return float(risk_coverage(error, uncertainty)[1].mean())


def failure_auroc(error: Array, uncertainty: Array, a: float) -> float:
    """The chance that a failure is more uncertain than a success, a tie counting half: the area under the ROC curve.

    Args:
        error: [B], non-negative; above `a`, or NaN, is a failure.
        uncertainty: as `risk_coverage`.
        a: threshold, in the error's unit, > 0.

    Returns:
        In [0, 1], 0.5 for an uncertainty that tells nothing; NaN where all images fail, or none.

    Raises:
        ValueError, TypeError: as `failure_rate` and `risk_coverage`.

    >>> import torch
    >>> failure_auroc(torch.tensor([0.01, 0.02, 0.2]), torch.tensor([1.0, 3.0, 2.0]), 0.08)
    0.5
    """
    errors, doubt = _error_and_doubt("failure_auroc", error, uncertainty)
    failed = (_errors("failure_auroc", errors, a, "error") > a).cpu().numpy()
    failures, successes = int(failed.sum()), int((~failed).sum())
    if failures == 0 or successes == 0:
        return math.nan
    ranks = rankdata(doubt.cpu().numpy())[failed].sum()
    return float((ranks - failures * (failures + 1) / 2) / (failures * successes))


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found. Printed names carry the normaliser and the threshold.

    nme: mean over the images whose NME is a number, a fraction (NaN if there is none). failure_rate, auc: fractions
    over all images. invalid: images whose NME is NaN; they are failures in failure_rate and auc. unknown: true landmarks
    of all images that are not known; no figure counts them.

    >>> print(Metrics(0.0531, 0.1, 0.4, "inter_ocular", 0.08, 20, 0))
    NME[inter_ocular] 5.31 %  FR@0.08[inter_ocular] 10.00 %  AUC@0.08[inter_ocular] 40.00 %  (20 images)
    """

    nme: float
    failure_rate: float
    auc: float
    normalizer: str
    threshold: float
    images: int
    invalid: int
    unknown: int = 0

    def as_dict(self) -> dict[str, float]:
        """Fractions (not %) and counts by their full names, e.g. {"NME[box]": 0.05, ..., "images": 20}."""
        name, at = self.normalizer, f"{self.threshold:g}"
        return {
            f"NME[{name}]": self.nme,
            f"FR@{at}[{name}]": self.failure_rate,
            f"AUC@{at}[{name}]": self.auc,
            "images": self.images,
            "invalid": self.invalid,
            "unknown": self.unknown,
        }

    def __str__(self) -> str:
        values = {key: value for key, value in self.as_dict().items() if "[" in key}
        text = "  ".join(f"{key} {100 * value:.2f} %" for key, value in values.items())
        unit = "image" if self.images == 1 else "images"
        invalid = f", {self.invalid} without an NME: failures, not in the mean" if self.invalid else ""
        marks = "landmark" if self.unknown == 1 else "landmarks"
        unknown = f", {self.unknown} unknown {marks} left out" if self.unknown else ""
        return f"{text}  ({self.images} {unit}{invalid}{unknown})"


def evaluate(pred: Array, target: Array, normalizer: str | Array | float, threshold: float = 0.08) -> Metrics:
    """NME, FR@threshold and AUC@threshold of a batch, with names that say how they were normalised.

    Args:
        pred, target, normalizer: as `nme`; a normalizer given as distances is printed as "given".
        threshold: fraction, > 0.

    Raises:
        ValueError, TypeError: as `nme` and `failure_rate`.
    """
    errors = nme(pred, target, normalizer)
    name = normalizer if isinstance(normalizer, str) else "given"
    return Metrics(
        nme=float(errors.nanmean()),
        failure_rate=failure_rate(errors, threshold),
        auc=auc(errors, threshold),
        normalizer=name,
        threshold=threshold,
        images=len(errors),
        invalid=int(errors.isnan().sum()),
        unknown=int((~_known(torch.as_tensor(target))).sum()),
    )


def _landmark_errors(function: str, pred: Array, target: Array, normalizer: str | Array | float) -> Tensor:
    p, g = _points(function, "pred", pred), _points(function, "target", target)
    if p.shape != g.shape:
        raise ValueError(
            f"{function}: pred and target must have the same shape, got {list(p.shape)} and {list(g.shape)}"
        )
    if p.shape[0] == 0:
        raise ValueError(f"{function}: pred must hold at least one image, got an empty batch {list(p.shape)}")
    if isinstance(normalizer, str):
        distance = normalizer_distance(g, normalizer)
    else:
        distance = _distance(function, normalizer, p.shape[0])
    distance = distance.to(p.device)[:, None]
    g = g.to(p.device)
    error = torch.linalg.vector_norm(p - g, dim=-1) / distance
    error = torch.where(p.isfinite().all(dim=-1), error, torch.inf)
    return torch.where(_known(g) & (distance > 0) & distance.isfinite(), error, torch.nan)


def _known(target: Tensor) -> Tensor:
    return target.isfinite().all(dim=-1)


def _finite_mean(errors: Tensor) -> Tensor:
    """Mean over the last dimension of what is not NaN; NaN where nothing is, or where the mean is not finite."""
    mean = errors.nanmean(dim=-1)
    return torch.where(mean.isfinite(), mean, torch.nan)


def _points(function: str, argument: str, value: Array) -> Tensor:
    points = _floating(function, argument, value)
    if points.dim() != 3 or points.shape[1] == 0 or points.shape[2] != 2:
        raise ValueError(f"{function}: {argument} must be [B, P, 2] with P > 0, got {list(points.shape)}")
    return points


def _floating(function: str, argument: str, value: Array) -> Tensor:
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{function}: {argument} must be a tensor or a numpy array, got {type(value).__name__}")
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        raise TypeError(f"{function}: {argument} must be floating-point, got {tensor.dtype}")
    return tensor.double()


def _distance(function: str, normalizer: Array | float, images: int) -> Tensor:
    if isinstance(normalizer, int | float):
        return torch.full((images,), float(normalizer), dtype=torch.float64)
    distance = _floating(function, "normalizer", normalizer)
    if distance.shape != (images,):
        raise ValueError(
            f"{function}: normalizer must be [{images}], one distance an image, got {list(distance.shape)}"
        )
    return distance


def _errors(function: str, value: Array, a: float, argument: str = "nme") -> Tensor:
    """[B] float64 with NaN replaced by inf: a failure at every threshold."""
    errors = _one_dimensional(function, argument, value)
    if not 0 < a < float("inf"):
        raise ValueError(f"{function}: a must be a positive finite number, got {a}")
    if bool((errors < 0).any()):
        raise ValueError(f"{function}: {argument} must be non-negative, got {float(errors.nan_to_num(0).min())}")
    return errors.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _error_and_doubt(function: str, error: Array, uncertainty: Array) -> tuple[Tensor, Tensor]:
    """Both [B] float64 on one device; an uncertainty that is NaN is inf."""
    errors = _one_dimensional(function, "error", error)
    doubt = _one_dimensional(function, "uncertainty", uncertainty).to(errors.device)
    if len(errors) != len(doubt):
        raise ValueError(
            f"{function}: error and uncertainty must have the same length, got {len(errors)} and {len(doubt)}"
        )
    return errors, torch.where(doubt.isnan(), torch.inf, doubt)


def _one_dimensional(function: str, argument: str, value: Array) -> Tensor:
    values = _floating(function, argument, value)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{function}: {argument} must be [B] with B > 0, got {list(values.shape)}")
    return values
