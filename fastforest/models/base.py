"""What the models share: the backbone and its adapter, the configuration, dense heatmaps to begin with, the two-sided KL.

Shapes: B images of side S, P landmarks, C channels, map [B, C, h, w], vector [B, F]. Points are (x, y) in image pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.models.backbone import build_backbone
from fastforest.models.units import Features, Trunk, unit
from fastforest.ops.heatmap import render_gaussian
from fastforest.ops.heatmap_loss import heatmap_kl_loss

__all__ = ["DenseHead", "LandmarkModel", "Shape", "two_sided_kl", "weighted_mean"]

Shape = Tensor | Sequence[Sequence[float]]
PRETRAIN_SIGMA = 1.5
"""Of the targets of `pretrain_loss`, cells of the map."""


class LandmarkModel(nn.Module):
    """Base of the models: a backbone, the mean shape, and the constructor's arguments as `config()`.

    `loss`, `accumulate` and `pretrain_loss` take points [B, P, 2] that may be NaN where weight [B, P] is 0.

    Args:
        scope: the constructor's `locals()`.
    """

    name: str
    shape: Tensor
    """[P, 2], image pixels."""

    def __init__(self, scope: dict[str, Any]) -> None:
        super().__init__()
        config = {key: value for key, value in scope.items() if key not in ("self", "__class__")}
        self.image_size: int = config["image_size"]
        self.landmarks: int = config["landmarks"]
        shape = torch.as_tensor(config["mean_shape"], dtype=torch.float32).detach()
        if tuple(shape.shape) != (self.landmarks, 2) or not bool(shape.isfinite().all()):
            owner = type(self).__name__
            raise ValueError(f"{owner}: mean_shape must be finite [{self.landmarks}, 2], got {list(shape.shape)}")
        self.register_buffer("shape", shape.clone(), persistent=False)
        backbone = config["backbone"]
        self.backbone: Any = fitted_backbone(backbone, self.image_size, config["backbone_options"] or {})
        self._config = config | {
            "mean_shape": shape.tolist(),
            "backbone_options": dict(config["backbone_options"] or {}),
        }
        self.dense: DenseHead | None = None
        if config.get("pretrain"):
            self.dense = DenseHead(self.backbone, self.landmarks)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON.

        Raises:
            ValueError: the backbone was given as a module, which no file can name.
        """
        if isinstance(self._config["backbone"], nn.Module):
            raise ValueError(
                f"{type(self).__name__}: the backbone was given as a {type(self._config['backbone']).__name__}, which a "
                "configuration cannot name: add it to models.BACKBONES under a name"
            )
        return dict(self._config)

    def pretrain_loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar: KL of dense heatmaps on the backbone's map, to begin with; needs `pretrain=True`."""
        if self.dense is None:
            raise ValueError(f"{type(self).__name__}: pretrain_loss needs a model made with pretrain=True")
        return self.dense.loss(self.backbone(images), hidden(points, weight), weight, self.image_size)


class DenseHead(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution from a map to one logit map a landmark; one of them for each earlier stack too."""

    def __init__(self, backbone: Trunk, landmarks: int) -> None:
        super().__init__()
        channels = backbone.map_channels
        self.heads = nn.ModuleList(
            nn.Sequential(unit(channels, channels), nn.Conv2d(channels, landmarks, 1))
            for _ in range(backbone.earlier + 1)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, features: Features) -> list[Tensor]:
        """Logits [B, P, h, w], float32, of the earlier stacks and, last, of the map itself."""
        maps = (*features.earlier, features.map)
        return [head(one).float() for head, one in zip(self.heads, maps, strict=True)]

    def loss(self, features: Features, points: Tensor, weight: Tensor | None, image_size: int) -> Tensor:
        """Mean KL(target || softmax) over the stacks. points: image pixels, finite."""
        logits = self(features)
        centre = (points + 0.5) * (logits[-1].shape[-1] / image_size) - 0.5
        losses = [heatmap_kl_loss(one, centre, PRETRAIN_SIGMA, weight=weight) for one in logits]
        return torch.stack(losses).mean()


class _Adapted(Trunk):
    """A user's module as a backbone: it gives a map, or (map, vector), or `Features`; without a vector, the map's means
    over a grid of S / 32 cells a side."""

    def __init__(self, module: nn.Module, image_size: int) -> None:
        super().__init__()
        self.module, self.image_size = module, image_size
        self.grid, self.narrow = max(1, image_size // 32), nn.Identity()
        training = module.training
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        with torch.no_grad():
            found = self.eval()(torch.zeros(2, 3, image_size, image_size, device=device))
        self.train(training)
        if found.map.dim() != 4 or found.map.shape[2] != found.map.shape[3] or found.vector.dim() != 2:
            raise ValueError(
                f"{type(module).__name__}: a backbone must give a map [B, C, h, h], or a map and a vector [B, F], got "
                f"{list(found.map.shape)} and {list(found.vector.shape)}"
            )
        self.map_channels, self.features, self.earlier = found.map.shape[1], found.vector.shape[1], len(found.earlier)
        self.stride = image_size / found.map.shape[-1]

    def forward(self, images: Tensor) -> Features:
        found = self.module(images)
        if isinstance(found, Tensor):
            found = (found, functional.adaptive_avg_pool2d(found, self.grid).flatten(1))
        return Features(*found)


def fitted_backbone(backbone: str | nn.Module, image_size: int, options: Mapping[str, Any]) -> Trunk:
    """By name with its options, or a module that fits by what it gives."""
    if isinstance(backbone, str):
        return build_backbone(backbone, image_size, **options)
    if options:
        raise ValueError(f"backbone_options belong to a backbone given by name, got {sorted(options)} with a module")
    return backbone if isinstance(backbone, Trunk) else _Adapted(backbone, image_size)


def hidden(points: Tensor, weight: Tensor | None) -> Tensor:
    """Points whose weight is 0 at the origin: whatever they held, NaN too, is gone."""
    return points if weight is None else torch.where((weight == 0)[..., None], 0.0, points)


def two_sided_kl(
    mixture: Tensor, points: Tensor, sigma: float, weight: Tensor | None = None, eps: float = 1e-7
) -> Tensor:
    r"""Mean over landmarks of :math:`\sum_h KL(y \| q) + KL(1 - y \| 1 - q)`, each pixel a Bernoulli variable.

    It also holds down q where the target y, a Gaussian that sums to 1 over what is visible of 3 sigma, is 0; there KL(y||q)
    is indifferent. Plain PyTorch on maps of full size: three of them, and their gradients, are stored.

    Args:
        mixture: q, [B, P, H, W], each map sums to 1.
        points: [B, P, 2], pixels of the map. weight: [B, P] or None.
        eps: q is kept in [eps, 1 - eps].
    """
    target = render_gaussian(points, sigma, (mixture.shape[-2], mixture.shape[-1]), normalize="sum", truncate=3.0)
    q = mixture.float().clamp(eps, 1 - eps)
    y = target.float().clamp(0, 1 - eps)
    rows = torch.xlogy(y, y) - y * q.log() + (1 - y) * ((-y).log1p() - (-q).log1p())
    return weighted_mean(rows.sum((2, 3)), weight)


def weighted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Scalar: mean of rows [B, P] by weight [B, P]; 0 where nothing counts, whatever hidden rows hold."""
    if weight is None:
        return rows.sum() / max(rows.numel(), 1)
    total = weight.sum()
    return torch.where(weight == 0, 0.0, rows * weight).sum() / torch.where(total > 0, total, 1.0)
