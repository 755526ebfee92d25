"""Differentiable regression forests and heatmap heads for PyTorch, as fused CPU and CUDA operators.

Operators stand here (`ff.pool_kl_loss`), layers in `ff.nn`, `ff.Aligner` finds landmarks with a trained model;
`fastforest.data`, `metrics`, `evaluation`, `models` and `training` are imported by name.

>>> import torch
>>> import fastforest as ff
>>> head = ff.nn.LeafPool(in_features=256, landmarks=68, leaves=64, size=(32, 32), sigma=2.0)
>>> head(torch.rand(4, 256)).shape
torch.Size([4, 68, 2])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastforest import nn
from fastforest.ops.categorical import *
from fastforest.ops.gaussian import *
from fastforest.ops.heatmap import *
from fastforest.ops.heatmap_loss import *
from fastforest.ops.pool import *
from fastforest.ops.routing import *

if TYPE_CHECKING:
    from fastforest.aligner import Aligner

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Aligner, when it is first asked for: operators and layers need neither images nor pictures."""
    if name == "Aligner":
        from fastforest.aligner import Aligner

        return Aligner
    raise AttributeError(f"module 'fastforest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "Aligner"} - {"TYPE_CHECKING", "annotations"})
