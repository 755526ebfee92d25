"""fastforest.data.layout: the orders of landmarks that have names."""

from __future__ import annotations

import numpy as np
import pytest

from fastforest.data import FLIP_68, LINES_68, REGIONS_68, layout_of, mean_shape_68

LAYOUTS = (68, 98, 29, 19)


def test_layout_of_68_is_the_one_with_names() -> None:
    layout = layout_of(68)
    assert layout is not None and layout.flip is FLIP_68 and layout.regions is REGIONS_68
    assert [i for region in REGIONS_68.values() for i in region] == list(range(68))
    assert layout_of(5) is None


@pytest.mark.parametrize("landmarks", LAYOUTS)
def test_flips_are_involutions_within_regions(landmarks: int) -> None:
    layout = layout_of(landmarks)
    assert layout is not None
    flip = np.array(layout.flip)
    assert np.array_equal(flip[flip], np.arange(landmarks))
    assert sorted(i for region in layout.regions.values() for i in region) == list(range(landmarks))
    assert list(layout.regions) == ["jaw", "brows", "nose", "eyes", "mouth"]
    for region in layout.regions.values():
        assert {layout.flip[i] for i in region} == set(region)
    right, left = layout.outer_eyes
    assert layout.flip[right] == left and right in layout.regions["eyes"]


def test_flip_permutation_is_an_involution_that_mirrors_the_mean_shape() -> None:
    flip = np.array(FLIP_68)
    assert sorted(FLIP_68) == list(range(68)) and np.array_equal(flip[flip], np.arange(68))
    mean = mean_shape_68()
    assert np.allclose(mean[flip] * [-1, 1], mean, atol=1e-6)
    # a second permutation that mirrors the shape as well would need two landmarks at one place
    gaps = np.linalg.norm(mean[:, None] - mean[None], axis=-1) + np.eye(68)
    assert gaps.min() > 0.005
    fixed = [index for index in range(68) if FLIP_68[index] == index]
    assert fixed == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    assert (FLIP_68[36], FLIP_68[39], FLIP_68[48], FLIP_68[60], FLIP_68[17], FLIP_68[31]) == (45, 42, 54, 64, 26, 35)


def test_lines_visit_every_landmark_and_stay_in_their_region() -> None:
    assert {i for line in LINES_68 for i in line} == set(range(68))
    for line in LINES_68:
        assert any(set(line) <= set(region) for region in REGIONS_68.values())


def test_mean_shape() -> None:
    mean = mean_shape_68()
    assert mean.shape == (68, 2) and mean.dtype == np.float32
    assert np.allclose(mean.min(0), -mean.max(0), atol=1e-6)
    assert np.ptp(mean, axis=0).max() == pytest.approx(1, abs=1e-6)
    assert mean[36:42, 0].max() < 0 < mean[42:48, 0].min()
    assert mean[19, 1] < mean[37, 1] < mean[30, 1] < mean[51, 1] < mean[57, 1] < mean[8, 1]
