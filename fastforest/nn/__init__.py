"""Layers: `torch.nn.Module`s over the operators of `fastforest.ops`."""

from fastforest.nn.categorical import LabelDistribution, LabelDistributionForest
from fastforest.nn.gaussian import GaussianForest, GaussianMixture
from fastforest.nn.heatmap import PeakDecoder, SoftArgmax2d
from fastforest.nn.heatmap_forest import HeatmapDistribution, HeatmapForest, group_landmarks
from fastforest.nn.heatmap_loss import (
    AdaptiveWingLoss,
    HeatmapJSLoss,
    HeatmapKLLoss,
    HeatmapMSELoss,
    HeatmapVarianceLoss,
    WingLoss,
)
from fastforest.nn.pool import LeafPool
from fastforest.nn.routing import SoftForest

__all__ = [
    "AdaptiveWingLoss",
    "GaussianForest",
    "GaussianMixture",
    "HeatmapDistribution",
    "HeatmapForest",
    "HeatmapJSLoss",
    "HeatmapKLLoss",
    "HeatmapMSELoss",
    "HeatmapVarianceLoss",
    "LabelDistribution",
    "LabelDistributionForest",
    "LeafPool",
    "PeakDecoder",
    "SoftArgmax2d",
    "SoftForest",
    "WingLoss",
    "group_landmarks",
]
