"""`LabelDistributionForest` and `HeatmapForest`: soft trees whose leaves are label distributions or heatmaps.

Shapes: N samples, T trees of L = 2^D leaves, M maps of C cells: one map of C classes, or P landmarks on H x W pixels.
Points are (x, y) in pixels, 0-based, pixel centres at integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastforest.nn._checks import check_integer, check_positive, looked_at, paired
from fastforest.nn._clusters import clusters, thinned, tree_order
from fastforest.nn._forest import ForestOptions, LeafForest
from fastforest.nn._ranks import rows_of_ranks, sum_over_ranks
from fastforest.nn.pool import spread_points
from fastforest.ops import categorical as ops_categorical
from fastforest.ops import heatmap as ops_heatmap

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HeatmapDistribution", "HeatmapForest", "LabelDistribution", "LabelDistributionForest", "group_landmarks"]

DAMPING = 1e-2  # of the least-squares update, relative to the mean diagonal of its gram
ROUNDED = 1e-3  # by how much the sum of a label's distribution may differ from 1
CHUNK = 2**22  # cells of targets and mixtures that the statistics hold at a time


class MapOptions(ForestOptions, total=False):
    """What both layers of this file take by keyword; `_MapForest` and `LeafForest` have the defaults."""

    loss: str
    leaf_update: str | None
    allow_mismatch: bool
    mask_threshold: float | None
    eps: float
    floor: float


class _MapForest(LeafForest):
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


class LabelDistributionForest(_MapForest):
    r"""A classification or label-distribution head: trees route features to leaves that are distributions over classes.

    .. math::  \hat y(x) = \frac1T \sum_t \sum_\ell P_{t\ell}(x)\, q_{t\ell}

    The leaves are a buffer [T, L, C], learned in closed form (`accumulate`, `update`), not by gradient; the gradient of
    `loss` reaches the routing. `initialize(labels)` starts them as clusters of the labels.

    Args:
        in_features: of the input.
        classes: C.
        trees (5), depth (6), units (128), steepness (1), seed: of the routing, see `SoftForest`. The seed also draws the
            first leaves.
        loss: "kl" (default: Kullback-Leibler divergence of the label to the prediction) or "l2" (squared distance).
        leaf_update: "bounding" (never increases KL) or "least_squares" (never increases L2); None: the loss's own.
        allow_mismatch: lets the two be paired crosswise.
        mask_threshold: the loss, and the leaf update, count only where the label exceeds it; None: everywhere. Least
            squares then take more than one iteration.
        objective: of each tree, mean over trees ("per_tree", the default), or of the "forest"'s mean prediction.
        tree_update: "average" (default) or "sequential", see `update`.
        update_every, iterations, replay: as `GaussianForest`; least squares without a mask are solved in one iteration.
        eps (1e-12): floor of the prediction in the logarithm.
        floor (1e-6): share of every leaf that is even over the classes, so that a class that one update did not see can
            return; it may raise the loss by as little.

    Labels: class indices [N] (int), or distributions [N, C] (float): finite, at least 0, rows of sum 1 to 1e-3 (bfloat16:
    to its rounding), but for rows of weight 0. weight [N]. Indices and rows are checked on the CPU. CUDA never waits to
    look: there an index out of range is a row of zeros, and a row that is no distribution counts as it is, or, if it
    holds NaN or infinity, has a loss of NaN and no part in the leaves.

    Raises:
        ValueError: an argument out of range, or a pairing that does not belong together; on the CPU, labels that are
            none, naming the worst row.

    >>> head = LabelDistributionForest(16, 5, trees=3, depth=3)
    >>> features, labels = torch.randn(10, 16), torch.randint(5, (10,))
    >>> head(features).shape, head.loss(features, labels).shape
    (torch.Size([10, 5]), torch.Size([]))
    >>> head.accumulate(features, labels); dead = head.update()
    """

    NAME = "LabelDistributionForest"

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        seed: int = 0,
        **options: Unpack[MapOptions],
    ) -> None:
        check_integer(self.NAME, "classes", classes, 1)
        super().__init__(in_features, 1, seed=seed, **options)
        self.classes = classes
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self.trees, self.routing.leaves, classes, generator=generator)
        self.register_buffer("leaves", start.softmax(-1))

    def forward(self, features: Tensor) -> Tensor:
        """Predicted distribution [N, C], float32 (float64 for a layer of that dtype)."""
        prob = self.routing(features)
        with torch.autocast(features.device.type, enabled=False):
            return prob.flatten(1) @ self.leaves.flatten(0, 1) / self.trees

    def distribution(self, features: Tensor) -> LabelDistribution:
        """The mixture over the leaves of all trees, whatever the objective."""
        return LabelDistribution(self(features), self.eps)

    @torch.no_grad()
    def initialize(self, labels: Tensor, group: Any = None) -> None:
        """Leaves from clusters of the labels (k-means++, seeded apart for every tree, in tree order).

        Each leaf is its cluster's mean, and the mean of all labels as if one more label had it. In a process group the
        labels of all ranks are taken; on CUDA, rows that are not finite are left out.

        Raises:
            ValueError: as `loss`, or no label.
        """
        rows = thinned(rows_of_ranks(self._checked_labels(labels, None)[0], group), self.seed)
        if not len(rows):
            raise ValueError(f"{self.NAME}.initialize: needs at least one label, got none")
        for tree in range(self.trees):
            centres, owner = clusters(rows, self.routing.leaves, self.seed * self.trees + tree)
            size = torch.bincount(owner, minlength=len(centres))[:, None]
            self.leaves[tree] = (size * centres + rows.mean(0)) / (size + 1)
        self._set(slice(None), self._maps(), 0)

    def _target(self, labels: Tensor) -> Tensor:
        return labels[:, None]

    def _checked_labels(self, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype, shape = self.leaves.dtype, tuple(labels.shape)
        if weight is not None and tuple(weight.shape) != shape[:1]:
            raise ValueError(f"{self.NAME}: weight must be {list(shape[:1])}, got {list(weight.shape)}")
        if len(shape) == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
            if looked_at(labels) and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise ValueError(
                    f"{self.NAME}: labels must be classes from 0 to {self.classes - 1}, got {int(labels.min())} to "
                    f"{int(labels.max())}"
                )
            dense = (labels[:, None] == torch.arange(self.classes, device=labels.device)).to(dtype)
        elif len(shape) == 2 and shape[1] == self.classes and labels.is_floating_point():
            if looked_at(labels):
                _check_distributions(self.NAME, labels, weight)
            dense = labels.detach().to(dtype)
        else:
            raise ValueError(
                f"{self.NAME}: labels must be class indices [N] or distributions [N, {self.classes}], got "
                f"{str(labels.dtype)[6:]} {list(shape)}"
            )
        if weight is None:
            return dense, dense.new_ones(len(dense), 1)
        return torch.where((weight == 0)[:, None], 0.0, dense), weight.detach().to(dtype)[:, None]


def _check_distributions(layer: str, labels: Tensor, weight: Tensor | None) -> None:
    """Rows that are distributions, to the rounding of 16 bits at most; hidden ones may be anything."""
    rows = labels.detach().double()
    least, off = rows.amin(1), (rows.sum(1) - 1).abs()
    tolerance = max(ROUNDED, torch.finfo(labels.dtype).eps)
    wrong = ~((least >= 0) & (off <= tolerance))
    if weight is not None:
        wrong = wrong & (weight != 0)
    if bool(wrong.any()):
        fault = torch.maximum(off, -least).nan_to_num(nan=torch.inf)
        row = int(torch.where(wrong, fault, -1.0).argmax())
        sizes = f"a sum of {float(rows[row].sum()):.6g}, least {float(least[row]):.6g}"
        raise ValueError(
            f"{layer}: rows of labels must be distributions: finite, at least 0, of sum 1 to {tolerance:.2g}; got "
            f"{sizes if bool(rows[row].isfinite().all()) else 'NaN or inf'} in row {row}, the worst of {int(wrong.sum())}"
        )


class LabelDistribution:
    """What a `LabelDistributionForest` predicts: probabilities [N, C]."""

    def __init__(self, probability: Tensor, eps: float) -> None:
        self.probability, self.eps = probability, eps

    def log_prob(self, labels: Tensor) -> Tensor:
        """[N] nats: log p of class indices [N], or sum_c y_c log p_c of distributions [N, C] (minus the cross entropy)."""
        log = self.probability.clamp_min(self.eps).log()
        if labels.is_floating_point():
            return (labels.to(log.dtype) * log).sum(-1)
        return log.gather(-1, labels[:, None])[:, 0]

    def expectation(self, values: Tensor) -> Tensor:
        """[N]: mean of the classes' values [C], such as ages."""
        return self.probability @ values.to(self.probability.dtype)


