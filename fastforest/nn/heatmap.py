"""Layers that turn heatmaps into points: `SoftArgmax2d` to train through, `PeakDecoder` to predict with.

Shapes: heatmaps [B, P, H, W], points [B, P, 2] as (x, y) in pixels, pixel centres at integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastforest.coordinates import heatmap_to_input
from fastforest.ops._checks import check_choice, check_number, check_size
from fastforest.ops.heatmap import REFINEMENTS, Peak, check_kernel, check_window, peak, soft_argmax

__all__ = ["PeakDecoder", "SoftArgmax2d"]


class SoftArgmax2d(nn.Module):
    """Expected position under softmax(beta z): `fastforest.soft_argmax` as a layer.

    Args:
        beta: inverse temperature.
        window, debias: as of `fastforest.soft_argmax`.
        learnable: beta is a parameter, a scalar, and gets gradients; otherwise a number.

    Raises:
        TypeError, ValueError: an argument of another type or range.

    >>> head = SoftArgmax2d(10.0, window=3, learnable=True)
    >>> head
    SoftArgmax2d(beta=10, window=3, debias=False, learnable=True)
    >>> head(torch.rand(2, 5, 16, 16)).shape
    torch.Size([2, 5, 2])
    """

    beta: float | nn.Parameter

    def __init__(
        self, beta: float = 1.0, *, window: int | None = None, debias: bool = False, learnable: bool = False
    ) -> None:
        super().__init__()
        start = check_number("SoftArgmax2d", "beta", beta)
        check_window("SoftArgmax2d", window)
        self.beta = nn.Parameter(torch.tensor(start)) if learnable else start
        self.window, self.debias, self.learnable = window, debias, learnable

    def forward(self, heatmap: Tensor) -> Tensor:
        """Points [B, P, 2] of heatmap [B, P, H, W]."""
        return soft_argmax(heatmap, self.beta, window=self.window, debias=self.debias)

    def extra_repr(self) -> str:
        beta = float(torch.as_tensor(self.beta).detach())
        return f"beta={beta:g}, window={self.window}, debias={self.debias}, learnable={self.learnable}"


class PeakDecoder(nn.Module):
    """Sub-pixel peaks of heatmaps, in pixels of the map or of the network's input: `fastforest.peak` as a layer.

    Args:
        refine, kernel: as of `fastforest.peak`.
        input_size: (H, W) of the network's input: points are given in its pixels. None: in pixels of the map.
        udp: how the two stand to each other, as of `fastforest.coordinates.heatmap_to_input`.

    Raises:
        TypeError, ValueError: an argument of another type or range.

    >>> decoder = PeakDecoder("dark_udp", input_size=(253, 253))
    >>> decoder
    PeakDecoder(refine='dark_udp', kernel=11, input_size=(253, 253), udp=True)
    >>> from fastforest import render_gaussian
    >>> decoder(render_gaussian(torch.tensor([[[20.25, 30.5]]]), 2.0, (64, 64))).points.round(decimals=2)
    tensor([[[ 81., 122.]]])
    """

    def __init__(
        self,
        refine: str = "dark_udp",
        *,
        kernel: int = 11,
        input_size: tuple[int, int] | None = None,
        udp: bool = True,
    ) -> None:
        super().__init__()
        check_choice("PeakDecoder", "refine", refine, REFINEMENTS)
        check_kernel("PeakDecoder", kernel)
        if input_size is not None:
            input_size = check_size("PeakDecoder", input_size)
        self.refine, self.kernel, self.input_size, self.udp = refine, kernel, input_size, udp

    def forward(self, heatmap: Tensor) -> Peak:
        """Points [B, P, 2] and scores [B, P] of heatmap [B, P, H, W]."""
        found = peak(heatmap, self.refine, kernel=self.kernel)
        if self.input_size is None:
            return found
        height, width = heatmap.shape[2:]
        return Peak(heatmap_to_input(found.points, (height, width), self.input_size, udp=self.udp), found.score)

    def extra_repr(self) -> str:
        return f"refine={self.refine!r}, kernel={self.kernel}, input_size={self.input_size}, udp={self.udp}"
