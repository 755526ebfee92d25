"""Losses of heatmaps as layers, over the operators of `fastforest.ops.heatmap_loss`: no target is ever built.

Shapes: B images, P landmarks, maps [B, P, H, W], points [B, P, 2] as (x, y) in pixels of the map, weight [B, P].
"""

from __future__ import annotations

from torch import Tensor, nn

from fastforest.nn._checks import check_positive
from fastforest.ops import heatmap_loss as ops
from fastforest.ops._checks import check_choice

__all__ = [
    "AdaptiveWingLoss",
    "HeatmapJSLoss",
    "HeatmapKLLoss",
    "HeatmapMSELoss",
    "HeatmapVarianceLoss",
    "WingLoss",
]


class _HeatmapLoss(nn.Module):
    """What the losses of maps share: the target's width and the reduction."""

    def __init__(self, sigma: float, reduction: str) -> None:
        super().__init__()
        layer = type(self).__name__
        check_positive(layer, "sigma", sigma)
        check_choice(layer, "reduction", reduction, ops.REDUCTIONS)
        self.sigma, self.reduction = sigma, reduction

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, reduction={self.reduction!r}"


class HeatmapMSELoss(_HeatmapLoss):
    """Mean squared error against Gaussian targets of peak 1; see `fastforest.heatmap_mse_loss`.

    Args:
        sigma: width of the target in pixels, above 0.
        foreground_weight: pixels where the target exceeds mask_threshold (0.01 unless given) count so many times.
        mask_threshold: given alone, the other pixels do not count.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> loss = HeatmapMSELoss(sigma=1.5, foreground_weight=10)
    >>> loss(torch.zeros(2, 3, 16, 16), torch.full((2, 3, 2), 8.0)).shape
    torch.Size([])
    >>> loss
    HeatmapMSELoss(sigma=1.5, reduction='mean', foreground_weight=10, mask_threshold=None)
    """

    def __init__(
        self,
        sigma: float,
        *,
        foreground_weight: float | None = None,
        mask_threshold: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(sigma, reduction)
        self.foreground_weight, self.mask_threshold = foreground_weight, mask_threshold

    def forward(self, pred: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of maps [B, P, H, W] whose landmarks are at points [B, P, 2]; weight [B, P] 0 hides a landmark."""
        return ops.heatmap_mse_loss(
            pred,
            points,
            self.sigma,
            weight=weight,
            foreground_weight=self.foreground_weight,
            mask_threshold=self.mask_threshold,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, foreground_weight={self.foreground_weight}, mask_threshold={self.mask_threshold}"
        )


class HeatmapKLLoss(_HeatmapLoss):
    """Kullback-Leibler divergence of each map's softmax from its target; see `fastforest.heatmap_kl_loss`.

    Args:
        sigma: width of the target in pixels, above 0.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> HeatmapKLLoss(sigma=2.0)(torch.zeros(2, 3, 64, 64), torch.full((2, 3, 2), 30.0))  # log(64^2) - 1 - log(2 pi 2^2)
    tensor(4.0936)
    >>> HeatmapKLLoss(sigma=2.0)
    HeatmapKLLoss(sigma=2, reduction='mean')
    """

    def __init__(self, sigma: float, *, reduction: str = "mean") -> None:
        super().__init__(sigma, reduction)

    def forward(self, logits: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits [B, P, H, W] whose landmarks are at points [B, P, 2]; weight [B, P] 0 hides a landmark."""
        return ops.heatmap_kl_loss(logits, points, self.sigma, weight=weight, reduction=self.reduction)


class HeatmapJSLoss(_HeatmapLoss):
    """Jensen-Shannon divergence of each map's softmax and its target; see `fastforest.heatmap_js_loss`.

    Args:
        sigma: width of the target in pixels, above 0.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> HeatmapJSLoss(sigma=2.0, reduction="none")(torch.zeros(2, 3, 64, 64), torch.full((2, 3, 2), 30.0)).shape
    torch.Size([2, 3])
    >>> HeatmapJSLoss(sigma=2.0)
    HeatmapJSLoss(sigma=2, reduction='mean')
    """

    def __init__(self, sigma: float, *, reduction: str = "mean") -> None:
        super().__init__(sigma, reduction)

    def forward(self, logits: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits [B, P, H, W] whose landmarks are at points [B, P, 2]; weight [B, P] 0 hides a landmark."""
        return ops.heatmap_js_loss(logits, points, self.sigma, weight=weight, reduction=self.reduction)


class HeatmapVarianceLoss(_HeatmapLoss):
    """How far each map's softmax is from a spread of sigma on both axes; see `fastforest.heatmap_variance_loss`.

    Args:
        sigma: width that is asked for in pixels, above 0.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> HeatmapVarianceLoss(sigma=2.0, reduction="none")(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 3])
    >>> HeatmapVarianceLoss(sigma=2.0)
    HeatmapVarianceLoss(sigma=2, reduction='mean')
    """

    def __init__(self, sigma: float, *, reduction: str = "mean") -> None:
        super().__init__(sigma, reduction)

    def forward(self, logits: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits [B, P, H, W]; weight [B, P] 0 hides a landmark."""
        return ops.heatmap_variance_loss(logits, self.sigma, weight=weight, reduction=self.reduction)


class AdaptiveWingLoss(_HeatmapLoss):
    """Adaptive Wing with its dilated weight map, against Gaussian targets of peak 1; see `fastforest.adaptive_wing_loss`.

    Args:
        sigma: width of the target in pixels, above 0.
        alpha, omega, epsilon, theta: of the loss.
        weight_map, dilation, threshold: whether, and where, pixels near the landmark count 11 times.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> loss = AdaptiveWingLoss(sigma=1.5)
    >>> pred = torch.zeros(2, 3, 16, 16, requires_grad=True)
    >>> loss(pred, torch.full((2, 3, 2), 8.0), weight=torch.ones(2, 3)).backward()
    >>> pred.grad.shape
    torch.Size([2, 3, 16, 16])
    >>> loss
    AdaptiveWingLoss(sigma=1.5, reduction='mean', alpha=2.1, omega=14, epsilon=1, theta=0.5, weight_map=True, dilation=3,
    threshold=0.2)
    """

    def __init__(
        self,
        sigma: float,
        *,
        alpha: float = 2.1,
        omega: float = 14.0,
        epsilon: float = 1.0,
        theta: float = 0.5,
        weight_map: bool = True,
        dilation: int = 3,
        threshold: float = 0.2,
        reduction: str = "mean",
    ) -> None:
        super().__init__(sigma, reduction)
        self.alpha, self.omega, self.epsilon, self.theta = alpha, omega, epsilon, theta
        self.weight_map, self.dilation, self.threshold = weight_map, dilation, threshold

    def forward(self, pred: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of maps [B, P, H, W] whose landmarks are at points [B, P, 2]; weight [B, P] 0 hides a landmark."""
        return ops.adaptive_wing_loss(
            pred,
            points,
            self.sigma,
            alpha=self.alpha,
            omega=self.omega,
            epsilon=self.epsilon,
            theta=self.theta,
            weight_map=self.weight_map,
            dilation=self.dilation,
            threshold=self.threshold,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha={self.alpha:g}, omega={self.omega:g}, epsilon={self.epsilon:g}, "
            f"theta={self.theta:g}, weight_map={self.weight_map}, dilation={self.dilation}, threshold={self.threshold:g}"
        )


class WingLoss(nn.Module):
    """Wing loss of coordinates; see `fastforest.wing_loss`.

    Args:
        width, epsilon: half the logarithmic range and its curvature, in pixels, above 0.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> WingLoss()(torch.zeros(2, 3, 2), torch.full((2, 3, 2), 20.0))  # 10 + 10 log(6)
    tensor(27.9176)
    >>> WingLoss(width=5)
    WingLoss(width=5, epsilon=2, reduction='mean')
    """

    def __init__(self, width: float = 10.0, epsilon: float = 2.0, *, reduction: str = "mean") -> None:
        super().__init__()
        check_positive("WingLoss", "width", width)
        check_positive("WingLoss", "epsilon", epsilon)
        check_choice("WingLoss", "reduction", reduction, ops.REDUCTIONS)
        self.width, self.epsilon, self.reduction = width, epsilon, reduction

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of coordinates [B, P, D] against target [B, P, D]; weight [B, P] 0 hides a landmark."""
        return ops.wing_loss(pred, target, self.width, self.epsilon, weight=weight, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"width={self.width:g}, epsilon={self.epsilon:g}, reduction={self.reduction!r}"
