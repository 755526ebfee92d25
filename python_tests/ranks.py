"""One rank of a process group: leaf updates of every layer on this rank's part of the data.

python ranks.py STORE RANK OUT, for ranks 0 and 1; `work(0, 1)` is the same on one rank.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed

from fastforest import training
from fastforest.nn import GaussianForest, HeatmapForest, LabelDistributionForest


def work(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The leaves and units of each layer after it started and moved."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(60, 5, generator=generator)
    values, classes = features[:, :2] + 20, features[:, 3:].argmax(1) + 2 * (features[:, 0] > 0)
    points = (4 + features[:, :4].view(60, 2, 2)).clamp(0, 8)
    mine = slice(rank * 60 // ranks, (rank + 1) * 60 // ranks)
    shape = {"trees": 2, "depth": 3, "units": 8}
    heads = {
        "per_tree": (GaussianForest(5, 2, dead="reseed", min_count=4.0, **shape), values),
        "sequential": (GaussianForest(5, 2, objective="forest", tree_update="sequential", **shape), values),
        "replay": (GaussianForest(5, 2, replay=100, update_every=2, iterations=3, **shape), values),
        "bounding": (LabelDistributionForest(5, 4, **shape), classes),
        # float64: the trees' weights are nearly dependent, and the solve amplifies float32's rounding a thousandfold.
        "least_squares": (LabelDistributionForest(5, 4, loss="l2", objective="forest", **shape).double(), classes),
        "heatmap": (HeatmapForest(5, 2, (9, 9), groups=[0, 1], **shape), points),
    }
    found = {}
    for name, (head, labels) in heads.items():
        torch.manual_seed(0)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        head.initialize(labels[mine])
        head.calibrate(features[mine])
        if name == "replay":
            for part in range(2):
                rows = torch.arange(60)[mine][part::2]
                head.loss(features[rows], labels[rows])
        else:
            for _ in range(3):
                head.accumulate(features[mine], labels[mine])
                head.update()
        found |= {f"{name}.{key}": value.clone() for key, value in head.state_dict().items()}
    torch.manual_seed(0)
    head = GaussianForest(5, 2, **shape)
    training.fit_forest(head, features[mine], values[mine], steps=4, batch=60, update_every=2, clip=None)
    return found | {f"fit.{key}": value for key, value in head.state_dict().items()}


if __name__ == "__main__":
    store, rank, out = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    torch.save(work(int(rank), 2), out)
    distributed.destroy_process_group()
