"""pool_kl_loss and pool_kl_statistics against dense PyTorch, sigma 2, 68 landmarks, one canvas row a size."""

from __future__ import annotations

import pytest
import rivals
import torch
from conftest import DEVICE, Bench

import fastforest as ff
from fastforest.reference import pool as exact

SIGMA, LANDMARKS, WINDOW = 2.0, 68, 13**2
SIZES = [(64, 2048, 16), (64, 512, 16), (128, 512, 16), (256, 512, 4)]
LOSS_BARS = {(64, 2048, 16): 5, (64, 512, 16): 8, (128, 512, 16): 25, (256, 512, 4): 60}
RETURNED_BARS = {(64, 2048, 16): 5, (64, 512, 16): 8, (128, 512, 16): 12, (256, 512, 4): 12}


def name(size: tuple[int, int, int]) -> str:
    side, leaves, batch = size
    return f"{side}^2 N {leaves} B {batch}"


class Inputs:
    def __init__(self, side: int, leaves: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        prob = torch.softmax(torch.randn(batch, LANDMARKS, leaves, generator=generator) * 2, -1)
        pool = torch.rand(side, side, leaves, generator=generator) + 0.05
        points = torch.rand(batch, LANDMARKS, 2, generator=generator) * (side - 17) + 8
        self.prob = prob.to(DEVICE).requires_grad_()
        self.pool = (pool / pool.sum((0, 1))).to(DEVICE)
        self.points = points.to(DEVICE)
        self.rows = self.prob.detach().flatten(0, 1).requires_grad_()
        self.leaves = self.pool.flatten(0, 1).T.contiguous()
        self.flat = self.points.flatten(0, 1)
        self.side = side

    def dense(self, function, compiled: bool = False):
        f = torch.compile(function) if compiled else function
        return lambda: f(self.rows, self.leaves, self.flat, self.side, self.side, SIGMA)

    def dense_grad(self, function, compiled: bool = False):
        run = self.dense(function, compiled)
        return lambda: torch.autograd.grad(run(), self.rows)[0]


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_kl_loss(bench: Bench, size: tuple[int, int, int]) -> None:
    x = Inputs(*size)

    def ours():
        return torch.autograd.grad(ff.pool_kl_loss(x.prob, x.pool, x.points, SIGMA).mean(), x.prob)[0]

    def reference_gradient():
        prob = x.prob.detach()[:2].double().requires_grad_()
        loss = exact.pool_kl_loss(prob, x.pool.double(), x.points[:2].double(), SIGMA)
        return torch.autograd.grad(loss.mean() * 2 / len(x.prob), prob)[0]

    row = bench.compare(
        name(size),
        "pool_kl_loss forward + backward",
        lambda: ours(),
        {
            "eager full": x.dense_grad(rivals.pool_kl_full),
            "eager kl_div": x.dense_grad(rivals.pool_kl_div),
            "eager separable": x.dense_grad(rivals.pool_kl_separable),
            "compile full": x.dense_grad(rivals.pool_kl_full, True),
            "compile separable": x.dense_grad(rivals.pool_kl_separable, True),
        },
        bars={"rival": LOSS_BARS[size]} | ({"memory": 20} if size[0] == 256 else {}),
        moved_bytes=4 * (3 * x.prob.numel() + min(x.pool.numel(), x.rows.numel() * WINDOW)),
        flops=4 * x.rows.numel() * WINDOW,
        memory=True,
        rounds=7,
    )
    got = ours()[:2]
    row.error = float((got.double() - reference_gradient()).abs().max() / got.abs().max())
    assert row.error < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize("inplace", [False, True], ids=["returned", "accumulated"])
def test_kl_statistics(bench: Bench, size: tuple[int, int, int], inplace: bool) -> None:
    x = Inputs(*size)
    total = torch.zeros_like(x.pool) if inplace else None
    rival = {
        "eager update": x.dense(rivals.pool_bounding),
        "eager update in place": x.dense(rivals.pool_bounding_inplace),
        "compile update": x.dense(rivals.pool_bounding, True),
    }

    def without_gradient(run):
        def call():
            with torch.no_grad():
                return run()

        return call

    bench.compare(
        name(size),
        f"pool_kl_statistics {'accumulated' if inplace else 'returned'}",
        lambda: ff.pool_kl_statistics(x.prob, x.pool, x.points, SIGMA, out=total),
        {k: without_gradient(v) for k, v in rival.items()},
        bars={"rival": (LOSS_BARS if inplace else RETURNED_BARS)[size]},
        moved_bytes=4 * (x.rows.numel() + (1 if inplace else 2) * x.pool.numel()),
        flops=4 * x.rows.numel() * WINDOW,
        rounds=7,
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [4, 16, 64])
@pytest.mark.parametrize("leaves", [64, 512])
def test_canvas(bench: Bench, leaves: int, batch: int) -> None:
    """The same loss, B and N on a canvas 16 times larger takes at most 1.5 times as long."""
    runs = {}
    for side in (64, 256):
        x = Inputs(side, leaves, batch)
        runs[side] = lambda x=x: torch.autograd.grad(ff.pool_kl_loss(x.prob, x.pool, x.points, SIGMA).mean(), x.prob)[0]
    bench.compare(
        f"N {leaves} B {batch}",
        "pool_kl_loss forward + backward at 256^2; rival: ours at 64^2",
        runs[256],
        {"rival 64^2": runs[64]},
        bars={"rival": 1 / 1.5},
        moved_bytes=4 * (3 * batch * LANDMARKS * leaves + min(256 * 256, batch * LANDMARKS * WINDOW) * leaves),
        flops=4 * batch * LANDMARKS * leaves * WINDOW,
        rounds=15,
    )
