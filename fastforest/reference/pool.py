"""A shared pool of heatmap leaves, in plain PyTorch: the specification of `fastforest.ops.pool`.

Dense and slow, any dtype, differentiable. Shapes: prob [B, P, N], pool [H, W, N], points [B, P, 2] (x, y) in pixels.
Rows (b, p) with weight 0, and windows that miss the canvas, count 0; rows with NaN count NaN in losses and are left out
of statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def axis_target(centre: Tensor, sigma: float, truncate: float, size: int) -> tuple[Tensor, Tensor]:
    """Truncated Gaussian along one axis, over the whole axis: (values [..., size] summing to 1, inside [..., size])."""
    radius = math.ceil(truncate * sigma)
    h = torch.arange(size, dtype=centre.dtype, device=centre.device)
    inside = (h - centre.round().unsqueeze(-1)).abs() <= radius
    log_value = -((h - centre.unsqueeze(-1)) ** 2) / (2 * sigma**2)
    shifted = torch.where(inside, log_value, -torch.inf)
    top = shifted.amax(-1, keepdim=True)
    value = (shifted - torch.where(top > -torch.inf, top, 0.0)).exp()
    total = value.sum(-1, keepdim=True)
    return value / torch.where(total > 0, total, 1.0), inside


def window_target(points: Tensor, sigma: float, truncate: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Target heatmaps y [B, P, H, W] (a Gaussian cut at the window, renormalised on the canvas) and the windows."""
    height, width = size
    gx, in_x = axis_target(points[..., 0], sigma, truncate, width)
    gy, in_y = axis_target(points[..., 1], sigma, truncate, height)
    inside = in_y.unsqueeze(-1) & in_x.unsqueeze(-2)
    return torch.where(inside, gy.unsqueeze(-1) * gx.unsqueeze(-2), 0.0), inside


