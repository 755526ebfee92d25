"""fastforest.data.Augment against computations of its own kind by scipy, on whole batches."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from small_images import centroid, dot

from fastforest.data import FLIP_68, Augment, Cached, Plain, SyntheticFaces, horizontal_flip, layout_of, resize
from fastforest.data.augment import warp

STILL: dict[str, Any] = {"rotation": 0, "scale": 0, "shift": 0, "flip": None, "colour": 0, "occlude": 0, "blur": 0}
MOVING: dict[str, Any] = STILL | {"rotation": 30.0, "scale": 0.25, "shift": 0.08}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def faces(count: int = 6, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return Cached(SyntheticFaces(count, size), size).batch(range(count))


def affine_of(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [2, 2] and t with after = A before + t, by least squares."""
    rows = np.concatenate([before, np.ones((len(before), 1))], axis=1)
    solution = np.linalg.lstsq(rows, after, rcond=None)[0]
    return solution[:2].T, solution[2]


def spots(size: int, points: np.ndarray, sigma: float) -> torch.Tensor:
    """One Gaussian spot of peak 250 a channel: uint8 [3, size, size]."""
    cell = np.arange(size)
    planes = [np.exp(-((cell[None] - x) ** 2 + (cell[:, None] - y) ** 2) / (2 * sigma**2)) for x, y in points]
    return torch.from_numpy(np.rint(250 * np.stack(planes)).astype(np.uint8))


# geometry


@pytest.mark.parametrize("flip", [None, FLIP_68], ids=["plain", "mirrored"])
def test_pixels_are_those_of_scipy_under_the_points_map(flip: tuple[int, ...] | None) -> None:
    """The map is read off the landmarks; the picture under it is then scipy's to 1e-3."""
    images, points = faces(12)
    changed, moved = Augment(48, **{**MOVING, "flip": flip})(images, points.double(), generator(3))
    mirrored = 0
    for image, result, before, after in zip(images, changed, points.double().numpy(), moved.numpy(), strict=True):
        matrix, offset = affine_of(before, after)
        if np.abs(before @ matrix.T + offset - after).max() > 1e-6:
            matrix, offset = affine_of(before[list(FLIP_68)], after)
            assert np.abs(before[list(FLIP_68)] @ matrix.T + offset - after).max() < 1e-6
            assert np.linalg.det(matrix) < 0
            mirrored += 1
        factor = np.sqrt(abs(np.linalg.det(matrix)))
        assert np.allclose(matrix @ matrix.T, factor**2 * np.eye(2), atol=1e-6) and 0.79 < factor < 1.26
        back = np.linalg.inv(matrix[::-1, ::-1])  # (row, column)
        for plane, own in zip(image.numpy() / 255, result.numpy(), strict=True):
            expected = ndimage.affine_transform(plane, back, -back @ offset[::-1], order=1, mode="grid-constant")
            assert np.abs(expected - own).max() < 1e-3
    assert mirrored == 0 if flip is None else 2 < mirrored < 10


@pytest.mark.parametrize(
    ("side", "size"), [(72, 72), (144, 72), (100, 64), (48, 80)], ids=["same", "half", "less", "more"]
)
def test_spots_stay_at_their_landmarks(side: int, size: int) -> None:
    """To 0.1 pixel, in batches of which about half is mirrored."""
    rng, permutation = np.random.default_rng(0), [1, 0, 2]
    truth = side * (np.array([[0.4, 0.45], [0.6, 0.45], [0.5, 0.6]]) + rng.uniform(-0.05, 0.05, (24, 3, 2)))
    images = torch.stack([spots(side, points, side / 20) for points in truth])
    augment = Augment(size, **{**MOVING, "flip": permutation})
    changed, moved = augment(images, torch.from_numpy(truth), generator(1))
    cell, mass = np.arange(size), changed.double().numpy()
    total = mass.sum(axis=(2, 3))
    along = [(mass.sum(axis=axis) * cell).sum(axis=2) for axis in (2, 3)]
    found = np.stack(along, axis=-1) / total[..., None]
    own = np.abs(found - moved.numpy()).max(axis=(1, 2))
    exchanged = np.abs(found[:, permutation] - moved.numpy()).max(axis=(1, 2))
    assert np.minimum(own, exchanged).max() < 0.1
    assert 6 < (exchanged < own).sum() < 18


