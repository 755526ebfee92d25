"""What an expert writes in PyTorch for the same work: dense, vectorised, target rendering included."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

try:
    import cv2
except ImportError:
    cv2 = None


def axis_weights(centre: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussian weights of one axis that sum to 1, [R, size]."""
    h = torch.arange(size, dtype=centre.dtype, device=centre.device)
    return torch.softmax((h - centre.unsqueeze(-1)).square() * (-0.5 / sigma**2), -1)


def dense_target(points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    gx, gy = axis_weights(points[:, 0], width, sigma), axis_weights(points[:, 1], height, sigma)
    return (gy.unsqueeze(2) * gx.unsqueeze(1)).flatten(1)


def pool_kl_full(prob: Tensor, leaves: Tensor, points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """prob [R, N], leaves [N, H W]: entropy of the separable target minus the dense cross term."""
    gx, gy = axis_weights(points[:, 0], width, sigma), axis_weights(points[:, 1], height, sigma)
    target = (gy.unsqueeze(2) * gx.unsqueeze(1)).flatten(1)
    entropy = torch.special.xlogy(gx, gx).sum() + torch.special.xlogy(gy, gy).sum()
    return (entropy - (target * (prob @ leaves).log()).sum()) / len(prob)


def pool_kl_div(prob: Tensor, leaves: Tensor, points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    return F.kl_div((prob @ leaves).log(), dense_target(points, height, width, sigma), reduction="batchmean")


def pool_kl_separable(prob: Tensor, leaves: Tensor, points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """The target is never formed: gy^T log(yhat) gx."""
    gx, gy = axis_weights(points[:, 0], width, sigma), axis_weights(points[:, 1], height, sigma)
    logs = (prob @ leaves).log().view(-1, height, width)
    cross = torch.bmm(torch.bmm(gy.unsqueeze(1), logs), gx.unsqueeze(2)).sum()
    entropy = torch.special.xlogy(gx, gx).sum() + torch.special.xlogy(gy, gy).sum()
    return (entropy - cross) / len(prob)


def pool_bounding(prob: Tensor, leaves: Tensor, points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """One dense leaf update."""
    fresh = leaves * (prob.T @ (dense_target(points, height, width, sigma) / (prob @ leaves)))
    return fresh / fresh.sum(-1, keepdim=True)


def pool_bounding_inplace(
    prob: Tensor, leaves: Tensor, points: Tensor, height: int, width: int, sigma: float
) -> Tensor:
    gx, gy = axis_weights(points[:, 0], width, sigma), axis_weights(points[:, 1], height, sigma)
    ratio = (prob @ leaves).reciprocal_().view(-1, height, width).mul_(gx.unsqueeze(1)).mul_(gy.unsqueeze(2))
    fresh = (prob.T @ ratio.flatten(1)).mul_(leaves)
    return fresh.div_(fresh.sum(-1, keepdim=True))


def soft_argmax_gemm(heatmap: Tensor, beta: float, grid: Tensor) -> Tensor:
    """grid [H W, 2] of (x, y)."""
    return torch.softmax(heatmap.flatten(2) * beta, -1) @ grid


def soft_argmax_marginals(heatmap: Tensor, beta: float, grid: Tensor) -> Tensor:
    width = heatmap.shape[-1]
    p = torch.softmax(heatmap.flatten(2) * beta, -1).view(heatmap.shape)
    x, y = grid[:width, 0], grid[::width, 1]
    return torch.stack([p.sum(-2) @ x, p.sum(-1) @ y], -1)


def soft_argmax_unnormalised(heatmap: Tensor, beta: float, grid: Tensor) -> Tensor:
    """exp, one GEMM with (x, y, 1), division last."""
    flat = heatmap.flatten(2)
    e = ((flat - flat.detach().amax(-1, keepdim=True)) * beta).exp()
    sums = e @ torch.cat([grid, torch.ones_like(grid[:, :1])], 1)
    return sums[..., :2] / sums[..., 2:]


def quarter_sign(heatmap: Tensor) -> tuple[Tensor, Tensor]:
    height, width = heatmap.shape[-2:]
    flat = heatmap.flatten(2)
    score, index = flat.max(-1)
    x, y = index % width, index // width
    right, left = (index + 1).clamp_max(flat.shape[-1] - 1), (index - 1).clamp_min(0)
    below, above = (index + width).clamp_max(flat.shape[-1] - 1), (index - width).clamp_min(0)
    near = flat.gather(-1, torch.stack([right, left, below, above], -1))
    dx = torch.where((x > 0) & (x < width - 1), (near[..., 0] - near[..., 1]).sign(), 0.0)
    dy = torch.where((y > 0) & (y < height - 1), (near[..., 2] - near[..., 3]).sign(), 0.0)
    return torch.stack([x + 0.25 * dx, y + 0.25 * dy], -1), score


def dark_udp_step(log: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log [..., 3, 3] around the peaks at x, y."""
    row = log.flatten(-2).unbind(-1)
    c, left, right, up, down = row[4], row[3], row[5], row[1], row[7]
    gx, gy = 0.5 * (right - left), 0.5 * (down - up)
    xx, yy = right - 2 * c + left, down - 2 * c + up
    xy = 0.5 * (row[8] - right - down + 2 * c - left - up + row[0])
    det = xx * yy - xy * xy
    shift = torch.stack([xy * gy - yy * gx, xy * gx - xx * gy], -1) / det.unsqueeze(-1)
    return torch.stack([x, y], -1) + torch.where(shift.abs().amax(-1, keepdim=True) <= 1.5, shift, 0.0)


def dark_udp_dense(heatmap: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Blurs the maps whole, by two convolutions, then gathers 3 x 3."""
    (height, width), half = heatmap.shape[-2:], len(taps) // 2
    score, index = heatmap.flatten(2).max(-1)
    x, y = index % width, index // width
    rows = F.conv2d(heatmap.flatten(0, 1).unsqueeze(1), taps.view(1, 1, 1, -1), padding=(0, half))
    blurred = F.conv2d(rows, taps.view(1, 1, -1, 1), padding=(half, 0)).view(heatmap.shape).flatten(2)
    scale = score / blurred.amax(-1)
    d = torch.arange(-1, 2, device=heatmap.device)
    at = (y[..., None] + d).clamp(0, height - 1)[..., None] * width + (x[..., None] + d).clamp(0, width - 1)[
        ..., None, :
    ]
    near = blurred.gather(-1, at.flatten(2)) * scale[..., None]
    return dark_udp_step(near.clamp(1e-3, 50).log().unflatten(-1, (3, 3)), x, y), score


def dark_udp_patch(heatmap: Tensor, bands: Tensor) -> tuple[Tensor, Tensor]:
    """Blurs the window of the stencil alone, as two small products; bands [3, taps + 2]."""
    (height, width), reach = heatmap.shape[-2:], bands.shape[1] // 2
    flat = heatmap.flatten(2)
    score, index = flat.max(-1)
    x, y = index % width, index // width
    d = torch.arange(-reach, reach + 1, device=heatmap.device)
    xs, ys = x[..., None] + d, y[..., None] + d
    inside = ((ys >= 0) & (ys < height))[..., None] & ((xs >= 0) & (xs < width))[..., None, :]
    at = ys.clamp(0, height - 1)[..., None] * width + xs.clamp(0, width - 1)[..., None, :]
    window = flat.gather(-1, at.flatten(2)).view(at.shape) * inside
    return dark_udp_step((bands @ window @ bands.T).clamp(1e-3, 50).log(), x, y), score


def dark_udp_library(heatmap: np.ndarray, kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """In the manner of the pose libraries: NumPy, an image at a time, every map padded, blurred whole and rescaled."""
    images, landmarks, height, width = heatmap.shape
    flat = heatmap.reshape(images, landmarks, -1)
    index = flat.argmax(-1)
    score = np.take_along_axis(flat, index[..., None], -1)[..., 0]
    points = np.stack([index % width, index // width], -1).astype(np.float32)
    half = kernel // 2
    d = np.arange(kernel) - half
    taps = np.exp(-(d**2) / (2 * (0.3 * (half - 1) + 0.8) ** 2))
    taps /= taps.sum()
    for image in range(images):
        log = np.empty((landmarks, height + 2, width + 2), np.float32)
        for landmark in range(landmarks):
            padded = np.zeros((height + 2 * half, width + 2 * half))
            padded[half:-half, half:-half] = heatmap[image, landmark]
            if cv2 is not None:
                padded = cv2.GaussianBlur(padded, (kernel, kernel), 0)
            else:
                padded = ndimage.correlate1d(ndimage.correlate1d(padded, taps, 0), taps, 1)
            blurred = padded[half:-half, half:-half]
            blurred = np.clip(blurred * (score[image, landmark] / (blurred.max() + 1e-12)), 1e-3, 50)
            log[landmark] = np.pad(np.log(blurred), 1, mode="edge")
        k = np.arange(landmarks)
        x, y = points[image].astype(np.int64).T + 1
        c, left, right = log[k, y, x], log[k, y, x - 1], log[k, y, x + 1]
        up, down = log[k, y - 1, x], log[k, y + 1, x]
        xy = 0.5 * (log[k, y + 1, x + 1] - right - down + 2 * c - left - up + log[k, y - 1, x - 1])
        hessian = np.stack([right - 2 * c + left, xy, xy, down - 2 * c + up], -1).reshape(-1, 2, 2)
        inverse = np.linalg.inv(hessian + np.finfo(np.float32).eps * np.eye(2))
        points[image] -= (inverse @ np.stack([right - left, down - up], -1)[..., None])[..., 0] / 2
    return points, score


def render(points: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """points [B, P, 2] -> [B, P, H, W], peak 1, as an outer product."""
    x = torch.arange(width, dtype=points.dtype, device=points.device)
    y = torch.arange(height, dtype=points.dtype, device=points.device)
    gx = ((x - points[..., :1]).square() * (-0.5 / sigma**2)).exp()
    gy = ((y - points[..., 1:]).square() * (-0.5 / sigma**2)).exp()
    return gy.unsqueeze(-1) * gx.unsqueeze(-2)


def adaptive_wing_target(pred: Tensor, points: Tensor, sigma: float) -> tuple[Tensor, ...]:
    """target, a, slope, offset and weight map: alpha 2.1, omega 14, epsilon 1, theta 0.5; without gradients."""
    with torch.no_grad():
        target = render(points, *pred.shape[-2:], sigma)
        a = 2.1 - target
        power = torch.exp(a * math.log(0.5))
        slope = a * power / (1 + power) * (14.0 / 0.5)
        offset = 0.5 * slope - 14.0 * torch.log1p(power)
        weight = 1 + 10 * (F.max_pool2d(target, 3, 1, 1) >= 0.2)
    return target, a, slope, offset, weight


def adaptive_wing(pred: Tensor, points: Tensor, sigma: float) -> Tensor:
    target, a, slope, offset, weight = adaptive_wing_target(pred, points, sigma)
    d = (pred - target).abs()
    return (torch.where(d < 0.5, 14.0 * torch.log1p(d**a), slope * d - offset) * weight).mean()


def adaptive_wing_exp(pred: Tensor, points: Tensor, sigma: float) -> Tensor:
    """The same with d^a = exp(a log d), which a compiler fuses into vector code."""
    target, a, slope, offset, weight = adaptive_wing_target(pred, points, sigma)
    d = (pred - target).abs()
    near = 14.0 * torch.log1p(torch.exp(a * torch.log(d + 1e-30)))
    return (torch.where(d < 0.5, near, slope * d - offset) * weight).mean()


def heatmap_mse(pred: Tensor, points: Tensor, sigma: float) -> Tensor:
    return F.mse_loss(pred, render(points, *pred.shape[-2:], sigma))


def _axes(points: Tensor, height: int, width: int, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """gx, gy and sum y log y of targets that sum to 1."""
    gx, gy = axis_weights(points[..., 0], width, sigma), axis_weights(points[..., 1], height, sigma)
    return gx, gy, torch.special.xlogy(gx, gx).sum() + torch.special.xlogy(gy, gy).sum()


def heatmap_kl_rendered(logits: Tensor, points: Tensor, sigma: float) -> Tensor:
    gx, gy, entropy = _axes(points, *logits.shape[-2:], sigma)
    target = (gy.unsqueeze(-1) * gx.unsqueeze(-2)).flatten(2)
    return (entropy - (target * torch.log_softmax(logits.flatten(2), -1)).sum()) / points[..., 0].numel()


def heatmap_kl_separable(logits: Tensor, points: Tensor, sigma: float) -> Tensor:
    """log sum exp minus gy^T z gx: the forward renders no target."""
    gx, gy, entropy = _axes(points, *logits.shape[-2:], sigma)
    cross = torch.matmul(torch.matmul(gy.unsqueeze(-2), logits), gx.unsqueeze(-1)).sum()
    return (entropy - cross + torch.logsumexp(logits.flatten(2), -1).sum()) / points[..., 0].numel()
