"""Heatmap losses in plain PyTorch: the specification of `fastforest.ops.heatmap_loss`. Dense and slow, any dtype.

Shapes: pred [B, P, H, W], points [B, P, 2] as (x, y) in pixels, pixel centres at integers; weight [B, P].
y is the target of `render_gaussian`, z the prediction; no gradient reaches points, sigma or weight.
A row of weight 0 counts 0 whatever it holds. No row reaches another, but in a mean or a sum of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastforest.reference.heatmap import render_gaussian


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """none: w r; sum: sum w r; mean: sum w r / sum w, 0 where the weights sum to 0."""
    weight = torch.ones_like(rows) if weight is None else weight.detach().to(rows.dtype)
    rows = torch.where(weight == 0, 0.0, weight * rows)
    if reduction == "none":
        return rows
    total = weight.sum() if reduction == "mean" else torch.ones((), dtype=rows.dtype, device=rows.device)
    return rows.sum() / torch.where(total == 0, 1.0, total)


def _loss(
    rows: Callable[[Tensor, Tensor], Tensor],
    pred: Tensor,
    points: Tensor,
    sigma: float | Tensor,
    weight: Tensor | None,
    reduction: str,
    normalize: str,
) -> Tensor:
    """rows(z, y) -> [B, P] of maps whose weight is not 0; the others are replaced by zeros, which hides NaN."""
    points = points.detach().to(pred.dtype)
    if not isinstance(sigma, Tensor):
        sigma = torch.full_like(points[..., 0], sigma)
    sigma = sigma.detach().to(pred.dtype)
    if weight is not None:
        hidden = weight == 0
        pred = torch.where(hidden[..., None, None], 0.0, pred)
        points = torch.where(hidden[..., None], 0.0, points)
        sigma = torch.where(hidden, 1.0, sigma)
    target = render_gaussian(points, sigma, (pred.shape[-2], pred.shape[-1]), normalize=normalize)
    return _reduce(rows(pred, target), weight, reduction)


def heatmap_mse_loss(
    pred: Tensor,
    points: Tensor,
    sigma: float | Tensor,
    *,
    weight: Tensor | None = None,
    foreground_weight: float | None = None,
    mask_threshold: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = mean over pixels of f (z - y)^2; f = foreground_weight where y > mask_threshold (0.01), 1 elsewhere; with
    mask_threshold alone 1 there and 0 elsewhere.
    """

    def rows(z: Tensor, y: Tensor) -> Tensor:
        square = (z - y).square()
        if foreground_weight is not None:
            square = square * torch.where(
                y > (0.01 if mask_threshold is None else mask_threshold), foreground_weight, 1.0
            )
        elif mask_threshold is not None:
            square = square * (y > mask_threshold)
        return square.mean((-2, -1))

    return _loss(rows, pred, points, sigma, weight, reduction, "peak")


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """p and log p, [B, P, H W]; NaN for a map with NaN or +inf, or -inf all over."""
    log_prob = torch.log_softmax(z.flatten(-2), -1)
    return log_prob.exp(), log_prob


