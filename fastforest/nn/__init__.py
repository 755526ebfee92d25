"""Layers: `torch.nn.Module`s over the operators of `fastforest.ops`."""

from fastforest.nn.pool import LeafPool

__all__ = ["LeafPool"]