class HeatmapDistribution:
    """What a `HeatmapForest` predicts: probabilities [N, P, H, W], of the pixels for each landmark.

    Points are (x, y) in pixels; within its pixel, a landmark is at the centre.
    """

    def __init__(self, probability: Tensor, eps: float) -> None:
        self.probability, self.eps = probability, eps

    @property
    def mean(self) -> Tensor:
        """[N, P, 2]: expected points, pixels."""
        return self._moments()[0]

    @property
    def covariance(self) -> Tensor:
        """[N, P, 2, 2], pixels squared."""
        mean, x, y = self._moments()
        height, width = self.probability.shape[2:]
        # About the mean: sums of squares of coordinates would cancel.
        x_apart, y_apart = self._axis(width) - mean[..., :1], self._axis(height) - mean[..., 1:]
        across = ((self.probability @ x_apart[..., None])[..., 0] * y_apart).sum(-1)
        spread = [(x * x_apart.square()).sum(-1), across, across, (y * y_apart.square()).sum(-1)]
        return torch.stack(spread, -1).unflatten(-1, (2, 2))

    def log_prob(self, labels: Tensor) -> Tensor:
        """[N, P] nats: log p of the pixels nearest to points [N, P, 2], or sum_h y_h log p_h of heatmaps [N, P, H, W]
        (minus the cross entropy).

        A pixel of less than eps, and one off the canvas, has log eps; a point that is not finite NaN.

        Raises:
            TypeError, ValueError: labels of another type or shape.
        """
        maps, (height, width) = list(self.probability.shape), self.probability.shape[2:]
        if not labels.is_floating_point():
            raise TypeError(f"HeatmapDistribution.log_prob: labels must be floating-point, got {labels.dtype}")
        if list(labels.shape) not in ([*maps[:2], 2], maps):
            raise ValueError(
                f"HeatmapDistribution.log_prob: labels must be points {[*maps[:2], 2]} or heatmaps {maps}, got "
                f"{list(labels.shape)}"
            )
        log = self.probability.clamp_min(self.eps).log()
        if labels.dim() == 4:
            return (labels.to(log.dtype) * log).sum((2, 3))
        finite = labels.isfinite().all(-1)
        points = labels.to(torch.promote_types(labels.dtype, torch.float32))
        column, row = torch.where(finite[..., None], points, -1.0).add(0.5).floor().unbind(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        pixel = torch.where(inside, row * width + column, 0.0).long()
        there = torch.where(inside, log.flatten(2).gather(2, pixel[..., None])[..., 0], math.log(self.eps))
        return torch.where(finite, there, torch.nan)

    def _axis(self, pixels: int) -> Tensor:
        return torch.arange(pixels, dtype=self.probability.dtype, device=self.probability.device)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, and the marginals of x [N, P, W] and y [N, P, H]."""
        x, y = self.probability.sum(-2), self.probability.sum(-1)
        return torch.stack([x @ self._axis(x.shape[-1]), y @ self._axis(y.shape[-1])], -1), x, y


class _LandmarkTrees(_MapForest):
    """The trees of one group of landmarks: leaves [T, L, P, H, W]."""

    NAME = "HeatmapForest"

    def __init__(
        self,
        in_features: int,
        landmarks: int,
        size: tuple[int, int],
        sigma: float,
        truncate: float,
        seed: int,
        **options: Unpack[MapOptions],
    ) -> None:
        super().__init__(in_features, landmarks, seed=seed, **options)
        self.size, self.sigma, self.truncate = size, sigma, truncate
        leaves = self.routing.leaves
        leaf_sigma = max(sigma, 0.5 * math.sqrt(size[0] * size[1] / leaves))
        half = torch.tensor([size[1] / 2, size[0] / 2])
        place = (spread_points(self.trees * leaves) + 1) * half - 0.5
        place = torch.stack([cells[tree_order(cells)] for cells in place.view(self.trees, -1, 2)])
        maps = ops_heatmap.render_gaussian(place, leaf_sigma, size, normalize="sum")
        self.register_buffer("leaves", maps[:, :, None].repeat(1, 1, landmarks, 1, 1))

    def leaf_points(self) -> Tensor:
        """Expected points of the leaves [T, L, P, 2]."""
        height, width = self.size
        x = torch.arange(width, dtype=self.leaves.dtype, device=self.leaves.device)
        y = torch.arange(height, dtype=self.leaves.dtype, device=self.leaves.device)
        with torch.autocast(x.device.type, enabled=False):
            return torch.stack([self.leaves.sum(-2) @ x, self.leaves.sum(-1) @ y], dim=-1)

    @torch.no_grad()
    def initialize(self, points: Tensor, group: Any = None) -> None:
        rows = thinned(rows_of_ranks(points.flatten(1), group), self.seed)
        if not len(rows):
            raise ValueError(f"{self.NAME}.initialize: needs at least one sample whose points are all finite, got none")
        for tree in range(self.trees):
            centres, owner = clusters(rows, self.routing.leaves, self.seed * self.trees + tree)
            apart = (rows - centres[owner]).square().unflatten(1, (-1, 2)).mean(-1)
            within = torch.zeros(len(centres), self.maps).to(rows).index_add_(0, owner, apart)
            size = torch.bincount(owner, minlength=len(centres))[:, None]
            sigma = (self.sigma**2 + (within + apart.mean(0)) / (size + 1)).sqrt()
            self.leaves[tree] = ops_heatmap.render_gaussian(
                centres.unflatten(1, (-1, 2)).contiguous(), sigma, self.size, normalize="sum"
            )
        self._set(slice(None), self._maps(), 0)

    def _target(self, labels: Tensor) -> Tensor:
        maps = ops_heatmap.render_gaussian(labels, self.sigma, self.size, normalize="sum", truncate=self.truncate)
        return maps.flatten(2)

    def _threshold(self) -> float | None:
        return None if self.mask_threshold is None else self.mask_threshold / (2 * math.pi * self.sigma**2)

    def _checked_labels(self, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        points = labels.detach().to(self.leaves.dtype)
        if weight is None:
            return points, points.new_ones(points.shape[:2])
        return torch.where((weight == 0)[..., None], 0.0, points), weight.detach().to(points.dtype)


GroupFeatures = Tensor | Sequence[Tensor]


class HeatmapForest(nn.Module):
    r"""A landmark head: trees route features to leaves that hold one heatmap a landmark; the prediction is their mixture.

    .. math::  \hat y_p(h) = \frac1T \sum_t \sum_\ell P_{t\ell}(x)\, q_{t\ell p}(h), \qquad \hat p = \sum_h h\, \hat y_p(h)

    Every group of landmarks has its own trees, units and leaves [T, L, P_g, H, W]: landmarks that move together share
    leaves, others are not forced to. The leaves are buffers, learned in closed form (`accumulate`, `update`), and start
    as bumps spread over the canvas; `initialize(points)` starts them at clusters of the points instead.

    This layer stores its leaves densely. `LeafPool` shares one pool among all landmarks and works in windows of the
    canvas: prefer it where speed matters.

    Args:
        in_features: of the input.
        landmarks: P.
        size: (H, W), pixels.
        groups: one label a landmark, of `group_landmarks`, or a list of lists of landmarks; each landmark is in exactly one.
            None: one group.
        sigma: of the targets, pixels, > 0; they sum to 1.
        truncate: targets are cut at ceil(truncate sigma) pixels; one that misses the canvas counts 0.
        mask_threshold: the loss, and the leaf update, count only pixels where the target exceeds this share of a
            Gaussian's peak; None: all.
        other arguments: as `LabelDistributionForest`.

    Features are [N, in_features], or a list of such, one a group in the order of the groups' labels, for a network that has
    a branch a group. `members` says which landmarks a group has.

    `loss(features, points, weight=None)`: points [N, P, 2], weight [N, P]; mean over visible landmarks.

    Raises:
        ValueError: an argument out of range, a pairing that does not belong together, groups that are no partition; on
            calling: features that are not [N, in_features], or a list of another length than there are groups.

    >>> head = HeatmapForest(16, 4, (12, 12), groups=[[0, 1], [2, 3]], trees=2, depth=3)
    >>> features = torch.randn(5, 16)
    >>> head(features).shape, head.heatmap(features).shape, head.distribution(features).covariance.shape
    (torch.Size([5, 4, 2]), torch.Size([5, 4, 12, 12]), torch.Size([5, 4, 2, 2]))
    """

    group: Tensor
    """[P]: to which group a landmark belongs."""

    def __init__(
        self,
        in_features: int,
        landmarks: int,
        size: tuple[int, int],
        *,
        groups: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        sigma: float = 1.5,
        truncate: float = 3.0,
        seed: int = 0,
        **options: Unpack[MapOptions],
    ) -> None:
        super().__init__()
        check_integer("HeatmapForest", "landmarks", landmarks, 1)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"HeatmapForest: size must be (H, W), both at least 1, got {size!r}")
        check_positive("HeatmapForest", "sigma", sigma)
        check_positive("HeatmapForest", "truncate", truncate)
        self.in_features, self.landmarks, self.size = in_features, landmarks, (int(size[0]), int(size[1]))
        members = _members(groups, landmarks)
        self.groups: Any = nn.ModuleList(
            _LandmarkTrees(
                in_features,
                len(member),
                self.size,
                float(sigma),
                float(truncate),
                seed + index,
                **options,
            )
            for index, member in enumerate(members)
        )
        label = torch.empty(landmarks, dtype=torch.int64)
        for index, member in enumerate(members):
            label[member] = index
        self.register_buffer("group", label)
        self.members: list[list[int]] = [member.tolist() for member in members]

    @property
    def steepness(self) -> float:
        """Of the routing, see `SoftForest`."""
        return self.groups[0].steepness

    @steepness.setter
    def steepness(self, value: float) -> None:
        for trees in self.groups:
            trees.steepness = value

    @property
    def dead_leaves(self) -> int:
        """Maps of leaves that were dead in the last update."""
        return sum(trees.dead_leaves for trees in self.groups)

    def calibrate(self, features: GroupFeatures, spread: float = 1.0) -> None:
        """Sets where the units start, see `SoftForest.calibrate`."""
        for trees, own, _ in self._each(features):
            trees.calibrate(own, spread)

    def forward(self, features: GroupFeatures) -> Tensor:
        """Expected points [N, P, 2], pixels, float32 (float64 for a layer of that dtype)."""
        return self._assembled([self._mixed(trees, own, trees.leaf_points()) for trees, own, _ in self._each(features)])

    def heatmap(self, features: GroupFeatures) -> Tensor:
        """The mixtures [N, P, H, W], each sums to 1."""
        return self._assembled([self._mixed(trees, own, trees.leaves) for trees, own, _ in self._each(features)])

    def distribution(self, features: GroupFeatures) -> HeatmapDistribution:
        """The mixture over the leaves of all trees of a landmark's group, whatever the objective."""
        return HeatmapDistribution(self.heatmap(features), self.groups[0].eps)

    def loss(self, features: GroupFeatures, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean loss over the landmarks, sum w R / sum w: a scalar, 0 where none is visible. See the class."""
        points, weight = self._checked(points, weight)
        sums = [trees.loss_sums(own, points[:, m], weight[:, m]) for trees, own, m in self._each(features)]
        mass = torch.stack([part[1] for part in sums]).sum()
        return torch.stack([part[0] for part in sums]).sum() / torch.where(mass > 0, mass, 1.0)

    @torch.no_grad()
    def initialize(self, points: Tensor, group: Any = None) -> None:
        """Leaves from clusters of points [N, P, 2]; samples with a point of the group that is not finite are left out."""
        points, _ = self._checked(points, None)
        for trees, m in self._groups():
            trees.initialize(points[:, m], group)

    @torch.no_grad()
    def accumulate(self, features: GroupFeatures, points: Tensor, weight: Tensor | None = None) -> None:
        """Adds the closed-form statistics of a batch; arguments as `loss`. Additive over batches until `update`."""
        points, weight = self._checked(points, weight)
        for trees, own, m in self._each(features):
            trees.accumulate(own, points[:, m], weight[:, m])

    @torch.no_grad()
    def update(self, group: Any = None) -> int:
        """As `LabelDistributionForest.update`, of every group; returns the sum of dead leaves, counted a landmark."""
        return sum(trees.update(group) for trees in self.groups)

    @torch.no_grad()
    def fit_leaves(self, points: Tensor, weight: Tensor | None = None, iterations: int = 20, group: Any = None) -> int:
        """Fits the leaves to the points alone, see `LabelDistributionForest.fit_leaves`."""
        points, weight = self._checked(points, weight)
        return sum(trees.fit_leaves(points[:, m], weight[:, m], iterations, group) for trees, m in self._groups())

    @torch.no_grad()
    def posterior(self, points: Tensor, weight: Tensor | None = None, scale: Any = None) -> Tensor:
        """[N, G T, L]: of the leaves of every tree, group after group, given the points alone. scale: of
        `posterior_scale`; None: of these points."""
        points, weight = self._checked(points, weight)
        scales = [None] * len(self.groups) if scale is None else scale
        return torch.cat(
            [
                trees.posterior(points[:, m], weight[:, m], one)
                for (trees, m), one in zip(self._groups(), scales, strict=True)
            ],
            dim=1,
        )

    def posterior_scale(self, points: Tensor, weight: Tensor | None = None) -> list[Tensor]:
        """Of every group, see `LabelDistributionForest.posterior_scale`."""
        points, weight = self._checked(points, weight)
        return [trees.posterior_scale(points[:, m], weight[:, m]) for trees, m in self._groups()]

    def routing_loss(self, features: GroupFeatures, posterior: Tensor) -> Tensor:
        """KL(posterior || routing), mean over samples and trees."""
        parts = posterior.chunk(len(self.groups), dim=1)
        each = zip(self._each(features), parts, strict=True)
        return torch.stack([trees.routing_loss(own, part) for (trees, own, _), part in each]).mean()

    def _groups(self) -> Any:
        return zip(self.groups, self.members, strict=True)

    def _each(self, features: GroupFeatures) -> Any:
        """(trees, features, landmarks) of every group."""
        own = [features] * len(self.groups) if isinstance(features, Tensor) else features
        if len(own) != len(self.groups):
            raise ValueError(f"HeatmapForest: features must be a tensor or {len(self.groups)} of them, got {len(own)}")
        return zip(self.groups, own, self.members, strict=True)

    def _mixed(self, trees: Any, features: Tensor, values: Tensor) -> Tensor:
        prob = trees.routing(features)
        with torch.autocast(features.device.type, enabled=False):
            mixed = prob.flatten(1) @ values.flatten(0, 1).flatten(1) / trees.trees
        return mixed.unflatten(1, values.shape[2:])

    def _assembled(self, parts: list[Tensor]) -> Tensor:
        place = torch.tensor([p for member in self.members for p in member], device=parts[0].device).argsort()
        return torch.cat(parts, dim=1)[:, place]

    def _checked(self, points: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if not points.is_floating_point():
            raise TypeError(f"HeatmapForest: points must be floating-point, got {points.dtype}")
        if points.dim() != 3 or tuple(points.shape[1:]) != (self.landmarks, 2):
            raise ValueError(f"HeatmapForest: points must be [N, {self.landmarks}, 2], got {list(points.shape)}")
        if weight is None:
            return points, points.new_ones(points.shape[:2])
        if weight.shape != points.shape[:2]:
            raise ValueError(f"HeatmapForest: weight must be {list(points.shape[:2])}, got {list(weight.shape)}")
        return points, weight


def group_landmarks(points: Tensor, groups: int, *, align: bool = True) -> Tensor:
    r"""Groups of landmarks that move together about the mean shape.

    Landmarks i and j are related by the RV coefficient of their motions, which no rotation of either changes and which
    opposite motions, such as those of two lips, share: :math:`\|C_{ij}\|_F^2 / (\|C_{ii}\|_F \|C_{jj}\|_F)`, C the
    [2, 2] covariances. The closest groups (average linkage) are merged until as many are left.

    Args:
        points: [N, P, 2], N >= 2, finite.
        groups: 1 to P.
        align: first takes out of every shape its shift, turn and scale against the mean shape (Procrustes), which move
            all landmarks together.

    Returns:
        [P] int64: 0 to groups - 1, numbered by their first landmarks; none is empty. Deterministic.

    Raises:
        ValueError: wrong shape, too few shapes, values that are not finite, groups out of range.

    Cost: N P^2 + P^3. Source of the coefficient: Robert and Escoufier, Applied Statistics 25, 1976.

    >>> motion = torch.randn(50, 2, 1, 2).expand(50, 2, 3, 2).reshape(50, 6, 2)
    >>> group_landmarks(motion, 2, align=False)
    tensor([0, 0, 0, 1, 1, 1])
    """
    if points.dim() != 3 or points.shape[2] != 2 or points.shape[0] < 2:
        raise ValueError(f"group_landmarks: points must be [N, P, 2] with N of at least 2, got {list(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("group_landmarks: points must be finite, got NaN or inf")
    landmarks = points.shape[1]
    check_integer("group_landmarks", "groups", groups, 1, landmarks)
    shapes = points.detach().double().cpu()
    if align:
        shapes = _aligned(shapes)
    motion = (shapes - shapes.mean(0)).flatten(1)
    cross = (motion.T @ motion).view(landmarks, 2, landmarks, 2).square().sum((1, 3))
    own = cross.diagonal().sqrt()
    moves = own > 1e-12 * own.max()
    scale = torch.where(moves, own, torch.inf)
    distance = 1 - cross / (scale[:, None] * scale)
    distance.fill_diagonal_(torch.inf)
    size, label = torch.ones(landmarks, dtype=torch.float64), torch.arange(landmarks)
    for _ in range(landmarks - groups):
        first, second = sorted(divmod(int(distance.argmin()), landmarks))
        merged = (size[first] * distance[first] + size[second] * distance[second]) / (size[first] + size[second])
        distance[first], distance[:, first] = merged, merged
        distance[second], distance[:, second] = torch.inf, torch.inf
        distance[first, first] = torch.inf
        size[first] += size[second]
        label[label == second] = first
    return torch.unique(label, return_inverse=True)[1].to(points.device)


def _aligned(shapes: Tensor) -> Tensor:
    """Shapes [N, P, 2] turned, scaled and shifted onto their mean, twice as the mean moves with them."""
    shapes = shapes - shapes.mean(1, keepdim=True)
    for _ in range(2):
        mean = shapes.mean(0)
        # As complex numbers, the best turn and scale of a shape z onto m is <z, m> / <z, z>.
        z, m = torch.complex(shapes[..., 0], shapes[..., 1]), torch.complex(mean[..., 0], mean[..., 1])
        power = (z.abs() ** 2).sum(1)
        factor = (z.conj() * m).sum(1) / torch.where(power > 0, power, 1.0)
        shapes = torch.view_as_real(z * factor[:, None])
    return shapes


def _members(groups: Any, landmarks: int) -> list[Tensor]:
    """The landmarks of every group, ascending."""
    if groups is None:
        return [torch.arange(landmarks)]
    if not isinstance(groups, Tensor) and len(groups) and not isinstance(groups[0], int):
        members = [torch.as_tensor(member, dtype=torch.int64).cpu().sort().values for member in groups]
    else:
        label = torch.as_tensor(groups).cpu()
        members = [(label == value).nonzero()[:, 0] for value in label.unique()]
    if any(not len(m) for m in members) or torch.cat(members).sort().values.tolist() != list(range(landmarks)):
        raise ValueError(
            f"HeatmapForest: groups must hold each of the {landmarks} landmarks in exactly one group, got "
            f"{[m.tolist() for m in members]}"
        )
    return members


def _shown(weight: Tensor) -> Tensor:
    """Of weights [N, M] which samples count, [N, 1, 1]."""
    return (weight.sum(1) > 0)[:, None, None]


def _by_map(leaves: Tensor) -> Tensor:
    """[G, K, M, C] -> [G M, K, C]."""
    return leaves.transpose(1, 2).flatten(0, 1)


def _from_maps(maps: Tensor, like: Tensor) -> Tensor:
    return maps.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
