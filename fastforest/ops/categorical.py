"""Label-distribution and dense heatmap leaves: mixtures, losses, bounding and least-squares leaf updates.

Shapes: N samples, T trees of L leaves, C classes or pixels. ``weight`` [N, T, L]: leaf probabilities as `route` gives
them, rows sum to 1. ``leaves`` [T, L, *C]: distributions over any trailing shape, heatmaps included. ``target`` [N, *C].
A tree predicts ``yhat = sum_l P_l q_l``; with ``forest=True`` the prediction is the mean over trees.

Everywhere: float32 or float64 inside (bfloat16 and float16 are computed in float32). A class where yhat is below
``eps`` counts with eps and has gradient 0. ``mask_threshold`` leaves out the classes whose target is at or below it.
A sample that holds NaN or infinity in its target, or a row of weights that does, has a loss of NaN, its own alone, and
adds nothing to statistics or to the gradient of the leaves. No [N, T, C] tensor is stored but the result of
`categorical_log_prob`. Deterministic: sums are taken in a fixed order. Nothing but an update waits for the GPU.
`torch.vmap` works; forward mode and second derivatives do not. KL goes with bounding, L2 with least squares.

Source: Shen et al., "Label distribution learning forests", NeurIPS 2017; Shen et al., "Deep differentiable random
forests for age estimation", TPAMI 2021, for the bounding; Kontschieder et al., ICCV 2015, for the forest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastforest.ops._checks import check_number, check_same, check_tensor, compute_dtype
from fastforest.ops._register import op, register
from fastforest.ops._solve import project_simplex, solve_least_squares

__all__ = [
    "LeafUpdate",
    "categorical_kl_loss",
    "categorical_l2_loss",
    "categorical_log_prob",
    "categorical_statistics",
    "categorical_update",
    "least_squares_statistics",
    "least_squares_update",
]

_KL, _L2 = 0, 1


class LeafUpdate(NamedTuple):
    """Result of a closed-form leaf update: the new leaves and the count of dead ones."""

    leaves: Tensor
    dead: int


def categorical_log_prob(weight: Tensor, leaves: Tensor, *, forest: bool = False, eps: float = 1e-12) -> Tensor:
    """``log max(yhat, eps)``, ``yhat_c = sum_l P_l q_lc``; with ``forest`` of the mean over trees.

    Args:
        weight: [N, T, L] leaf probabilities. Gradient.
        leaves: [T, L, *C], same dtype. Gradient.
        forest: the mean of the trees rather than each tree.
        eps: floor of yhat, at least 0; the gradient is 0 where it acts.

    Returns:
        [N, T, *C], or [N, *C] with ``forest``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or range, naming the argument.

    Cost: 2 N T L C flops; the backward pass 4 for each gradient.

    >>> weight, leaves = torch.rand(4, 2, 8).softmax(-1), torch.rand(2, 8, 5, 5)
    >>> categorical_log_prob(weight, leaves).shape, categorical_log_prob(weight, leaves, forest=True).shape
    (torch.Size([4, 2, 5, 5]), torch.Size([4, 5, 5]))
    """
    name = "categorical_log_prob"
    given, flat, scale, trailing = _mixture(name, weight, leaves, forest)
    out = op(name)(given, flat, scale, _floor(name, eps, given.dtype)).unflatten(-1, trailing)
    return out.squeeze(1) if forest else out


def categorical_kl_loss(
    weight: Tensor,
    leaves: Tensor,
    target: Tensor,
    *,
    forest: bool = False,
    eps: float = 1e-12,
    mask_threshold: float | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the target from the mixture, fused: ``R = sum_c y (log y - log max(yhat, eps))``.

    ``dR/dP_l = -sum_c (y / yhat) q_lc``; 0 log 0 = 0. One pass computes the loss and the gradient of the weights.

    Args:
        weight, leaves, forest, eps: as `categorical_log_prob`. Gradients.
        target: [N, *C], at least 0; labels, no gradient.
        mask_threshold: classes whose target is at or below it are left out; None: none.

    Returns:
        [N, T], or [N] with ``forest``, in nats.

    Raises:
        TypeError, ValueError: as `categorical_log_prob`.

    Cost: 2 N T L C flops, 4 with the gradient of the weights; as many again for that of the leaves. Memory [N, T, L].

    >>> weight, leaves = torch.rand(4, 2, 8).softmax(-1).requires_grad_(), torch.rand(2, 8, 5).softmax(-1)
    >>> loss = categorical_kl_loss(weight, leaves, torch.rand(4, 5).softmax(-1))
    >>> loss.mean().backward(); loss.shape, bool((loss >= 0).all())
    (torch.Size([4, 2]), True)
    """
    return _loss("categorical_kl_loss", _KL, weight, leaves, target, forest, eps, mask_threshold)


