"""Dense heatmaps, the conventional head.

Shapes: B images of side S, P landmarks, maps of side M. Points [B, P, 2] are (x, y) in image pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.base import LandmarkModel, Shape, hidden
from fastforest.models.units import unit
from fastforest.ops._checks import check_choice
from fastforest.ops.heatmap import peak, soft_argmax
from fastforest.ops.heatmap_loss import adaptive_wing_loss, heatmap_kl_loss, heatmap_mse_loss

__all__ = ["DECODES", "DenseHeatmap"]

DECODES = ("soft_argmax", "argmax", "quarter", "dark", "dark_udp")
PEAKS = {"argmax": "none", "quarter": "quarter_sign", "dark": "dark", "dark_udp": "dark_udp"}
OBJECTIVES = ("kl", "mse", "awing")
FOREGROUND = 11.0
"""Weight of the pixels of a target above 0.2 in the mean square, as in Adaptive Wing: unweighted, maps stay empty."""
FLOOR = 1e-30
"""Of a heatmap's pixels as mass: what all of them weigh together must not count, nor a map without a peak be NaN."""


class DenseHeatmap(LandmarkModel):
    """A 3 x 3 and a 1 x 1 convolution from the backbone's map to one map a landmark; of every stack, where it has many.

    Args:
        landmarks: P.
        mean_shape: [P, 2]; kept for the configuration, the maps do not need it.
        image_size: S.
        upsample: the maps have `upsample` times the side of the backbone's.
        sigma: of the targets, map pixels.
        objective: "kl" (the maps are logits, KL(target || softmax)), "mse" or "awing" (the maps are heatmaps of peak 1;
            mean square with the foreground weighted, Adaptive Wing).
        decode: "soft_argmax": mean of the softmax (of heatmaps: of their positive part) within ceil(2 sigma) of the highest
            pixel; "argmax", "quarter", "dark", "dark_udp": that pixel, refined as `fastforest.peak` does. An attribute, so a
            trained model can be decoded in each way.
        backbone, backbone_options: by name, see `build_backbone`, or a module that gives a map.
    """

    name = "dense"

    def __init__(
        self,
        landmarks: int,
        mean_shape: Shape,
        image_size: int = 96,
        *,
        upsample: int = 1,
        sigma: float = 1.5,
        objective: str = "kl",
        decode: str = "soft_argmax",
        backbone: str | nn.Module = "small",
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(locals())
        check_choice("DenseHeatmap", "objective", objective, OBJECTIVES)
        if upsample < 1 or not sigma > 0:
            raise ValueError(f"DenseHeatmap: upsample must be >= 1 and sigma > 0, got {upsample} and {sigma}")
        self.upsample, self.sigma, self.objective, self.decode = upsample, sigma, objective, decode
        if isinstance(backbone, str):  # the vector is not used here; a module's owner may use it elsewhere
            self.backbone.narrow.requires_grad_(False)
        channels, stacks = self.backbone.map_channels, self.backbone.earlier + 1
        self.heads = nn.ModuleList(unit(channels, channels) for _ in range(stacks))
        self.maps = nn.ModuleList(nn.Conv2d(channels, landmarks, 1) for _ in range(stacks))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def decode(self) -> str:
        return self._decode

    @decode.setter
    def decode(self, value: str) -> None:
        check_choice("DenseHeatmap", "decode", value, DECODES)
        self._decode = value

    def heatmaps(self, images: Tensor) -> list[Tensor]:
        """Maps [B, P, M, M] of every stack, the last one's last: logits ("kl") or heatmaps, float32."""
        features = self.backbone(images)
        return [self._map(i, one) for i, one in enumerate((*features.earlier, features.map))]

    def heatmap(self, images: Tensor) -> Tensor:
        """The last stack's maps [B, P, M, M]."""
        return self._map(-1, self.backbone(images).map)

    def _map(self, stack: int, features: Tensor) -> Tensor:
        features = self.heads[stack](features)
        if self.upsample > 1:
            features = functional.interpolate(features, scale_factor=float(self.upsample), mode="bilinear")
        return self.maps[stack](features).float()

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> points [B, P, 2], image pixels, float32."""
        return self._decoded(self.heatmap(images))

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The points, and the covariance [B, P, 2, 2] of the whole map's mass, image pixels squared."""
        maps = self.heatmap(images)
        mass = self._logits(maps).flatten(2).softmax(-1).view_as(maps)
        grid = torch.arange(maps.shape[-1], device=maps.device, dtype=maps.dtype)
        column, row = mass.sum(2), mass.sum(3)
        mx, my = (column * grid).sum(-1), (row * grid).sum(-1)
        dx, dy = grid - mx[..., None], grid - my[..., None]
        xx, yy = (column * dx**2).sum(-1), (row * dy**2).sum(-1)
        xy = (torch.einsum("bpyx,bpx->bpy", mass, dx) * dy).sum(-1)
        covariance = torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2))
        return self._decoded(maps), covariance * (self.image_size / maps.shape[-1]) ** 2

    def loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar, mean over landmarks by weight and over the stacks. points: [B, P, 2], image pixels."""
        if tuple(points.shape) != (images.shape[0], self.landmarks, 2):
            expected = [images.shape[0], self.landmarks, 2]
            raise ValueError(f"DenseHeatmap: points must be {expected}, got {list(points.shape)}")
        maps = self.heatmaps(images)
        side = maps[-1].shape[-1]
        centre = ((hidden(points, weight) + 0.5) * (side / self.image_size) - 0.5).float()
        return torch.stack([self._loss(one, centre, weight) for one in maps]).mean()

    def _loss(self, maps: Tensor, centre: Tensor, weight: Tensor | None) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            if self.objective == "kl":
                return heatmap_kl_loss(maps, centre, self.sigma, weight=weight)
            if self.objective == "awing":
                return maps.shape[-1] * adaptive_wing_loss(maps, centre, self.sigma, weight=weight)
            return maps.shape[-1] * heatmap_mse_loss(
                maps, centre, self.sigma, weight=weight, foreground_weight=FOREGROUND, mask_threshold=0.2
            )

    def _logits(self, maps: Tensor) -> Tensor:
        """Whose softmax is the maps' mass."""
        return maps if self.objective == "kl" else maps.clamp_min(FLOOR).log()

    def _decoded(self, maps: Tensor) -> Tensor:
        if self.decode == "soft_argmax":
            found = soft_argmax(self._logits(maps), window=math.ceil(2 * self.sigma))
        else:
            if self.objective == "kl":  # peaks are refined on heatmaps: of peak 1
                maps = (maps - maps.amax((2, 3), keepdim=True)).exp()
            found = peak(maps, PEAKS[self.decode]).points
        return (found + 0.5) * (self.image_size / maps.shape[-1]) - 0.5
