"""fastforest.data.shapes against known similarities, scipy and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial import procrustes as scipy_procrustes
from sklearn.decomposition import PCA

from fastforest.data import DataError, ShapePCA, Similarity, generalized_procrustes, mean_shape_68, procrustes

NAN = math.nan


def faces(count: int, noise: float = 0.03, seed: int = 0, landmarks: int = 68) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    base = mean_shape_68()[:landmarks].astype(np.float64)
    return torch.from_numpy(base + noise * rng.standard_normal((count, landmarks, 2)))


def similarity(scale: Any, angle: Any, offset: Any) -> Similarity:
    scale, angle = (torch.as_tensor(value, dtype=torch.float64) for value in (scale, angle))
    a, b = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([a, -b, b, a], dim=-1).unflatten(-1, (2, 2))
    return Similarity(matrix, torch.as_tensor(offset, dtype=torch.float64))


def some_similarities(count: int, seed: int = 0) -> Similarity:
    rng = np.random.default_rng(seed)
    return similarity(rng.uniform(0.2, 300, count), rng.uniform(-3.1, 3.1, count), rng.uniform(-900, 900, (count, 2)))


def scattered(count: int, noise: float = 0.03, seed: int = 0) -> torch.Tensor:
    """Faces of any place, size and rotation."""
    return some_similarities(count, seed).apply(faces(count, noise, seed))


# similarities


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_a_known_similarity_is_found(dtype: torch.dtype, bound: float) -> None:
    shapes, known = faces(7).to(dtype), some_similarities(7)
    known = Similarity(known.matrix.to(dtype), known.offset.to(dtype))
    moved = known.apply(shapes)
    aligned, found = procrustes(shapes, moved)
    assert aligned.dtype == dtype and (aligned - moved).abs().max() < bound
    assert (found.matrix - known.matrix).abs().max() < bound and (found.offset - known.offset).abs().max() < bound
    assert torch.allclose(found.scale, known.scale) and torch.allclose(found.angle, known.angle, atol=1e-5)


def test_points_go_back() -> None:
    shapes = scattered(5)
    aligned, found = procrustes(shapes, faces(1, seed=3)[0])
    assert (found.inverse().apply(aligned) - shapes).abs().max() < 1e-10
    assert (found.inverse().inverse().matrix - found.matrix).abs().max() < 1e-12
    one, single = procrustes(shapes[2], faces(1, seed=3)[0])
    assert torch.allclose(one, aligned[2]) and single.matrix.shape == (2, 2) and single.offset.shape == (2,)


def test_agrees_with_scipy() -> None:
    """scipy's disparity is the sum of squares of shapes of size 1; it may mirror, which these do not need."""
    first, second = scattered(2, noise=0.1)
    reference, best, disparity = scipy_procrustes(first.numpy(), second.numpy())
    aligned, _ = procrustes(second, torch.from_numpy(reference))
    assert np.allclose(aligned.numpy(), best, atol=1e-12)
    assert float((aligned - torch.from_numpy(reference)).square().sum()) == pytest.approx(disparity, abs=1e-12)


