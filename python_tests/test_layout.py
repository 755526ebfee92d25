"""fastforest.data.layout: the orders of landmarks that have names."""

from __future__ import annotations

import numpy as np
import pytest

from fastforest.data import FLIP_68, REGIONS_68, layout_of

LAYOUTS = (68, 98, 29, 19)


def test_layout_of_68_is_the_one_with_names() -> None:
    layout = layout_of(68)
    assert layout is not None and layout.flip is FLIP_68 and layout.regions is REGIONS_68
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
