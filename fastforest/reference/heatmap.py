"""Heatmaps in plain PyTorch: the specification of `fastforest.ops.heatmap`. Dense and slow, any dtype, differentiable.

Shapes: heatmap [B, P, H, W], points [B, P, 2] as (x, y) in pixels, pixel centres at integers.
A map that holds NaN or +inf counts as NaN; -inf is a masked pixel; no map reaches another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _axis(centre: Tensor, sigma: Tensor, size: int, normalize: str, truncate: float | None) -> Tensor:
    """exp(-(h - c)^2 / 2 sigma^2) for h = 0..size-1, 0 outside |h - round(c)| <= ceil(t sigma); [..., size]."""
    h = torch.arange(size, dtype=centre.dtype, device=centre.device)
    exponent = -((h - centre.unsqueeze(-1)) ** 2) / (2 * sigma.unsqueeze(-1) ** 2)
    if truncate is None:
        inside = torch.ones_like(exponent, dtype=torch.bool)
    else:
        radius = torch.ceil(truncate * sigma.detach()).unsqueeze(-1)
        inside = (h - centre.detach().round().unsqueeze(-1)).abs() <= radius
    if normalize == "peak":
        return torch.where(inside, exponent.exp(), 0.0)
    # Shifted by the largest exponent, which the sum divides out: a point far outside still has a visible share of 1.
    top = torch.where(inside, exponent.detach(), -torch.inf).amax(-1, keepdim=True)
    shifted = torch.where(inside, exponent - torch.where(top.isinf(), 0.0, top), -torch.inf).exp()
    return shifted / torch.where(inside.any(-1, keepdim=True), shifted.sum(-1, keepdim=True), 1.0)


def render_gaussian(
    points: Tensor,
    sigma: float | Tensor,
    size: tuple[int, int],
    *,
    normalize: str = "peak",
    truncate: float | None = None,
) -> Tensor:
    """exp(-|h - c|^2 / 2 sigma^2), peak 1 or (over the visible canvas) sum 1; NaN where a point or sigma is invalid."""
    height, width = size
    if not isinstance(sigma, Tensor):
        sigma = torch.full_like(points[..., 0], sigma)
    sigma = sigma.to(points.dtype)
    valid = (points.isfinite().all(-1) & sigma.isfinite() & (sigma > 0))[..., None, None]
    safe_points = torch.where(valid[..., 0], points, 0.0)
    safe_sigma = torch.where(valid[..., 0, 0], sigma, 1.0)
    gx = _axis(safe_points[..., 0], safe_sigma, width, normalize, truncate)
    gy = _axis(safe_points[..., 1], safe_sigma, height, normalize, truncate)
    maps = gy.unsqueeze(-1) * gx.unsqueeze(-2)
    return maps * torch.where(valid, 1.0, torch.nan).to(maps.dtype)


def _grid(heatmap: Tensor) -> tuple[Tensor, Tensor]:
    height, width = heatmap.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=heatmap.dtype, device=heatmap.device),
        torch.arange(width, dtype=heatmap.dtype, device=heatmap.device),
        indexing="ij",
    )
    return x, y


def _poisoned(heatmap: Tensor) -> Tensor:
    """NaN for maps that hold NaN or +inf, else 0; [B, P]."""
    bad = (heatmap.isnan() | (heatmap == torch.inf)).flatten(-2).any(-1)
    return torch.where(bad, torch.nan, 0.0).to(heatmap.dtype)


def _first_maximum(heatmap: Tensor) -> Tensor:
    """Lowest flat index among equal maxima; [B, P]."""
    flat = heatmap.flatten(-2)
    return (flat == flat.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def soft_argmax(
    heatmap: Tensor, beta: float | Tensor = 1.0, *, window: int | None = None, debias: bool = False
) -> Tensor:
    """x = sum p (x, y), p = softmax(beta z) over the canvas, or over the window |h - peak| <= r clipped to it.

    debias: a background of z = 0 adds 1 per pixel to C = sum exp(beta z); taking n pixels of it away,
    x = (C x - n xbar) / (C - n), with n the pixels and xbar the centre of the region; unchanged unless C > n.
    """
    height, width = heatmap.shape[-2:]
    x, y = _grid(heatmap)
    inside = torch.ones_like(heatmap, dtype=torch.bool)
    if window is not None:
        peak = _first_maximum(heatmap)[..., None, None]
        inside = ((x - peak % width).abs() <= window) & ((y - peak // width).abs() <= window)
    logits = torch.where(inside, beta * heatmap, -torch.inf).flatten(-2)
    prob = torch.softmax(logits, -1).unflatten(-1, (height, width))
    mean = torch.stack([(prob * x).sum((-2, -1)), (prob * y).sum((-2, -1))], -1)
    if debias:
        count = inside.sum((-2, -1)).to(heatmap.dtype)
        share = (count * torch.exp(-torch.logsumexp(logits, -1))).unsqueeze(-1)
        centre = torch.stack([(inside * x).sum((-2, -1)), (inside * y).sum((-2, -1))], -1) / count.unsqueeze(-1)
        apply = share < 1
        mean = torch.where(apply, (mean - share * centre) / torch.where(apply, 1 - share, 1.0), mean)
    return mean + _poisoned(heatmap).unsqueeze(-1)


def gaussian_kernel(size: int) -> Tensor:
    """OpenCV's weights for an odd size and no sigma, float64: tables up to 9, then exp(-d^2 / 2 sigma^2) over its sum."""
    tables = {1: [1], 3: [64, 128], 5: [16, 64, 96], 7: [8, 28, 56, 72], 9: [4, 13, 30, 51, 60]}
    if size in tables:
        half = torch.tensor(tables[size], dtype=torch.float64)
        return torch.cat([half, half[:-1].flip(0)]) / half.sum().mul(2).sub(half[-1])
    d = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-d.square() / (2 * (0.3 * ((size - 1) * 0.5 - 1) + 0.8) ** 2))
    return weights / weights.sum()


