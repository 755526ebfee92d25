"""Room `heatmap`: the contract, and what its formulas promise."""

from __future__ import annotations

import doctest
import math

import contract
import dsntnn
import kornia
import numpy as np
import pytest
import torch
from contract import Case, Operator
from scipy import ndimage
from torch import Tensor

from fastforest import coordinates
from fastforest.ops import heatmap as ops
from fastforest.ops._register import op
from fastforest.reference import heatmap as reference

# A gradient of exactly 0 (a map of one pixel, a window of radius 0) is held against the size that gradients have.
RENDER = Operator(
    ops.render_gaussian, reference.render_gaussian, ("points", "sigma"), scale={"points": 1e-3, "sigma": 1e-3}
)
SOFT_ARGMAX = Operator(ops.soft_argmax, reference.soft_argmax, ("heatmap",), scale={"heatmap": 1e-1, "beta": 1e1})
PEAK = Operator(ops.peak, reference.peak, ("heatmap",), scale={"heatmap": 1e-1})


def maps(*shape: int):
    return lambda g: {"heatmap": torch.rand(shape, generator=g, dtype=torch.float64)}


def maps_and_beta(*shape: int, beta: float):
    return lambda g: maps(*shape)(g) | {"beta": torch.tensor(beta, dtype=torch.float64)}


