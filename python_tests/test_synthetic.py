"""fastforest.data: drawn faces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from fastforest.data import Face, SyntheticFaces, draw_face


def test_drawn_face_is_a_function_of_its_arguments() -> None:
    image, points = draw_face(3, 5, 64)
    again, same = draw_face(3, 5, 64)
    assert np.array_equal(image, again) and np.array_equal(points, same)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert points.dtype == np.float32 and points.shape == (68, 2)
    for other in (draw_face(4, 5, 64), draw_face(3, 6, 64), draw_face(5, 3, 64)):
        assert not np.array_equal(points, other[1]) and not np.array_equal(image, other[0])


def test_landmarks_do_not_depend_on_the_size() -> None:
    small, large = draw_face(0, 1, 64)[1], draw_face(0, 1, 256)[1]
    assert np.allclose((small + 0.5) * 4 - 0.5, large, atol=1e-3)


def test_drawn_faces_are_framed_as_crops_and_plausible() -> None:
    shapes = np.stack([draw_face(1, index, 32)[1] for index in range(60)]).astype(np.float64)
    low, high = shapes.min(1), shapes.max(1)
    assert np.allclose((low + high) / 2, 15.5, atol=1e-3)
    assert np.allclose((high - low).max(1), 32 / 1.5, atol=1e-3)
    ocular = np.linalg.norm(shapes[:, 36] - shapes[:, 45], axis=1) / (high - low).max(1)
    assert ocular.min() > 0.3 and ocular.max() < 0.85
    spread = np.linalg.norm(shapes - shapes.mean(0), axis=-1).mean(1) / np.linalg.norm(
        shapes[:, 36] - shapes[:, 45], axis=1
    )
    assert 0.08 < spread.mean() < 0.4
    # mouths open and close, eyes too
    gap = np.linalg.norm(shapes[:, 66] - shapes[:, 62], axis=1)
    assert gap.min() < 0.5 < 2 < gap.max()


def profile(grey: np.ndarray, point: np.ndarray, normal: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    places = point + offsets[:, None] * normal
    return map_coordinates(grey, places[:, ::-1].T, order=1, mode="nearest")


@pytest.mark.parametrize("marks", [(4, 5, 6, 7, 8, 9, 10, 11, 12), (37, 38, 43, 44)], ids=["jaw", "upper-lids"])
def test_landmarks_lie_on_drawn_edges(marks: tuple[int, ...]) -> None:
    """Along the outline's normal, the picture's mean change is greatest at the landmark, to a pixel of 128."""
    offsets = np.arange(-8, 8.5, 0.5)
    change = np.zeros(len(offsets) - 1)
    for index in range(24):
        image, points = draw_face(2, index, 128)
        for mark in marks:
            along = points[mark + 1] - points[mark - 1]
            normal = np.array([-along[1], along[0]]) / np.linalg.norm(along)
            change += np.abs(np.diff(profile(image.mean(2), points[mark], normal, offsets)))
    peak = float(offsets[change.argmax()] + 0.25)
    assert abs(peak) < 1 and change.max() > 1.5 * np.median(change)


def test_synthetic_dataset() -> None:
    faces: Any = SyntheticFaces(3, size=32, seed=9)
    face = faces[1]
    assert isinstance(face, Face) and face.name == "synthetic_9_1"
    assert face.image.dtype == torch.uint8 and face.image.shape == (3, 32, 32) and face.points.dtype == torch.float32
    image, points = draw_face(9, 1, 32)
    assert np.array_equal(face.image.permute(1, 2, 0).numpy(), image) and np.array_equal(face.points.numpy(), points)
    assert len(list(faces)) == 3 and torch.equal(faces[-1].image, faces[2].image)
    with pytest.raises(IndexError, match=r"face index must be in \[-3, 3\), got 3"):
        faces[3]
    for arguments, message in (((0,), "count"), ((3, 15), "size"), ((3, 32, -1), "seed")):
        with pytest.raises(ValueError, match=f"SyntheticFaces: {message} must"):
            SyntheticFaces(*arguments)
