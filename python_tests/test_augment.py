"""fastforest.data.Augment against computations of its own kind by scipy, on whole batches."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastforest.data import FLIP_68, Augment, Cached, SyntheticFaces, horizontal_flip, layout_of, resize

STILL: dict[str, Any] = {"rotation": 0, "scale": 0, "shift": 0, "flip": None, "colour": 0, "occlude": 0, "blur": 0}
MOVING: dict[str, Any] = STILL | {"rotation": 30.0, "scale": 0.25, "shift": 0.08}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def faces(count: int, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
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