def categorical_l2_loss(
    weight: Tensor, leaves: Tensor, target: Tensor, *, forest: bool = False, mask_threshold: float | None = None
) -> Tensor:
    """Squared distance of the target from the mixture, fused: ``R = sum_c (y - yhat)^2``.

    Arguments, result and cost are those of `categorical_kl_loss`; the target may hold any finite numbers.
    """
    return _loss("categorical_l2_loss", _L2, weight, leaves, target, forest, 0.0, mask_threshold)


def categorical_statistics(
    weight: Tensor,
    leaves: Tensor,
    target: Tensor,
    *,
    forest: bool = False,
    eps: float = 1e-12,
    mask_threshold: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Bounding statistics of the leaves: ``stat_lc = q_lc sum_n P_nl y_nc / yhat_nc``, of the shape of the leaves.

    yhat is that of the leaf's tree; with ``forest`` that of the mean, and P counts 1 / T. Additive over batches and
    ranks while the leaves are fixed; `categorical_update` turns the sum into new leaves.

    Args:
        weight, leaves, target, forest, eps, mask_threshold: as `categorical_kl_loss`. No gradients.
        out: contiguous, the shape of the leaves, of the dtype computed in: added to in place and returned.

    Raises:
        TypeError, ValueError: as `categorical_log_prob`.

    Cost: 4 N T L C flops; memory at most 32 times the leaves where these are small.
    """
    name = "categorical_statistics"
    given, flat, y, scale, trailing = _targeted(name, weight, leaves, target, forest)
    args = (given.detach(), flat.detach(), y, scale, _floor(name, eps, given.dtype), _threshold(name, mask_threshold))
    if out is None:
        return op(name)(*args).unflatten(-1, trailing).view(leaves.shape)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: out must be a tensor, got {type(out).__name__}")
    check_same(name, "out", list(out.shape), list(leaves.shape), "the shape of leaves")
    check_same(name, "out's dtype", out.dtype, given.dtype, "the dtype computed in")
    check_same(name, "out's device", out.device, given.device, "the device of weight")
    if not out.is_contiguous():
        raise ValueError(f"{name}: out must be contiguous, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError(f"{name}: out must not require a gradient")
    op("categorical_statistics_")(*args, out.view(flat.shape))
    return out


def categorical_update(statistics: Tensor, leaves: Tensor) -> LeafUpdate:
    """One step of variational bounding: ``q'_lc = stat_lc / sum_c stat_lc``. Never increases the KL loss.

    A leaf whose statistics sum to 0 (or are not finite) is dead and stays as it is.

    Args:
        statistics: [T, L, *C] sum of `categorical_statistics`.
        leaves: the leaves they were taken with.

    Returns:
        LeafUpdate(leaves, dead): dead counts dead leaves; reading it waits for the device.

    >>> weight, leaves = torch.rand(9, 2, 4).softmax(-1), torch.rand(2, 4, 5).softmax(-1)
    >>> statistics = categorical_statistics(weight, leaves, torch.rand(9, 5).softmax(-1))
    >>> categorical_update(statistics, leaves).leaves.sum(-1).allclose(torch.ones(2, 4))
    True
    """
    name = "categorical_update"
    _leaves(name, "statistics", statistics)
    _leaves(name, "leaves", leaves)
    check_same(name, "statistics", list(statistics.shape), list(leaves.shape), "the shape of leaves")
    stat, kept = statistics.detach(), leaves.detach()
    mass = stat.flatten(2).sum(-1)
    alive = (mass > 0) & mass.isfinite()
    dead = alive.numel() - int(alive.sum())
    shape = (*mass.shape, *[1] * (leaves.dim() - 2))
    fresh = stat / mass.view(shape)
    if dead:
        fresh = torch.where(alive.view(shape), fresh, kept.to(fresh.dtype))
    return LeafUpdate(fresh.to(kept.dtype), dead)


def least_squares_statistics(weight: Tensor, target: Tensor, *, forest: bool = False) -> tuple[Tensor, Tensor]:
    """Least-squares statistics: ``gram = P^T P`` and ``cross = P^T Y`` of each tree, additive over batches and ranks.

    Args:
        weight: [N, T, L], target: [N, *C]. No gradients.
        forest: all trees at once, as K = T L leaves with weights P / T.

    Returns:
        gram [T, L, L] and cross [T, L, *C]; with ``forest`` [K, K] and [K, *C].

    Raises:
        TypeError, ValueError: as `categorical_log_prob`.

    Cost: 2 N T L (L + C) flops (``forest``: 2 N K (K + C)), PyTorch's matrix products.
    """
    name = "least_squares_statistics"
    check_tensor(name, "weight", weight, "[N, T, L]")
    y = _target(name, weight, target, None)
    p = weight.detach().to(compute_dtype(weight.dtype))
    with torch.autocast(p.device.type, enabled=False):
        if forest:
            p = p.flatten(1).unsqueeze(1) / max(p.shape[1], 1)
        sound = y.isfinite().all(-1, keepdim=True)
        p = torch.where((p.isfinite().all(-1) & sound).unsqueeze(-1), p, 0.0)
        by_tree = p.movedim(0, -1)  # [T, L, N]
        gram = by_tree @ by_tree.mT
        cross = by_tree.flatten(0, 1) @ torch.where(sound, y, 0.0)
        cross = cross.view(*by_tree.shape[:2], *target.shape[1:])
    return (gram[0], cross[0]) if forest else (gram, cross)


def least_squares_update(gram: Tensor, cross: Tensor, *, ridge: float = 1e-6, simplex: bool = True) -> LeafUpdate:
    """Least-squares leaves: ``Q = (P^T P + lambda I)^-1 P^T Y`` with ``lambda = ridge * mean(diag(gram))``.

    Cholesky in float64; where that fails (a singular gram at ridge 0) the minimum-norm solution. With ``simplex`` each
    leaf is projected on the probability simplex over its trailing dimensions (Euclidean).

    Args:
        gram: [T, L, L] and cross: [T, L, *C], or [K, K] and [K, *C]: sums of `least_squares_statistics`.
        ridge: at least 0.
        simplex: leaves stay distributions.

    Returns:
        LeafUpdate(leaves of the shape of cross, dead): dead counts leaves that no sample reached (a diagonal of 0).

    >>> gram, cross = least_squares_statistics(torch.rand(9, 2, 4).softmax(-1), torch.rand(9, 5).softmax(-1))
    >>> least_squares_update(gram, cross).leaves.shape
    torch.Size([2, 4, 5])
    """
    name = "least_squares_update"
    for label, given in (("gram", gram), ("cross", cross)):
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(f"{name}: {label} must be a floating tensor, got {_kind(given)}")
    if gram.dim() not in (2, 3) or cross.dim() < gram.dim():
        raise ValueError(
            f"{name}: gram and cross must be [T, L, L] and [T, L, *C] or [K, K] and [K, *C], got {list(gram.shape)} "
            f"and {list(cross.shape)}"
        )
    lead = list(cross.shape[: gram.dim() - 1])
    check_same(name, "gram", list(gram.shape), [*lead, lead[-1]], "the leaves of cross")
    check_same(name, "cross's device", cross.device, gram.device, "the device of gram")
    if not cross.numel() or not bool(gram.isfinite().all() & cross.isfinite().all()):
        raise ValueError(f"{name}: gram and cross must be finite and not empty, got {list(cross.shape)}")
    ridge = check_number(name, "ridge", ridge, least=0)
    grams, crosses = (
        gram.detach().reshape(-1, lead[-1], lead[-1]),
        cross.detach().reshape(-1, lead[-1], _width(cross, lead)),
    )
    solution = torch.stack([solve_least_squares(g, c, ridge) for g, c in zip(grams, crosses, strict=True)])
    if simplex:
        solution = project_simplex(solution)
    dead = int((gram.diagonal(dim1=-2, dim2=-1) <= 0).sum())
    return LeafUpdate(solution.reshape(cross.shape).to(cross.dtype), dead)


def _width(cross: Tensor, lead: list[int]) -> int:
    return cross.shape[len(lead) :].numel()


def _kind(value: object) -> str:
    return str(value.dtype)[6:] if isinstance(value, Tensor) else type(value).__name__


def _floor(name: str, eps: float, dtype: torch.dtype) -> float:
    """eps, but at least the least normal number: nothing is divided by 0."""
    return max(check_number(name, "eps", eps, least=0), torch.finfo(dtype).tiny)


def _threshold(name: str, value: float | None) -> float:
    return float("-inf") if value is None else check_number(name, "mask_threshold", value)


def _leaves(name: str, label: str, value: object, like: Tensor | None = None) -> Tensor:
    """[T, L, *C] with at least one trailing dimension, not empty."""
    if isinstance(value, Tensor) and value.dim() > 3:
        check_tensor(name, label, value.flatten(2), "[T, L, *C]", like=like)
    else:
        check_tensor(name, label, value, "[T, L, *C]", like=like)
    assert isinstance(value, Tensor)
    if not all(value.shape):
        raise ValueError(f"{name}: {label} must not be empty, got {list(value.shape)}")
    return value


def _mixture(name: str, weight: Tensor, leaves: Tensor, forest: bool) -> tuple[Tensor, Tensor, float, tuple[int, ...]]:
    """weight [N, T, L] and leaves [T, L, C] (forest: of one tree), the scale of the weights, and the trailing shape."""
    check_tensor(name, "weight", weight, "[N, T, L]")
    _leaves(name, "leaves", leaves, like=weight)
    check_same(name, "weight", list(weight.shape), [weight.shape[0], *leaves.shape[:2]], "[N, T, L] of leaves")
    dtype = compute_dtype(weight.dtype)
    check_same(name, "leaves' dtype", compute_dtype(leaves.dtype), dtype, "computed in the dtype of weight")
    given, flat, trees = weight.to(dtype), leaves.to(dtype).flatten(2), weight.shape[1]
    if forest:  # one tree of all leaves
        given, flat = given.flatten(1).unsqueeze(1), flat.flatten(0, 1).unsqueeze(0)
    return given, flat, 1 / trees if forest else 1.0, tuple(leaves.shape[2:])


def _target(name: str, weight: Tensor, target: Tensor, trailing: tuple[int, ...] | None) -> Tensor:
    """target [N, *C] as [N, C]."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be a tensor [N, *C], got {type(target).__name__}")
    if target.dim() < 2:
        raise ValueError(f"{name}: target must be [N, *C], got {list(target.shape)}")
    expected = [weight.shape[0], *(target.shape[1:] if trailing is None else trailing)]
    check_same(name, "target", list(target.shape), expected, "[N, *C] of weight and leaves")
    flat = target.flatten(1) if target.numel() else target.reshape(target.shape[0], target.shape[1:].numel())
    check_tensor(name, "target", flat, "[N, C]", like=weight)
    if target.requires_grad:
        raise ValueError(f"{name}: target must not require a gradient (none is defined)")
    dtype = compute_dtype(weight.dtype)
    check_same(name, "target's dtype", compute_dtype(target.dtype), dtype, "computed in the dtype of weight")
    return flat.to(dtype)


