"""A training run that kills itself: python training_killed.py OUT MOMENT. SIGKILL leaves no time to tidy up."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastforest import models, training
from fastforest.data import Cached, SyntheticFaces
from fastforest.training import checkpoint

SIZE, ROUNDS, STEPS = 32, 3, 3


class Orders(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, faces: Cached, orders: Iterable[Tensor]) -> None:
        self.faces, self.orders = faces, list(orders)

    def __len__(self) -> int:
        return len(self.orders)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.faces.batch(self.orders[index])


class Ahead:
    """Faces that two processes read ahead."""

    def __init__(self, faces: Cached) -> None:
        self.faces, self.size, self.batch = faces, faces.size, faces.batch

    def __len__(self) -> int:
        return len(self.faces)

    def batches(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(DataLoader(Orders(self.faces, orders), batch_size=None, num_workers=2))


def train(
    out: Path, *, resume: bool = False, workers: bool = False, change: Callable[[Any], None] | None = None
) -> Any:
    """The run; `change` may lay a trap in the model."""
    torch.set_num_threads(1)
    train_faces, held_out = (Cached(SyntheticFaces(n, SIZE, seed), SIZE).load() for n, seed in ((12, 1), (5, 2)))
    torch.manual_seed(0)
    given = {"landmarks": 68, "mean_shape": training.mean_shape(train_faces).tolist(), "image_size": SIZE}
    small = {"canvas": 8, "leaves": 16, "rank": 8, "backbone_options": {"width": 4, "code": 8}}
    model: Any = models.build("forest", given | small)
    if change is not None:
        change(model)
    config = training.TrainConfig(
        rounds=ROUNDS, steps=STEPS, batch=4, warmup=2, rate=3e-3, leaf_faces=8, ema=0.9, schedule="plateau", log_every=1
    )
    faces = Ahead(train_faces) if workers else train_faces
    training.fit(model, faces, held_out, config, out, resume=resume)
    return model


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, do: Callable[..., None]) -> None:
    """The `number`-th call of owner.name does something else, with the call's arguments."""
    own, calls = getattr(owner, name), []

    def called(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            do(*arguments)
        return own(*arguments, **keywords)

    setattr(owner, name, called)


def half_saved(content: Any, file: Any) -> None:
    whole = io.BytesIO()
    torch.serialization.save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    kill()


TRAPS: dict[str, Callable[[Any], None]] = {
    "in a step": lambda model: at_call(model, "loss", STEPS + 2, lambda *_: kill()),
    "in a leaf step": lambda model: at_call(model, "update", 2, lambda: kill()),
    "in a checkpoint": lambda model: at_call(checkpoint.torch, "save", 2, half_saved),
    # Round 1 replaces steps.jsonl, checkpoint.pt, best.pt, metrics.jsonl and two pictures; round 2 begins with the 7th.
    "before a checkpoint's name": lambda model: at_call(os, "replace", 7, lambda *_: kill()),
    "after a checkpoint": lambda model: at_call(os, "replace", 8, lambda *_: kill()),
}


if __name__ == "__main__":
    where, moment = sys.argv[1:]
    train(Path(where), workers=moment == "workers", change=TRAPS.get(moment))
