"""soft_argmax, peak and render_gaussian against eager PyTorch and torch.compile."""

from __future__ import annotations

import rivals
import torch
from conftest import DEVICE, Bench

import fastforest as ff
from fastforest.reference import heatmap as exact

BETA, SIGMA = 10.0, 2.0
MAPS = (64, 68, 64, 64)


def grid_of(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1).float().to(DEVICE)


def test_soft_argmax_forward(bench: Bench) -> None:
    heatmap, grid = torch.rand(MAPS, device=DEVICE), grid_of(*MAPS[2:])
    forms = {
        "gemm": rivals.soft_argmax_gemm,
        "marginals": rivals.soft_argmax_marginals,
        "unnormalised": rivals.soft_argmax_unnormalised,
    }
    contenders = {}
    for name, form in forms.items():
        compiled = torch.compile(form)
        contenders[f"eager {name}"] = lambda form=form: form(heatmap, BETA, grid)
        contenders[f"compile {name}"] = lambda form=compiled: form(heatmap, BETA, grid)
    with torch.no_grad():
        bench.compare(
            str(MAPS),
            "soft_argmax forward",
            lambda: ff.soft_argmax(heatmap, BETA),
            contenders,
            bars={"eager": 10, "compile": 6},
            moved_bytes=4 * heatmap.numel(),
            flops=7 * heatmap.numel(),
            exact=lambda: exact.soft_argmax(heatmap.double(), BETA),
        )
    torch._dynamo.reset()


def test_soft_argmax_backward(bench: Bench) -> None:
    heatmap, grid = torch.rand(MAPS, device=DEVICE, requires_grad=True), grid_of(*MAPS[2:])
    upstream = torch.randn(*MAPS[:2], 2, device=DEVICE)

    def gradient(form, *args):
        return lambda: torch.autograd.grad(form(heatmap, BETA, *args), heatmap, upstream)[0]

    def reference():
        h = heatmap.detach().double().requires_grad_()
        return torch.autograd.grad(exact.soft_argmax(h, BETA), h, upstream.double())[0]

    contenders = {}
    for form in (rivals.soft_argmax_gemm, rivals.soft_argmax_marginals, rivals.soft_argmax_unnormalised):
        name = form.__name__.removeprefix("soft_argmax_")
        contenders[f"eager {name}"] = gradient(form, grid)
        contenders[f"compile {name}"] = gradient(torch.compile(form), grid)
    bench.compare(
        str(MAPS),
        "soft_argmax forward + backward",
        gradient(ff.soft_argmax),
        contenders,
        bars={"eager": 10, "compile": 5},
        moved_bytes=12 * heatmap.numel(),
        flops=14 * heatmap.numel(),
        exact=reference,
    )
    torch._dynamo.reset()


def test_peak(bench: Bench) -> None:
    heatmap = torch.rand(MAPS, device=DEVICE)
    compiled = torch.compile(rivals.quarter_sign)
    with torch.no_grad():
        bench.compare(
            str(MAPS),
            "peak quarter_sign",
            lambda: ff.peak(heatmap, "quarter_sign"),
            {"eager": lambda: rivals.quarter_sign(heatmap), "compile": lambda: compiled(heatmap)},
            bars={"eager": 2.5, "compile": 1.5},
            moved_bytes=4 * heatmap.numel(),
            flops=0,
            exact=lambda: tuple(exact.peak(heatmap.double(), "quarter_sign")),
        )
    torch._dynamo.reset()


def test_peak_dark_udp(bench: Bench) -> None:
    """Gaussians with noise, away from the border, where all rivals agree."""
    at = 8 + 48 * torch.rand(*MAPS[:2], 2, device=DEVICE)
    heatmap = ff.render_gaussian(at, SIGMA, MAPS[2:]) + 0.02 * torch.randn(MAPS, device=DEVICE)
    taps = exact.gaussian_kernel(11).float().to(DEVICE)
    bands = torch.stack([torch.nn.functional.pad(taps, (j, 2 - j)) for j in range(3)])
    on_host = heatmap.cpu().numpy()
    forms = {"dense": (rivals.dark_udp_dense, taps), "patch": (rivals.dark_udp_patch, bands)}
    name = f"library NumPy, {'cv2' if rivals.cv2 else 'scipy'} blur"
    contenders = {name: lambda: rivals.dark_udp_library(on_host, 11)}
    for form, (function, weights) in forms.items():
        compiled = torch.compile(function)
        contenders[f"eager {form}"] = lambda f=function, w=weights: f(heatmap, w)
        contenders[f"compile {form}"] = lambda f=compiled, w=weights: f(heatmap, w)
    ours = ff.peak(heatmap, "dark_udp").points
    with torch.no_grad():
        for run in contenders.values():
            assert (ours.cpu() - torch.as_tensor(run()[0]).cpu()).abs().max() < 1e-3
        bench.compare(
            str(MAPS),
            "peak dark_udp",
            lambda: ff.peak(heatmap, "dark_udp"),
            contenders,
            bars={"library": 40, "compile": 1.7},
            moved_bytes=4 * heatmap.numel(),
            flops=0,
            exact=lambda: tuple(exact.peak(heatmap.double(), "dark_udp")),
        )
    torch._dynamo.reset()


def test_render(bench: Bench) -> None:
    batch, landmarks, height, width = 4, 971, 128, 128
    points = torch.rand(batch, landmarks, 2, device=DEVICE) * 110 + 8
    compiled = torch.compile(rivals.render)
    with torch.no_grad():
        bench.compare(
            str((batch, landmarks, height, width)),
            "render_gaussian",
            lambda: ff.render_gaussian(points, SIGMA, (height, width)),
            {
                "eager": lambda: rivals.render(points, height, width, SIGMA),
                "compile": lambda: compiled(points, height, width, SIGMA),
            },
            moved_bytes=4 * batch * landmarks * height * width,
            flops=batch * landmarks * height * width,
            exact=lambda: exact.render_gaussian(points.double(), SIGMA, (height, width)),
        )
    torch._dynamo.reset()
