"""Sums and gathers over the ranks of a process group; without one, nothing happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def many_ranks(group: Any = None) -> bool:
    """Whether there is a process group of more than one rank."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def sum_over_ranks(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Each tensor becomes its sum, in place."""
    if many_ranks(group):
        for tensor in tensors:
            distributed.all_reduce(tensor, group=group)


def rows_of_ranks(rows: Tensor, group: Any = None) -> Tensor:
    """The rows [N, ...] of all ranks in the order of the ranks; their numbers may differ."""
    if not many_ranks(group):
        return rows
    ranks = distributed.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(every, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(every, counts, strict=True)])