def points(images: int, landmarks: int, height: int, width: int, sigma: bool = False):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        """Up to a fifth of the canvas outside it."""
        at = torch.rand(images, landmarks, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
        made = {"points": at * torch.tensor([width, height])}
        if sigma:
            made["sigma"] = 0.7 + torch.rand(images, landmarks, generator=g, dtype=torch.float64)
        return made

    return make


ALL_POINTS = ("points",)
RENDER_CASES = [
    Case("one-pixel", points(1, 1, 1, 1), {"sigma": 1.5, "size": (1, 1)}, ALL_POINTS),
    Case("aligned", points(2, 3, 16, 32), {"sigma": 2.0, "size": (16, 32)}, ALL_POINTS),
    Case("sigma", points(2, 3, 7, 13, True), {"size": (7, 13)}, ("points", "sigma")),
    Case("sum", points(2, 3, 7, 13, True), {"size": (7, 13), "normalize": "sum"}, ("points", "sigma")),
    Case("cut", points(2, 3, 17, 19, True), {"size": (17, 19), "truncate": 2.5}, ("points", "sigma")),
    Case(
        "cut-sum",
        points(3, 5, 17, 19, True),
        {"size": (17, 19), "truncate": 1, "normalize": "sum"},
        ("points", "sigma"),
    ),
    # Windows of the last cells, whose vectors reach past the map.
    Case(
        "cut-edge",
        lambda g: {
            "points": torch.tensor([[[19.2, 3.0], [18.9, 17.2], [-0.4, 16.8]]], dtype=torch.float64),
            "sigma": 0.8 + torch.rand(1, 3, generator=g, dtype=torch.float64) / 5,
        },
        {"size": (17, 19), "truncate": 2, "normalize": "sum"},
        ("points", "sigma"),
    ),
]
SOFT_ARGMAX_CASES = [
    Case("one-pixel", maps(1, 1, 1, 1), {"beta": 10.0}, ("heatmap",)),
    Case("aligned", maps(2, 3, 16, 32), {"beta": 10.0}, ("heatmap",)),
    Case("large", maps(1, 1, 40, 26), {"beta": 10.0}, ("heatmap",)),
    Case("beta", maps_and_beta(2, 3, 7, 13, beta=10.0), {}, ("heatmap", "beta")),
    Case("negative-beta", maps_and_beta(2, 3, 7, 13, beta=-4.0), {}, ("heatmap", "beta")),
    Case("debias", maps_and_beta(2, 3, 7, 13, beta=5.0), {"debias": True}, ("heatmap", "beta")),
    Case("window", maps_and_beta(2, 3, 17, 19, beta=10.0), {"window": 2}, ("heatmap", "beta")),
    Case("window-0", maps(2, 3, 5, 7), {"window": 0}, ("heatmap",)),
    Case("window-debias", maps_and_beta(2, 3, 17, 19, beta=10.0), {"window": 3, "debias": True}, ("heatmap", "beta")),
]
PEAK_CASES = [
    Case(f"{refine}-{h}x{w}", maps(2, 5, h, w), {"refine": refine}, ("heatmap",) if refine == "local" else ())
    for refine in ops.REFINEMENTS
    for h, w in ((1, 1), (7, 13), (40, 26))
] + [
    Case("dark_udp-kernel-3", maps(2, 5, 7, 13), {"refine": "dark_udp", "kernel": 3}),
    Case("dark-kernel-25", maps(2, 5, 16, 16), {"refine": "dark", "kernel": 25}),
]
EVERY = (
    [(RENDER, c) for c in RENDER_CASES]
    + [(SOFT_ARGMAX, c) for c in SOFT_ARGMAX_CASES]
    + [(PEAK, c) for c in PEAK_CASES]
)


def name(value: object) -> str:
    return (
        value.id if isinstance(value, Case) else value.function.__name__ if isinstance(value, Operator) else str(value)
    )


every = pytest.mark.parametrize("operator, case", EVERY, ids=name)
differentiable = pytest.mark.parametrize("operator, case", [(o, c) for o, c in EVERY if c.differentiable], ids=name)
chosen = pytest.mark.parametrize(
    "operator, case", [(RENDER, RENDER_CASES[5]), (SOFT_ARGMAX, SOFT_ARGMAX_CASES[5]),
                       (SOFT_ARGMAX, SOFT_ARGMAX_CASES[6]), (PEAK, PEAK_CASES[7]),
                       (PEAK, PEAK_CASES[10]), (PEAK, PEAK_CASES[14]), (PEAK, PEAK_CASES[17])], ids=name)  # fmt: skip


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_agreement(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_agreement(operator, case, backend, dtype)


@differentiable
def test_contract_gradcheck(operator: Operator, case: Case, backend: str) -> None:
    contract.check_gradcheck(operator, case, backend)


@every
def test_contract_strides(operator: Operator, case: Case, backend: str) -> None:
    contract.check_strides(operator, case, backend)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
@chosen
def test_contract_strides_low(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_strides(operator, case, backend, dtype)


@chosen
def test_contract_repeatable(operator: Operator, case: Case, backend: str) -> None:
    contract.check_repeatable(operator, case, backend)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_soiled_memory(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    contract.check_soiled_memory(operator, case, backend, dtype)


@chosen
def test_contract_empty(operator: Operator, case: Case, backend: str) -> None:
    contract.check_empty(operator, case, backend)


@chosen
def test_contract_rows_apart(operator: Operator, case: Case, backend: str) -> None:
    bad = "points" if operator is RENDER else "heatmap"
    contract.check_rows_apart(operator, case, backend, bad, (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(rerun_under, isa: str) -> None:
    rerun_under(isa, __file__, "test_contract and cpu or values")


@chosen
def test_compile(operator: Operator, case: Case) -> None:
    contract.check_compile(operator, case)


@chosen
def test_vmap(operator: Operator, case: Case, backend: str) -> None:
    contract.check_vmap(operator, case, backend)


@chosen
def test_autocast(operator: Operator, case: Case, backend: str) -> None:
    contract.check_autocast(operator, case, backend, same=True)


def test_opcheck(backend: str) -> None:
    with contract.on(backend) as device:
        at = torch.rand(2, 3, 2, device=device, requires_grad=True)
        sigma = torch.rand(2, 3, device=device).add(0.5).requires_grad_()
        z = torch.rand(2, 3, 5, 7, device=device, requires_grad=True)
        beta = torch.tensor(3.0, device=device, requires_grad=True)
        # The shim wears the CPU's key: its gradient operators are reached through the forward ones.
        contract.check_opcheck(op("heatmap_render").default, at, sigma, 1.0, 5, 7, True, 2.0)
        contract.check_opcheck(op("heatmap_soft_argmax").default, z, beta, 1.0, -1, True)
        contract.check_opcheck(op("heatmap_soft_argmax").default, z, None, 2.0, 1, False)
        contract.check_opcheck(op("heatmap_peak").default, z.detach(), 1, 11)
        contract.check_opcheck(op("heatmap_peak").default, z.detach(), 4, 3)


# values


def test_values_render(backend: str) -> None:
    with contract.on(backend) as device:
        at = torch.tensor([[[3.0, 2.0], [2.5, 1.5], [-40.0, 1.0], [900.0, 1.0], [math.nan, 1.0]]], device=device)
        whole = ops.render_gaussian(at, 1.0, (5, 7), normalize="sum")[0]
        torch.testing.assert_close(whole[:4].sum((-2, -1)), torch.ones(4, device=device))
        assert whole[2, :, 0].sum() > 0.999  # all its mass on the nearest column
        assert whole[4].isnan().all()
        far = torch.tensor([[[3e6, 3.0], [-1e9, 2.0]]], device=device)  # where float32 no longer tells pixels apart
        away = ops.render_gaussian(far, 2.0, (6, 6), normalize="sum")[0]
        torch.testing.assert_close(away[0, :, 5].sum() + away[1, :, 0].sum(), torch.tensor(2.0, device=device))
        cut = ops.render_gaussian(at, 1.0, (5, 7), normalize="sum", truncate=1.0)[0]
        assert cut[2].eq(0).all() and cut[3].eq(0).all()
        # round half to even: 2.5 -> 2, 1.5 -> 2
        assert cut[1].nonzero().amin(0).tolist() == [1, 1] and cut[1].nonzero().amax(0).tolist() == [3, 3]
        assert ops.render_gaussian(at, 1.0, (5, 7))[0, 0].amax() == 1
        bad = ops.render_gaussian(at[:, :3], torch.tensor([[1.0, 0.0, math.inf]], device=device), (5, 7))[0]
        assert bad[0].isfinite().all() and bad[1:].isnan().all()


def test_values_soft_argmax(backend: str) -> None:
    with contract.on(backend) as device:
        z = torch.zeros(1, 6, 5, 8, device=device)
        z[0, 1] = 7e4  # huge and all equal
        z[0, 2, 3, 6] = 1e5
        z[0, 3] = -math.inf
        z[0, 4] = -math.inf
        z[0, 4, 1, 2] = 1.0
        z[0, 5, 0, 0] = math.inf
        for layout in (z, z.contiguous(memory_format=torch.channels_last)):
            got = ops.soft_argmax(layout.requires_grad_(), 10.0)
            torch.testing.assert_close(got[0, :2], torch.tensor([[3.5, 2.0]] * 2, device=device))
            torch.testing.assert_close(got[0, 2], torch.tensor([6.0, 3.0], device=device))
            torch.testing.assert_close(got[0, 4], torch.tensor([2.0, 1.0], device=device))
            assert got[0, 3].isnan().all() and got[0, 5].isnan().all()
            (grad,) = torch.autograd.grad(got[0, [0, 1, 2, 4]].sum(), layout)
            assert grad[0, [0, 1, 2, 4]].isfinite().all()
            # a NaN outside the window poisons its own map, and a tie goes to the lowest index
            y = layout.detach().clone()
            y[0, 1, 4, 7] = math.nan
            windowed = ops.soft_argmax(y, 10.0, window=1)[0]
            torch.testing.assert_close(windowed[0], torch.tensor([0.5, 0.5], device=device))
            assert windowed[1].isnan().all()


def test_values_debias(backend: str) -> None:
    """A peak on a zero background: the pull towards the centre is taken out whole; without mass nothing changes."""
    with contract.on(backend) as device:
        z = torch.zeros(1, 2, 9, 11, device=device, dtype=torch.float64)
        z[0, 0, 2, 8] = 1.0
        pulled, free = ops.soft_argmax(z, 2.0), ops.soft_argmax(z, 2.0, debias=True)
        assert (pulled[0, 0] - torch.tensor([8.0, 2.0], device=device)).abs().max() > 1
        torch.testing.assert_close(free[0, 0], torch.tensor([8.0, 2.0], device=device, dtype=torch.float64))
        torch.testing.assert_close(free[0, 1], pulled[0, 1])


def test_values_peak(backend: str) -> None:
    inf = math.inf
    with contract.on(backend) as device:
        z = torch.full((1, 6, 3, 4), -inf)
        z[0, 1, 1, 1] = z[0, 1, 1, 3] = 5.0  # a tie, and neighbours that are all -inf
        z[0, 2] = 0.0
        z[0, 2, 1, 1], z[0, 2, 1, 2], z[0, 2, 0, 1], z[0, 2, 2, 1] = 5.0, 3.0, 2.0, 2.0
        z[0, 3, 0, 0], z[0, 3, 0, 1], z[0, 3, 1, 1] = 5.0, 1.0, 4.0  # in a corner
        z[0, 4, 2, 2] = math.nan
        z[0, 5, 2, 2] = inf
        d = 0.25 / math.sqrt(2)
        expected = {
            "none": [[0, 0], [1, 1], [1, 1], [0, 0]],
            "quarter_sign": [[0, 0], [1, 1], [1.25, 1], [0, 0]],
            "quarter_second": [[0, 0], [1, 1], [1.25, 1], [d, d]],
        }
        for refine, want in expected.items():
            for layout in (z, z.contiguous(memory_format=torch.channels_last)):
                got = ops.peak(layout.to(device), refine)
                torch.testing.assert_close(got.points[0, :4].cpu(), torch.tensor(want, dtype=torch.float32))
                assert got.score[0, :4].tolist() == [-inf, 5.0, 5.0, 5.0]
                assert got.points[0, 4:].isnan().all() and got.score[0, 4:].isnan().all()


def oracle_dark(heatmap: np.ndarray, udp: bool, size: int) -> np.ndarray:
    """One map in float64, blurred whole: DARK (Zhang et al.) and its form in UDP (Huang et al.), with our refusals."""
    if size > 9:
        d = np.arange(size) - size // 2
        taps = np.exp(-(d**2) / (2 * (0.3 * ((size - 1) * 0.5 - 1) + 0.8) ** 2))
    else:  # Pascal's triangle up to 5; OpenCV's tables
        taps = np.array(
            {1: [1], 3: [1, 2, 1], 5: [1, 4, 6, 4, 1], 7: [8, 28, 56, 72, 56, 28, 8],
             9: [4, 13, 30, 51, 60, 51, 30, 13, 4]}[size], dtype=float)  # fmt: skip
    taps /= taps.sum()
    (line, column), (height, width) = np.unravel_index(heatmap.argmax(), heatmap.shape), heatmap.shape
    peak = np.array([column, line], dtype=float)
    step = 1 if udp else 2
    if not (step <= column < width - step and step <= line < height - step) or heatmap.max() <= 0:
        return peak
    blurred = ndimage.correlate1d(ndimage.correlate1d(heatmap, taps, 0, mode="constant"), taps, 1, mode="constant")
    if blurred.max() <= 0:
        return peak
    log = np.log(np.clip(blurred * (heatmap.max() / blurred.max()), *((1e-3, 50) if udp else (1e-10, None))))

    def at(dx: int, dy: int) -> float:
        return log[line + dy, column + dx]

    gradient = np.array([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)]) / 2
    xx = (at(step, 0) + at(-step, 0) - 2 * at(0, 0)) / step**2
    yy = (at(0, step) + at(0, -step) - 2 * at(0, 0)) / step**2
    if udp:
        xy = (at(1, 1) + at(-1, -1) + 2 * at(0, 0) - at(1, 0) - at(-1, 0) - at(0, 1) - at(0, -1)) / 2
    else:
        xy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    hessian = np.array([[xx, xy], [xy, yy]])
    if abs(np.linalg.det(hessian)) < 1e-12:
        return peak
    shift = -np.linalg.solve(hessian, gradient)
    return peak + shift if abs(shift).max() <= 1.5 else peak


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11, 17])
@pytest.mark.parametrize("refine", ["dark", "dark_udp"])
def test_values_dark(backend: str, refine: str, kernel: int) -> None:
    """Gaussians all over the canvas and beyond its border, clipped ones, ones on a negative ground, ridges."""
    g = torch.Generator().manual_seed(0)
    at = torch.rand(1, 24, 2, generator=g, dtype=torch.float64) * torch.tensor([23.0, 19.0]) - 0.5
    z = reference.render_gaussian(at, 2.0, (19, 23)) + 0.02 * torch.randn(1, 24, 19, 23, generator=g).double()
    z[0, 8:12] *= 1e-3  # below the floor of dark_udp in part
    z[0, 12:15] *= 200.0  # above its ceiling
    z[0, 15:18] -= 0.7  # negative but for the peak
    z[0, 18] -= 2.0
    z[0, 19] = 0.0
    z[0, 20] *= 1e-11  # below the floor of dark
    z[0, 21, :, 3:8] = -math.inf  # masked
    z[0, 22] = torch.arange(23).sub(11).square().mul(-0.1).exp()  # a ridge: its Hessian is singular
    z[0, 23, 4:9, 4:9] = 40.0  # a plateau: the step is long
    expected = np.stack([oracle_dark(m, refine == "dark_udp", kernel) for m in z[0].numpy()])
    with contract.on(backend) as device:
        for layout in (torch.contiguous_format, torch.channels_last):
            given = z.to(device).contiguous(memory_format=layout)
            got = ops.peak(given, refine, kernel=kernel)
            np.testing.assert_allclose(got.points[0].cpu().numpy(), expected, rtol=0, atol=1e-8)
            torch.testing.assert_close(got.score.cpu(), z.amax((-2, -1)), rtol=0, atol=0)
            single = ops.peak(given.float(), refine, kernel=kernel).points[0].cpu().numpy()
            # The last maps turn on roundings: Hessians that are singular, steps of almost 1.5 pixels.
            np.testing.assert_allclose(single[:18], expected[:18], rtol=0, atol=5e-5)


def test_values_quarter_borders(backend: str) -> None:
    """The peak on every pixel: an axis needs both neighbours for the sign; the second-highest is on the canvas."""
    height, width = 4, 5
    z = torch.rand(height, width, height, width, generator=torch.Generator().manual_seed(0))
    for y in range(height):
        for x in range(width):
            z[y, x, y, x] = 2.0
    with contract.on(backend) as device:
        sign = ops.peak(z.to(device), "quarter_sign").points.cpu()
        second = ops.peak(z.to(device), "quarter_second").points.cpu()
    for y in range(height):
        for x in range(width):
            m, at = z[y, x], torch.tensor([x, y])
            dx = 0.25 * torch.sign(m[y, x + 1] - m[y, x - 1]) if 0 < x < width - 1 else 0.0
            dy = 0.25 * torch.sign(m[y + 1, x] - m[y - 1, x]) if 0 < y < height - 1 else 0.0
            assert sign[y, x].tolist() == [x + dx, y + dy]
            near = [
                (j, i)
                for j in range(max(0, y - 1), min(height, y + 2))
                for i in range(max(0, x - 1), min(width, x + 2))
            ]
            j, i = max((n for n in near if n != (y, x)), key=lambda n: float(m[n]))
            step = torch.tensor([i, j]) - at
            torch.testing.assert_close(second[y, x], at + 0.25 * step / step.float().norm())


@pytest.mark.parametrize("refine, step", [("dark", 2), ("dark_udp", 1)])
def test_values_dark_borders(backend: str, refine: str, step: int) -> None:
    """A lopsided spot on every pixel: refined where the stencil is on the canvas, and as the oracle says."""
    height, width = 7, 8
    with contract.on(backend) as device:
        z = torch.zeros(height, width, height, width, dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                z[y, x, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 0.5
                z[y, x, y : y + 2, x : x + 2] = 0.8
                z[y, x, y, x] = 1.0
        got = ops.peak(z.to(device), refine).points.cpu().numpy()
    for y in range(height):
        for x in range(width):
            inside = step <= x < width - step and step <= y < height - step
            np.testing.assert_allclose(got[y, x], oracle_dark(z[y, x].numpy(), step == 1, 11), rtol=0, atol=1e-9)
            assert (got[y, x] != [x, y]).any() == inside, (x, y)


def test_values_dark_poisoned(backend: str) -> None:
    with contract.on(backend) as device:
        z = reference.render_gaussian(torch.full((1, 4, 2), 8.3), 2.0, (16, 16)).to(device)
        alone = ops.peak(z, "dark_udp").points[0, 0].clone()
        z[0, 1, 8, 9], z[0, 2, 8, 9], z[0, 3] = math.nan, math.inf, -math.inf
        for refine in ("dark", "dark_udp", "local"):
            points, score = ops.peak(z, refine)
            assert points[0, 1:3].isnan().all() and score[0, 1:3].isnan().all()
            assert points[0, 0].isfinite().all() and score[0, 3] == -math.inf
            assert points[0, 3].isnan().all() if refine == "local" else points[0, 3].eq(0).all()
        assert torch.equal(ops.peak(z, "dark_udp").points[0, 0], alone)


def test_values_decoding_error(backend: str) -> None:
    """Mean error in pixels on maps of sigma 2 with noise of 0.02, away from the border."""
    g = torch.Generator().manual_seed(0)
    at = 8 + 48 * torch.rand(4, 68, 2, generator=g)
    z = reference.render_gaussian(at, 2.0, (64, 64)) + 0.02 * torch.randn(4, 68, 64, 64, generator=g)
    if backend == "shim":
        at, z = at[:1, :16], z[:1, :16]
    with contract.on(backend) as device:
        for refine, most in (("dark", 0.022), ("dark_udp", 0.021), ("local", 0.055), ("quarter_sign", 0.25)):
            error = (ops.peak(z.to(device), refine).points.cpu() - at).norm(dim=-1).mean().item()
            assert error <= most, (refine, error)


def test_values_window_borders(backend: str) -> None:
    """The peak on every pixel: the window is clipped to the canvas; points and gradients."""
    height, width = 4, 6
    g = torch.Generator().manual_seed(0)
    z = torch.rand(height, width, height, width, generator=g, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            z[y, x, y, x] = 1.5
    upstream = torch.randn(height, width, 2, generator=g, dtype=torch.float64)
    with contract.on(backend) as device:
        for window in (0, 1, 2, 5):
            given = z.to(device).requires_grad_()
            got = ops.soft_argmax(given, 4.0, window=window)
            (grad,) = torch.autograd.grad(got, given, upstream.to(device))
            exact = z.clone().requires_grad_()
            want = reference.soft_argmax(exact, 4.0, window=window)
            (want_grad,) = torch.autograd.grad(want, exact, upstream)
            torch.testing.assert_close(got.detach().cpu(), want.detach())
            torch.testing.assert_close(grad.cpu(), want_grad)
            outside = (torch.arange(width) - torch.arange(width)[:, None]).abs() > window  # [x of the peak, x]
            assert grad.cpu().sum(0).sum(1)[outside].eq(0).all()


def test_local_score_has_no_gradient() -> None:
    z = torch.rand(1, 2, 6, 6, requires_grad=True)
    points, score = ops.peak(z, "local")
    assert points.requires_grad and not score.requires_grad
    torch.testing.assert_close(score, z.detach().amax((-2, -1)), rtol=0, atol=0)
    assert torch.equal(points, ops.soft_argmax(z, 10.0, window=2))


# other libraries


def test_values_kornia() -> None:
    z = torch.randn(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    subpix = kornia.geometry.subpix
    softmax = subpix.spatial_softmax2d(z)
    pixels = subpix.spatial_expectation2d(softmax, normalized_coordinates=False)
    corners = subpix.spatial_expectation2d(softmax, normalized_coordinates=True)
    torch.testing.assert_close(ops.soft_argmax(z), pixels)
    torch.testing.assert_close(coordinates.to_corner_aligned(ops.soft_argmax(z), (9, 14)), corners)
    at = torch.tensor([[[4.3, 2.2], [11.8, 7.5]]], dtype=torch.float64)
    std = torch.full_like(at, 1.5)
    drawn = subpix.render_gaussian2d(at.flatten(0, 1), std.flatten(0, 1), (9, 14), normalized_coordinates=False)
    torch.testing.assert_close(
        ops.render_gaussian(at, 1.5, (9, 14), normalize="sum").flatten(0, 1), drawn.view(2, 9, 14)
    )


def test_values_dsntnn() -> None:
    z = torch.randn(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = dsntnn.dsnt(dsntnn.flat_softmax(z))
    torch.testing.assert_close(coordinates.to_pixel_centred(ops.soft_argmax(z), (9, 14)), theirs)
    at = torch.tensor([[[4.3, 2.2], [11.8, 7.5]]], dtype=torch.float64)
    drawn = dsntnn.make_gauss(coordinates.to_pixel_centred(at, (9, 14)), (9, 14), 1.5)
    torch.testing.assert_close(ops.render_gaussian(at, 1.5, (9, 14), normalize="sum"), drawn, rtol=1e-6, atol=1e-6)


# layouts and sizes


def test_values_many_landmarks() -> None:
    """Chunks of landmarks-innermost maps: their last vectors overlap, and threads share an image."""
    for landmarks in (1, 5, 33, 68, 300):
        z = torch.rand(2, landmarks, 4, 6)
        last = z.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ops.soft_argmax(last, 9.0), ops.soft_argmax(z, 9.0))
        torch.testing.assert_close(ops.peak(last, "quarter_sign"), ops.peak(z, "quarter_sign"), rtol=0, atol=0)


def test_gradient_keeps_the_layout() -> None:
    z = torch.rand(2, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(ops.soft_argmax(z, 2.0).sum(), z)
    assert grad.stride() == z.stride()


@pytest.mark.parametrize("backend", ["cpu"])
def test_beyond_31_bits(backend: str) -> None:
    z = contract.far_view((2, 1, 3, 5), torch.float16)
    z[1, 0, 2, 3] = 9.0
    assert ops.peak(z).points[1, 0].tolist() == [3, 2]
    torch.testing.assert_close(ops.soft_argmax(z, 10.0)[1, 0], torch.tensor([3.0, 2.0]))


def test_beyond_31_bits_of_maps() -> None:
    """2^31 pixels and more in one tensor: the batch is one image over and over, which takes no memory."""
    at = torch.tensor([[[20.4, 31.7], [50.2, 8.9]]]).repeat(1, 8, 1)
    z = ops.render_gaussian(at, 2.0, (128, 128)).bfloat16()
    images = 2**31 // z.numel() + 1
    many = z.expand(images, -1, -1, -1)
    assert many.numel() > 2**31
    for refine in ("dark_udp", "local"):
        one, all_of_them = ops.peak(z, refine), ops.peak(many, refine)
        assert torch.equal(all_of_them.points, one.points.expand(images, -1, -1))
        assert torch.equal(all_of_them.score, one.score.expand(images, -1))


Z, AT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2)
ERRORS = [
    (lambda: ops.soft_argmax([1.0]), TypeError, r"soft_argmax: heatmap must be a tensor \[B, P, H, W\], got list"),
    (lambda: ops.soft_argmax(Z[0]), ValueError, r"soft_argmax: heatmap must be \[B, P, H, W\], got \[3, 4, 5\]"),
    (lambda: ops.soft_argmax(Z.int()), TypeError, "soft_argmax: heatmap must be float32.*got int32"),
    (lambda: ops.soft_argmax(Z[:, :, :0]), ValueError, r"at least one pixel a map, got \[2, 3, 0, 5\]"),
    (lambda: ops.soft_argmax(Z, "x"), TypeError, "soft_argmax: beta must be a number, got str"),
    (lambda: ops.soft_argmax(Z, math.nan), ValueError, "soft_argmax: beta must be finite, got nan"),
    (
        lambda: ops.soft_argmax(Z, torch.ones(2)),
        ValueError,
        r"beta must be a number or a tensor of one element, got \[2\]",
    ),
    (lambda: ops.soft_argmax(Z, torch.ones((), dtype=torch.int64)), TypeError, "beta must be.*got int64"),
    (lambda: ops.soft_argmax(Z, torch.ones((), device="meta")), ValueError, "beta's device must be cpu.*got meta"),
    (lambda: ops.soft_argmax(Z, window=-1), ValueError, "soft_argmax: window must be at least 0, got -1"),
    (lambda: ops.soft_argmax(Z, window=1.5), TypeError, "soft_argmax: window must be an int or None, got float"),
    (lambda: ops.peak(Z, "taylor"), ValueError, "peak: refine must be one of 'none'.*'local', got 'taylor'"),
    (lambda: ops.peak(Z, kernel=4), ValueError, "peak: kernel must be odd, from 1 to 63, got 4"),
    (lambda: ops.peak(Z, kernel=65), ValueError, "peak: kernel must be odd, from 1 to 63, got 65"),
    (lambda: ops.peak(Z, kernel=11.0), TypeError, "peak: kernel must be an int, got float"),
    (lambda: ops.peak(Z[0]), ValueError, r"peak: heatmap must be \[B, P, H, W\], got \[3, 4, 5\]"),
    (lambda: ops.render_gaussian(AT[..., :1], 1.0, (4, 4)), ValueError, r"points must be \[B, P, 2\], got \[2, 3, 1\]"),
    (lambda: ops.render_gaussian(AT, 0, (4, 4)), ValueError, "render_gaussian: sigma must be above 0, got 0"),
    (
        lambda: ops.render_gaussian(AT, torch.ones(2, 4), (4, 4)),
        ValueError,
        r"sigma's shape must be \[2, 3\].*got \[2, 4\]",
    ),
    (lambda: ops.render_gaussian(AT, 1.0, (4,)), TypeError, r"render_gaussian: size must be \(H, W\), got \(4,\)"),
    (lambda: ops.render_gaussian(AT, 1.0, (0, 4)), ValueError, "render_gaussian: H of size must be at least 1, got 0"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4.0)), TypeError, "render_gaussian: W of size must be an int, got float"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4), normalize="max"), ValueError, "normalize must be one of.*got 'max'"),
    (lambda: ops.render_gaussian(AT, 1.0, (4, 4), truncate=-1), ValueError, "truncate must be at least 0, got -1"),
    (lambda: ops.peak(Z.requires_grad_(True)).score.sum().backward(), RuntimeError, "peak cannot be differentiated"),
    (
        lambda: torch.ops.fastforest.heatmap_peak(Z[0], 0, 11),
        RuntimeError,
        r"peak: heatmap must be \[B, P, H, W\], got \[3",
    ),
    (
        lambda: torch.ops.fastforest.heatmap_peak(Z, 3, 10),
        RuntimeError,
        "peak: kernel must be odd, from 1 to 63, got 10",
    ),
]


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    contract.check_error(call, kind, pattern)


def test_twice_differentiated_is_refused() -> None:
    z = torch.rand(1, 1, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.soft_argmax(z).sum(), z, create_graph=True)
    contract.check_error(lambda: grad.sum().backward(), RuntimeError, "soft_argmax cannot be differentiated twice")


def test_docstrings() -> None:
    result = doctest.testmod(ops, extraglobs={"torch": torch})
    assert result.attempted >= 5 and result.failed == 0
