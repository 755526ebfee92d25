"""Shapes of faces: similarities between them, their mean, their principal components.

Shapes: N shapes, P landmarks, K components; "..." any leading dimensions. A landmark that is unknown is NaN in both
coordinates; it has no part in any sum and stays NaN.

Sources: Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 13(4), 1991;
Gower, "Generalized Procrustes analysis", Psychometrika 40(1), 1975; Cootes, Taylor, Cooper, Graham, "Active shape models:
their training and application", CVIU 61(1), 1995.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DataError

__all__ = ["MeanShape", "ShapePCA", "Similarity", "generalized_procrustes", "procrustes"]

STEPS = 1000
"""Bound of the steps of `generalized_procrustes`; complete shapes need about ten, those with gaps more."""


class Similarity(NamedTuple):
    """p -> M p + offset with M = [[a, -b], [b, a]], (a, b) = scale (cos angle, sin angle): no reflection.

    matrix: M, [..., 2, 2]. offset: [..., 2].
    """

    matrix: Tensor
    offset: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Of points [..., P, 2]; NaN stays NaN."""
        return points @ self.matrix.mT + self.offset[..., None, :]

    def inverse(self) -> Similarity:
        """The similarity back. Its scale must not be 0, which that of `procrustes` never is."""
        back = self.matrix.mT / self.scale.square()[..., None, None]
        return Similarity(back, -(back @ self.offset[..., None])[..., 0])

    @property
    def scale(self) -> Tensor:
        """[...], at least 0."""
        return self.matrix[..., 0].norm(dim=-1)

    @property
    def angle(self) -> Tensor:
        """[...], radians in (-pi, pi], from the x axis towards the y axis."""
        return torch.atan2(self.matrix[..., 1, 0], self.matrix[..., 0, 0])


def procrustes(points: Tensor, reference: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Similarity]:
    """The similarity that takes points nearest to a reference, and the points after it.

    It minimises ``sum_i w_i |M p_i + t - q_i|^2``. In the plane, with x_i = p_i - p~ and y_i = q_i - q~ the offsets from
    the weighted means, Umeyama's solution without reflection is

    ``a = sum w x.y / sum w |x|^2,   b = sum w (x_1 y_2 - x_2 y_1) / sum w |x|^2,   t = q~ - M p~``.

    Where the rotation is not determined (fewer than two landmarks known in both, or these all at one place in the
    points or in the reference, or no rotation better than another) M is the identity, so that the result is the
    translation of the means; where no landmark is known in both, nothing moves.

    Args:
        points: [..., P, 2], float32 or float64.
        reference: [..., P, 2], the same dtype; leading dimensions broadcast.
        weight: [..., P], at least 0; landmarks unknown in points or reference have weight 0 in any case. None: 1.

    Returns:
        (aligned [..., P, 2], similarity). ``similarity.inverse().apply(aligned)`` gives the points again.

    Raises:
        ValueError: shapes that do not fit.

    >>> square = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    >>> aligned, similarity = procrustes(square, 3 * square + 1)
    >>> similarity.scale.item(), similarity.offset.tolist()
    (3.0, [1.0, 1.0])
    """
    if points.dim() < 2 or points.shape[-1] != 2 or points.shape[-2:] != reference.shape[-2:]:
        shapes = f"{list(points.shape)} and {list(reference.shape)}"
        raise ValueError(f"procrustes: points and reference must be [..., P, 2] of the same P, got {shapes}")
    known = _known(points) & _known(reference)
    if weight is not None and weight.shape[-1:] != points.shape[-2:-1]:
        raise ValueError(f"procrustes: weight must be [..., {points.shape[-2]}], got {list(weight.shape)}")
    w = known.to(points.dtype) if weight is None else torch.where(known, weight, 0).to(points.dtype)
    p, q = (torch.where(known[..., None], tensor, 0) for tensor in (points, reference))
    total = w.sum(dim=-1, keepdim=True)
    share = (w / total.clamp(min=torch.finfo(w.dtype).tiny))[..., None]
    p_mean, q_mean = ((share * tensor).sum(dim=-2) for tensor in (p, q))
    x, y = p - p_mean[..., None, :], q - q_mean[..., None, :]
    x_size, y_size = ((share * tensor.square()).sum(dim=(-2, -1)) for tensor in (x, y))
    a = (share * x * y).sum(dim=(-2, -1))
    b = (share[..., 0] * (x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0])).sum(dim=-1)
    # sizes below what rounding leaves of equal points
    fuzz = 8 * torch.finfo(w.dtype).eps
    flat_x = x_size <= (fuzz * p.abs().amax(dim=(-2, -1))).square()
    flat_y = y_size <= (fuzz * q.abs().amax(dim=(-2, -1))).square()
    undecided = torch.hypot(a, b) <= fuzz * (x_size * y_size).sqrt()
    free = flat_x | flat_y | undecided
    a, b = (torch.where(free, one, value / torch.where(free, 1, x_size)) for value, one in ((a, 1.0), (b, 0.0)))
    matrix = torch.stack([a, -b, b, a], dim=-1).unflatten(-1, (2, 2))
    similarity = Similarity(matrix, q_mean - (matrix @ p_mean[..., None])[..., 0])
    return similarity.apply(points), similarity