@pytest.mark.parametrize("landmarks", [68, 98, 29, 19])
def test_each_layout_is_mirrored_by_its_own_permutation(landmarks: int) -> None:
    layout = layout_of(landmarks)
    assert layout is not None
    images = faces(8)[0]
    points = torch.rand(8, landmarks, 2, generator=generator(2)) * 47
    mirrored_images, mirrored = horizontal_flip(images, points, layout.flip)
    changed, moved = Augment(48, **{**STILL, "flip": layout.flip})(images, points, generator())
    flips = 0
    for row in range(8):
        is_mirrored = bool(torch.allclose(moved[row], mirrored[row], atol=1e-3))
        expected = mirrored_images[row] if is_mirrored else images[row]
        assert torch.allclose(changed[row], expected / 255, atol=1e-4)
        assert is_mirrored or torch.allclose(moved[row], points[row], atol=1e-3)
        flips += is_mirrored
    assert 0 < flips < 8


# unknown landmarks


def test_flips_take_unknown_landmarks_to_their_partners() -> None:
    images, points = faces(2)
    points[0, 36], points[1, [8, 60]] = torch.nan, torch.nan
    _, mirrored = horizontal_flip(images, points, FLIP_68)
    assert mirrored.isnan().all(dim=-1).nonzero().tolist() == [[0, 45], [1, 8], [1, 64]]
    assert torch.equal(mirrored.isnan().any(dim=-1), mirrored.isnan().all(dim=-1))
    assert torch.equal(horizontal_flip(images, mirrored, FLIP_68)[1].isnan(), points.isnan())


def test_augmentation_keeps_unknown_landmarks_to_themselves() -> None:
    images, points = faces(24)
    reference = Augment(48)(images, points, generator(5))
    hidden = points.clone()
    hidden[::2, 36], hidden[1, 5:40] = torch.nan, torch.nan
    changed, moved = Augment(48)(images, hidden, generator(5))
    assert torch.equal(changed, reference[0])
    known = moved.isfinite().all(dim=-1)
    assert torch.equal(moved[known], reference[1][known])
    assert torch.equal(known.sum(dim=1), hidden.isfinite().all(dim=-1).sum(dim=1))
    lost = [int((~known[row]).nonzero()) for row in range(0, 24, 2)]
    assert set(lost) == {36, 45}  # as it was, and mirrored


# pixels


def test_colour_is_one_line_a_channel() -> None:
    images, points = faces(16)
    strength = 0.4
    changed, _ = Augment(48, **{**STILL, "colour": strength})(images, points, generator())
    slopes = []
    for image, result in zip(images.numpy() / 255, changed.double().numpy(), strict=True):
        for plane, own in zip(image, result, strict=True):
            inner = (own > 1e-4) & (own < 1 - 1e-4)
            slope, bias = np.polyfit(plane[inner], own[inner], 1)
            assert np.abs(np.clip(slope * plane + bias, 0, 1) - own).max() < 1e-4
            slopes.append(slope)
    assert 0.6 * 0.8 <= min(slopes) < 0.75 and 1.25 < max(slopes) <= 1.4 * 1.2


def test_blur_is_scipys_box_mixed_in() -> None:
    images, points = faces(24)
    changed, _ = Augment(48, **{**STILL, "blur": 0.7})(images, points, generator())
    kernels = []
    for sharp, own in zip(images.numpy() / 255, changed.double().numpy(), strict=True):
        errors = {0: float(np.abs(own - sharp).max())}
        for kernel in (3, 5):
            inside = ndimage.uniform_filter(np.ones_like(sharp), (1, kernel, kernel), mode="constant")
            step = ndimage.uniform_filter(sharp, (1, kernel, kernel), mode="constant") / inside - sharp
            weight = ((own - sharp) * step).sum() / (step**2).sum()
            if 0.399 < weight < 1.001:
                errors[kernel] = float(np.abs(sharp + weight * step - own).max())
        kernel = min(errors, key=lambda key: errors[key])
        assert errors[kernel] < 1e-5
        kernels.append(kernel)
    assert set(kernels) == {0, 3, 5} and 10 < len(kernels) - kernels.count(0) < 23


