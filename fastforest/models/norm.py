"""Normalisation of maps [B, C, h, w]: by the batch, the batch of all ranks, or groups of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from fastforest.nn._ranks import many_ranks, sum_over_ranks

__all__ = ["NORMS", "normalization", "synchronize_batch_norm"]

NORMS = ("batch", "group")
CHANNELS = 8  # in a group, at least: a group of one channel on a map of one cell would be its bias alone


def normalization(channels: int, norm: str) -> nn.BatchNorm2d | nn.GroupNorm:
    """ "batch": BatchNorm2d. "group": GroupNorm, the most groups of equal size with at least 8 channels each.

    An image's groups do not depend on the other images: for tiny batches, and for equal results on many ranks.

    Raises:
        ValueError: another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = next(count for count in range(max(1, channels // CHANNELS), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d in `module` normalises by the batch of all ranks, in place; returns `module`.

    For training under DistributedDataParallel, on gloo and on NCCL (`torch.nn.SyncBatchNorm` needs CUDA). Outputs,
    gradients and running statistics are those of one process with the ranks' batches joined, which may differ in size
    or be empty; a gradient of weight and bias is the rank's own share, for DDP to average. In evaluation, and without a
    process group of two or more ranks, nothing changes. Parameters, buffers and the state dictionary stay the same.

    Statistics are float32 (float64 for float64 maps): each rank's mean and variance, weighted by its count. One
    collective of 2 C + 1 numbers a layer forward, one of 2 C backward; no second derivative.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = _JoinedBatchNorm2d  # keeps the hooks, and the parameters that an optimizer holds
    return module


class _JoinedBatchNorm2d(nn.BatchNorm2d):
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and many_ranks()):
            return super().forward(x)
        self._check_input_dim(x)
        mean, variance, count = _joined_moments(x.detach())
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1).clamp_min(1)))
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, count, self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) weight + bias, with mean and variance of all ranks' rows.

    With z = (x - mean) / sqrt(variance + eps) and n rows in all,
    dx = (g - sum(g) / n - z sum(g z) / n) weight / sqrt(variance + eps), sums over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, inverse, count)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return torch.addcmul(_over_channels(shift), x, _over_channels(scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse, count = ctx.saved_tensors
        grad_wide = grad.to(mean.dtype)
        z = (x - _over_channels(mean)) * _over_channels(inverse)
        own = torch.stack([_sum(grad_wide), _sum(grad_wide * z)])
        joined = own.clone()
        sum_over_ranks([joined])
        level, slope = joined / count.clamp_min(1)
        scale = inverse if weight is None else inverse * weight
        grad_x = (grad_wide - _over_channels(level) - z * _over_channels(slope)) * _over_channels(scale)
        grad_weight = None if weight is None else own[1].to(weight.dtype)
        grad_bias = None if bias is None else own[0].to(bias.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _joined_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of rows [] of the rows of all ranks."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = _sum(wide) / max(count, 1)
    variance = _sum((wide - _over_channels(mean)).square()) / max(count, 1)
    own = torch.cat([mean, variance, mean.new_full((1,), count)])
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, own)
    means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)
    share = counts / counts.sum().clamp_min(1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), counts.sum()


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def _over_channels(values: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return values[None, :, None, None]
