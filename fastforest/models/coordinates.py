"""Direct regression of coordinates, what every other head is measured against.

Shapes: B images of side S, P landmarks. Points [B, P, 2] are (x, y) in image pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastforest.models.base import LandmarkModel, Shape, hidden, weighted_mean
from fastforest.ops._checks import check_choice
from fastforest.ops.heatmap_loss import wing_loss

__all__ = ["CoordinateRegression"]


class CoordinateRegression(LandmarkModel):
    """The backbone's vector, a hidden layer, and a linear map to the coordinates.

    Args:
        landmarks: P.
        mean_shape: [P, 2], image pixels.
        image_size: S.
        residual: predict S / 8 times what is added to the mean shape; False: S / 2 times what is added to the centre.
        loss: "wing" (of width 10 and curvature 2 at S = 256, in proportion), "l1" or "l2", of coordinates in 256ths of S.
        hidden_units: of the hidden layer.
        backbone, backbone_options: by name, see `build_backbone`, or a module that gives a map, or a map and a vector.
        pretrain: has a head for dense heatmaps, see `pretrain_loss`.
    """

    name = "coordinates"

    def __init__(
        self,
        landmarks: int,
        mean_shape: Shape,
        image_size: int = 96,
        *,
        residual: bool = True,
        loss: str = "wing",
        hidden_units: int = 256,
        backbone: str | nn.Module = "small",
        backbone_options: dict[str, Any] | None = None,
        pretrain: bool = False,
    ) -> None:
        super().__init__(locals())
        check_choice("CoordinateRegression", "loss", loss, ("wing", "l1", "l2"))
        self.loss_kind = loss
        start = self.shape if residual else torch.full_like(self.shape, (image_size - 1) / 2)
        self.register_buffer("origin", start.clone(), persistent=False)
        self.reach = image_size / (8 if residual else 2)
        last = nn.Linear(hidden_units, 2 * landmarks)
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(self.backbone.features, hidden_units), nn.ReLU(inplace=True), last)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> points [B, P, 2], image pixels, float32."""
        found = self.head(self.backbone.vector(images)).float()
        return self.origin + self.reach * found.unflatten(1, (self.landmarks, 2))

    def loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar, mean over landmarks by weight."""
        unit = 256 / self.image_size
        found, truth = unit * self(images), unit * hidden(points, weight)
        if self.loss_kind == "wing":
            return wing_loss(found, truth, weight=weight)
        rows = (found - truth).abs() if self.loss_kind == "l1" else (found - truth).square()
        return weighted_mean(rows.mean(-1), weight)
