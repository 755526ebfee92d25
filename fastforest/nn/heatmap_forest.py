"""`HeatmapForest`: soft trees whose leaves hold a heatmap for each landmark, and groups of landmarks to share trees.

Shapes: N samples, T trees of L = 2^D leaves, P landmarks on H x W pixels. Points are (x, y) in pixels, 0-based, pixel
centres at integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastforest.nn._categorical import MapForest, MapOptions
from fastforest.nn._checks import check_integer, check_positive
from fastforest.nn._clusters import clusters, thinned, tree_order
from fastforest.nn._ranks import rows_of_ranks
from fastforest.nn.pool import spread_points
from fastforest.ops import heatmap as ops_heatmap

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HeatmapDistribution", "HeatmapForest", "group_landmarks"]


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


class _LandmarkTrees(MapForest):
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