class MeanShape(NamedTuple):
    """shape: [P, 2], centroid 0, ``sum |m_i|^2 = 1``, turned as the shapes are in the mean. steps: taken. change: of the
    mean in the last step, the root of the sum of squares."""

    shape: Tensor
    steps: int
    change: float


def generalized_procrustes(points: Tensor, tolerance: float = 1e-10) -> MeanShape:
    """The mean of shapes whatever their place, size and rotation (Gower 1975).

    Repeats, from the first of the most complete shapes: `procrustes` of every shape to the mean, then the mean over the
    aligned shapes of each landmark, where known, of centroid 0 and size 1; until the mean changes by no more than
    `tolerance`. Computed in float64; the result has the dtype of the points.

    Args:
        points: [N, P, 2].
        tolerance: for `MeanShape.change`, above 0.

    Raises:
        DataError: a landmark known in no shape, or shapes without extent.
        ValueError: points of another shape, or no convergence in `STEPS` steps.
    """
    if points.dim() != 3 or points.shape[2] != 2 or len(points) == 0:
        raise ValueError(f"generalized_procrustes: points must be [N, P, 2] with N > 0, got {list(points.shape)}")
    shapes, known = points.double(), _known(points)
    counts = known.sum(dim=0)
    if not bool((counts > 0).all()):
        raise DataError(f"landmark {int(counts.argmin())} is known in none of the {len(points)} shapes")
    # landmarks that the first shape lacks come in through the others
    mean = _normalized(shapes[int(known.sum(dim=1).argmax())])
    for step in range(1, STEPS + 1):
        aligned, _ = procrustes(shapes, mean)
        before, mean = mean, _normalized(_mean_of_known(aligned))
        mean = _normalized(procrustes(mean, before)[0])
        change = (mean - before).square().sum().sqrt().item()
        if change <= tolerance:
            return MeanShape(_turned_as(mean, shapes).to(points.dtype), step, change)
    raise ValueError(f"generalized_procrustes: no convergence to {tolerance:g} in {STEPS} steps, got {change:g}")


