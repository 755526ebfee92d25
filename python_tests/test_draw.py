"""fastforest.draw: points, ellipses, sheets and figures."""

import numpy as np
import pytest
import torch

from fastforest import draw


def test_annotate_draws_on_the_points_and_nowhere_else():
    image = np.full((600, 640, 3), 90, np.uint8)
    points = np.array([[100.0, 50.0], [400.0, 300.0]])
    drawn = draw.annotate(image, points)
    assert drawn.shape == image.shape and (image == 90).all()
    changed = (drawn != image).any(axis=2)
    rows, columns = np.nonzero(changed)
    near = np.minimum(*(np.hypot(columns - x, rows - y) for x, y in points))
    assert near.max() < 6
    for x, y in points:
        close = np.hypot(columns - x, rows - y) < 6
        assert columns[close].mean() == pytest.approx(x, abs=0.3) and rows[close].mean() == pytest.approx(y, abs=0.3)


def test_ellipses_lie_along_the_covariance():
    image = np.zeros((600, 600, 3), np.uint8)
    covariance = 900 * np.array([[[1.0, 0.8], [0.8, 1.0]]])
    drawn = draw.annotate(image, np.array([[300.0, 300.0]]), covariance=covariance)
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert np.corrcoef(rows, columns)[0, 1] > 0.5
    # two standard deviations along x: 60 pixels
    assert columns.max() - 300 == pytest.approx(60, abs=3)


def test_small_images_are_enlarged_and_odd_numbers_of_points_drawn():
    assert draw.annotate(np.zeros((20, 30, 3), np.uint8), torch.full((5, 2), 8.0)).shape == (360, 540, 3)
    images = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    sheet = draw.contact_sheet(images, torch.rand(7, 68, 2) * 40 - 10, torch.rand(7, 68, 2) * 16, tile=64)
    assert sheet.shape == (4 + 2 * 68, 4 + 6 * 68, 3)


def test_figures_have_their_documented_shapes():
    rounds = [{"seconds": 60.0 * i, "loss": 2.0 / i, "NME[box]": 0.3 / i} for i in range(1, 4)]
    assert draw.curves_figure({"forest": rounds, "dense": rounds[:1]}, "box").shape == (440, 1000, 3)
    assert draw.ced_figure({"forest": torch.rand(9) / 9}, "box").shape == (480, 640, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw.annotate(np.zeros((4, 4), np.uint8), np.zeros((1, 2))), "annotate: image must be uint8"),
        (lambda: draw.annotate(np.zeros((4, 4, 3), np.uint8), np.zeros(2)), r"annotate: points must be \[P, 2\]"),
        (
            lambda: draw.annotate(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), covariance=np.zeros((1, 2, 2))),
            r"annotate: covariance must be \[2, 2, 2\], got \[1, 2, 2\]",
        ),
        (lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2)), "contact_sheet: images must be"),
        (
            lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 2, 2)),
            r"contact_sheet: points must be \[1, P, 2\]",
        ),
        (
            lambda: draw.contact_sheet(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 2), captions=[]),
            "captions must hold 1 words, got 0",
        ),
    ],
)
def test_drawing_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
