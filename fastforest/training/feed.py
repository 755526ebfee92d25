"""From a training set to what a step takes: order, augmentation, the rank's part, the weight of each landmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import ranks

__all__ = ["Augmentation", "Batch", "Batches", "Feed"]

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Batches(Protocol):
    """Faces by index, as `data.Cached` gives them.

    A set may also have `batches(orders) -> iterator of (images, points)`, one for each order: for reading ahead.
    """

    size: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor, /) -> tuple[Tensor, Tensor]: ...


class Batch(NamedTuple):
    """images: float32 [B, 3, S, S] in [0, 1]. points: [B, P, 2], pixels, NaN where unknown. weight: [B, P], 1 where a
    landmark is known, or None: all are. share: of the known landmarks of all ranks' parts, those of this one."""

    images: Tensor
    points: Tensor
    weight: Tensor | None
    share: float


class Feed:
    """Training faces for one run. Everything random comes from `generator`, in the same order on every rank."""

    def __init__(self, faces: Batches, augment: Augmentation, generator: torch.Generator, device: torch.device) -> None:
        self.faces, self.augment, self.generator, self.device = faces, augment, generator, device

    def order(self, count: int) -> Tensor:
        """`count` training faces: whole passes in random order, the last one cut."""
        passes = math.ceil(count / len(self.faces))
        orders = [torch.randperm(len(self.faces), generator=self.generator) for _ in range(passes)]
        return torch.cat(orders)[:count]

    def read(self, orders: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8, points) of each order, read ahead where the set can."""
        ahead = getattr(self.faces, "batches", None)
        return map(self.faces.batch, orders) if ahead is None else ahead(orders)

    def augmented(self, images: Tensor, points: Tensor) -> Batch:
        """As `part`, of the faces as they are drawn for training.

        All ranks augment all faces and keep their part, so that the numbers drawn do not depend on the number of ranks.
        """
        moved = images.to(self.device, non_blocking=True), points.to(self.device, non_blocking=True)
        return part(*self.augment(*moved, self.generator))


def part(images: Tensor, points: Tensor) -> Batch:
    """This rank's part of a batch; where it has none, one face of weight 0, because layers want at least one."""
    rows = ranks.mine(len(images))
    known = points.isfinite().all(dim=-1)
    total = int(known.sum())
    if rows.start == rows.stop:
        return Batch(images[:1], points[:1], torch.zeros_like(points[:1, :, 0]), 0.0)
    share = int(known[rows].sum()) / max(total, 1)
    weight = None if total == known.numel() else known[rows].to(points.dtype)
    return Batch(images[rows], points[rows], weight, share)
