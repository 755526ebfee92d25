"""The heatmap losses, forward and backward, against eager PyTorch and torch.compile with the targets' rendering included."""

from __future__ import annotations

from collections.abc import Callable

import rivals
import torch
from conftest import DEVICE, Bench
from torch import Tensor

import fastforest as ff
from fastforest.reference import heatmap_loss as exact

SIGMA = 2.0
MAPS = (4 if DEVICE.type == "cpu" else 32, 971, 128, 128)
Loss = Callable[[Tensor, Tensor, float], Tensor]


def compare(
    bench: Bench,
    what: str,
    ours: Loss,
    reference: Loss,
    forms: list[Loss],
    bars: dict[str, float],
    flops: int,
    rounds: int,
) -> None:
    pred = torch.rand(MAPS, device=DEVICE, requires_grad=True)
    points = torch.rand(*MAPS[:2], 2, device=DEVICE) * 110 + 8

    def gradient(loss: Loss) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(pred, points, SIGMA), pred)[0]

    def precise() -> Tensor:
        """In float64, a few landmarks at a time."""
        parts = []
        for z, at in zip(pred.detach().flatten(0, 1).split(64), points.flatten(0, 1).split(64), strict=True):
            leaf = z.double().unsqueeze(0).requires_grad_()
            share = reference(leaf, at.double().unsqueeze(0), SIGMA) * (len(z) / (MAPS[0] * MAPS[1]))
            parts.append(torch.autograd.grad(share, leaf)[0][0].float())
        return torch.cat(parts).view(MAPS)

    contenders = {f"eager {form.__name__}": gradient(form) for form in forms}
    contenders |= {f"compile {form.__name__}": gradient(torch.compile(form)) for form in forms}
    row = bench.compare(
        str(MAPS),
        f"{what} forward + backward",
        gradient(ours),
        contenders,
        bars=bars,
        moved_bytes=12 * pred.numel(),
        flops=flops * pred.numel(),
        exact=precise,
        memory=True,
        rounds=rounds,
    )
    torch._dynamo.reset()
    assert row.peak_mb["ours"] < 1.15 * pred.nbytes / 2**20


def test_adaptive_wing(bench: Bench) -> None:
    compare(
        bench,
        "adaptive_wing_loss",
        ff.adaptive_wing_loss,
        exact.adaptive_wing_loss,
        [rivals.adaptive_wing, rivals.adaptive_wing_exp],
        {"eager": 40, "compile": 6},
        flops=100,
        rounds=3,
    )


def test_mse(bench: Bench) -> None:
    compare(
        bench,
        "heatmap_mse_loss",
        ff.heatmap_mse_loss,
        exact.heatmap_mse_loss,
        [rivals.heatmap_mse],
        {"eager": 5, "compile": 2},
        flops=8,
        rounds=7,
    )


def test_kl(bench: Bench) -> None:
    compare(
        bench,
        "heatmap_kl_loss",
        ff.heatmap_kl_loss,
        exact.heatmap_kl_loss,
        [rivals.heatmap_kl_rendered, rivals.heatmap_kl_separable],
        {"eager": 5, "compile": 2},
        flops=30,
        rounds=7,
    )
