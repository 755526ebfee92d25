"""Networks from an image to landmarks.

All of them: `model(images [B, 3, S, S] in [0, 1]) -> points [B, P, 2]` in image pixels, `model.loss(images, points,
weight=None)`, `model.config()`, which `build` takes back. "forest" also has `accumulate`, `update`, `steepness` and
`distribution`.
"""

from __future__ import annotations

import inspect
from typing import Any

from fastforest.models.backbone import BACKBONES, Backbone, Features, Trunk, build_backbone
from fastforest.models.highres import HighResNet
from fastforest.models.hourglass import StackedHourglass
from fastforest.models.landmarks import DenseHeatmap, LandmarkForest
from fastforest.models.norm import synchronize_batch_norm

__all__ = [
    "BACKBONES",
    "MODELS",
    "Backbone",
    "DenseHeatmap",
    "Features",
    "HighResNet",
    "LandmarkForest",
    "StackedHourglass",
    "Trunk",
    "build",
    "build_backbone",
    "synchronize_batch_norm",
]

MODELS: dict[str, type[LandmarkForest] | type[DenseHeatmap]] = {
    LandmarkForest.name: LandmarkForest,
    DenseHeatmap.name: DenseHeatmap,
}


def build(name: str, config: dict[str, Any]) -> LandmarkForest | DenseHeatmap:
    """The model of that name with `config` as its constructor's arguments.

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
    return model(**config)
