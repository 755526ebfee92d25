"""The base of the layers over the categorical room: soft trees whose leaves hold maps.

Shapes: N samples, T trees of L = 2^D leaves, M maps of C cells: one map of C classes, or P landmarks on H x W pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforest.nn._checks import check_positive, paired
from fastforest.nn._forest import ForestOptions, LeafForest
from fastforest.nn._ranks import sum_over_ranks
from fastforest.ops import categorical as ops_categorical

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MapForest", "MapOptions"]

DAMPING = 1e-2  # of the least-squares update, relative to the mean diagonal of its gram
CHUNK = 2**22  # cells of targets and mixtures that the statistics hold at a time


class MapOptions(ForestOptions, total=False):
    """What the layers take by keyword; `MapForest` and `LeafForest` have the defaults."""

    loss: str
    leaf_update: str | None
    allow_mismatch: bool
    mask_threshold: float | None
    eps: float
    floor: float


class MapForest(LeafForest):
    """Trees over `leaves` [T, L, ...], read as M maps of C cells, each map of each leaf a distribution."""

    PRECISE = ("leaves",)
    leaves: Tensor

    def __init__(
        self,
        in_features: int,
        maps: int,
        *,
        loss: str = "kl",
        leaf_update: str | None = None,
        allow_mismatch: bool = False,
        mask_threshold: float | None = None,
        eps: float = 1e-12,
        floor: float = 1e-6,
        seed: int = 0,
        **forest: Unpack[ForestOptions],
    ) -> None:
        super().__init__(in_features, seed=seed, **forest)
        check_positive(self.NAME, "eps", eps)
        if not 0 <= floor < 1:
            raise ValueError(f"{self.NAME}: floor must be in [0, 1), got {floor!r}")
        if mask_threshold is not None and not 0 <= mask_threshold < math.inf:
            raise ValueError(
                f"{self.NAME}: mask_threshold must be a finite number of at least 0, got {mask_threshold!r}"
            )
        self.leaf_update = paired(self.NAME, "loss", loss, leaf_update, allow_mismatch)
        self.loss_kind, self.mask_threshold, self.eps, self.floor = loss, mask_threshold, eps, floor
        self.maps = maps

    @torch.no_grad()
    def posterior(self, labels: Tensor, weight: Tensor | None = None, scale: Any = None) -> Tensor:
        """[N, T, L]: exp(-KL(y || q_l) / scale), normalised: scale is the mean KL to the nearest leaf, over these labels
        unless it is given.

        A label distribution is one observation, and the likelihoods of one observation hardly differ between leaves:
        without the scale all leaves would share all labels, and fitting would make them equal.
        """
        labels, weight = self._checked_labels(labels, weight)
        apart = self._apart(labels, weight)
        if scale is None:
            scale = self._scale_of(apart, weight)
        return (-apart / scale).softmax(-1) * _shown(weight)

    @torch.no_grad()
    def posterior_scale(self, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """[1, T, 1]: the mean KL to the nearest leaf."""
        labels, weight = self._checked_labels(labels, weight)
        return self._scale_of(self._apart(labels, weight), weight)

    def _scale_of(self, apart: Tensor, weight: Tensor) -> Tensor:
        shown = _shown(weight)
        mean = (apart.amin(2, keepdim=True) * shown).sum(0, keepdim=True) / shown.sum().clamp_min(1)
        return mean.clamp_min(1e-6)

    @torch.no_grad()
    def fit_leaves(self, labels: Tensor, weight: Tensor | None = None, iterations: int = 20, group: Any = None) -> int:
        """Fits every tree's leaves to the labels alone: each label counts for its nearest leaf by KL, each leaf becomes
        the mean of its labels (Banerjee et al., 2005), which never raises the mean KL. Returns the dead leaves.

        The first half of the sequential scheme; `initialize` first.
        """
        labels, weight = self._checked_labels(labels, weight)
        for _ in range(iterations):
            nearest = self._apart(labels, weight).argmin(2, keepdim=True)
            chosen = torch.zeros_like(nearest, dtype=self.leaves.dtype).expand(-1, -1, self.routing.leaves)
            chosen = chosen.scatter(2, nearest, 1.0)
            sums = torch.zeros_like(self._maps())
            for prob, part in zip(chosen.split(self._rows_at_a_time()), self._chunks(labels, weight), strict=True):
                sums += torch.einsum("ntl,nmc->tlmc", prob, self._weighted(*part))
            sum_over_ranks([sums], group)
            self.dead_leaves = self._set(slice(None), *self._bounded(sums, self._maps()))
        return self.dead_leaves

    def extra_repr(self) -> str:
        return (
            f"leaves={list(self.leaves.shape)}, loss={self.loss_kind!r}, leaf_update={self.leaf_update!r}, "
            f"mask_threshold={self.mask_threshold}, floor={self.floor}, " + self._forest_repr()
        )

    def _apart(self, labels: Tensor, weight: Tensor) -> Tensor:
        """KL of every label to every leaf [N, T, L], summed over maps with their weights."""
        log_leaves = self._maps().flatten(2).clamp_min(self.eps).log().flatten(0, 1)
        rows = []
        for part in self._chunks(labels, weight):
            target = self._weighted(*part)
            own = torch.special.xlogy(target, target) - torch.special.xlogy(target, part[1][..., None])
            rows.append(own.sum((1, 2))[:, None] - target.flatten(1) @ log_leaves.T)
        return torch.cat(rows).unflatten(1, (self.trees, -1))

    def _target(self, labels: Tensor) -> Tensor:
        """[N, M, C] of labels as `_checked_labels` gives them."""
        raise NotImplementedError

    def _checked_labels(self, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Finite labels and weights [N, M]."""
        raise NotImplementedError

    @property
    def _replay_steps(self) -> int:
        """Least squares are solved at once, unless a mask makes each a step."""
        return self.iterations if self.leaf_update == "bounding" or self.mask_threshold is not None else 1

    def _maps(self) -> Tensor:
        return self.leaves.reshape(self.trees, self.routing.leaves, self.maps, -1)

    def _mixing(self, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, G, K] and leaves [G, K, M, C]: G = T trees of their own, or one mixture of them all."""
        prob, leaves = log_prob.exp(), self._maps()
        if self.objective == "forest":
            return prob.flatten(1)[:, None] / self.trees, leaves.flatten(0, 1)[None]
        return prob, leaves

    def _threshold(self) -> float | None:
        return self.mask_threshold

    def _weighted(self, labels: Tensor, weight: Tensor) -> Tensor:
        """w y, masked, for what is linear in the target."""
        target, threshold = self._target(labels), self._threshold()
        if threshold is not None:
            target = torch.where(target > threshold, target, 0.0)
        return target * weight[..., None]

    def _rows(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        prob, leaves = self._mixing(log_prob)
        if self.loss_kind == "kl":
            target = self._weighted(labels, weight)
            rows = ops_categorical.categorical_kl_loss(prob, leaves, target, eps=self.eps).mean(-1)
            # KL of w y is w KL of y and w log w times its mass.
            return rows - (torch.where(weight > 0, weight.log(), 0.0) * target.sum(-1)).sum(-1)
        target, total = self._target(labels), log_prob.new_zeros(len(log_prob))
        for m in range(self.maps):
            rows = ops_categorical.categorical_l2_loss(
                prob, leaves[:, :, m], target[:, m], mask_threshold=self._threshold()
            )
            total = total + rows.mean(-1) * weight[:, m]
        return total

    def _statistics_of(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> list[Any]:
        """Bounding: [G, K, M, C]. Least squares: grams [M, G, K, K] and crosses [G, K, M, C].

        Least squares under a mask: a cell that does not count has the present prediction for its target. The loss of that
        bounds the masked loss and touches it at the present leaves, so lowering the one lowers the other; one gram still
        serves all cells.
        """
        prob, leaves = self._mixing(log_prob)
        if self.leaf_update == "bounding":
            sums = torch.zeros_like(leaves)
            for rows, part in zip(prob.split(self._rows_at_a_time()), self._chunks(labels, weight), strict=True):
                ops_categorical.categorical_statistics(rows, leaves, self._weighted(*part), eps=self.eps, out=sums)
            return [sums]
        grams = leaves.new_zeros(self.maps, *leaves.shape[:2], leaves.shape[1])
        crosses = torch.zeros_like(leaves)
        threshold = self._threshold()
        for rows, part in zip(prob.split(self._rows_at_a_time()), self._chunks(labels, weight), strict=True):
            target, root = self._target(part[0]), part[1].sqrt()
            if threshold is not None:
                out = target <= threshold
                target = torch.where(out, 0.0, target)
            for m in range(self.maps):
                scaled = rows * root[:, m, None, None]
                gram, cross = ops_categorical.least_squares_statistics(scaled, target[:, m] * root[:, m, None])
                grams[m] += gram
                crosses[:, :, m] += cross
                if threshold is not None:
                    present = torch.einsum("ngk,gkc->ngc", scaled, leaves[:, :, m]) * out[:, m, None]
                    crosses[:, :, m] += torch.einsum("ngk,ngc->gkc", scaled, present)
        return [grams, crosses]

    def _fit(self, statistics: list[Any], tree: int | None, group: Any) -> int:
        sum_over_ranks(statistics, group)
        leaves = self._maps()
        if self.objective == "forest":
            leaves = leaves.flatten(0, 1)[None]
        size = self.routing.leaves
        part = slice(None) if tree is None else slice(tree * size, (tree + 1) * size)
        if self.leaf_update == "bounding":
            fresh, dead = self._bounded(statistics[0][:, part], leaves[:, part])
        else:
            fresh, dead = self._solved(statistics[0], statistics[1], leaves, part)
        return self._set(part, fresh, dead)

    def _bounded(self, sums: Tensor, leaves: Tensor) -> tuple[Tensor, int]:
        """Every map of a leaf is normalised by itself, as a leaf of a tree of its own."""
        fresh, dead = ops_categorical.categorical_update(_by_map(sums), _by_map(leaves))
        return _from_maps(fresh, leaves), int(dead)

    def _solved(self, grams: Tensor, crosses: Tensor, leaves: Tensor, part: slice) -> tuple[Tensor, int]:
        """Minimum of L2 + damping |q - leaves|^2 on the simplex, then along the line to it: L2 never grows."""
        gram = grams.transpose(0, 1).flatten(0, 1)
        now, rest = _by_map(leaves), _by_map(crosses) - gram @ _by_map(leaves)
        gram, now, rest = gram[:, part, part], now[:, part], rest[:, part]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        damping = (DAMPING * diagonal.mean(-1)).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        fresh, _ = ops_categorical.least_squares_update(
            gram + damping * eye, rest + gram @ now + damping * now, ridge=0.0, simplex=True
        )
        way = fresh - now
        slope = (way * rest).sum((1, 2))
        step = (slope / ((gram @ way) * way).sum((1, 2)).clamp_min(1e-30)).clamp(0, 1)
        return _from_maps(now + step[:, None, None] * way, leaves[:, part]), int((diagonal <= 0).sum())

    def _set(self, part: slice, fresh: Tensor, dead: int) -> int:
        """The floor lets a cell that no target touched come back: a product with 0 stays 0."""
        fresh = (1 - self.floor) * fresh + self.floor / fresh.shape[-1]
        if self.objective == "forest" and part != slice(None):
            self._maps().flatten(0, 1)[part] = fresh[0]
        else:
            self.leaves.copy_(fresh.reshape(self.leaves.shape))
        return dead

    def _rows_at_a_time(self) -> int:
        return max(1, CHUNK // (self._maps()[0, 0].numel() * self.trees))

    def _chunks(self, labels: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = self._rows_at_a_time()
        return list(zip(labels.split(rows), weight.split(rows), strict=True))

    def _checked(self, features: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels.dim() == 0 or len(labels) != len(features):
            raise ValueError(f"{self.NAME}: labels must be of {len(features)} samples, got {list(labels.shape)}")
        return self._checked_labels(labels, weight)


def _shown(weight: Tensor) -> Tensor:
    """Of weights [N, M] which samples count, [N, 1, 1]."""
    return (weight.sum(1) > 0)[:, None, None]


def _by_map(leaves: Tensor) -> Tensor:
    """[G, K, M, C] -> [G M, K, C]."""
    return leaves.transpose(1, 2).flatten(0, 1)


def _from_maps(maps: Tensor, like: Tensor) -> Tensor:
    return maps.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
