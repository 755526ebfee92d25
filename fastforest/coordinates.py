"""Points from and to the conventions of other libraries, and between an image and its heatmaps.

This package's own: (x, y) in pixels, 0-based, pixel centres at integers: the pixel in column 3 of row 0 is (3, 0). It is
also MMPose's and HRNet's (an index of the map), which need no converter. Everything here takes [..., 2], keeps shape and
dtype, is plain PyTorch and differentiable as often as you like. Sizes are (H, W), as of the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastforest.ops._checks import FLOATING, check_size

__all__ = [
    "flip_xy",
    "from_corner_aligned",
    "from_pixel_centred",
    "heatmap_to_input",
    "input_to_heatmap",
    "to_corner_aligned",
    "to_pixel_centred",
]


def input_to_heatmap(
    points: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], *, udp: bool = True
) -> Tensor:
    """Points of the network's input as points of its heatmaps.

    Args:
        points: [..., 2], pixels of the input.
        input_size, heatmap_size: (H, W).
        udp: True: the centres of the corner pixels fall on each other, ``x (W_map - 1) / (W_in - 1)``: the unbiased
            transform of Huang et al., UDP, and `interpolate(align_corners=True)`; needs at least 2 pixels a side. False:
            the corners of the corner pixels do, ``(x + 1/2) W_map / W_in - 1/2``, as `interpolate(align_corners=False)`.
            MMPose's codecs without UDP use ``x W_map / W_in``, which is neither; write it as that product.

    Raises:
        TypeError, ValueError: another type, shape or size.

    >>> input_to_heatmap(torch.tensor([255.0, 127.0]), (256, 256), (64, 64))
    tensor([63.0000, 31.3765])
    >>> input_to_heatmap(torch.tensor([255.0, 127.5]), (256, 256), (64, 64), udp=False)
    tensor([63.3750, 31.5000])
    """
    return _resized("input_to_heatmap", points, input_size, heatmap_size, udp)


def heatmap_to_input(
    points: Tensor, heatmap_size: tuple[int, int], input_size: tuple[int, int], *, udp: bool = True
) -> Tensor:
    """The inverse of `input_to_heatmap`: ``x (W_in - 1) / (W_map - 1)``, or ``(x + 1/2) W_in / W_map - 1/2``.

    >>> heatmap_to_input(torch.tensor([63.0, 31.5]), (64, 64), (256, 256))
    tensor([255.0000, 127.5000])
    """
    return _resized("heatmap_to_input", points, heatmap_size, input_size, udp)


def to_corner_aligned(points: Tensor, size: tuple[int, int]) -> Tensor:
    """-1 and 1 at the centres of the corner pixels: ``2 x / (W - 1) - 1``; kornia, `grid_sample(align_corners=True)`.

    A side of one pixel keeps its coordinate.

    >>> to_corner_aligned(torch.tensor([[0.0, 0.0], [1.5, 4.0]]), (5, 4))
    tensor([[-1., -1.],
            [ 0.,  1.]])
    """
    scale, shift = _corner_aligned("to_corner_aligned", points, size)
    return points * scale + shift


def from_corner_aligned(points: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `to_corner_aligned`: ``(x + 1) (W - 1) / 2``.

    >>> from_corner_aligned(torch.tensor([0.0, 1.0]), (5, 4))
    tensor([1.5000, 4.0000])
    """
    scale, shift = _corner_aligned("from_corner_aligned", points, size)
    return (points - shift) / scale


def to_pixel_centred(points: Tensor, size: tuple[int, int]) -> Tensor:
    """-1 and 1 at the edges of the canvas: ``(2 x + 1) / W - 1``; dsntnn, `grid_sample(align_corners=False)`.

    >>> to_pixel_centred(torch.tensor([0.0, 3.0]), (4, 4))
    tensor([-0.7500,  0.7500])
    """
    return (2 * points + 1) / _sides("to_pixel_centred", points, size) - 1


def from_pixel_centred(points: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `to_pixel_centred`: ``((x + 1) W - 1) / 2``.

    >>> from_pixel_centred(torch.tensor([-0.75, 0.75]), (4, 4))
    tensor([0., 3.])
    """
    return ((points + 1) * _sides("from_pixel_centred", points, size) - 1) / 2


def flip_xy(points: Tensor) -> Tensor:
    """(x, y) from (y, x), as landmarker and NumPy's indices have it, or the other way round.

    >>> flip_xy(torch.tensor([[7.0, 2.0]]))
    tensor([[2., 7.]])
    """
    return _check_points("flip_xy", points).flip(-1)


def _check_points(name: str, points: object) -> Tensor:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name}: points must be a tensor [..., 2], got {type(points).__name__}")
    if points.dtype not in FLOATING:
        raise TypeError(f"{name}: points must be float32, float64, bfloat16 or float16, got {str(points.dtype)[6:]}")
    if points.dim() == 0 or points.shape[-1] != 2:
        raise ValueError(f"{name}: points must be [..., 2], got {list(points.shape)}")
    return points


def _sides(name: str, points: Tensor, size: object) -> Tensor:
    """(W, H), in the order of the coordinates."""
    _check_points(name, points)
    height, width = check_size(name, size)
    return points.new_tensor([width, height])


def _corner_aligned(name: str, points: Tensor, size: object) -> tuple[Tensor, Tensor]:
    sides = _sides(name, points, size)
    wide = sides > 1
    return torch.where(wide, 2 / (sides - 1).clamp_min(1), 1.0), torch.where(wide, -1.0, 0.0).to(points.dtype)


def _resized(name: str, points: Tensor, before: object, after: object, udp: bool) -> Tensor:
    _check_points(name, points)
    (h0, w0), (h1, w1) = check_size(name, before), check_size(name, after)
    if not udp:
        return (points + 0.5) * points.new_tensor([w1 / w0, h1 / h0]) - 0.5
    if min(h0, w0, h1, w1) < 2:
        raise ValueError(f"{name}: udp needs at least 2 pixels a side, got {(h0, w0)} and {(h1, w1)}")
    return points * points.new_tensor([(w1 - 1) / (w0 - 1), (h1 - 1) / (h0 - 1)])