def _visible(points: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Points and weights with hidden rows (weight 0) put at a harmless place."""
    if weight is None:
        return points, torch.ones_like(points[..., 0])
    return torch.where((weight == 0).unsqueeze(-1), torch.zeros_like(points), points), weight


def pool_heatmap(prob: Tensor, pool: Tensor) -> Tensor:
    """yhat(h) = sum_n p_n q(h, n), [B, P, H, W]."""
    return torch.einsum("bpn,hwn->bphw", prob, pool)


def pool_kl_loss(
    prob: Tensor,
    pool: Tensor,
    points: Tensor,
    sigma: float,
    *,
    truncate: float = 3.0,
    weight: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """w * sum_{h in W} y (log y - log max(yhat, eps)), [B, P]."""
    points, weight = _visible(points, weight)
    target, inside = window_target(points, sigma, truncate, (pool.shape[0], pool.shape[1]))
    yhat = pool_heatmap(prob, pool)
    yhat = yhat + (yhat - yhat)  # an infinite mixture is NaN
    floored = torch.where(yhat < eps, torch.full_like(yhat, eps), yhat)
    terms = torch.special.xlogy(target, target) - target * torch.where(inside, floored, 1.0).log()
    loss = torch.where(inside, terms, 0.0).sum((-2, -1))
    loss = torch.where(points.isfinite().all(-1), loss, torch.nan)
    return torch.where(weight == 0, torch.zeros_like(loss), weight * loss)


def pool_kl_statistics(
    prob: Tensor,
    pool: Tensor,
    points: Tensor,
    sigma: float,
    *,
    truncate: float = 3.0,
    weight: Tensor | None = None,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """stat(h, n) = q(h, n) sum_{b, p: h in W} w p_n y / yhat, [H, W, N] (variational bounding); 0 where yhat < eps."""
    points, weight = _visible(points, weight)
    target, inside = window_target(points, sigma, truncate, (pool.shape[0], pool.shape[1]))
    yhat = pool_heatmap(prob, pool)
    seen = inside & (yhat >= eps) & yhat.isfinite() & points.isfinite().all(-1)[..., None, None]
    ratio = torch.where(seen, target / torch.where(seen, yhat, 1.0), 0.0) * weight[..., None, None]
    row_ok = prob.isfinite().all(-1, keepdim=True)
    share = torch.einsum("bphw,bpn->hwn", ratio * row_ok.unsqueeze(-1), torch.where(row_ok, prob, 0.0))
    stat = pool * share
    return stat if out is None else out.add_(stat)


def pool_l2_loss(
    prob: Tensor,
    pool: Tensor,
    points: Tensor,
    sigma: float,
    *,
    truncate: float = 3.0,
    weight: Tensor | None = None,
    gram: Tensor | None = None,
) -> Tensor:
    """w * sum_h (y - yhat)^2 over the whole canvas, [B, P]; a window that misses the canvas counts 0."""
    points, weight = _visible(points, weight)
    target, inside = window_target(points, sigma, truncate, (pool.shape[0], pool.shape[1]))
    loss = ((target - pool_heatmap(prob, pool)) ** 2).sum((-2, -1))
    loss = loss + (loss - loss)  # an infinite row is NaN
    finite = points.isfinite().all(-1)
    loss = torch.where(inside.flatten(-2).any(-1) | ~finite, loss, torch.zeros_like(loss))
    loss = torch.where(finite, loss, torch.nan)
    return torch.where(weight == 0, torch.zeros_like(loss), weight * loss)


def pool_l2_statistics(
    prob: Tensor,
    points: Tensor,
    sigma: float,
    size: tuple[int, int],
    *,
    truncate: float = 3.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gram [N, N] = sum w p^T p and cross [H, W, N] = sum w y p over the rows whose windows meet the canvas."""
    points, weight = _visible(points, weight)
    target, inside = window_target(points, sigma, truncate, size)
    seen = inside.flatten(-2).any(-1) & points.isfinite().all(-1) & prob.isfinite().all(-1)
    w = torch.where(seen, weight, 0.0)
    p = torch.where(seen.unsqueeze(-1), prob, 0.0)
    target = torch.where(seen[..., None, None], target, 0.0)
    gram = torch.einsum("bp,bpn,bpm->nm", w, p, p)
    cross = torch.einsum("bp,bphw,bpn->hwn", w, target, p)
    return gram, cross


def pool_expectation(prob: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """E = sum_h h yhat(h) in (x, y), [B, P, 2], and covariance sum_h yhat(h) (h - E)(h - E)^T, [B, P, 2, 2]."""
    height, width, _ = pool.shape
    y, x = torch.meshgrid(
        torch.arange(height, dtype=pool.dtype, device=pool.device),
        torch.arange(width, dtype=pool.dtype, device=pool.device),
        indexing="ij",
    )
    grid = torch.stack([x, y], -1)
    yhat = pool_heatmap(prob, pool)
    mean = torch.einsum("bphw,hwd->bpd", yhat, grid)
    d = grid - mean[..., None, None, :]
    return mean, torch.einsum("bphw,bphwd,bphwe->bpde", yhat, d, d)


def pool_peak(prob: Tensor, pool: Tensor, refine: str = "none") -> tuple[Tensor, Tensor]:
    """Peak of the mixture heatmap, with `fastforest.reference.heatmap.peak`'s refinements."""
    from fastforest.reference.heatmap import peak

    return peak(pool_heatmap(prob, pool), refine)


def pool_kl_update(statistics: Tensor, pool: Tensor, *, min_mass: float = 0.0) -> tuple[Tensor, int]:
    """q' = stat / sum_h stat. A leaf with mass not above min_mass is dead and is reseeded.

    The k-th dead leaf (in order of its index) becomes a copy of the k-th heaviest living leaf, wrapping round; if no
    leaf lives, the pool is kept.
    """
    mass = statistics.sum((0, 1))
    alive = mass > min_mass
    fresh = torch.where(alive, statistics / torch.where(alive, mass, 1.0), 0.0)
    dead = int((~alive).sum())
    if dead == alive.numel():
        return pool.clone(), dead
    heavy = torch.argsort(torch.where(alive, mass, -torch.inf), descending=True, stable=True)[: alive.numel() - dead]
    fresh[..., ~alive] = fresh[..., heavy[torch.arange(dead) % len(heavy)]]
    return fresh, dead


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of each row on the simplex (sort-based, Held, Wolfe and Crowder 1974)."""
    u = v.sort(-1, descending=True).values
    total = u.cumsum(-1) - 1
    k = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    count = (u - total / k > 0).sum(-1, keepdim=True)
    theta = total.gather(-1, count - 1) / count
    return (v - theta).clamp_min(0)


def pool_l2_update(gram: Tensor, cross: Tensor, *, ridge: float = 1e-6, simplex: bool = True) -> tuple[Tensor, int]:
    """Q = (P^T P + lambda I)^-1 P^T Y, lambda = ridge * mean diagonal; minimum norm where singular; leaves on the simplex.

    dead counts the leaves that no row selects (zero diagonal of the gram).
    """
    height, width, leaves = cross.shape
    scale = gram.diagonal().mean()
    system = gram + ridge * scale * torch.eye(leaves, dtype=gram.dtype, device=gram.device)
    q = torch.linalg.lstsq(system, cross.reshape(-1, leaves).T, driver="gelsd").solution
    if simplex:
        q = project_simplex(q)
    return q.T.reshape(height, width, leaves), int((gram.diagonal() <= 0).sum())
