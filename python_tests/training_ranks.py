"""One rank of a training run: python training_ranks.py RUN OUT under torchrun's environment, or `work(run)` alone.

RUN: "forest", "heatmap_forest" (group norm, faces of which some landmarks are unknown), "batch_norm", "minutes",
"memory", "lost" (a loss that is NaN on the last rank).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastforest import models, training
from fastforest.data import Cached, SyntheticFaces
from fastforest.training import ranks

SIZE = 32


class Hidden:
    """Faces of which every third lacks some landmarks."""

    def __init__(self, faces: Cached) -> None:
        self.faces, self.size = faces, faces.size

    def __len__(self) -> int:
        return len(self.faces)

    def batch(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, points = self.faces.batch(rows)
        third = torch.as_tensor(rows) % 3 == 0
        points = points.clone()
        points[third, 5:40] = torch.nan
        return images, points


def work(run: str) -> dict[str, Any]:
    """The state at the end, the last gradients, and the rounds."""
    torch.set_num_threads(1)
    train, held_out = (Cached(SyntheticFaces(count, SIZE, seed), SIZE).load() for count, seed in ((13, 1), (5, 2)))
    torch.manual_seed(0)
    given = {"landmarks": 68, "mean_shape": training.mean_shape(train).tolist(), "image_size": SIZE}
    backbone = {"width": 8, "code": 8, "norm": "batch" if run in ("batch_norm", "lost") else "group"}
    small: dict[str, Any] = {"canvas": 8, "leaves": 16, "rank": 8}
    if run == "heatmap_forest":
        small = {"canvas": 8, "trees": 2, "depth": 2, "units": 8, "groups": [i // 34 for i in range(68)]}
    name = run if run in models.MODELS else "forest"
    model: Any = models.build(name, given | small | {"backbone_options": backbone})
    limits: dict[str, Any] = {"rounds": 2, "steps": 3}
    if run == "minutes":
        limits = {"minutes": 0.02, "steps": 3}
    if run == "batch_norm":
        limits = {"rounds": 1, "steps": 1}
    if run == "memory":
        fail_once(model)
    if run == "lost":
        lose(model)
    # 7 faces a step and a leaf batch of 1 face: parts that differ in size, and one that is empty.
    config = training.TrainConfig(**limits, batch=7, warmup=2, rate=3e-3, leaf_faces=8, ema=0.9)
    try:
        history = training.fit(model, Hidden(train) if run in models.MODELS else train, held_out, config)
    except training.TrainingError as error:
        return {"error": str(error)}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"state": dict(model.state_dict()), "gradients": gradients, "rounds": history.rounds}


def fail_once(model: Any) -> None:
    """The last rank's memory runs out in its second step."""
    own, calls = model.loss, []

    def loss(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2 and ranks.rank() == ranks.count() - 1:
            raise torch.OutOfMemoryError("out of memory")
        return own(*arguments)

    model.loss = loss


def lose(model: Any) -> None:
    own = model.loss
    model.loss = lambda *given: own(*given) * (torch.nan if ranks.rank() == ranks.count() - 1 else 1.0)


if __name__ == "__main__":
    with ranks.joined(torch.device("cpu")):
        result = work(sys.argv[1])
        torch.save(result, f"{sys.argv[2]}.{ranks.rank()}")
