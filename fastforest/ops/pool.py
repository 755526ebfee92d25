"""A shared pool of heatmap leaves with windowed targets: losses, leaf statistics, decoding.

Shapes: B images, P landmarks, H x W canvas, N leaves. ``pool`` [H, W, N]: leaf n is a distribution over the canvas.
``prob`` [B, P, N]: selection, rows sum to 1. ``points`` [B, P, 2]: (x, y) in canvas pixels, pixel centres at integers.
A landmark's heatmap is ``yhat(h) = sum_n p_n q(h, n)``; it is never stored. Its target ``y`` is a Gaussian of standard
deviation ``sigma`` pixels on the window ``|h - round(c)| <= ceil(truncate * sigma)`` clipped to the canvas (round half to
even), renormalised to 1. Work is proportional to the window, not to the canvas.

Everywhere: float32 or float64 inside (bfloat16 and float16 are computed in float32); a window that misses the canvas
counts 0; ``weight`` [B, P] multiplies its row, and weight 0 hides the row whatever it holds. Deterministic: sums are
taken in a fixed order. Nothing but an update waits for the GPU; CUDA graphs can capture the rest. `torch.vmap` works;
of the other transforms, forward mode and second derivatives do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastforest.ops._checks import check_choice, check_number, check_same, check_size, check_tensor, compute_dtype
from fastforest.ops._register import op, register
from fastforest.ops._solve import project_simplex, solve_least_squares

__all__ = [
    "PoolUpdate",
    "pool_expectation",
    "pool_heatmap",
    "pool_kl_loss",
    "pool_kl_statistics",
    "pool_kl_update",
    "pool_l2_loss",
    "pool_l2_statistics",
    "pool_l2_update",
    "pool_peak",
]

P = ParamSpec("P")
R = TypeVar("R")
_REFINE = ("none", "quarter_sign", "quarter_second")


class PoolUpdate(NamedTuple):
    """Result of a closed-form leaf update: the new pool [H, W, N] and the count of dead leaves."""

    pool: Tensor
    dead: int


def _full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast would run the matrix products between the kernels in low precision."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        with torch.autocast("cpu" if tensor is None else tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


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
    """Kullback-Leibler divergence of each landmark's target from its mixture of leaves, exact.

    ``R = w sum_{h in W} y (log y - log max(yhat, eps))``;  ``dR/dp_n = -w sum_{h in W} (y / yhat) q(h, n)``, 0 where eps
    floors yhat. One pass computes both; a backward pass only multiplies.

    Args:
        prob: [B, P, N] selection. Gradient.
        pool: [H, W, N] leaves, same dtype. Gradient when it requires one.
        points: [B, P, 2] (x, y) in canvas pixels; labels, no gradient.
        sigma: standard deviation of the target in pixels, above 0.
        truncate: window radius in sigmas, at least 0.
        weight: [B, P] or None; no gradient.
        eps: floor of yhat, at least 0.

    Returns:
        [B, P] loss in nats. A row with NaN or infinite points or prob is NaN, and only that row.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or range, naming the argument.

    Cost: 4 (2 ceil(truncate sigma) + 1)^2 N flops a landmark with gradient, at any canvas size; memory [B, P, N].
    Source: Shen et al., "Label distribution learning forests", NeurIPS 2017, for the loss.

    >>> pool = torch.rand(16, 16, 8); pool /= pool.sum((0, 1))
    >>> prob = torch.softmax(torch.randn(2, 3, 8), -1).requires_grad_()
    >>> loss = pool_kl_loss(prob, pool, torch.rand(2, 3, 2) * 15, sigma=1.5)
    >>> loss.mean().backward(); loss.shape, prob.grad.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 8]))
    """
    prob, pool, points, weight, radius = _windowed("pool_kl_loss", prob, pool, points, sigma, truncate, weight)
    eps = _floor("pool_kl_loss", eps, prob.dtype)
    need_grad = torch.is_grad_enabled() and prob.requires_grad
    return op("pool_kl_loss")(prob, pool, points, weight, float(sigma), radius, eps, need_grad)[0]


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
    """Bounding statistics of the leaves: ``stat(h, n) = q(h, n) sum_{b, p: h in W} w p_n y / yhat``, [H, W, N].

    Additive over batches and ranks while the pool is fixed; `pool_kl_update` turns the sum into the new pool. A row that
    holds NaN or infinity (its weight included), and a pixel where yhat is below eps, contribute nothing.

    Args:
        prob, pool, points, sigma, truncate, weight, eps: as `pool_kl_loss`. No gradients.
        out: [H, W, N] contiguous, of the dtype computed in: added to in place and returned; only pixels inside a window
            are touched. None: a new tensor is returned.

    Raises:
        TypeError, ValueError: as `pool_kl_loss`.

    Cost: as `pool_kl_loss` with gradient, plus writing the canvas once when ``out`` is None.
    """
    name = "pool_kl_statistics"
    prob, pool, points, weight, radius = _windowed(name, prob, pool, points, sigma, truncate, weight)
    eps = _floor(name, eps, prob.dtype)
    args = (prob.detach(), pool.detach(), points, weight, float(sigma), radius, eps)
    if out is None:
        return op("pool_kl_statistics")(*args)
    check_tensor(name, "out", out, "[H, W, N]", like=prob)
    check_same(name, "out", list(out.shape), list(pool.shape), "the shape of pool")
    check_same(name, "out's dtype", out.dtype, prob.dtype, "the dtype computed in")
    if not out.is_contiguous():
        raise ValueError(f"{name}: out must be contiguous, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError(f"{name}: out must not require a gradient")
    op("pool_kl_statistics_")(*args, out)
    return out


def pool_kl_update(statistics: Tensor, pool: Tensor, *, min_mass: float = 0.0) -> PoolUpdate:
    """One step of variational bounding: ``q'(h, n) = stat(h, n) / sum_h stat(h, n)``. Never increases the KL loss.

    A leaf whose mass ``sum_h stat`` is not above ``min_mass`` (or is not finite) is dead. The k-th dead leaf, by index,
    becomes a copy of the k-th heaviest living one, wrapping round: it starts where the selection has most to tell apart.
    If none lives the pool is kept.

    Args:
        statistics: [H, W, N] sum of `pool_kl_statistics`.
        pool: [H, W, N] the pool they were taken with.
        min_mass: at least 0, in units of landmarks.

    Returns:
        PoolUpdate(pool, dead): dead counts dead leaves; reading it waits for the device.
    """
    name = "pool_kl_update"
    check_tensor(name, "statistics", statistics, "[H, W, N]")
    check_tensor(name, "pool", pool, "[H, W, N]", like=statistics)
    check_same(name, "pool", list(pool.shape), list(statistics.shape), "the shape of statistics")
    min_mass = check_number(name, "min_mass", min_mass, least=0)
    mass = statistics.detach().sum((0, 1))
    alive = (mass > min_mass) & mass.isfinite()
    dead = int((~alive).sum())
    if dead == alive.numel():
        return PoolUpdate(pool.detach().clone(), dead)
    fresh = statistics.detach() / mass
    if dead:
        heavy = torch.where(alive, mass, -1.0).argsort(descending=True, stable=True)[: alive.numel() - dead]
        fresh[..., ~alive] = fresh[..., heavy[torch.arange(dead, device=heavy.device) % len(heavy)]]
    return PoolUpdate(fresh.to(pool.dtype), dead)


@_full_precision
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
    """Squared distance of each landmark's mixture from its target over the whole canvas, exact, no heatmap.

    ``R = w sum_h (y - yhat)^2 = w (sum y^2 - 2 p.t + p G p^T)`` with ``t_n = sum_{h in W} y q(h, n)``, ``G = q^T q``;
    ``dR/dp = 2 w (p G - t)``.

    Args:
        prob, pool, points, sigma, truncate, weight: as `pool_kl_loss`. Gradients to prob, and to pool when it requires
            one.
        gram: [N, N] = q^T q of this pool, to compute it once for many batches; None computes it (2 H W N^2 flops).

    Returns:
        [B, P] loss. A row with NaN is NaN, and only that row.

    Raises:
        TypeError, ValueError: as `pool_kl_loss`.

    Cost: 2 K^2 N (K the window's width) + 2 N^2 flops a landmark; the difference of near-equal numbers, so the
    absolute error is about 1e-7 sum y^2 in float32.
    """
    name = "pool_l2_loss"
    prob, pool, points, weight, radius = _windowed(name, prob, pool, points, sigma, truncate, weight)
    if gram is None:
        flat = pool.flatten(0, 1)
        gram = flat.T @ flat
    else:
        check_tensor(name, "gram", gram, "[N, N]", like=prob)
        check_same(name, "gram", list(gram.shape), [pool.shape[-1]] * 2, "[N, N] of pool")
        gram = gram.to(prob.dtype)
    target, square = op("pool_l2_target")(pool, points, weight, float(sigma), radius)
    seen = square != 0
    selected = torch.where(seen.unsqueeze(-1), prob, 0.0)
    loss = square + (selected * (selected @ gram - 2 * target)).sum(-1)
    if weight is not None:
        loss = loss * torch.where(seen, weight, 0.0)
    return loss + (loss - loss)  # an infinite row is NaN


@_full_precision
def pool_l2_statistics(
    prob: Tensor,
    points: Tensor,
    sigma: float,
    size: tuple[int, int],
    *,
    truncate: float = 3.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Least-squares statistics: ``gram = sum w p^T p`` [N, N] and ``cross = sum w y p`` [H, W, N].

    Additive over batches and ranks. Rows that hold NaN or infinity, or whose window misses the canvas, contribute
    nothing. ``size`` is (H, W); the other arguments are those of `pool_kl_loss`.

    Cost: 2 R N^2 + 2 R K^2 N flops for R = B P rows, and writing the canvas once.
    """
    name = "pool_l2_statistics"
    height, width = check_size(name, size)
    prob, points, weight, radius = _rows(name, prob, points, sigma, truncate, weight)
    prob = prob.detach()
    x, y = points.round().unbind(-1)
    seen = (x >= -radius) & (x <= width - 1 + radius) & (y >= -radius) & (y <= height - 1 + radius)
    seen = seen & prob.sum(-1).isfinite()
    keep = seen.to(prob.dtype) if weight is None else torch.where(seen & weight.isfinite(), weight, 0.0)
    shown = torch.where((keep != 0).unsqueeze(-1), prob, 0.0).flatten(0, 1)
    gram = (shown * keep.reshape(-1, 1)).T @ shown
    return gram, op("pool_l2_cross")(prob, points, keep, height, width, float(sigma), radius)


def pool_l2_update(gram: Tensor, cross: Tensor, *, ridge: float = 1e-6, simplex: bool = True) -> PoolUpdate:
    """Least-squares leaves: ``Q = (P^T P + lambda I)^-1 P^T Y`` with ``lambda = ridge * mean(diag(gram))``.

    Cholesky; where that fails (a singular gram at ridge 0) the minimum-norm solution by singular values. With
    ``simplex`` each leaf is projected on the probability simplex (Euclidean; Held, Wolfe and Crowder 1974).

    Args:
        gram: [N, N], cross: [H, W, N], sums of `pool_l2_statistics`.
        ridge: at least 0.
        simplex: leaves stay distributions.

    Returns:
        PoolUpdate(pool [H, W, N], dead): dead counts leaves that no row selected (a diagonal of the gram that is 0).
    """
    name = "pool_l2_update"
    check_tensor(name, "gram", gram, "[N, N]")
    check_tensor(name, "cross", cross, "[H, W, N]", like=gram)
    leaves = cross.shape[-1]
    check_same(name, "gram", list(gram.shape), [leaves, leaves], "[N, N] of cross")
    if not cross.numel() or not bool(gram.isfinite().all() & cross.isfinite().all()):
        raise ValueError(
            f"{name}: gram and cross must be finite and not empty, got {list(cross.shape)} with NaN or inf"
        )
    ridge = check_number(name, "ridge", ridge, least=0)
    solution = solve_least_squares(gram, cross.flatten(0, 1).T, ridge)
    if simplex:
        solution = project_simplex(solution)
    return PoolUpdate(solution.T.reshape(cross.shape).to(cross.dtype).contiguous(), int((gram.diagonal() <= 0).sum()))


@_full_precision
def pool_expectation(prob: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of each landmark's mixture: the soft-argmax, linear in the leaves.

    ``E = sum_n p_n E[h | q_n]`` and ``sum_h yhat (h - E)(h - E)^T`` by second moments about the canvas centre.

    Args:
        prob: [B, P, N] selection. Gradient.
        pool: [H, W, N] leaves. Gradient when it requires one.

    Returns:
        points [B, P, 2] (x, y) in canvas pixels and covariance [B, P, 2, 2] in pixels squared; float32, or float64 for
        float64.

    Cost: 12 N flops a landmark, and one pass over the pool for its leaves' moments.
    """
    prob, pool = _mixture("pool_expectation", prob, pool)
    height, width, _ = pool.shape
    x = torch.arange(width, dtype=pool.dtype, device=pool.device) - (width - 1) / 2
    y = torch.arange(height, dtype=pool.dtype, device=pool.device) - (height - 1) / 2
    by_x, by_y = pool.sum(0), pool.sum(1)
    xy = torch.einsum("h,hwn,w->n", y, pool, x)
    moments = torch.stack([by_x.sum(0), x @ by_x, y @ by_y, x**2 @ by_x, y**2 @ by_y, xy], -1)
    mass, mx, my, xx, yy, xy = (prob @ moments).unbind(-1)
    first = torch.stack([mx, my], -1)
    mean = torch.stack([mx + mass * ((width - 1) / 2), my + mass * ((height - 1) / 2)], -1)
    d = torch.stack([mean[..., 0] - (width - 1) / 2, mean[..., 1] - (height - 1) / 2], -1)
    second = torch.stack([xx, xy, xy, yy], -1).unflatten(-1, (2, 2))
    outer = d.unsqueeze(-1) * first.unsqueeze(-2)
    covariance = second - outer - outer.mT + mass[..., None, None] * d.unsqueeze(-1) * d.unsqueeze(-2)
    return mean, covariance


def pool_peak(prob: Tensor, pool: Tensor, refine: str = "none") -> tuple[Tensor, Tensor]:
    """Highest pixel of each landmark's mixture heatmap, without storing it.

    Args:
        prob: [B, P, N], pool: [H, W, N]. No gradients.
        refine: "none"; "quarter_sign": +-1/4 towards the higher neighbour on each axis that has both; "quarter_second":
            1/4 towards the highest of the 8 neighbours on the canvas. Lowest flat index among equals.

    Returns:
        points [B, P, 2] (x, y) in canvas pixels, score [B, P] the height of the peak. A row with NaN is NaN.

    Cost: 2 H W N flops a landmark.
    """
    prob, pool = _mixture("pool_peak", prob, pool)
    check_choice("pool_peak", "refine", refine, _REFINE)
    return op("pool_peak")(prob.detach(), pool.detach(), _REFINE.index(refine))


@_full_precision
def pool_heatmap(prob: Tensor, pool: Tensor) -> Tensor:
    """The mixture heatmaps themselves, ``yhat(h) = sum_n p_n q(h, n)``, [B, P, H, W]: to look at, not to train with."""
    prob, pool = _mixture("pool_heatmap", prob, pool)
    return (prob @ pool.flatten(0, 1).T).unflatten(-1, pool.shape[:2])


def _floor(name: str, eps: float, dtype: torch.dtype) -> float:
    """eps, but at least the least normal number: nothing is divided by 0."""
    return max(check_number(name, "eps", eps, least=0), torch.finfo(dtype).tiny)


def _mixture(name: str, prob: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor(name, "prob", prob, "[B, P, N]")
    check_tensor(name, "pool", pool, "[H, W, N]", like=prob)
    if not all(pool.shape):
        raise ValueError(f"{name}: pool must not be empty, got {list(pool.shape)}")
    check_same(name, "prob", list(prob.shape), [*prob.shape[:2], pool.shape[-1]], "[B, P, N] with the N of pool")
    dtype = compute_dtype(prob.dtype)
    check_same(name, "pool's dtype", compute_dtype(pool.dtype), dtype, "computed in the dtype of prob")
    return prob.to(dtype), pool.to(dtype)


def _rows(
    name: str, prob: Tensor, points: Tensor, sigma: float, truncate: float, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    check_tensor(name, "prob", prob, "[B, P, N]")
    check_tensor(name, "points", points, "[B, P, 2]", like=prob)
    check_same(name, "points", list(points.shape), [*prob.shape[:2], 2], "[B, P, 2] of prob")
    dtype = compute_dtype(prob.dtype)
    if weight is not None:
        check_tensor(name, "weight", weight, "[B, P]", like=prob)
        check_same(name, "weight", list(weight.shape), list(prob.shape[:2]), "[B, P] of prob")
        weight = weight.to(dtype)
    for label, given in (("points", points), ("weight", weight)):
        if given is not None and given.requires_grad:
            raise ValueError(f"{name}: {label} must not require a gradient (none is defined)")
    check_number(name, "sigma", sigma, above=0)
    if not 1e-15 <= sigma <= 1e15:  # sigma^-2 must be a float32
        raise ValueError(f"{name}: sigma must be within 1e-15 and 1e15, got {sigma:g}")
    # No canvas is wider than 2^24: a larger window is the whole canvas all the same.
    radius = math.ceil(min(check_number(name, "truncate", truncate, least=0) * sigma, 2.0**24 - 1))
    return prob.to(dtype), points.to(dtype), weight, radius


def _windowed(
    name: str, prob: Tensor, pool: Tensor, points: Tensor, sigma: float, truncate: float, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    prob, points, weight, radius = _rows(name, prob, points, sigma, truncate, weight)
    prob, pool = _mixture(name, prob, pool)
    return prob, pool, points, weight, radius


def _kl_fake(
    prob: Tensor, pool: Tensor, points: Tensor, weight: Tensor | None, sigma: float, radius: int, eps: float, need: bool
) -> tuple[Tensor, Tensor]:
    rows = prob.shape[:2]
    return prob.new_empty(rows), prob.new_empty((*rows, prob.shape[-1] if need else 0))


class _Scaled(torch.autograd.Function):
    """unit * grad for a gradient that is kept as a graph: it cannot be differentiated, and says so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(prob: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
        return unit * grad.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("pool_kl_loss cannot be differentiated twice")


def _kl_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prob, pool, points, weight, ctx.sigma, ctx.radius, ctx.eps, _ = inputs
    ctx.save_for_backward(prob, pool, points, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _kl_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    prob, pool, points, weight, unit = ctx.saved_tensors
    grad_prob = grad_pool = None
    if grad is not None and ctx.needs_input_grad[0]:
        if unit.shape[-1] != prob.shape[-1]:  # a transform hid from the forward pass that prob is differentiated
            unit = op("pool_kl_loss")(prob, pool, points, weight, ctx.sigma, ctx.radius, ctx.eps, True)[1]
        grad_prob = _Scaled.apply(prob, unit, grad) if torch.is_grad_enabled() else unit * grad.unsqueeze(-1)
    if grad is not None and ctx.needs_input_grad[1]:
        factor = grad if weight is None else torch.where(weight == 0, 0.0, grad * weight)
        grad_pool = op("pool_kl_loss_backward_pool")(prob, pool, points, factor, ctx.sigma, ctx.radius, ctx.eps)
    return grad_prob, grad_pool, None, None, None, None, None, None


def _target_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pool, points, weight, ctx.sigma, ctx.radius = inputs
    ctx.size = pool.shape[:2]
    ctx.save_for_backward(points, weight)
    ctx.mark_non_differentiable(output[1])


def _target_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    points, weight = ctx.saved_tensors
    shown = None if weight is None else (weight != 0).to(grad.dtype)
    return op("pool_l2_cross")(grad, points, shown, *ctx.size, ctx.sigma, ctx.radius), None, None, None, None


register("pool_kl_loss", fake=_kl_fake, save=_kl_save, backward=_kl_backward, batch=(0, 2, 3), autocast=torch.float32)
register("pool_kl_loss_backward_pool", fake=lambda prob, pool, *_: pool.new_empty(pool.shape), batch=())
register("pool_kl_statistics", fake=lambda prob, pool, *_: pool.new_empty(pool.shape), batch=(), autocast=torch.float32)
register("pool_kl_statistics_", fake=lambda *_: None)
register(
    "pool_l2_cross",
    fake=lambda prob, points, weight, height, width, *_: prob.new_empty((height, width, prob.shape[-1])),
    batch=(),
    autocast=torch.float32,
)
register(
    "pool_l2_target",
    fake=lambda pool, points, *_: (
        pool.new_empty((*points.shape[:2], pool.shape[-1])),
        pool.new_empty(points.shape[:2]),
    ),
    save=_target_save,
    backward=_target_backward,
    batch=(1, 2),
    autocast=torch.float32,
)
register(
    "pool_peak",
    fake=lambda prob, pool, refine: (prob.new_empty((*prob.shape[:2], 2)), prob.new_empty(prob.shape[:2])),
    batch=(0,),
    autocast=torch.float32,
)