def _blur(heatmap: Tensor, size: int) -> Tensor:
    """The same size; 0 outside the canvas."""
    half = size // 2
    weights = gaussian_kernel(size).tolist()
    for dim, pad in ((-2, (0, 0, half, half)), (-1, (half, half))):
        length, padded = heatmap.shape[dim], torch.nn.functional.pad(heatmap, pad)
        heatmap = torch.zeros_like(heatmap)
        for start, weight in enumerate(weights):
            heatmap = heatmap + weight * padded.narrow(dim, start, length)
    return heatmap


def _dark(
    heatmap: Tensor, x: Tensor, y: Tensor, score: Tensor, step: int, low: float, high: float, size: int
) -> Tensor:
    """-Hess^-1 grad of l = log clip(s b, low, high) at (x, y); 0 where it is refused. MMPose's formulas."""
    height, width = heatmap.shape[-2:]
    blurred = _blur(heatmap, size)
    scale = score / blurred.flatten(-2).amax(-1)
    log = (blurred * scale[..., None, None]).clamp(low, high).log().flatten(-2)
    inside = (x >= step) & (x < width - step) & (y >= step) & (y < height - step)
    usable = inside & (score > 0) & (scale > 0) & scale.isfinite()

    def at(dx: int, dy: int) -> Tensor:
        return log.gather(-1, torch.where(usable, (y + dy) * width + x + dx, 0).unsqueeze(-1)).squeeze(-1)

    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    xx = (at(step, 0) - 2 * at(0, 0) + at(-step, 0)) / step**2
    yy = (at(0, step) - 2 * at(0, 0) + at(0, -step)) / step**2
    if step == 2:
        xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    else:
        xy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    det = xx * yy - xy * xy
    regular = usable & (det.abs() > 4 * torch.finfo(det.dtype).eps * ((xx * yy).abs() + xy * xy))
    safe = torch.where(regular, det, 1.0)
    shift = torch.stack([xy * gy - yy * gx, xy * gx - xx * gy], -1) / safe.unsqueeze(-1)
    taken = regular & (shift.abs() <= 1.5).all(-1)
    return torch.where(taken.unsqueeze(-1), shift, 0.0)


def peak(heatmap: Tensor, refine: str = "none", *, kernel: int = 11) -> tuple[Tensor, Tensor]:
    """Highest pixel (lowest flat index among equals) and its value; points and score are NaN for a poisoned map.

    quarter_sign (HRNet): x + 1/4 sign(h[x+1] - h[x-1]) per axis, where both neighbours exist, sign(0) = 0.
    quarter_second: m + (s - m) / (4 |s - m|), s the highest of the 8 neighbours inside the canvas (lowest index among
    equals), unless all of them are -inf.
    dark (DARK), dark_udp (UDP): m - Hess^-1 grad of l = log clip(s b, low, high), b the map under a Gaussian blur that
    takes 0 outside the canvas, s = max h / max b; second differences of step 2, low 1e-10, high inf, or step 1, 1e-3, 50.
    Unmoved unless the stencil is on the canvas, h[m] > 0, the Hessian regular, and the step at most 1.5 on both axes.
    local: soft_argmax(window=2, beta=10); the score has no gradient.
    """
    height, width = heatmap.shape[-2:]
    flat = heatmap.flatten(-2)
    index = _first_maximum(heatmap)
    score = flat.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    x, y = index % width, index // width

    def at(dx: int, dy: int) -> tuple[Tensor, Tensor]:
        """The neighbour's value and whether it exists."""
        nx, ny = x + dx, y + dy
        exists = (nx >= 0) & (nx < width) & (ny >= 0) & (ny < height)
        value = flat.gather(-1, torch.where(exists, ny * width + nx, 0).unsqueeze(-1)).squeeze(-1)
        return value, exists

    points = torch.stack([x, y], -1).to(heatmap.dtype)
    if refine == "quarter_sign":
        shifts = []
        for dx, dy in ((1, 0), (0, 1)):
            (after, has_after), (before, has_before) = at(dx, dy), at(-dx, -dy)
            # Compared, not subtracted: -inf on both sides is a tie.
            sign = (after > before).to(heatmap.dtype) - (after < before).to(heatmap.dtype)
            shifts.append(torch.where(has_after & has_before, 0.25 * sign, 0.0))
        points = points + torch.stack(shifts, -1)
    elif refine == "quarter_second":
        best = torch.full_like(score, -torch.inf)
        shift = torch.zeros_like(points)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if dx == 0 and dy == 0:
                    continue
                value, exists = at(dx, dy)
                higher = exists & (value > best)
                best = torch.where(higher, value, best)
                step = torch.tensor([dx, dy], dtype=points.dtype, device=points.device) / (4 * math.hypot(dx, dy))
                shift = torch.where(higher.unsqueeze(-1), step, shift)
        points = points + shift
    elif refine == "dark":
        points = points + _dark(heatmap, x, y, score, 2, 1e-10, math.inf, kernel)
    elif refine == "dark_udp":
        points = points + _dark(heatmap, x, y, score, 1, 1e-3, 50.0, kernel)
    elif refine == "local":
        return soft_argmax(heatmap, 10.0, window=2), (score + _poisoned(heatmap)).detach()
    poison = _poisoned(heatmap)
    return points + poison.unsqueeze(-1), score + poison
