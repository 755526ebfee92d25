"""Layers: `torch.nn.Module`s over the operators of `fastforest.ops`."""

from fastforest.nn.categorical import (
    HeatmapDistribution,
    HeatmapForest,
    LabelDistribution,
    LabelDistributionForest,
    group_landmarks,
)
from fastforest.nn.gaussian import GaussianForest, GaussianMixture
from fastforest.nn.heatmap import PeakDecoder, SoftArgmax2d
from fastforest.nn.pool import LeafPool
from fastforest.nn.routing import SoftForest

__all__ = [
    "GaussianForest",
    "GaussianMixture",
    "HeatmapDistribution",
    "HeatmapForest",
    "LabelDistribution",
    "LabelDistributionForest",
    "LeafPool",
    "PeakDecoder",
    "SoftArgmax2d",
    "SoftForest",
    "group_landmarks",
]
