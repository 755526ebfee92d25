"""`GaussianForest`: soft trees whose leaves are Gaussians of the label; regression with a distribution.

Shapes: N samples, T trees of L = 2^D leaves, label dimension D (out_features), K = T L leaves in all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforest.nn._checks import check_integer, check_positive
from fastforest.nn._clusters import clusters, thinned
from fastforest.nn._forest import ForestOptions, LeafForest
from fastforest.nn._ranks import many_ranks, rows_of_ranks
from fastforest.ops import gaussian as ops_gaussian
from fastforest.ops._checks import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GaussianForest", "GaussianMixture"]

COVARIANCES = ("full", "diagonal", "spherical", "tied")
BISECTIONS = 60


class GaussianForest(LeafForest):
    r"""A regression head: trees route features to Gaussian leaves, and the prediction is their mixture.

    .. math::  p(y \mid x) = \frac1T \sum_t \sum_\ell P_{t\ell}(x)\, \mathcal N(y;\, \mu_{t\ell}, L_{t\ell} L_{t\ell}^T)

    The leaves are buffers, learned in closed form by expectation maximisation (`accumulate`, `update`), not by gradient;
    the gradient of `loss` reaches the routing. Call `initialize(labels)` once before training: without it leaves are
    drawn about the origin with unit covariance, and labels far from it choose one leaf for all samples.

    What the layer does about what befalls such forests: covariances have a floor, so they cannot collapse; densities stay
    in log space, so none under- or overflows; leaves that no sample reaches are counted and kept (or reseeded); there
    are no mixing weights but the routing, whose rows sum to 1, so that the mean is never dragged to the origin; leaves
    start as clusters of the labels in tree order, apart from each other, so that outputs differ from the start.

    Args:
        in_features: of the input.
        out_features: D, of the label, 1 to 256.
        trees (5), depth (6), units (128), steepness (1), seed: of the routing, see `SoftForest`. The seed also draws the
            clusters.
        covariance: "full", "diagonal", "spherical" (one variance a leaf) or "tied" (one covariance a tree).
        floor: least variance of a leaf relative to the labels', > 0.
        min_count: a leaf with a smaller sum of weighted responsibilities is dead, > 0.
        dead: "keep" it, or "reseed" it at the worst explained samples.
        objective: "per_tree" (as given by default): the mean of the trees' negative log likelihoods; "forest": that of the
            mean of the trees.
        tree_update: "average" (default) or "sequential", see `update`.
        replay: how many past samples `loss` stores on each rank, features as this head saw them; every `update_every`
            calls in training mode, `iterations` steps of expectation maximisation over them, with the routing held
            fixed. None (default): no replay, leaves move by `accumulate` and `update` alone. It is not part of the state
            dict.
        update_every (50), iterations (20): of the replay.

    `loss(features, labels, weight=None)`: negative log likelihood in nats; labels [N, D] as floats, weight [N]. In
    `accumulate`, `fit_leaves` and the replay a sample counts weight times; one whose label is not finite does not count.

    Raises:
        ValueError: an argument out of range.

    Autocast, and a layer in bfloat16 or float16: the routing's units alone are 16 bits, leaves and losses stay float32.
    torch.compile: `loss` and `forward` in one graph, with a
    replay `loss` breaks the graph once. Deterministic if the operators are.

    >>> head = GaussianForest(16, 2, trees=3, depth=3)
    >>> features, labels = torch.randn(100, 16), torch.randn(100, 2)
    >>> head.initialize(labels)
    >>> head(features).shape, head.distribution(features).covariance.shape
    (torch.Size([100, 2]), torch.Size([100, 2, 2]))
    >>> head.loss(features, labels).backward()
    >>> head.accumulate(features, labels); dead = head.update()
    """

    NAME = "GaussianForest"
    PRECISE = ("mean", "scale_tril")
    mean: Tensor
    scale_tril: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        covariance: str = "full",
        floor: float = 1e-3,
        min_count: float = 1.0,
        dead: str = "keep",
        seed: int = 0,
        **options: Unpack[ForestOptions],
    ) -> None:
        super().__init__(in_features, seed=seed, **options)
        check_integer(self.NAME, "out_features", out_features, 1, 256)
        check_positive(self.NAME, "floor", floor)
        check_positive(self.NAME, "min_count", min_count)
        check_choice(self.NAME, "covariance", covariance, COVARIANCES)
        check_choice(self.NAME, "dead", dead, ("keep", "reseed"))
        self.out_features, self.covariance, self.dead = out_features, covariance, dead
        self.floor, self.min_count = float(floor), float(min_count)
        shape, generator = (self.trees, self.routing.leaves), torch.Generator().manual_seed(seed)
        self.register_buffer("mean", torch.randn(*shape, out_features, generator=generator))
        self.register_buffer("scale_tril", torch.eye(out_features).repeat(*shape, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Expected label [N, D], float32 (float64 for a layer of that dtype)."""
        prob = self.routing(features)
        with torch.autocast(features.device.type, enabled=False):
            return prob.flatten(1) @ self.mean.flatten(0, 1) / self.trees

    def distribution(self, features: Tensor) -> GaussianMixture:
        """The mixture over the leaves of all trees, whatever the objective."""
        log_prob = self.routing.log_prob(features).flatten(1) - math.log(self.trees)
        return GaussianMixture(log_prob, *self._leaves())

    @torch.no_grad()
    def initialize(self, labels: Tensor, group: Any = None) -> None:
        """Leaves from clusters of the labels [N, D]: k-means++, seeded apart for every tree, in tree order.

        A cluster's covariance is drawn towards that of all labels, scaled to a cell of 1 / L of their volume, as if D + 1
        more samples had it; so few samples, fewer distinct ones than leaves, or equal ones give valid leaves. Labels that
        are not finite are left out. In a process group the labels of all ranks are taken.

        Raises:
            ValueError: wrong shape, or no finite label.
        """
        labels = self._labels(labels, labels.shape[0] if labels.dim() else 0)
        labels = thinned(rows_of_ranks(labels, group), self.seed).double()
        if not len(labels):
            raise ValueError(f"{self.NAME}.initialize: needs at least one finite label, got none")
        dims, leaves = self.out_features, self.routing.leaves
        centre = labels.mean(0)
        apart = labels - centre
        pooled = apart.T @ apart / len(labels)
        deviation = pooled.diagonal().sqrt()
        unit = torch.where(deviation > 0, deviation, 1.0)
        prior = (dims + 1) * pooled * leaves ** (-2 / dims)
        for tree in range(self.trees):
            place, owner = clusters(apart / unit, leaves, self.seed * self.trees + tree)
            place = place * unit
            scatter = prior.repeat(leaves, 1, 1)
            for leaf in owner.unique().tolist():
                inside = apart[owner == leaf] - place[leaf]
                scatter[leaf] += inside.T @ inside
            count = torch.bincount(owner, minlength=leaves) + (dims + 1.0)
            nothing = labels.new_zeros(leaves, dims)
            moments = ops_gaussian.GaussianStatistics(
                count,
                nothing,
                scatter,
                labels.new_zeros(()),
                place + centre,
                scatter,
                nothing[:0],
                nothing[:0, 0],
                labels.new_zeros((), dtype=torch.int64),
            )
            fitted = moments.fit(self.covariance, floor=self.floor)
            self.mean[tree], self.scale_tril[tree] = fitted.mean.to(self.mean), fitted.scale_tril.to(self.mean)

    @torch.no_grad()
    def posterior(self, labels: Tensor, weight: Tensor | None = None, scale: Any = None) -> Tensor:
        labels, weight = self._checked_labels(labels, weight)
        flat = self._counted(labels, weight)
        posterior = [
            ops_gaussian.gaussian_responsibilities(flat, self._even(flat), mean, scale_tril)
            for mean, scale_tril in zip(self.mean, self.scale_tril, strict=True)
        ]
        return torch.stack(posterior, dim=1).nan_to_num(nan=0.0)

    def posterior_scale(self, labels: Tensor, weight: Tensor | None = None) -> None:
        """None: a density knows no other samples."""

    @torch.no_grad()
    def fit_leaves(self, labels: Tensor, weight: Tensor | None = None, iterations: int = 20, group: Any = None) -> int:
        labels, weight = self._checked_labels(labels, weight)
        self._check_weight(weight)
        flat = self._counted(labels, weight)
        for _ in range(iterations):
            even = self._even(flat)
            statistics = [
                ops_gaussian.gaussian_statistics(flat, even, mean, scale_tril, weight)
                for mean, scale_tril in zip(self.mean, self.scale_tril, strict=True)
            ]
            self.dead_leaves = self._set([self._fitted(s, group) for s in statistics], range(self.trees))
        return self.dead_leaves

    def extra_repr(self) -> str:
        return (
            f"out_features={self.out_features}, covariance={self.covariance!r}, floor={self.floor}, "
            f"min_count={self.min_count}, dead={self.dead!r}, " + self._forest_repr()
        )

    def _rows(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        mean, scale_tril = self._leaves()
        labels = torch.where((weight == 0)[:, None], 0.0, labels)
        if self.objective == "forest":
            joint = log_prob.flatten(1) - math.log(self.trees)
            rows = -ops_gaussian.gaussian_mixture_log_prob(labels, joint, mean, scale_tril)
        else:
            density = ops_gaussian.gaussian_log_prob(labels, mean, scale_tril).view_as(log_prob)
            rows = -(log_prob + density).logsumexp(-1).mean(-1)
        return torch.where(weight == 0, 0.0, rows * weight)

    def _statistics_of(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> list[Any]:
        labels = self._counted(labels, weight)
        if self.objective == "forest":
            joint = log_prob.flatten(1) - math.log(self.trees)
            return [ops_gaussian.gaussian_statistics(labels, joint, *self._leaves(), weight)]
        return [
            ops_gaussian.gaussian_statistics(labels, log_prob[:, tree], self.mean[tree], self.scale_tril[tree], weight)
            for tree in range(self.trees)
        ]

    def _fit(self, statistics: list[Any], tree: int | None, group: Any) -> int:
        if self.objective == "per_tree":
            return self._set([self._fitted(s, group) for s in statistics], range(self.trees))
        whole, leaves = _summed(statistics[0], group), self.routing.leaves
        trees = range(self.trees) if tree is None else (tree,)
        parts = [slice(t * leaves, (t + 1) * leaves) for t in trees]
        fields = ("count", "first", "second", "mean", "scale_tril")
        fits: list[Any] = []
        taken = 0  # of the worst explained samples, by the trees before: each reseeded leaf gets another
        for part in parts:
            own = {name: getattr(whole, name)[part] for name in fields}
            rest = {name: getattr(whole, name)[taken:] for name in ("worst", "worst_log_prob")}
            fits.append(self._fit_of(whole._replace(**own, **rest)))
            taken += fits[-1].dead
        return self._set(fits, trees)

    def _fitted(self, statistics: Any, group: Any) -> Any:
        return self._fit_of(_summed(statistics, group))

    def _fit_of(self, statistics: Any) -> Any:
        return statistics.fit(self.covariance, floor=self.floor, min_count=self.min_count, dead=self.dead)

    def _set(self, fits: list[Any], trees: Any) -> int:
        for tree, fitted in zip(trees, fits, strict=True):
            self.mean[tree], self.scale_tril[tree] = fitted.mean, fitted.scale_tril
        return sum(int(fitted.dead) for fitted in fits)

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self.mean.flatten(0, 1), self.scale_tril.flatten(0, 1)

    def _even(self, labels: Tensor) -> Tensor:
        leaves = self.routing.leaves
        return labels.new_full((len(labels), leaves), -math.log(leaves))

    def _counted(self, labels: Tensor, weight: Tensor) -> Tensor:
        """A hidden label is NaN, which the statistics leave out."""
        return torch.where((weight == 0)[:, None], torch.nan, labels)

    def _checked(self, features: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._checked_labels(self._labels(labels, features.shape[0]), weight)

    def _checked_labels(self, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        labels = self._labels(labels, labels.shape[0])
        if weight is None:
            return labels, labels.new_ones(len(labels))
        if tuple(weight.shape) != (len(labels),):
            raise ValueError(f"{self.NAME}: weight must be [{len(labels)}], got {list(weight.shape)}")
        return labels, weight.to(labels.dtype)

    def _labels(self, labels: Tensor, samples: int) -> Tensor:
        if not labels.is_floating_point():
            raise TypeError(f"{self.NAME}: labels must be floating-point, got {labels.dtype}")
        if tuple(labels.shape) != (samples, self.out_features):
            raise ValueError(f"{self.NAME}: labels must be [{samples}, {self.out_features}], got {list(labels.shape)}")
        return labels.detach().to(self.mean.dtype)


class GaussianMixture:
    """What a `GaussianForest` predicts for N samples: a mixture of its K leaves for each.

    log_weight [N, K], mean of the leaves [K, D], scale_tril [K, D, D]. All that it gives is float32 or float64.
    """

    def __init__(self, log_weight: Tensor, leaf_mean: Tensor, leaf_scale_tril: Tensor) -> None:
        self.log_weight, self.leaf_mean, self.leaf_scale_tril = log_weight, leaf_mean, leaf_scale_tril
        self._moments: Any = None

    @property
    def weight(self) -> Tensor:
        """[N, K], rows sum to 1."""
        return self.log_weight.exp()

    @property
    def mean(self) -> Tensor:
        """[N, D]."""
        return self._moment().mean

    @property
    def covariance(self) -> Tensor:
        """[N, D, D]: the leaves' own spread and that of their means."""
        return self._moment().covariance

    @property
    def entropy_bound(self) -> Tensor:
        """[N] nats, not below the entropy; near it where leaves do not overlap."""
        return self._moment().entropy

    def log_prob(self, labels: Tensor) -> Tensor:
        """Log density [N] of labels [N, D], nats."""
        labels = labels.to(self.leaf_mean.dtype)
        return ops_gaussian.gaussian_mixture_log_prob(labels, self.log_weight, self.leaf_mean, self.leaf_scale_tril)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, samples: int = 1) -> Tensor:
        """Draws [S, N, D]; the generator must be of the leaves' device."""
        rows, device = len(self.log_weight), self.log_weight.device
        dims = self.leaf_mean.shape[1]
        # The largest of Gumbel-perturbed logits is a draw from their softmax.
        uniform = torch.rand(samples, *self.log_weight.shape, generator=generator, device=device)
        noise = -(-uniform.clamp_min(1e-30).log()).clamp_min(1e-30).log()
        leaf = (self.log_weight + noise).argmax(-1)
        z = torch.randn(samples, rows, dims, generator=generator, device=device).to(self.leaf_mean.dtype)
        return self.leaf_mean[leaf] + (self.leaf_scale_tril[leaf] @ z[..., None])[..., 0]

    def cdf(self, value: Tensor, dimension: int = 0) -> Tensor:
        """P(y_d <= value) of each sample's marginal in a dimension; value and result [N] or [N, Q]."""
        if value.dim() not in (1, 2):
            raise ValueError(f"GaussianMixture.cdf: value must be [N] or [N, Q], got {list(value.shape)}")
        centre, deviation = self._marginal(dimension)
        z = (value[..., None] - centre) / deviation
        weight = self.weight if value.dim() == 1 else self.weight[:, None]
        return (weight * torch.special.ndtr(z)).sum(-1)

    @torch.no_grad()
    def quantile(self, q: float | Tensor, dimension: int = 0) -> Tensor:
        """The value that y_d stays below with probability q, by bisection on the distribution function.

        Args:
            q: in (0, 1), a number or [Q].
            dimension: of the label.

        Returns:
            [N], or [N, Q] for a tensor.

        Raises:
            ValueError: q or dimension out of range.
        """
        levels = torch.as_tensor(q, dtype=self.leaf_mean.dtype, device=self.leaf_mean.device)
        if levels.dim() > 1 or not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"GaussianMixture.quantile: q must be a number or [Q] in (0, 1), got {q!r}")
        centre, deviation = self._marginal(dimension)
        each = centre[:, None] + deviation[:, None] * torch.special.ndtri(levels.reshape(1, -1))
        shape = (len(self.log_weight), each.shape[1])
        # A mixture's quantile lies between those of its parts.
        low, high = each.amin(0).expand(shape).clone(), each.amax(0).expand(shape).clone()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle, dimension) < levels.reshape(1, -1)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        middle = (low + high) / 2
        return middle if levels.dim() else middle[:, 0]

    def _marginal(self, dimension: int) -> tuple[Tensor, Tensor]:
        if not 0 <= dimension < self.leaf_mean.shape[1]:
            raise ValueError(
                f"GaussianMixture: dimension must be from 0 to {self.leaf_mean.shape[1] - 1}, got {dimension}"
            )
        row = self.leaf_scale_tril[:, dimension]
        return self.leaf_mean[:, dimension], row.square().sum(-1).sqrt()

    def _moment(self) -> Any:
        if self._moments is None:
            self._moments = ops_gaussian.mixture_moments(self.weight, self.leaf_mean, self.leaf_scale_tril)
        return self._moments


def _summed(statistics: Any, group: Any) -> Any:
    return statistics.all_reduce(group) if many_ranks(group) else statistics