def heatmap_kl_loss(
    logits: Tensor,
    points: Tensor,
    sigma: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = sum y (log y - log p), p = softmax(z), y of sum 1; y = 0 contributes 0."""

    def rows(z: Tensor, y: Tensor) -> Tensor:
        _, log_prob = _softmax(z)
        y = y.flatten(-2)
        poison = torch.where(log_prob.isnan() | y.isnan(), torch.nan, 0.0).sum(-1)
        return (torch.special.xlogy(y, y) - torch.where(y > 0, y * torch.where(y > 0, log_prob, 0.0), 0.0)).sum(
            -1
        ) + poison

    return _loss(rows, logits, points, sigma, weight, reduction, "sum")


def heatmap_js_loss(
    logits: Tensor,
    points: Tensor,
    sigma: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = (KL(y || m) + KL(p || m)) / 2, m = (p + y) / 2, p = softmax(z), y of sum 1."""

    def rows(z: Tensor, y: Tensor) -> Tensor:
        prob, _ = _softmax(z)
        y = y.flatten(-2)
        m = 0.5 * (prob + y)
        safe = torch.where(m > 0, m, 1.0)

        def kl(q: Tensor) -> Tensor:
            return torch.where(q > 0, q * (torch.where(q > 0, q, 1.0) / safe).log(), q * 0).sum(-1)

        return 0.5 * (kl(y) + kl(prob))

    return _loss(rows, logits, points, sigma, weight, reduction, "sum")


def heatmap_variance_loss(
    logits: Tensor,
    sigma: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = (var_x - sigma^2)^2 + (var_y - sigma^2)^2, variances of p = softmax(z) in pixels squared."""
    height, width = logits.shape[-2:]
    if not isinstance(sigma, Tensor):
        sigma = torch.full_like(logits[..., 0, 0], sigma)
    sigma = torch.where(sigma.isfinite() & (sigma > 0), sigma, torch.nan).detach().to(logits.dtype)

    def rows(z: Tensor, _: Tensor) -> Tensor:
        prob = _softmax(z)[0].unflatten(-1, (height, width))
        total = torch.zeros_like(prob[..., 0, 0])
        for dim, size in ((-2, width), (-1, height)):
            marginal = prob.sum(dim)
            h = torch.arange(size, dtype=prob.dtype, device=prob.device)
            mean = (marginal * h).sum(-1, keepdim=True)
            spread = (marginal * (h - mean) ** 2).sum(-1)
            total = total + (spread - sigma**2) ** 2
        return total

    nowhere = logits.new_zeros(*logits.shape[:2], 2)
    return _loss(rows, logits, nowhere, 1.0, weight, reduction, "peak")


def adaptive_wing_loss(
    pred: Tensor,
    points: Tensor,
    sigma: float | Tensor,
    *,
    alpha: float = 2.1,
    omega: float = 14.0,
    epsilon: float = 1.0,
    theta: float = 0.5,
    weight_map: bool = True,
    dilation: int = 3,
    threshold: float = 0.2,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = mean over pixels of (1 + 10 M) wing, d = |z - y|, a = alpha - y:
    wing = omega log(1 + (d / epsilon)^a) for d < theta, else A d - C with
    A = omega a (theta / epsilon)^(a - 1) / (epsilon (1 + (theta / epsilon)^a)),
    C = theta A - omega log(1 + (theta / epsilon)^a); M = [y after a dilation x dilation maximum >= threshold].
    """

    def rows(z: Tensor, y: Tensor) -> Tensor:
        d, a = (z - y).abs(), alpha - y
        ratio = theta / epsilon
        slope = omega * a * ratio ** (a - 1) / (epsilon * (1 + ratio**a))
        offset = theta * slope - omega * torch.log1p(ratio**a)
        near = d < theta
        base = torch.where(near & (d > 0), d, theta)  # the power's gradient at 0 is 0, not NaN
        curved = torch.where(d > 0, omega * torch.log1p((base / epsilon) ** a), 0.0)
        wing = torch.where(near, curved, slope * d - offset)
        if weight_map:
            wide = functional.max_pool2d(y, dilation, 1, dilation // 2)
            wing = wing * torch.where(wide >= threshold, 11.0, 1.0)
        return wing.mean((-2, -1))

    return _loss(rows, pred, points, sigma, weight, reduction, "peak")


def wing_loss(
    pred: Tensor,
    target: Tensor,
    width: float = 10.0,
    epsilon: float = 2.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """r = mean over the last dimension of width log(1 + d / epsilon) for d = |pred - target| < width, else d - C,
    C = width - width log(1 + width / epsilon).
    """
    if weight is not None:
        weight = weight.detach()
        pred = torch.where((weight == 0).unsqueeze(-1), 0.0, pred)
        target = torch.where((weight == 0).unsqueeze(-1), 0.0, target)
    d = (pred - target).abs()
    bend = width - width * torch.log1p(torch.tensor(width / epsilon, dtype=d.dtype, device=d.device))
    rows = torch.where(d < width, width * torch.log1p(d / epsilon), d - bend).mean(-1)
    return _reduce(rows, weight, reduction)