def test_occlusion_is_one_rectangle_of_one_colour() -> None:
    grey = torch.full((60, 3, 50, 50), 128, dtype=torch.uint8)
    changed, _ = Augment(50, **{**STILL, "occlude": 0.8})(grey, torch.zeros(60, 1, 2), generator())
    sides, places = [], []
    for image in changed.numpy():
        hidden = (np.abs(image - 128 / 255) > 1e-4).any(axis=0)
        if hidden.any():
            rows, columns = np.flatnonzero(hidden.any(axis=1)), np.flatnonzero(hidden.any(axis=0))
            assert hidden.sum() == len(rows) * len(columns)
            assert len(np.unique(image[:, hidden], axis=1).T) == 1
            sides += [len(rows), len(columns)]
            places += [rows[0], columns[0]]
    assert 36 < len(sides) / 2 < 58 and 5 <= min(sides) < 9 and 17 < max(sides) <= 20
    assert min(places) < 5 and max(places) > 30


# devices, memory


def test_other_devices_resize_bytes_too() -> None:
    """Only shapes: what a device without a kernel for bytes is asked for."""
    images = torch.empty(2, 3, 40, 40, dtype=torch.uint8, device="meta")
    assert resize(images, 16).dtype == torch.uint8 and resize(images, 16).shape == (2, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [64, 40])
def test_augmentation_on_cuda(size: int) -> None:
    """The same generator gives the same faces on both devices; bytes may round to the other side."""
    images, points = faces(16, 64)
    points[3, 7] = torch.nan
    here = Augment(size)(images, points, generator())
    there = Augment(size)(images.cuda(), points.cuda(), generator())
    assert there[0].is_cuda and there[1].is_cuda
    assert (there[0].cpu() - here[0]).abs().max() < 2 / 255
    assert torch.allclose(there[1].cpu(), here[1], atol=1e-3, equal_nan=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: resident memory cannot be read")
def test_nothing_grows() -> None:
    images, points = faces(8)
    augment, draws = Augment(40), generator()

    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    for _ in range(30):
        augment(images, points, draws)
    before = megabytes()
    for _ in range(150):
        changed, moved = augment(images, points, draws)
    assert megabytes() - before < 4
    assert changed.shape == (8, 3, 40, 40) and moved.shape == (8, 68, 2)


# flips, warps and ranges


def test_flip_twice_is_the_identity() -> None:
    images, points = faces()
    once = horizontal_flip(images, points, FLIP_68)
    twice = horizontal_flip(*once, FLIP_68)
    assert torch.equal(twice[0], images) and torch.allclose(twice[1], points, atol=1e-5)
    assert not torch.equal(once[0], images)
    single = horizontal_flip(images[0], points[0], FLIP_68)
    assert torch.equal(single[0], once[0][0]) and torch.equal(single[1], once[1][0])
    # the person's right eye is again at smaller x
    assert (once[1][:, 36, 0] < once[1][:, 45, 0]).all()


def test_flip_moves_pixels_and_points_together() -> None:
    image = torch.zeros(1, 4, 5)
    image[0, 1, 3] = 1
    flipped, points = horizontal_flip(image, torch.tensor([[3.0, 1.0], [0.0, 0.0]]), (0, 1))
    assert flipped[0, 1, 1] == 1 and points.tolist() == [[1.0, 1.0], [4.0, 0.0]]


def test_still_augmentation_is_plain() -> None:
    images, points = faces()
    for size in (48, 24, 96):
        changed = Augment(size, **STILL)(images, points, generator())
        plain = Plain(size)(images, points)
        assert torch.allclose(changed[1], plain[1], atol=1e-4)
        if size <= 48:
            assert torch.allclose(changed[0], plain[0], atol=1e-5)
        assert plain[0].dtype == torch.float32 and plain[0].min() >= 0 and plain[0].max() <= 1
    same = Plain(48)(images, points)
    assert torch.equal(same[0], images.float() / 255) and torch.equal(same[1], points)


def smooth_bump(size: int, x: float, y: float, radius: float) -> torch.Tensor:
    cell = torch.arange(size, dtype=torch.float64)
    square = (cell - x)[None] ** 2 + (cell - y)[:, None] ** 2
    return torch.exp(-square / (2 * radius**2))


def test_warp_moves_a_rendered_dot_to_the_mapped_point() -> None:
    """Whole-pixel maps are exact; others keep the dot's centre of mass, which bilinear sampling does not bias, to 1e-4
    of the side."""
    size = 64
    rotations = [0.0, 90.0, 180.0, 17.0, -33.0]
    for degrees in rotations:
        turn = math.radians(degrees)
        matrix = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])[None]
        offset = torch.tensor([[4 / 64, -6 / 64]])
        x, y = 36.0, 27.0
        image = (smooth_bump(size, x, y, 5.0) * 255).round().to(torch.uint8).expand(1, 3, -1, -1)
        moved, points = warp(image, torch.tensor([[[x, y]]], dtype=torch.float64), matrix, offset, size)
        expected = points[0, 0].tolist()
        assert centroid(moved[0]) == pytest.approx(expected, abs=1e-4 * size if degrees % 90 else 1e-4)
        if degrees == 0:
            assert expected == pytest.approx([38.0, 24.0])


