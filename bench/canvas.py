"""Cost of the pool's loss against the canvas, ours and dense: writes docs/canvas.png. `python bench/canvas.py`"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rivals
import torch
from conftest import DEVICE, take_turns

import fastforest as ff

SIDES, LEAVES, BATCH, LANDMARKS, SIGMA = (32, 48, 64, 96, 128, 192, 256), 256, 16, 68, 2.0


def times(side: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    prob = torch.softmax(torch.randn(BATCH, LANDMARKS, LEAVES, generator=generator) * 2, -1).to(DEVICE).requires_grad_()
    pool = torch.rand(side, side, LEAVES, generator=generator).to(DEVICE) + 0.05
    pool /= pool.sum((0, 1))
    points = (torch.rand(BATCH, LANDMARKS, 2, generator=generator) * (side - 17) + 8).to(DEVICE)
    rows, leaves = prob.detach().flatten(0, 1).requires_grad_(), pool.flatten(0, 1).T.contiguous()
    flat = points.flatten(0, 1)
    found = take_turns(
        {
            "ours": lambda: torch.autograd.grad(ff.pool_kl_loss(prob, pool, points, SIGMA).mean(), prob),
            "dense": lambda: torch.autograd.grad(rivals.pool_kl_separable(rows, leaves, flat, side, side, SIGMA), rows),
        },
        rounds=7,
    )
    return found["ours"]["median"], found["dense"]["median"]


def main(path: Path) -> None:
    rows = [times(side) for side in SIDES]
    for side, (ours, dense) in zip(SIDES, rows, strict=True):
        print(f"{side:4d}^2  windowed {ours:8.2f} ms  dense {dense:8.2f} ms")
    figure, axes = plt.subplots(figsize=(6, 4), dpi=120)
    axes.plot(SIDES, [d for _, d in rows], "o-", color="#999999", label="dense PyTorch")
    axes.plot(SIDES, [o for o, _ in rows], "o-", color="#c1440e", label="fastforest, windowed")
    axes.set(xscale="log", yscale="log", xlabel="canvas side (pixels)", ylabel="milliseconds")
    axes.set_xticks(SIDES, [str(s) for s in SIDES])
    axes.minorticks_off()
    axes.set_title(
        f"pool_kl_loss forward + backward\nB {BATCH}, P {LANDMARKS}, N {LEAVES}, sigma {SIGMA:g}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "canvas.png")
