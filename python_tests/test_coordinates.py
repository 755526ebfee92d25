"""Points from and to other conventions, against PyTorch, kornia and dsntnn."""

from __future__ import annotations

import dsntnn
import kornia
import pytest
import torch
from torch.nn import functional

from fastforest import coordinates

SIZE = (5, 8)
POINTS = torch.tensor([[[0.0, 0.0], [7.0, 4.0], [2.25, 3.5], [-3.0, 11.0]]], dtype=torch.float64)


@pytest.mark.parametrize("udp", [True, False])
def test_input_to_heatmap_is_what_interpolate_does(udp: bool) -> None:
    """The input's own coordinates, resized: a map of 3 x 5 samples the input of 9 x 21 there."""
    small, large = (3, 5), (9, 21)
    grid = torch.stack(torch.meshgrid(torch.arange(21.0), torch.arange(9.0), indexing="xy")).double()
    sampled = functional.interpolate(grid[None], small, mode="bilinear", align_corners=udp)[0].movedim(0, -1)
    at = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(3.0), indexing="xy"), -1).double()
    torch.testing.assert_close(coordinates.heatmap_to_input(at, small, large, udp=udp), sampled)
    torch.testing.assert_close(coordinates.input_to_heatmap(sampled, large, small, udp=udp), at)


def test_against_libraries() -> None:
    height, width = SIZE
    torch.testing.assert_close(
        coordinates.to_corner_aligned(POINTS, SIZE),
        kornia.geometry.conversions.normalize_pixel_coordinates(POINTS, height, width),
    )
    torch.testing.assert_close(
        coordinates.to_pixel_centred(POINTS, SIZE), dsntnn.pixel_to_normalized_coordinates(POINTS, SIZE)
    )


@pytest.mark.parametrize("name, aligned", [("corner_aligned", True), ("pixel_centred", False)])
def test_normalised_is_what_grid_sample_reads(name: str, aligned: bool) -> None:
    image = torch.rand(1, 1, *SIZE, dtype=torch.float64)
    inside = POINTS[:, :3]
    grid = getattr(coordinates, f"to_{name}")(inside, SIZE)[:, None]
    got = functional.grid_sample(image, grid, align_corners=aligned)[0, 0, 0]
    assert got[:2].tolist() == pytest.approx([image[0, 0, 0, 0].item(), image[0, 0, 4, 7].item()])
    half = 0.5 * (0.75 * (image[0, 0, 3, 2] + image[0, 0, 4, 2]) + 0.25 * (image[0, 0, 3, 3] + image[0, 0, 4, 3]))
    torch.testing.assert_close(got[2], half)


@pytest.mark.parametrize("size", [SIZE, (1, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["corner_aligned", "pixel_centred"])
def test_there_and_back(name: str, size: tuple[int, int]) -> None:
    there = getattr(coordinates, f"to_{name}")(POINTS, size)
    torch.testing.assert_close(getattr(coordinates, f"from_{name}")(there, size), POINTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_stays(dtype: torch.dtype) -> None:
    points = POINTS.to(dtype)
    for name in ("to_corner_aligned", "from_corner_aligned", "to_pixel_centred", "from_pixel_centred"):
        assert getattr(coordinates, name)(points, SIZE).dtype == dtype
    for udp in (True, False):
        assert coordinates.input_to_heatmap(points, SIZE, (3, 4), udp=udp).dtype == dtype
    assert coordinates.flip_xy(points).dtype == dtype


def test_gradients_and_compile() -> None:
    def chain(points: torch.Tensor) -> torch.Tensor:
        points = coordinates.input_to_heatmap(coordinates.flip_xy(points), SIZE, (3, 4))
        return coordinates.to_pixel_centred(coordinates.from_corner_aligned(points, (3, 4)), (3, 4))

    points = POINTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(chain, points)
    torch.testing.assert_close(torch.compile(chain, fullgraph=True)(points), chain(points))


ERRORS = [
    (lambda: coordinates.flip_xy([1.0, 2.0]), TypeError, r"flip_xy: points must be a tensor \[\.\.\., 2\], got list"),
    (lambda: coordinates.flip_xy(POINTS.int()), TypeError, "flip_xy: points must be float32.*got int32"),
    (
        lambda: coordinates.flip_xy(POINTS[..., :1]),
        ValueError,
        r"flip_xy: points must be \[\.\.\., 2\], got \[1, 4, 1\]",
    ),
    (lambda: coordinates.to_pixel_centred(POINTS, 5), TypeError, r"to_pixel_centred: size must be \(H, W\), got 5"),
    (lambda: coordinates.from_corner_aligned(POINTS, (0, 5)), ValueError, "H of size must be at least 1, got 0"),
    (
        lambda: coordinates.input_to_heatmap(POINTS, (1, 5), (3, 4)),
        ValueError,
        r"input_to_heatmap: udp needs at least 2 pixels a side, got \(1, 5\) and \(3, 4\)",
    ),
]


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        call()
