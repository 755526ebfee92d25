"""Rendering, soft-argmax and peaks of heatmaps.

B images, P landmarks, maps of H x W. Points are (x, y) in pixels of the map, 0-based, pixel centres at integers.
float32, float64, bfloat16 and float16; sums are held in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastforest.ops._checks import check_choice, check_number, check_same, check_size, check_tensor, compute_dtype
from fastforest.ops._register import op, register

__all__ = ["Peak", "peak", "render_gaussian", "soft_argmax"]

KERNELS = ("none", "quarter_sign", "quarter_second", "dark", "dark_udp")  # by the operator's number
REFINEMENTS = (*KERNELS, "local")
LOCAL_WINDOW, LOCAL_BETA = 2, 10.0


class Peak(NamedTuple):
    """points [B, P, 2] as (x, y) in pixels, score [B, P]."""

    points: Tensor
    score: Tensor


def render_gaussian(
    points: Tensor,
    sigma: float | Tensor,
    size: tuple[int, int],
    *,
    normalize: str = "peak",
    truncate: float | None = None,
) -> Tensor:
    """Gaussian heatmaps of landmarks: map(h) = exp(-|h - c|^2 / (2 sigma^2)).

    Args:
        points: [B, P, 2], (x, y) in pixels; may lie outside the canvas, or between pixels.
        sigma: width in pixels, above 0: a number, or a tensor [B, P].
        size: (H, W) of the maps, at least 1 each.
        normalize: "peak": 1 at the sub-pixel centre; "sum": each map sums to 1 over the visible canvas, after
            truncation (a centre far outside gives its mass to the nearest pixels).
        truncate: t: zero outside |h - round(c)| <= ceil(t sigma) on each axis (half to even). None: no truncation.

    Returns:
        [B, P, H, W] in the dtype of ``points``. All 0 where truncation leaves nothing on the canvas. All NaN where a
        point is not finite, or an element of a tensor ``sigma`` is not finite and above 0.

    Gradients flow to ``points`` and to a tensor ``sigma``; the truncation is held fixed. The backward reads the
    incoming gradient once and stores no other map. Not differentiable twice.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range. On CUDA, H + W > 2044.

    Deterministic, bit by bit; no synchronisation, CUDA-graph safe. Cost: one write of the maps; H + W
    exponentials a map.

    >>> maps = render_gaussian(torch.tensor([[[2.0, 1.0]]]), 1.0, (3, 4))
    >>> maps[0, 0, 1]
    tensor([0.1353, 0.6065, 1.0000, 0.6065])
    """
    name = "render_gaussian"
    check_tensor(name, "points", points, "[B, P, 2]")
    height, width = check_size(name, size)
    check_choice(name, "normalize", normalize, ("peak", "sum"))
    cut = -1.0 if truncate is None else check_number(name, "truncate", truncate, least=0)
    sigmas = None
    if isinstance(sigma, Tensor):
        check_tensor(name, "sigma", sigma, "[B, P]", like=points)
        check_same(name, "sigma's shape", list(sigma.shape), list(points.shape[:2]), "one for each point")
        sigmas, sigma = sigma.to(compute_dtype(points.dtype)), 1.0
    else:
        sigma = check_number(name, "sigma", sigma, above=0)
    if points.is_cuda and height + width > 2044:
        raise ValueError(f"{name}: H + W must be at most 2044 on CUDA, got {height + width}")
    return op("heatmap_render")(points, sigmas, sigma, height, width, normalize == "sum", cut)


def soft_argmax(
    heatmap: Tensor, beta: float | Tensor = 1.0, *, window: int | None = None, debias: bool = False
) -> Tensor:
    """Expected position under a softmax: x = sum_h p(h) h, p = softmax(beta z).

    Args:
        heatmap: z, [B, P, H, W]; any strides (channels_last is read as it stands).
        beta: inverse temperature, a finite number or a floating tensor of one element on the same device. A negative
            beta weighs the lowest values.
        window: r: only the square |h - m| <= r around the highest pixel m (lowest flat index among equals), clipped to
            the canvas. m is held fixed in the gradient. None: the whole canvas.
        debias: take out the pull of the background: pixels with z = 0 add 1 each to C = sum exp(beta z). With n the
            pixels and xbar the centre of the canvas (or window), x = (C x - n xbar) / (C - n); left alone unless C > n.

    Returns:
        [B, P, 2], (x, y) in pixels; float32, or float64 for float64. A map with NaN or +inf gives NaN, and so does one
        that is -inf all over; elsewhere -inf is a masked pixel. No map affects another.

    Gradients flow to ``heatmap`` (in its dtype and layout) and to a tensor ``beta``: dx/dz = beta p (h - x), computed
    from the position and two numbers a map; no softmax is stored. Not differentiable twice.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range; a map without pixels.

    Deterministic, bit by bit; no synchronisation, CUDA-graph safe. Cost: one read of the maps; backward one read and
    one write. Strides other than rows in order or landmarks innermost cost a copy on the CPU.

    >>> z = torch.zeros(1, 1, 3, 5)
    >>> z[0, 0, 1, 3] = 10.0
    >>> soft_argmax(z, beta=2.0)
    tensor([[[3., 1.]]])
    """
    name = "soft_argmax"
    _check_maps(name, heatmap)
    scale: Tensor | None = None
    if isinstance(beta, Tensor):
        if not beta.is_floating_point():
            raise TypeError(f"{name}: beta must be a number or a floating tensor, got {str(beta.dtype)[6:]}")
        check_same(name, "beta's device", beta.device, heatmap.device, "as heatmap")
        if beta.numel() != 1:
            raise ValueError(f"{name}: beta must be a number or a tensor of one element, got {list(beta.shape)}")
        scale, beta = beta.to(compute_dtype(heatmap.dtype)), 1.0
    else:
        beta = check_number(name, "beta", beta)
    check_window(name, window)
    return op("heatmap_soft_argmax")(heatmap, scale, beta, -1 if window is None else window, bool(debias))[0]


def peak(heatmap: Tensor, refine: str = "none", *, kernel: int = 11) -> Peak:
    """Highest pixel m of every map, moved between the pixels, and its value.

    Args:
        heatmap: h, [B, P, H, W]; any strides.
        refine: how m is moved.

            - "none": not at all.
            - "quarter_sign": a quarter pixel towards the higher of the two neighbours on each axis, where both exist and
              differ (HRNet).
            - "quarter_second": a quarter pixel towards the highest of the 8 neighbours on the canvas (lowest flat index
              among equals), unless all are -inf (Newell et al., Stacked Hourglass).
            - "dark": to the top of the parabola through l at m, ``m - Hess^-1 grad``, with differences of step 2:
              l = log max(s b, 1e-10), b = h under a Gaussian blur, s = max h / max b (Zhang et al., DARK).
            - "dark_udp": the same with differences of step 1 and l = log clip(s b, 1e-3, 50) (Huang et al., UDP).
            - "local": `soft_argmax` with window 2 and beta 10.
        kernel: of the blur of "dark" and "dark_udp", in pixels on each axis: odd, from 1 (no blur) to 63. Weights as in
            OpenCV: sigma = 0.3 ((kernel - 1) / 2 - 1) + 0.8, which is 2 at 11 and 3 at 17; binomial or tabulated up to 9.

    Borders: the blur takes 0 outside the canvas. "dark" leaves m where it is nearer than 2 pixels to the border,
    "dark_udp" on the border itself, and both where the peak is 0 or lower, the Hessian is singular to rounding, or the
    step would exceed 1.5 pixels on an axis. "local" clips its window to the canvas.

    Returns:
        Peak(points [B, P, 2], score [B, P]), float32 or float64 for float64; the lowest flat index wins among equals,
        so a map that is -inf all over has its peak at (0, 0) ("local": NaN). NaN for a map with NaN or +inf, and for that
        map alone.

    Not differentiable, but for "local": the gradient of its points is that of `soft_argmax`; its score has none.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or range; a map without pixels.

    Deterministic, bit by bit; no synchronisation, CUDA-graph safe. Cost: one read of the maps. Only the stencil is
    blurred: s is a constant of l and drops out of the differences, unless a clip acts. That takes a pixel of b in the
    stencil below the lower bound or a peak above 50; such a map alone is blurred whole, for the s of the formula.

    >>> points, score = peak(torch.tensor([[[[0.0, 0.1, 0.0, 0.0], [0.2, 0.9, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]]]]),
    ...                      refine="quarter_sign")
    >>> points, score
    (tensor([[[1.2500, 0.7500]]]), tensor([[0.9000]]))
    >>> peak(render_gaussian(torch.tensor([[[20.3, 11.6]]]), 2.0, (24, 32)), refine="dark_udp").points
    tensor([[[20.3000, 11.6000]]])
    """
    _check_maps("peak", heatmap)
    check_choice("peak", "refine", refine, REFINEMENTS)
    check_kernel("peak", kernel)
    if refine == "local":  # beta > 0: the highest logit is that of the peak
        points, normalizer, _ = op("heatmap_soft_argmax")(heatmap, None, LOCAL_BETA, LOCAL_WINDOW, False)
        return Peak(points, normalizer.detach()[..., 0])
    return Peak(*op("heatmap_peak")(heatmap, KERNELS.index(refine), kernel))


def check_window(name: str, window: object) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"{name}: window must be an int or None, got {type(window).__name__}")
    check_number(name, "window", window, least=0)


def check_kernel(name: str, kernel: object) -> None:
    if isinstance(kernel, bool) or not isinstance(kernel, int):
        raise TypeError(f"{name}: kernel must be an int, got {type(kernel).__name__}")
    if not (1 <= kernel <= 63 and kernel % 2):
        raise ValueError(f"{name}: kernel must be odd, from 1 to 63, got {kernel}")


def _check_maps(name: str, heatmap: object) -> None:
    maps = check_tensor(name, "heatmap", heatmap, "[B, P, H, W]")
    if 0 in maps.shape[2:]:
        raise ValueError(f"{name}: heatmap must have at least one pixel a map, got {list(maps.shape)}")
    if math.prod(maps.shape[2:]) >= 2**30:
        raise ValueError(f"{name}: heatmap must be below 2^30 pixels a map, got {list(maps.shape)}")


# No autocast rule: the kernels read low precision as it is and sum in float32.


def _render_fake(points: Tensor, sigmas: Any, sigma: Any, height: int, width: int, *_: Any) -> Tensor:
    return points.new_empty(points.shape[0], points.shape[1], height, width)


def _render_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    points, sigmas, sigma, _, _, normalized, truncate = inputs
    ctx.save_for_backward(points, sigmas)
    ctx.options = sigma, normalized, truncate


def _render_backward(ctx: Any, grad: Tensor) -> Any:
    points, sigmas = ctx.saved_tensors
    grad_points, grad_sigmas = op("heatmap_render_backward")(grad, points, sigmas, *ctx.options)
    return grad_points, None if sigmas is None else grad_sigmas, None, None, None, None, None


register("heatmap_render", fake=_render_fake, save=_render_save, backward=_render_backward, batch=(0, 1))
register(
    "heatmap_render_backward",
    fake=lambda grad, points, *_: (
        torch.empty_like(points, memory_format=torch.contiguous_format),
        points.new_empty(points.shape[:2], dtype=compute_dtype(points.dtype)),
    ),
    batch=(0, 1, 2),
)


def _soft_argmax_fake(heatmap: Tensor, scale: Any, beta: Any, window: int, debias: Any) -> tuple[Tensor, ...]:
    images, landmarks = heatmap.shape[:2]
    dtype = compute_dtype(heatmap.dtype)
    return (
        heatmap.new_empty(images, landmarks, 2, dtype=dtype),
        heatmap.new_empty(images, landmarks, 2, dtype=dtype),
        heatmap.new_empty(images, 0 if window < 0 else landmarks, dtype=torch.int32),
    )


def _soft_argmax_save(ctx: Any, inputs: Any, output: Any) -> None:
    heatmap, scale, *ctx.options = inputs
    points, normalizer, index = output
    ctx.mark_non_differentiable(normalizer, index)
    ctx.save_for_backward(heatmap, scale, points, normalizer, index)


def _soft_argmax_backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    heatmap, scale, points, normalizer, index = ctx.saved_tensors
    needs_beta = scale is not None and ctx.needs_input_grad[1]
    grad_heatmap, grad_beta = op("heatmap_soft_argmax_backward")(
        grad, heatmap, scale, *ctx.options, points, normalizer, index, needs_beta
    )
    return grad_heatmap, grad_beta.sum().reshape(scale.shape) if needs_beta else None, None, None, None


register(
    "heatmap_soft_argmax",
    fake=_soft_argmax_fake,
    save=_soft_argmax_save,
    backward=_soft_argmax_backward,
    batch=(0,),
)
register(
    "heatmap_soft_argmax_backward",
    fake=lambda grad, heatmap, scale, beta, window, debias, points, normalizer, index, needs_beta: (
        torch.empty_like(heatmap),
        points.new_empty(heatmap.shape[0], heatmap.shape[1] if needs_beta else 0),
    ),
    batch=(0, 1, 6, 7, 8),
)
register(
    "heatmap_peak",
    fake=lambda heatmap, refine, kernel: (
        heatmap.new_empty(*heatmap.shape[:2], 2, dtype=compute_dtype(heatmap.dtype)),
        heatmap.new_empty(heatmap.shape[:2], dtype=compute_dtype(heatmap.dtype)),
    ),
    batch=(0,),
)