@pytest.mark.parametrize("size", [40, 64, 100])
def test_warp_inverts_its_own_point_map_to_1e_4(size: int) -> None:
    """Pixels that hold their own coordinates, which bilinear sampling keeps exactly, tell where each pixel came from;
    the point map must take that place back to the pixel."""
    cell = torch.arange(64, dtype=torch.uint8)
    columns, rows = torch.meshgrid(cell, cell, indexing="xy")
    image = torch.stack([columns, rows, torch.full_like(rows, 255)])[None]
    matrix = torch.tensor([[[0.71, -0.42], [0.47, 0.83]], [[-0.9, 0.1], [0.05, 1.2]]])
    offset = torch.tensor([[0.11, -0.07], [0.0, 0.2]])
    moved, _ = warp(image.expand(2, -1, -1, -1), torch.zeros(2, 1, 2), matrix, offset, size)
    came_from = (moved[:, :2] * 255).flatten(2).mT
    _, back = warp(image.expand(2, -1, -1, -1), came_from, matrix, offset, size)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), dim=-1).reshape(-1, 2)
    inside = (moved[:, 2] > 0.99999).flatten(1)
    assert int(inside.sum()) > size * size / 2
    for row in range(2):
        assert float((back[row] - grid)[inside[row]].abs().max()) < 1e-4


@pytest.mark.parametrize("size", [32, 64, 100])
def test_warp_to_another_size_keeps_the_convention(size: int) -> None:
    image = dot(64, 30.0, 35.0, 5.0)[None]
    moved, points = warp(image, torch.tensor([[[30.0, 35.0]]]), torch.eye(2)[None], torch.zeros(1, 2), size)
    assert points[0, 0].tolist() == pytest.approx([30.5 * size / 64 - 0.5, 35.5 * size / 64 - 0.5], abs=1e-5)
    assert centroid(moved[0]) == pytest.approx(points[0, 0].tolist(), abs=0.01)


def test_warp_agrees_with_affine_grid() -> None:
    images, points = faces(3)
    matrix = torch.tensor([[[0.9, -0.3], [0.2, 1.1]], [[1, 0], [0, 1]], [[-1.0, 0.1], [0, 0.8]]])
    offset = torch.tensor([[0.1, -0.2], [0, 0], [0.05, 0]])
    inverse = torch.linalg.inv(matrix)
    theta = torch.cat([inverse, -inverse @ offset[:, :, None]], dim=2)
    grid = torch.nn.functional.affine_grid(theta, [3, 3, 40, 40], align_corners=False)
    expected = torch.nn.functional.grid_sample(images.float() / 255, grid, align_corners=False)
    assert torch.allclose(warp(images, points, matrix, offset, 40)[0], expected, atol=1e-4)


