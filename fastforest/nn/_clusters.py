"""Where leaves start: k-means of the labels, in the order of a tree."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 20
MOST_ROWS = 2**16
"""More labels than this are thinned out first."""


def clusters(rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of rows [N, D]: centres [count, D] and the centre of every row [N]; the centres in `tree_order`.

    Seeded by k-means++ (Arthur and Vassilvitskii, 2007), then at most `ROUNDS` rounds of Lloyd's. Fewer distinct rows
    than centres: several centres coincide, and all but one of them own no row. The same on every machine of a group.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = rows[_spread_seeds(rows, count, generator)].clone()
    owner = rows.new_full((len(rows),), -1, dtype=torch.int64)
    for _ in range(ROUNDS):
        before, owner = owner, _nearest(rows, centres)
        if torch.equal(before, owner):
            break
        size = torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add_(0, owner, rows.new_ones(len(rows)))
        total = torch.zeros_like(centres).index_add_(0, owner, rows)
        centres = torch.where((size > 0)[:, None], total / size.clamp_min(1)[:, None], centres)
    order = tree_order(centres)
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=order.device)
    return centres[order], place[_nearest(rows, centres)]


def tree_order(centres: Tensor) -> Tensor:
    """Order [K] in which every subtree's leaves are near each other: halved along the principal axis, and so on down.

    The upper splits of a tree then tell apart what differs most, which a network can learn; in a random order they must
    learn to separate mixtures of everything.
    """
    parts = [torch.arange(len(centres))]
    place = centres.double().cpu()
    while len(parts[0]) > 1:
        halves: list[Tensor] = []
        for part in parts:
            apart = place[part] - place[part].mean(0)
            axis = torch.linalg.svd(apart, full_matrices=False).Vh[0]
            axis = axis * axis[axis.abs().argmax()].sign()
            halves += part[(apart @ axis).argsort(stable=True)].chunk(2)
        parts = halves
    return torch.cat(parts).to(centres.device)


def thinned(rows: Tensor, seed: int) -> Tensor:
    """At most `MOST_ROWS` of the rows, drawn by the seed; rows that are not finite are left out."""
    rows = rows[rows.flatten(1).isfinite().all(1)]
    if len(rows) <= MOST_ROWS:
        return rows
    kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    return rows[kept.sort().values.to(rows.device)]


def _spread_seeds(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).to(rows.device)
    distance = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    for k in range(count):
        mass = distance.cumsum(0)
        # No row is apart from the seeds: any will do.
        mass = torch.where(mass[-1] > 0, mass, torch.ones_like(mass).cumsum(0))
        chosen[k] = torch.searchsorted(mass, draws[k : k + 1] * mass[-1], right=True)[0].clamp_max(len(rows) - 1)
        apart = (rows - rows[chosen[k]]).square().sum(1).double()
        distance = apart if k == 0 else torch.minimum(distance, apart)
    return chosen


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(rows, centres).argmin(1)
