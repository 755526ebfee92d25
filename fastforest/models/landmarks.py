"""Faces to landmarks by two pools of heatmap leaves, one after the other.

Shapes: B images of side S, P landmarks, N leaves, C channels, K = taps^2 cells. Points [B, P, 2] are (x, y) in image
pixels, 0-based, pixel centres at integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.base import LandmarkModel, Shape, hidden
from fastforest.nn import LeafPool

__all__ = ["LandmarkForest"]

CONTEXT = 16  # numbers a landmark that the fine stage gets of the whole face


class Selected(NamedTuple):
    """What one stage chose: its layer, its selection [B, P, N], and where its canvas lies.

    A canvas point c is the image point origin + pixel (c - canvas centre); origin None: the layer's own mean shape.
    """

    head: LeafPool
    prob: Tensor
    origin: Tensor | None
    pixel: float

    def to_canvas(self, points: Tensor) -> Tensor:
        """Image points -> what `head` takes."""
        if self.origin is None:
            return points / self.pixel
        return (points - self.origin) / self.pixel + self.head.centre

    def distribution(self) -> tuple[Tensor, Tensor]:
        """Mean [B, P, 2] in image pixels, covariance [B, P, 2, 2] in their squares."""
        mean, covariance = self.head.expectation(self.prob)
        mean = mean * self.pixel if self.origin is None else self.origin + (mean - self.head.centre) * self.pixel
        return mean, covariance * self.pixel**2


class LandmarkForest(LandmarkModel):
    """Two leaf pools over one backbone: the whole face finds the landmarks roughly, then each looks about itself.

    1. coarse: the backbone's vector selects leaves of a canvas of offsets from the mean shape, +-`reach` S wide.
    2. fine: taps x taps cells of the map about the cell nearest to each point found, with a few numbers drawn from the
       vector and the point's place in that cell, select leaves of a canvas of offsets from the cell's centre,
       +-`fine_reach` S wide. No gradient passes through the point found.

    Loss: the sum of the two pools' losses. Leaves are learned in closed form: `accumulate`, then `update`.

    Args:
        landmarks: P.
        mean_shape: [P, 2], image pixels.
        image_size: S, a multiple of 32.
        canvas: H = W of both canvases, canvas pixels.
        leaves: N of each pool.
        sigma: of the targets, canvas pixels (a coarse one is 2 reach S / canvas image pixels, a fine one
            2 fine_reach S / canvas).
        reach, fine_reach: half the canvases' sides, fractions of S.
        taps: side of the neighbourhood, odd, cells of the backbone's map.
        selection, rank, depth, objective: as `LeafPool`.
        leaf_rate: of the leaf updates, in (0, 1]; see `LeafPool.update`.
        backbone, backbone_options, pretrain: as `CoordinateRegression`.
    """

    name = "forest"

    def __init__(
        self,
        landmarks: int,
        mean_shape: Shape,
        image_size: int = 96,
        *,
        canvas: int = 32,
        leaves: int = 256,
        sigma: float = 1.5,
        reach: float = 0.3,
        fine_reach: float = 0.1,
        taps: int = 5,
        selection: str = "softmax",
        rank: int = 32,
        depth: int | None = None,
        objective: str = "kl",
        leaf_rate: float = 0.5,
        backbone: str | nn.Module = "small",
        backbone_options: dict[str, Any] | None = None,
        pretrain: bool = False,
    ) -> None:
        super().__init__(locals())
        for name, value in (("reach", reach), ("fine_reach", fine_reach)):
            if not 0 < value < 1:
                raise ValueError(f"LandmarkForest: {name} must be a fraction of the image in (0, 1), got {value}")
        if canvas < 1:
            raise ValueError(f"LandmarkForest: canvas must be at least 1, got {canvas}")
        if taps < 1 or taps % 2 == 0:
            raise ValueError(f"LandmarkForest: taps must be odd and positive, got {taps}")
        if not 0 < leaf_rate <= 1:
            raise ValueError(f"LandmarkForest: leaf_rate must be in (0, 1], got {leaf_rate}")
        self.leaf_rate = leaf_rate
        self.taps, self.cell = taps, self.backbone.stride
        self.pixel, self.fine_pixel = 2 * reach * image_size / canvas, 2 * fine_reach * image_size / canvas
        features, channels = self.backbone.features, self.backbone.map_channels
        head: dict[str, Any] = {"selection": selection, "rank": rank, "depth": depth, "objective": objective}
        size = (canvas, canvas)
        self.coarse = LeafPool(features, landmarks, leaves, size, sigma, mean_shape=self.shape / self.pixel, **head)
        self.context = nn.Linear(features, landmarks * CONTEXT)
        self.fine = LeafPool(taps**2 * channels + CONTEXT + 2, landmarks, leaves, size, sigma, **head)

    @property
    def steepness(self) -> float:
        """Of both selections; see `LeafPool.steepness`."""
        return self.coarse.steepness

    @steepness.setter
    def steepness(self, value: float) -> None:
        self.coarse.steepness = self.fine.steepness = value

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> points [B, P, 2], image pixels, float32."""
        return self.distribution(images)[0]

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, P, 2] and covariance [B, P, 2, 2] of the fine stage, image pixels and their squares."""
        return self.stages(images)[1].distribution()

    def loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar: the two stages' mean losses, added. points: [B, P, 2]; weight: [B, P], 0 hides a landmark."""
        points = hidden(points, weight)
        coarse, fine = (
            stage.head.selection_loss(stage.prob, stage.to_canvas(points), weight) for stage in self.stages(images)
        )
        return coarse + fine

    @torch.no_grad()
    def accumulate(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> None:
        """Adds the leaf statistics of a batch; arguments as `loss`. Additive until `update`."""
        points = hidden(points, weight)
        for stage in self.stages(images):
            stage.head.accumulate_selection(stage.prob, stage.to_canvas(points), weight)

    def update(self) -> int:
        """Closed-form update of both pools; returns how many leaves were dead."""
        return self.coarse.update(self.leaf_rate) + self.fine.update(self.leaf_rate)

    def stages(self, images: Tensor) -> tuple[Selected, Selected]:
        """The selections of the coarse and of the fine stage."""
        maps, vector = self.backbone(images)[:2]
        coarse = Selected(self.coarse, self.coarse.select(vector), None, self.pixel)
        found = coarse.distribution()[0].detach()
        cell, origin = self._nearest(found, maps.shape[-1])
        within = (found - origin) / self.cell
        context = self.context(vector).unflatten(1, (self.landmarks, CONTEXT))
        local = self._around(maps, cell)
        features = torch.cat([local, context.to(local.dtype), within.to(local.dtype)], dim=-1)
        return coarse, Selected(self.fine, self.fine.select(features), origin, self.fine_pixel)

    def _nearest(self, points: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The map's cell nearest to each point, int64 [B, P, 2] (x, y), and its centre in image pixels [B, P, 2]."""
        at = ((points + 0.5) / self.cell - 0.5).nan_to_num().round().clamp(0, side - 1)
        return at.long(), (at + 0.5) * self.cell - 0.5

    def _around(self, maps: Tensor, cell: Tensor) -> Tensor:
        """The map at taps x taps cells about each cell, 0 beyond its border: [B, P, K C].

        Whole rows of channels are copied: nine times as fast as grid_sample here (2 cores, B 32, P 68, C 64, K 25).
        """
        margin = self.taps // 2
        padded = functional.pad(maps, (margin, margin, margin, margin)).permute(0, 2, 3, 1)
        batch, height, width, channels = padded.shape
        step = torch.arange(self.taps, device=cell.device)
        x, y = cell[..., 0, None, None] + step, cell[..., 1, None, None] + step[:, None]
        image = torch.arange(batch, device=cell.device)[:, None, None, None]
        rows = ((image * height + y) * width + x).flatten()
        samples = padded.reshape(-1, channels).index_select(0, rows)
        return samples.reshape(batch, self.landmarks, self.taps**2 * channels)
