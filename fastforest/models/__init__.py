"""Networks from an image to landmarks.

All of them: `model(images [B, 3, S, S] in [0, 1]) -> points [B, P, 2]` in image pixels, `model.loss(images, points,
weight=None)`, `model.config()`, which `build` takes back. All but "coordinates" have `distribution`; the forests have
`accumulate`, `update` and `steepness`, some `start`; those made with `pretrain=True` have `pretrain_loss`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fastforest.models.backbone import BACKBONES, Backbone, Features, Trunk, build_backbone
from fastforest.models.base import LandmarkModel
from fastforest.models.coordinates import CoordinateRegression
from fastforest.models.forests import GroupedForest, SharedPool
from fastforest.models.heatmaps import DenseHeatmap
from fastforest.models.highres import HighResNet
from fastforest.models.hourglass import StackedHourglass
from fastforest.models.landmarks import LandmarkForest
from fastforest.models.norm import synchronize_batch_norm
from fastforest.nn import group_landmarks

__all__ = [
    "BACKBONES",
    "MODELS",
    "Backbone",
    "CoordinateRegression",
    "DenseHeatmap",
    "Features",
    "GroupedForest",
    "HighResNet",
    "LandmarkForest",
    "LandmarkModel",
    "SharedPool",
    "StackedHourglass",
    "Trunk",
    "build",
    "build_backbone",
    "synchronize_batch_norm",
]

MODELS: dict[str, type[Any]] = {
    model.name: model for model in (LandmarkForest, SharedPool, GroupedForest, DenseHeatmap, CoordinateRegression)
}


def build(name: str, config: dict[str, Any], points: Tensor | None = None) -> Any:
    """The model of that name with `config` as its constructor's arguments.

    Args:
        points: [N, P, 2], landmarks of the training set, by which a number of groups is made into groups; those with
            unknown landmarks are left out. Not needed for a configuration that a model gave.

    Raises:
        ValueError: a name that is not in `MODELS`, an argument that the model lacks or needs, or a value out of range.
    """
    if name not in MODELS:
        raise ValueError(f"models.build: name must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    try:
        inspect.signature(model).bind(**config)
    except TypeError as error:
        raise ValueError(f"models.build: config of '{name}': {error}") from None
    groups = config.get("groups")
    if isinstance(groups, int) and groups > 1 and points is not None:
        whole = points[points.isfinite().flatten(1).all(1)]
        config = config | {"groups": group_landmarks(whole, groups).tolist()}
    return model(**config)
