"""Categorical leaves in plain PyTorch: the specification of `fastforest.ops.categorical`.

Dense and slow, any dtype, differentiable. Shapes: weight [N, T, L], leaves [T, L, *C], target [N, *C].
"""

from __future__ import annotations

import torch
from torch import Tensor


def categorical_mixture(weight: Tensor, leaves: Tensor, *, forest: bool = False) -> Tensor:
    """yhat = sum_l P_l q_l of each tree [N, T, *C], or the mean over trees [N, *C]; an infinite one is NaN."""
    yhat = torch.einsum("ntl,tlc->ntc", weight, leaves.flatten(2)).unflatten(-1, leaves.shape[2:])
    yhat = yhat.mean(1) if forest else yhat
    return yhat + (yhat - yhat)


def _floored(yhat: Tensor, eps: float) -> Tensor:
    return torch.where(yhat < eps, torch.full_like(yhat, eps), yhat)


def _target(target: Tensor, yhat: Tensor, mask_threshold: float | None) -> tuple[Tensor, Tensor]:
    """The target beside yhat, and the classes that count."""
    target = (target + (target - target)).reshape(
        *target.shape[:1], *[1] * (yhat.dim() - target.dim()), *target.shape[1:]
    )
    left_out = torch.zeros_like(target, dtype=torch.bool) if mask_threshold is None else target <= mask_threshold
    return target, ~left_out


def categorical_log_prob(weight: Tensor, leaves: Tensor, *, forest: bool = False, eps: float = 1e-12) -> Tensor:
    """log max(yhat, eps)."""
    return _floored(categorical_mixture(weight, leaves, forest=forest), eps).log()


def categorical_kl_loss(
    weight: Tensor,
    leaves: Tensor,
    target: Tensor,
    *,
    forest: bool = False,
    eps: float = 1e-12,
    mask_threshold: float | None = None,
) -> Tensor:
    """sum_c y (log y - log max(yhat, eps)) over the classes that count, [N, T] or [N]; 0 log 0 = 0."""
    yhat = categorical_mixture(weight, leaves, forest=forest)
    y, counts = _target(target, yhat, mask_threshold)
    y = torch.where(counts, y, 0.0)
    terms = torch.special.xlogy(y, y) - y * _floored(yhat, eps).log()
    return terms.flatten(1 if forest else 2).sum(-1)


def categorical_l2_loss(
    weight: Tensor, leaves: Tensor, target: Tensor, *, forest: bool = False, mask_threshold: float | None = None
) -> Tensor:
    """sum_c (y - yhat)^2 over the classes that count, [N, T] or [N]."""
    yhat = categorical_mixture(weight, leaves, forest=forest)
    y, counts = _target(target, yhat, mask_threshold)
    return torch.where(counts, y - yhat, yhat - yhat).square().flatten(1 if forest else 2).sum(-1)


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
    """stat_lc = q_lc sum_n P_nl y_nc / yhat_nc (forest: P / T, yhat of the mean); 0 where yhat < eps."""
    yhat = categorical_mixture(weight, leaves, forest=forest)
    y, counts = _target(target, yhat, mask_threshold)
    seen = counts & (yhat >= eps)
    ratio = torch.where(seen, y / torch.where(seen, yhat, 1.0), 0.0).flatten(1 if forest else 2)
    ratio = (ratio / weight.shape[1]).unsqueeze(1).expand(-1, weight.shape[1], -1) if forest else ratio
    broken = ~weight.isfinite().all(-1)
    broken = broken.any(-1, keepdim=True).expand_as(broken) if forest else broken
    broken = (broken | ~target.flatten(1).isfinite().all(-1, keepdim=True)).unsqueeze(-1)
    share = torch.einsum("ntl,ntc->tlc", torch.where(broken, 0.0, weight), torch.where(broken, 0.0, ratio))
    stat = leaves * share.unflatten(-1, leaves.shape[2:])
    return stat if out is None else out.add_(stat)


def categorical_update(statistics: Tensor, leaves: Tensor) -> tuple[Tensor, int]:
    """q' = stat / sum_c stat; a leaf without statistics is dead and stays."""
    mass = statistics.flatten(2).sum(-1)
    dead = ~((mass > 0) & mass.isfinite())
    shape = (*mass.shape, *[1] * (leaves.dim() - 2))
    fresh = statistics / torch.where(dead, 1.0, mass).view(shape)
    return torch.where(dead.view(shape), leaves, fresh), int(dead.sum())


def least_squares_statistics(weight: Tensor, target: Tensor, *, forest: bool = False) -> tuple[Tensor, Tensor]:
    """gram = P^T P and cross = P^T Y of each tree, or of all leaves with weights P / T."""
    if forest:
        weight = weight.flatten(1).unsqueeze(1) / weight.shape[1]
    y = target.flatten(1)
    broken = ~weight.isfinite().all(-1) | ~y.isfinite().all(-1, keepdim=True)
    p = torch.where(broken.unsqueeze(-1), 0.0, weight)
    y = torch.where(y.isfinite().all(-1, keepdim=True), y, 0.0)
    gram = torch.einsum("ntl,ntk->tlk", p, p)
    cross = torch.einsum("ntl,nc->tlc", p, y).unflatten(-1, target.shape[1:])
    return (gram[0], cross[0]) if forest else (gram, cross)


def least_squares_update(
    gram: Tensor, cross: Tensor, *, ridge: float = 1e-6, simplex: bool = True
) -> tuple[Tensor, int]:
    """Q = (gram + ridge mean(diag) I)^-1 cross, minimum norm where singular; rows on the simplex."""
    from fastforest.reference.pool import project_simplex

    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    system = gram + ridge * scale * torch.eye(size, dtype=gram.dtype, device=gram.device)
    right = cross.flatten(gram.dim() - 1)
    q = torch.linalg.lstsq(system, right, driver="gelsd").solution
    if simplex:
        q = project_simplex(q)
    return q.reshape(cross.shape), int((gram.diagonal(dim1=-2, dim2=-1) <= 0).sum())
