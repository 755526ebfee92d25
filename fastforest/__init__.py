"""Differentiable regression forests and heatmap heads for PyTorch, as fused CPU and CUDA operators.

>>> import fastforest as ff
>>> head = ff.nn.LeafPool(in_features=256, landmarks=68, leaves=512, size=(64, 64), sigma=2.0)
"""

from fastforest.ops.heatmap import Peak, peak, render_gaussian, soft_argmax
from fastforest.ops.pool import (
    PoolUpdate,
    pool_expectation,
    pool_heatmap,
    pool_kl_loss,
    pool_kl_statistics,
    pool_kl_update,
    pool_l2_loss,
    pool_l2_statistics,
    pool_l2_update,
    pool_peak,
)

__version__ = "0.1.0"
