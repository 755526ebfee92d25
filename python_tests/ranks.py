"""One rank of a process group: leaf updates of every layer on this rank's part of the data.

python ranks.py STORE RANK OUT, for ranks 0 and 1; `work(0, 1)` is the same on one rank.
"""

from __future__ import annotations

import torch
from processes import rank_of_two

from fastforest import training
from fastforest.nn import GaussianForest, HeatmapForest, LabelDistributionForest


class Loss(torch.nn.Module):
    """What is wrapped for gradients to be averaged: its forward pass is the loss."""

    def __init__(self, head: GaussianForest) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head.loss(features, labels)


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
        "replay": (GaussianForest(5, 2, replay=200, update_every=3, iterations=3, **shape), values),
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
            model: torch.nn.Module = Loss(head)
            if ranks > 1:
                model = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(head.parameters(), 0.1)
            for _ in range(4):
                optimizer.zero_grad()
                model(features[mine], labels[mine]).backward()
                optimizer.step()
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
    rank_of_two(work)
