"""Layers: `torch.nn.Module`s over the operators of `fastforest.ops`."""

from fastforest.nn.gaussian import GaussianForest, GaussianMixture
from fastforest.nn.pool import LeafPool
from fastforest.nn.routing import SoftForest

__all__ = ["GaussianForest", "GaussianMixture", "LeafPool", "SoftForest"]
