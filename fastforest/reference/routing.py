"""Routing in plain PyTorch: the specification of `fastforest.ops.routing`. Node by node, any dtype, differentiable.

Shapes: units [N, F], phi [T, 2^D - 1], leaves [N, T, 2^D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def route(units: Tensor, phi: Tensor, steepness: float | Tensor = 1.0, *, log: bool = False) -> Tensor:
    """P_l = prod over the path of d (left) or 1 - d (right), d = sigmoid(s f_phi(n)); log: the sum of their logs.

    Nodes breadth-first, children 2n+1 (left) and 2n+2 (right); leaves left to right.
    """
    x = steepness * units[:, phi]
    left, right = (logsigmoid(x), logsigmoid(-x)) if log else (torch.sigmoid(x), torch.sigmoid(-x))
    nodes = phi.shape[1]
    reach = [torch.zeros_like(x[..., 0]) if log else torch.ones_like(x[..., 0])]
    for n in range(nodes):
        for d in (left[..., n], right[..., n]):
            reach.append(reach[n] + d if log else reach[n] * d)
    return torch.stack(reach[nodes:], -1)