class ShapePCA:
    """``x = mean + sum_k c_k basis_k`` with the principal components of shapes as basis (Cootes et al. 1995).

    The components are the eigenvectors of the covariance (over N - 1) of the shapes' 2 P numbers, by falling
    eigenvalue. Shapes are taken as they are: align them first, e.g. with `procrustes` to `generalized_procrustes`. Those
    with an unknown landmark have no part in the fit. The sign of a component makes its number of largest absolute value
    positive, the first of these. Computed in float64; the results have the dtype of the points.

    Args:
        points: [N, P, 2], of which M >= 2 complete.
        components: K <= min(M - 1, 2 P), or as a float in (0, 1] the share of the variance that the fewest components
            that reach it are kept for.

    Attributes:
        mean: [P, 2]. basis: [K, P, 2], orthonormal. eigenvalues: [K], variances of the coefficients. share: of the
        variance, that of the K components, 1 where there is none. shapes: M.

    Raises:
        ValueError: points of another shape, components out of range.
        DataError: fewer than 2 complete shapes.
    """

    def __init__(self, points: Tensor, components: int | float) -> None:
        if points.dim() != 3 or points.shape[2] != 2:
            raise ValueError(f"ShapePCA: points must be [N, P, 2], got {list(points.shape)}")
        complete = points[_known(points).all(dim=1)].double().flatten(1)
        self.shapes = len(complete)
        if self.shapes < 2:
            raise DataError(
                f"ShapePCA: needs at least 2 shapes whose landmarks are all known, got {self.shapes} of {len(points)}"
            )
        mean = complete.mean(dim=0)
        _, sizes, basis = torch.linalg.svd(complete - mean, full_matrices=False)
        variances = sizes.square() / (self.shapes - 1)
        count = self._count(components, variances)
        basis = basis[:count]
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        basis = torch.where(largest < 0, -basis, basis)
        total = float(variances.sum())
        self.share = float(variances[:count].sum()) / total if total > 0 else 1.0
        self.mean, self.basis = (tensor.unflatten(-1, (-1, 2)).to(points.dtype) for tensor in (mean, basis))
        self.eigenvalues = variances[:count].to(points.dtype)

    def encode(self, points: Tensor, limit: float | None = None) -> Tensor:
        """Coefficients [..., K] of shapes [..., P, 2]: those of the nearest combination, over the known landmarks.

        Where too few landmarks are known to determine them, those of the smallest sum of squares. limit: clamps each
        to that many standard deviations.
        """
        if points.shape[-2:] != self.mean.shape:
            raise ValueError(f"ShapePCA.encode: points must be [..., {len(self.mean)}, 2], got {list(points.shape)}")
        known = _known(points)
        offset = torch.where(known[..., None], points - self.mean, 0).flatten(-2)
        basis = self.basis.flatten(1)
        codes = offset @ basis.mT
        gaps = ~known.all(dim=-1)
        if bool(gaps.any()):
            partial = basis * known[gaps][..., None].expand(-1, -1, 2).flatten(1)[:, None]
            codes[gaps] = (offset[gaps][:, None] @ torch.linalg.pinv(partial))[:, 0]
        if limit is None:
            return codes
        bound = limit * self.eigenvalues.sqrt()
        return codes.clamp(-bound, bound)

    def decode(self, codes: Tensor) -> Tensor:
        """Shapes [..., P, 2] of coefficients [..., K]."""
        if codes.shape[-1:] != self.eigenvalues.shape:
            raise ValueError(f"ShapePCA.decode: codes must be [..., {len(self.eigenvalues)}], got {list(codes.shape)}")
        return self.mean + (codes @ self.basis.flatten(1)).unflatten(-1, (-1, 2))

    def reconstruct(self, points: Tensor, limit: float | None = None) -> Tensor:
        """``decode(encode(points, limit))``: the nearest shapes that the components can make, complete."""
        return self.decode(self.encode(points, limit))

    def _count(self, components: int | float, variances: Tensor) -> int:
        most = min(self.shapes - 1, len(variances))
        if isinstance(components, float):
            if not 0 < components <= 1:
                raise ValueError(f"ShapePCA: components as a share must be in (0, 1], got {components}")
            short = variances.cumsum(dim=0) < components * variances.sum()
            return min(most, int(short.sum()) + 1)
        if not 1 <= components <= most:
            raise ValueError(f"ShapePCA: components must be in [1, {most}] for {self.shapes} shapes, got {components}")
        return components


def _known(points: Tensor) -> Tensor:
    return points.isfinite().all(dim=-1)


def _mean_of_known(points: Tensor) -> Tensor:
    known = _known(points)[..., None]
    return torch.where(known, points, 0).sum(dim=0) / known.sum(dim=0)


def _normalized(shape: Tensor) -> Tensor:
    """Centroid 0 and size 1, of the known landmarks."""
    known = _known(shape)
    centred = shape - shape[known].mean(dim=0)
    size = centred[known].square().sum().sqrt()
    if not bool(size > 0):
        raise DataError("the shapes have no extent: all landmarks are the same point")
    return centred / size


def _turned_as(mean: Tensor, shapes: Tensor) -> Tensor:
    """The mean, turned by the mean direction of the rotations that take it to the shapes."""
    _, similarity = procrustes(mean.expand_as(shapes), shapes)
    direction = (similarity.matrix / similarity.scale[:, None, None]).mean(dim=0)
    length = direction[:, 0].norm()
    return mean if bool(length < 1e-9) else mean @ (direction / length).mT
