"""Routing through soft trees: from units to leaf probabilities.

N samples, F units, T trees of depth D with 2^D leaves each. Computed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastforest.ops._checks import check_number, check_same, check_tensor, compute_dtype
from fastforest.ops._register import op, register

__all__ = ["draw_phi", "route"]

MOST_DEPTH = 16


def route(units: Tensor, phi: Tensor, steepness: float | Tensor = 1.0, *, log: bool = False) -> Tensor:
    """Probability of every leaf of soft trees: P_l = product over the path of d_n (left) or 1 - d_n (right).

    d_n = sigmoid(s f_phi(n)). Nodes are numbered breadth-first, the children of n are 2n + 1 (left) and 2n + 2
    (right); leaves left to right.

    Args:
        units: f, [N, F]; any value: an infinite unit makes a hard split.
        phi: [T, 2^D - 1], int64 or int32: the unit that each node reads, 0 to F - 1; nodes and trees may share units.
            Its width sets the depth D, 1 to 16.
        steepness: s, a finite number above 0, or a floating tensor of one element on the same device (not looked at,
            so that annealing it costs neither a recompilation nor a synchronisation).
        log: return log P_l instead, summed in log space from log sigmoid(+-s f): no underflow at any depth.

    Returns:
        [N, T, 2^D], float32, or float64 for float64. Rows sum to 1 (their exponentials, with log). A NaN unit makes
        NaN of the leaves below the nodes that read it, in its own sample. On CUDA, so does a phi out of range.

    Gradients flow to ``units`` and to a tensor ``steepness``. With V_v the mean of dR/dP_l under v weighted by P_l / P_v,
    dR/df_u = s sum over the nodes of u of P_n d_n (1 - d_n) (V_left - V_right); with log, A_v the sum of dR/dlog P_l
    under v, s sum of (1 - d_n) A_left - d_n A_right. Split probabilities are not stored: the backward computes them
    again and reads the incoming gradient once. Not differentiable twice.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range; on the CPU, a phi out of
            range.

    Deterministic, bit by bit, gradients too; no synchronisation, CUDA-graph safe. Cost: one write of the leaves; F
    exponentials a sample.

    >>> units = torch.tensor([[0.0, 1.0, -2.0]])
    >>> route(units, torch.tensor([[0, 1, 2]]))
    tensor([[[0.3655, 0.1345, 0.0596, 0.4404]]])
    >>> route(units, torch.tensor([[0]]), log=True)
    tensor([[[-0.6931, -0.6931]]])
    """
    name = "route"
    check_tensor(name, "units", units, "[N, F]")
    _check_phi(name, phi, units)
    scale: Tensor | None = None
    if isinstance(steepness, Tensor):
        if not steepness.is_floating_point():
            raise TypeError(f"{name}: steepness must be a number or a floating tensor, got {str(steepness.dtype)[6:]}")
        check_same(name, "steepness's device", steepness.device, units.device, "as units")
        if steepness.numel() != 1:
            raise ValueError(
                f"{name}: steepness must be a number or a tensor of one element, got {list(steepness.shape)}"
            )
        scale, factor = steepness.to(compute_dtype(units.dtype)), 1.0
    else:
        factor = check_number(name, "steepness", steepness, above=0)
    return op("routing_route")(units.to(compute_dtype(units.dtype)), phi, scale, factor, bool(log))


def draw_phi(units: int, trees: int, depth: int, seed: int = 0) -> Tensor:
    """A random phi for `route`: each tree's nodes draw units without replacement while they last, then anew.

    Args:
        units: F, at least 1.
        trees: T, at least 1.
        depth: D, 1 to 16.
        seed: the same seed draws the same phi.

    Returns:
        [T, 2^D - 1] int64, on the CPU; within a tree the uses of any two units differ by at most one.

    Raises:
        TypeError, ValueError: an argument that is not an int, or out of range.

    >>> draw_phi(units=3, trees=2, depth=2).sort().values
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    for word, value, least in (("units", units, 1), ("trees", trees, 1), ("depth", depth, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"draw_phi: {word} must be an int, got {type(value).__name__}")
        check_number("draw_phi", word, value, least=least)
    if depth > MOST_DEPTH:
        raise ValueError(f"draw_phi: depth must be at most {MOST_DEPTH}, got {depth}")
    generator = torch.Generator().manual_seed(seed)
    nodes = 2**depth - 1
    rounds = -(-nodes // units)
    return torch.stack(
        [torch.cat([torch.randperm(units, generator=generator) for _ in range(rounds)])[:nodes] for _ in range(trees)]
    )


def _check_phi(name: str, phi: object, units: Tensor) -> None:
    if not isinstance(phi, Tensor):
        raise TypeError(f"{name}: phi must be a tensor [T, 2^D - 1], got {type(phi).__name__}")
    if phi.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: phi must be int64 or int32, got {str(phi.dtype)[6:]}")
    if phi.dim() != 2 or phi.shape[1] + 1 not in [2**depth for depth in range(1, MOST_DEPTH + 1)]:
        raise ValueError(
            f"{name}: phi must be [T, 2^D - 1] with a depth D from 1 to {MOST_DEPTH}, got {list(phi.shape)}"
        )
    check_same(name, "phi's device", phi.device, units.device, "as units")
    # The library checks again, while tracing and under vmap too, where there are no values to look at here.
    looked_at = (
        phi.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(phi)
    )
    if looked_at and phi.numel():
        low, high = (int(v) for v in torch.aminmax(phi))
        if low < 0 or high >= units.shape[1]:
            bad = low if low < 0 else high
            raise ValueError(f"{name}: phi must be from 0 to {units.shape[1] - 1} (F - 1), got {bad}")


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    units, phi, scale, *ctx.options = inputs
    ctx.save_for_backward(units, phi, scale)


def _backward(ctx: Any, grad: Tensor) -> Any:
    units, phi, scale = ctx.saved_tensors
    grad_units = op("routing_route_backward")(grad, units, phi, scale, *ctx.options)
    grad_scale = None
    if scale is not None and ctx.needs_input_grad[2]:
        # R depends on s f alone: s dR/ds = sum f dR/df. A hard split (an infinite unit) has no part in it.
        parts = torch.where(grad_units == 0, 0.0, grad_units * units)
        grad_scale = (parts.sum() / scale.reshape(())).reshape(scale.shape)
    return grad_units, None, grad_scale, None, None


register(
    "routing_route",
    fake=lambda units, phi, *_: units.new_empty(units.shape[0], phi.shape[0], phi.shape[1] + 1),
    save=_save,
    backward=_backward,
    batch=(0,),
    autocast=torch.float32,
)
register(
    "routing_route_backward",
    fake=lambda grad, units, *_: torch.empty_like(units, memory_format=torch.contiguous_format),
    batch=(0, 1),
)