def _targeted(
    name: str, weight: Tensor, leaves: Tensor, target: Tensor, forest: bool
) -> tuple[Tensor, Tensor, Tensor, float, tuple[int, ...]]:
    given, flat, scale, trailing = _mixture(name, weight, leaves, forest)
    return given, flat, _target(name, weight, target, trailing), scale, trailing


def _loss(
    name: str,
    kind: int,
    weight: Tensor,
    leaves: Tensor,
    target: Tensor,
    forest: bool,
    eps: float,
    mask_threshold: float | None,
) -> Tensor:
    given, flat, y, scale, _ = _targeted(name, weight, leaves, target, forest)
    eps, threshold = _floor(name, eps, given.dtype), _threshold(name, mask_threshold)
    need_grad = torch.is_grad_enabled() and given.requires_grad
    loss = op("categorical_loss")(given, flat, y, kind, scale, eps, threshold, need_grad)[0]
    return loss.squeeze(1) if forest else loss


def _log_prob_fake(weight: Tensor, leaves: Tensor, scale: float, eps: float) -> Tensor:
    return weight.new_empty((*weight.shape[:2], leaves.shape[-1]))


def _log_prob_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, leaves, ctx.scale, ctx.eps = inputs
    ctx.save_for_backward(weight, leaves)


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, leaves = ctx.saved_tensors
    need = ctx.needs_input_grad[:2]
    grads = op("categorical_log_prob_backward")(grad, weight, leaves, ctx.scale, ctx.eps, *need)
    return grads[0] if need[0] else None, grads[1] if need[1] else None, None, None