def test_weighted_is_the_minimum() -> None:
    points, reference = faces(1, 0.3, 1)[0], faces(1, 0.3, 2)[0]
    weight = torch.rand(68, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def cost(values: np.ndarray) -> float:
        a, b, x, y = values
        moved = points.numpy() @ np.array([[a, b], [-b, a]]) + (x, y)
        return float((weight.numpy()[:, None] * (moved - reference.numpy()) ** 2).sum())

    found = procrustes(points, reference, weight)[1]
    own = np.array([*found.matrix[:, 0].tolist(), *found.offset.tolist()])
    best = minimize(cost, [1, 0, 0, 0], tol=1e-14)
    assert cost(own) <= best.fun + 1e-12 and np.allclose(own, best.x, atol=1e-5)


def test_no_reflection() -> None:
    shape = faces(1)[0]
    mirrored = shape * torch.tensor([-1.0, 1.0])
    _, found = procrustes(mirrored, shape)
    assert float(torch.linalg.det(found.matrix)) > 0


def test_unknown_landmarks_have_no_part() -> None:
    shapes, known = faces(3), some_similarities(3)
    moved = known.apply(shapes)
    shapes[0, 5], moved[1, 7], shapes[2, :60] = NAN, NAN, NAN
    aligned, found = procrustes(shapes, moved)
    assert (found.matrix - known.matrix).abs().max() < 1e-8
    assert torch.equal(aligned.isnan(), shapes.isnan())
    weight = torch.ones(68, dtype=torch.float64)
    weight[3] = 0
    moved[:, 3] += 99
    assert (procrustes(shapes, moved, weight)[1].matrix - known.matrix).abs().max() < 1e-8


def test_what_cannot_be_turned_is_only_moved() -> None:
    shape = faces(1)[0]
    same, one, none = torch.full_like(shape, 0.1), torch.full_like(shape, NAN), torch.full_like(shape, NAN)
    one[4] = torch.tensor([3.0, 4.0])
    identity = torch.eye(2, dtype=torch.float64)
    for points, reference, offset in (
        (same, shape, shape.mean(0) - 0.1),
        (shape, same, 0.1 - shape.mean(0)),
        (one, shape, shape[4] - one[4]),
        (none, shape, torch.zeros(2)),
        (shape, none, torch.zeros(2)),
    ):
        aligned, found = procrustes(points, reference)
        assert torch.equal(found.matrix, identity)
        assert torch.allclose(found.offset, offset.double(), atol=1e-12)
        back = found.inverse().apply(aligned)
        assert torch.allclose(back, points, atol=1e-12, equal_nan=True)
    # every rotation is as good: the reference's points are a square, these one of its diagonals against the other
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    mirrored = square * torch.tensor([-1.0, 1.0])
    assert torch.equal(procrustes(mirrored, square)[1].matrix, identity)


def test_gradients_pass() -> None:
    shape = faces(1)[0]
    points = scattered(2, seed=4)
    points[0, 3] = NAN
    points.requires_grad_()
    procrustes(points, shape)[1].matrix.sum().backward()
    assert points.grad is not None and bool(points.grad.isfinite().all())
    assert float(points.grad[0, 3].abs().sum()) == 0 and float(points.grad[0, 2].abs().sum()) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: procrustes(s[0], s[0, :5]), r"procrustes: points and reference .*got \[68, 2\] and \[5, 2\]"),
        (lambda s: procrustes(s[0, :, 0], s[0, :, 0]), r"procrustes: points and reference must be \[..., P, 2\]"),
        (lambda s: procrustes(s, s, torch.ones(5)), r"procrustes: weight must be \[..., 68\], got \[5\]"),
        (lambda s: generalized_procrustes(s[0]), r"points must be \[N, P, 2\] with N > 0, got \[68, 2\]"),
        (lambda s: generalized_procrustes(s[:0]), r"points must be \[N, P, 2\] with N > 0, got \[0, 68, 2\]"),
        (lambda s: generalized_procrustes(s, -1.0), "no convergence to -1 in 1000 steps"),
        (lambda s: ShapePCA(s[0], 1), r"ShapePCA: points must be \[N, P, 2\], got \[68, 2\]"),
        (lambda s: ShapePCA(s, 6), r"ShapePCA: components must be in \[1, 5\] for 6 shapes, got 6"),
        (lambda s: ShapePCA(s, 0), r"ShapePCA: components must be in \[1, 5\] for 6 shapes, got 0"),
        (lambda s: ShapePCA(s, 1.5), r"ShapePCA: components as a share must be in \(0, 1\], got 1.5"),
        (lambda s: ShapePCA(s, 2).encode(s[:, :5]), r"ShapePCA.encode: points must be \[..., 68, 2\], got \[6, 5, 2\]"),
        (lambda s: ShapePCA(s, 2).decode(s[:, 0, :1]), r"ShapePCA.decode: codes must be \[..., 2\], got \[6, 1\]"),
    ],
)
def test_argument_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(faces(6))


# the mean shape


def test_mean_of_one_shape_in_many_poses() -> None:
    shape = faces(1)[0]
    angles = torch.tensor([-0.5, 0.1, 0.3, 0.9], dtype=torch.float64)
    many = similarity([3.0, 1.0, 200.0, 9.0], angles, [[0, 0], [5, 5], [800, 9], [0, -4]]).apply(shape)
    mean = generalized_procrustes(many)
    assert mean.change <= 1e-10 and mean.steps < 10
    assert mean.shape.mean(0).abs().max() < 1e-12 and float(mean.shape.square().sum()) == pytest.approx(1, abs=1e-12)
    aligned, found = procrustes(shape, mean.shape)
    assert (aligned - mean.shape).abs().max() < 1e-10
    # turned by the direction of the mean of the four unit vectors
    direction = torch.atan2(angles.sin().mean(), angles.cos().mean())
    assert float(found.angle) == pytest.approx(float(direction), abs=1e-10)


def test_mean_is_stationary_and_does_not_depend_on_order_or_pose() -> None:
    shapes = scattered(12, noise=0.05)
    mean = generalized_procrustes(shapes).shape
    aligned, _ = procrustes(shapes, mean)
    again = aligned.mean(0)
    assert (again / again.square().sum().sqrt() - mean).abs().max() < 1e-9
    assert (generalized_procrustes(shapes.flip(0)).shape - mean).abs().max() < 1e-8
    upright = generalized_procrustes(faces(12, 0.05)).shape
    turned, found = procrustes(mean, upright)
    assert (turned - upright).abs().max() < 1e-8 and float(found.scale) == pytest.approx(1, abs=1e-8)
    assert generalized_procrustes(shapes.float()).shape.dtype == torch.float32


def test_mean_with_unknown_landmarks() -> None:
    shape, poses = faces(1)[0], some_similarities(6)
    many = poses.apply(shape)
    for row in range(6):
        many[row, row * 11 : row * 11 + 13] = NAN
    mean = generalized_procrustes(many)
    assert (procrustes(shape, mean.shape)[0] - mean.shape).abs().max() < 1e-8
    many[:, 20] = NAN
    with pytest.raises(DataError, match=r"^landmark 20 is known in none of the 6 shapes$"):
        generalized_procrustes(many)
    with pytest.raises(DataError, match="the shapes have no extent"):
        generalized_procrustes(torch.zeros(3, 5, 2))


