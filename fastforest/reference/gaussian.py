"""Gaussian leaves in plain PyTorch: the specification of `fastforest.ops.gaussian`. Dense and slow, any dtype.

Shapes: x [N, D], mean [K, D], scale_tril [K, D, D] lower triangular L with covariance L L^T, log_weight [N, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_log_prob(x: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """log N(x; mean, L L^T) = -(D log 2 pi) / 2 - sum_i log L_ii - |z|^2 / 2, L z = x - mean; [N, K]."""
    lower = scale_tril.tril()
    difference = (x.unsqueeze(0) - mean.unsqueeze(1)).mT
    z = torch.linalg.solve_triangular(lower, difference, upper=False)
    log_determinant = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_norm = -0.5 * x.shape[-1] * math.log(2 * math.pi) - log_determinant
    return log_norm - 0.5 * z.square().sum(1).mT


def gaussian_mixture_log_prob(x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """log p = logsumexp_k(log w + log N); [N]."""
    return torch.logsumexp(log_weight + gaussian_log_prob(x, mean, scale_tril), -1)


def gaussian_responsibilities(x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """r = softmax_k(log w + log N); 0 in a row without weight; [N, K]."""
    joint = log_weight + gaussian_log_prob(x, mean, scale_tril)
    none = (joint == -torch.inf).all(-1, keepdim=True)
    return torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, joint), -1))


def gaussian_statistics(
    x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S0 = sum w r, S1 = sum w r (x - mean), S2 = sum w r (x - mean)(x - mean)^T, sum w log p: over samples of finite
    log p; w [N] is 1 where none is given."""
    log_prob = gaussian_mixture_log_prob(x, log_weight, mean, scale_tril)
    counts = log_prob.isfinite()
    w = (torch.ones_like(log_prob) if weight is None else weight)[counts]
    r = gaussian_responsibilities(x, log_weight, mean, scale_tril)[counts] * w[:, None]
    difference = x[counts].unsqueeze(1) - mean
    second = torch.einsum("nk,nki,nkj->kij", r, difference, difference)
    return r.sum(0), torch.einsum("nk,nki->ki", r, difference), second, (w * log_prob[counts]).sum()


def mixture_moments(weight: Tensor, mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m = sum w mu, C = sum w (L L^T + (mu - m)(mu - m)^T), entropy at most sum w (H_k - log w),
    H_k = (D / 2) log(2 pi e) + sum_i log L_ii (Huber et al., 2008); rows of weight are divided by their sum."""
    lower, weight = scale_tril.tril(), weight / weight.sum(-1, keepdim=True)
    centre = weight @ mean
    apart = mean.unsqueeze(0) - centre.unsqueeze(1)
    spread = (lower @ lower.mT).unsqueeze(0) + apart.unsqueeze(-1) * apart.unsqueeze(-2)
    entropy = 0.5 * mean.shape[-1] * (1 + math.log(2 * math.pi)) + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    bound = weight @ entropy - torch.special.xlogy(weight, weight).sum(-1)
    return centre, (weight[..., None, None] * spread).sum(1), bound