def _log_prob_backward_fake(
    grad: Tensor, weight: Tensor, leaves: Tensor, scale: float, eps: float, need_weight: bool, need_leaves: bool
) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape if need_weight else (0, *weight.shape[1:])),
        weight.new_empty(leaves.shape if need_leaves else (0, *leaves.shape[1:])),
    )


def _loss_fake(
    weight: Tensor, leaves: Tensor, target: Tensor, kind: int, scale: float, eps: float, threshold: float, need: bool
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape[:2]), weight.new_empty((*weight.shape[:2], weight.shape[2] if need else 0))


class _Scaled(torch.autograd.Function):
    """unit * grad for a gradient that is kept as a graph: it cannot be differentiated, and says so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
        return unit * grad.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("categorical_loss cannot be differentiated twice")


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, leaves, target, *ctx.options, _ = inputs
    ctx.save_for_backward(weight, leaves, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    weight, leaves, target, unit = ctx.saved_tensors
    grad_weight = grad_leaves = None
    if grad is not None and ctx.needs_input_grad[0]:
        if unit.shape[-1] != weight.shape[-1]:  # a transform hid from the forward pass that weight is differentiated
            unit = op("categorical_loss")(weight, leaves, target, *ctx.options, True)[1]
        grad_weight = _Scaled.apply(weight, unit, grad) if torch.is_grad_enabled() else unit * grad.unsqueeze(-1)
    if grad is not None and ctx.needs_input_grad[1]:
        grad_leaves = op("categorical_loss_backward_leaves")(grad, weight, leaves, target, *ctx.options)
    return grad_weight, grad_leaves, None, None, None, None, None, None


register(
    "categorical_log_prob",
    fake=_log_prob_fake,
    save=_log_prob_save,
    backward=_log_prob_backward,
    batch=(0,),
    autocast=torch.float32,
)
register("categorical_log_prob_backward", fake=_log_prob_backward_fake, batch=())
register(
    "categorical_loss",
    fake=_loss_fake,
    save=_loss_save,
    backward=_loss_backward,
    batch=(0, 2),
    autocast=torch.float32,
)
register(
    "categorical_loss_backward_leaves", fake=lambda grad, weight, leaves, *_: leaves.new_empty(leaves.shape), batch=()
)
register(
    "categorical_statistics",
    fake=lambda weight, leaves, *_: leaves.new_empty(leaves.shape),
    batch=(),
    autocast=torch.float32,
)
register("categorical_statistics_", fake=lambda *_: None)