# components


@pytest.mark.parametrize(("count", "components"), [(40, 7), (9, 8), (300, 136)], ids=["some", "few-shapes", "all"])
def test_agrees_with_sklearn(count: int, components: int) -> None:
    shapes = faces(count, 0.1)
    own, other = ShapePCA(shapes, components), PCA(components, svd_solver="full").fit(shapes.flatten(1).numpy())
    assert np.allclose(own.mean.flatten(), other.mean_, atol=1e-12)
    assert np.allclose(own.eigenvalues, other.explained_variance_, atol=1e-12)
    assert own.share == pytest.approx(other.explained_variance_ratio_.sum(), abs=1e-12)
    basis = own.basis.flatten(1).numpy()
    signs = np.sign((basis * other.components_).sum(axis=1))
    assert np.allclose(basis, signs[:, None] * other.components_, atol=1e-8)
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()
    fresh = faces(4, 0.1, seed=8)
    codes = own.encode(fresh)
    assert np.allclose(codes, signs * other.transform(fresh.flatten(1).numpy()), atol=1e-8)
    expected = other.inverse_transform(other.transform(fresh.flatten(1).numpy()))
    assert np.allclose(own.reconstruct(fresh).flatten(1), expected, atol=1e-8)


def test_share_of_the_variance() -> None:
    shapes = faces(60, 0.1)
    variances = PCA().fit(shapes.flatten(1).numpy()).explained_variance_ratio_.cumsum()
    for share in (0.05, 0.5, 0.9):
        pca = ShapePCA(shapes, share)
        count = len(pca.eigenvalues)
        assert pca.share >= share and variances[count - 1] >= share and (count == 1 or variances[count - 2] < share)
    assert len(ShapePCA(shapes, 1.0).eigenvalues) <= 59 and ShapePCA(shapes, 1.0).share == pytest.approx(1)
    still = ShapePCA(shapes[:1].expand(3, -1, -1), 0.9)
    assert still.share == 1 and float(still.eigenvalues[0]) < 1e-28
    assert torch.allclose(still.reconstruct(shapes[0]), shapes[0])


def test_signs_do_not_depend_on_the_shapes_order() -> None:
    shapes = faces(30, 0.1)
    assert torch.allclose(ShapePCA(shapes, 5).basis, ShapePCA(shapes.flip(0), 5).basis, atol=1e-8)


def test_unknown_landmarks_in_components() -> None:
    shapes = faces(40, 0.1)
    pca = ShapePCA(shapes, 6)
    with_gaps = torch.cat([shapes, shapes[:5].clone()])
    with_gaps[40:, 3] = NAN
    again = ShapePCA(with_gaps, 6)
    assert again.shapes == 40 and torch.equal(again.basis, pca.basis) and torch.equal(again.mean, pca.mean)
    codes = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = pca.decode(codes)
    partial = exact.clone()
    partial[0, 10:40], partial[1, 3], partial[3, 4:] = NAN, NAN, NAN
    assert torch.allclose(pca.encode(partial), codes, atol=1e-9)
    assert torch.allclose(pca.reconstruct(partial), exact, atol=1e-9)
    assert torch.allclose(pca.encode(partial[0]), codes[0], atol=1e-9)
    assert torch.allclose(pca.encode(partial[None]), codes[None], atol=1e-9)
    # too few: the smallest coefficients that fit
    partial[4, 2:] = NAN
    few = pca.encode(partial[4])
    assert torch.allclose(pca.decode(few)[:2], exact[4, :2]) and float(few.norm()) <= float(codes[4].norm())
    assert torch.equal(pca.encode(torch.full((68, 2), NAN, dtype=torch.float64)), torch.zeros(6, dtype=torch.float64))
    with pytest.raises(DataError, match="needs at least 2 shapes whose landmarks are all known, got 1 of 6"):
        ShapePCA(with_gaps[39:], 1)


def test_clamped_coefficients() -> None:
    shapes = faces(40, 0.1)
    pca = ShapePCA(shapes, 4)
    far = pca.decode(torch.tensor([100.0, -100.0, 0.0, 0.0], dtype=torch.float64))
    bound = 3 * pca.eigenvalues.sqrt()
    codes = pca.encode(far, limit=3)
    assert torch.allclose(codes, torch.stack([bound[0], -bound[1], bound[2] * 0, bound[3] * 0]), atol=1e-9)
    assert torch.allclose(pca.reconstruct(far, limit=3), pca.decode(codes))
    assert torch.allclose(pca.encode(shapes, limit=1e6), pca.encode(shapes))


def test_components_in_single_precision() -> None:
    shapes = faces(40, 0.1)
    single, double = ShapePCA(shapes.float(), 4), ShapePCA(shapes, 4)
    assert single.basis.dtype == single.mean.dtype == single.eigenvalues.dtype == torch.float32
    assert torch.allclose(single.basis, double.basis.float(), atol=1e-5)
    assert single.reconstruct(shapes.float()).dtype == torch.float32