def test_points_follow_the_picture_through_the_whole_augmentation() -> None:
    """Dots at asymmetric places stay under their landmark through rotation, scale, shift and mirror images."""
    size, count = 64, 24
    truth = torch.tensor([[22.0, 30.0], [42.0, 34.0]])
    images = torch.stack([dot(size, float(x), float(y), 3.0) for x, y in truth.repeat(count // 2, 1)])
    points = truth.expand(count, 2, 2).clone()
    changed, moved = Augment(size, **{**STILL, "rotation": 30.0, "scale": 0.2, "shift": 0.05, "flip": (1, 0)})(
        images, points, generator(4)
    )
    mirrored = 0
    for row in range(count):
        center = torch.tensor(centroid(changed[row]), dtype=torch.float32)
        distances = (moved[row] - center).norm(dim=-1)
        own = row % 2
        assert float(distances.min()) < 0.05
        mirrored += int(distances.argmin()) != own
    assert 4 < mirrored < 20


def test_random_parameters_keep_to_their_ranges() -> None:
    images = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    points = torch.tensor([[3.5, 3.5], [7.5, 3.5]]).expand(400, 2, 2)
    augment = Augment(8, **{**STILL, "rotation": 20.0, "scale": 0.25, "shift": 0.1})
    _, moved = augment(images, points, generator())
    arm = moved[:, 1] - moved[:, 0]
    angle = torch.atan2(arm[:, 1], arm[:, 0]).rad2deg()
    factor = arm.norm(dim=-1) / 4
    shift = (moved[:, 0] - 3.5) / 8
    assert 19 < float(angle.abs().max()) <= 20.001
    assert 0.8 - 1e-4 <= float(factor.min()) < 0.82 and 1.23 < float(factor.max()) <= 1.25 + 1e-4
    assert 0.095 < float(shift.abs().max()) <= 0.1 + 1e-5


def test_augmentation_repeats_with_its_generator_and_leaves_its_input() -> None:
    images, points = faces()
    before = images.clone(), points.clone()
    augment = Augment(32)
    one, two, other = (augment(images, points, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])
    assert torch.equal(images, before[0]) and torch.equal(points, before[1])
    assert one[0].shape == (6, 3, 32, 32) and one[0].dtype == torch.float32
    assert float(one[0].min()) >= 0 and float(one[0].max()) <= 1
    assert augment(images, points.double(), generator())[1].dtype == torch.float64


def test_each_pixel_change_acts_alone() -> None:
    images, points = faces(32)
    plain = Plain(48)(images, points)[0]
    for name in ("colour", "occlude", "blur"):
        changed, moved = Augment(48, **{**STILL, name: 1.0})(images, points, generator())
        assert torch.allclose(moved, points, atol=1e-4)
        different = (changed - plain).abs().amax(dim=1) > 1e-3
        share = different.float().mean(dim=(1, 2))
        if name == "occlude":
            assert float(share.min()) > 0.005 and float(share.max()) < 0.17
        else:
            assert float(share.min()) > 0.3
        if name == "blur":
            assert (changed.var(dim=(1, 2, 3)) < plain.var(dim=(1, 2, 3))).all()
    half = Augment(48, **{**STILL, "occlude": 0.5})(images, points, generator())[0]
    touched = int(((half - plain).abs().amax(dim=(1, 2, 3)) > 1e-3).sum())
    assert 6 < touched < 26


def test_outside_the_image_is_black() -> None:
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    moved, _ = warp(white, torch.zeros(1, 1, 2), torch.eye(2)[None], torch.tensor([[0.5, 0.0]]), 16)
    assert moved[0, :, :, :4].max() == 0 and moved[0, :, :, 5:].min() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, p: Augment(0), "Augment: size must be at least 1, got 0"),
        (lambda i, p: Augment(8, rotation=-1.0), "Augment: rotation must not be negative, got -1.0"),
        (lambda i, p: Augment(8, occlude=1.5), r"Augment: occlude must be a probability in \[0, 1\], got 1.5"),
        (
            lambda i, p: Augment(8)(i.float(), p, generator()),
            r"images must be uint8 .*got torch.float32 \[6, 3, 48, 48\]",
        ),
        (
            lambda i, p: Augment(8)(i[..., :40], p, generator()),
            r"images must be uint8 \[B, 3, S, S\].*\[6, 3, 48, 40\]",
        ),
        (lambda i, p: Augment(8)(i, p[:2], generator()), r"points must be \[6, P, 2\], got \[2, 68, 2\]"),
        (
            lambda i, p: Augment(8)(i, p[:, :5], generator()),
            r"Augment: the flip permutation must hold each of 0..4 once",
        ),
        (lambda i, p: Plain(8)(i[0], p), r"Plain: images must be uint8 \[B, 3, S, S\]"),
        (lambda i, p: horizontal_flip(i, p, [0, 0]), "horizontal_flip: the flip permutation must hold each of 0..67"),
    ],
)
def test_augmentation_errors(call: Callable[[torch.Tensor, torch.Tensor], object], message: str) -> None:
    images, points = faces()
    with pytest.raises(ValueError, match=message):
        call(images, points)
