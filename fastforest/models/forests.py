"""Forests of one stage over the backbone's vector: grouped trees with heatmap leaves, and a shared pool of leaves.

Shapes: B images of side S, P landmarks, canvas H = W, T trees of depth D, N leaves. Points [B, P, 2] are (x, y) in image
pixels; a canvas shows the image, or offsets from the mean shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastforest.models.base import LandmarkModel, Shape, hidden, two_sided_kl
from fastforest.models.units import unit
from fastforest.nn import HeatmapForest, LeafPool
from fastforest.ops._checks import check_choice

__all__ = ["GroupedForest", "SharedPool"]

OBJECTIVES = ("kl", "l2", "two_sided")
Groups = int | Sequence[int] | Sequence[Sequence[int]]


class _OnCanvas(LandmarkModel):
    """A model whose leaves live on a canvas: c = (p - origin) / pixel + centre, origin the mean shape or the image's
    centre."""

    origin: Tensor

    def __init__(self, scope: dict[str, Any]) -> None:
        super().__init__(scope)
        owner, canvas, reach = type(self).__name__, scope["canvas"], scope["reach"]
        check_choice(owner, "objective", scope["objective"], OBJECTIVES)
        if canvas < 1:
            raise ValueError(f"{owner}: canvas must be at least 1, got {canvas}")
        if not 0 < reach < 1:
            raise ValueError(f"{owner}: reach must be a fraction of the image in (0, 1), got {reach}")
        self.objective, self.residual, self.canvas = scope["objective"], scope["residual"], canvas
        self.sigma: float = scope["sigma"]
        self.pixel = (2 * reach if self.residual else 1.0) * self.image_size / canvas
        origin = self.shape if self.residual else torch.full_like(self.shape, (self.image_size - 1) / 2)
        self.register_buffer("origin", origin.clone(), persistent=False)

    def to_canvas(self, points: Tensor) -> Tensor:
        """Image points on the canvas."""
        return (points - self.origin) / self.pixel + (self.canvas - 1) / 2

    def from_canvas(self, points: Tensor) -> Tensor:
        """Canvas points in the image."""
        return (points - (self.canvas - 1) / 2) * self.pixel + self.origin

    def on_canvas(self, points: Tensor, weight: Tensor | None) -> Tensor:
        """Labels: hidden ones at 0."""
        return hidden(self.to_canvas(points.float()), weight)


class GroupedForest(_OnCanvas):
    """Groups of landmarks, each with trees of its own whose leaves hold one heatmap a landmark (`nn.HeatmapForest`).

    The trees read the backbone's vector, and with `branch` also features of the group's own: two strided convolutions on
    the backbone's map, so that groups need not share all that the network says.

    Leaves are learned in closed form: `accumulate` keeps features and labels, `update` takes `leaf_iterations` steps with
    the routing held fixed.

    Args:
        landmarks: P.
        mean_shape: [P, 2], image pixels.
        image_size: S.
        groups: one label a landmark, or a list of lists of landmarks. `models.build` takes a number too, and makes so many
            by `nn.group_landmarks`; 1: all together.
        trees, depth: of each group.
        units: of each group's routing.
        canvas: H = W, canvas pixels.
        residual: the canvas shows offsets from the mean shape, +-`reach` S wide; False: the image.
        reach: half the residual canvas's side, a fraction of S.
        sigma: of the targets, canvas pixels.
        objective: "kl" (leaves by bounding), "l2" (by least squares), or "two_sided": the network learns from
            `two_sided_kl`, the leaves by bounding.
        mask: the loss counts only pixels whose target exceeds this share of its peak; None: all. Not for "two_sided".
        branch: channels of each group's branch; 0: none.
        leaf_iterations: of the closed-form updates.
        backbone, backbone_options, pretrain: as `CoordinateRegression`.
    """

    name = "heatmap_forest"

    def __init__(
        self,
        landmarks: int,
        mean_shape: Shape,
        image_size: int = 96,
        *,
        groups: Groups = 1,
        trees: int = 5,
        depth: int = 5,
        units: int = 128,
        canvas: int = 32,
        residual: bool = True,
        reach: float = 0.3,
        sigma: float = 1.5,
        objective: str = "kl",
        mask: float | None = None,
        branch: int = 0,
        leaf_iterations: int = 5,
        backbone: str | nn.Module = "small",
        backbone_options: dict[str, Any] | None = None,
        pretrain: bool = False,
    ) -> None:
        super().__init__(locals())
        if objective == "two_sided" and mask is not None:
            raise ValueError("GroupedForest: mask limits the losses 'kl' and 'l2', not 'two_sided'")
        if min(branch, leaf_iterations - 1) < 0:
            raise ValueError(
                f"GroupedForest: expected branch >= 0 and leaf_iterations >= 1, got {branch} and {leaf_iterations}"
            )
        self.leaf_iterations = leaf_iterations
        channels, cells = self.backbone.map_channels, max(1, image_size // 32)
        self.head = HeatmapForest(
            self.backbone.features + branch * cells**2,
            landmarks,
            (canvas, canvas),
            groups=_groups(groups),
            sigma=sigma,
            trees=trees,
            depth=depth,
            units=units,
            loss="l2" if objective == "l2" else "kl",
            mask_threshold=mask,
        )
        self.branches = nn.ModuleList()
        if branch:
            self.branches.extend(
                nn.Sequential(
                    unit(channels, branch, stride=2),
                    unit(branch, branch, stride=2),
                    nn.AdaptiveAvgPool2d(cells),
                    nn.Flatten(),
                )
                for _ in self.head.members
            )
        self._kept: list[tuple[Tensor | list[Tensor], Tensor, Tensor | None]] = []

    @property
    def steepness(self) -> float:
        """Of every tree; see `nn.SoftForest`."""
        return self.head.steepness

    @steepness.setter
    def steepness(self, value: float) -> None:
        self.head.steepness = value

    def features(self, images: Tensor) -> Tensor | list[Tensor]:
        """What the trees read, [B, F]; with branches, a list of what those of each group do."""
        if not len(self.branches):
            return self.backbone.vector(images)
        maps, vector = self.backbone(images)[:2]
        return [torch.cat([vector, branch(maps)], dim=1) for branch in self.branches]

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> points [B, P, 2], image pixels, float32."""
        return self.from_canvas(self.head(self.features(images)))

    def heatmap(self, images: Tensor) -> Tensor:
        """The mixtures on the canvas [B, P, H, W], each sums to 1."""
        return self.head.heatmap(self.features(images))

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, P, 2] and covariance [B, P, 2, 2], image pixels and their squares."""
        found = self.head.distribution(self.features(images))
        return self.from_canvas(found.mean), found.covariance * self.pixel**2

    def loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar, mean over landmarks by weight. points: [B, P, 2], image pixels."""
        features, target = self.features(images), self.on_canvas(points, weight)
        if self.objective == "two_sided":
            return two_sided_kl(self.head.heatmap(features), target, self.sigma, weight)
        return self.head.loss(features, target, weight)

    @torch.no_grad()
    def start(self, images: Tensor, points: Tensor) -> None:
        """Leaves at clusters of the points, routing units spread over the features as training sees them.

        Normalised by the batch: an untrained network's running averages give features hundreds of times smaller, and
        units calibrated on those would be saturated from the first step on.
        """
        mode = self.training
        features = self.train().features(images)
        self.train(mode)
        self.head.initialize(self.on_canvas(points, None))
        self.head.calibrate(features)

    @torch.no_grad()
    def accumulate(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> None:
        """Keeps what a leaf update needs of a batch."""
        kept = None if weight is None else weight.clone()  # a caller may use its tensor again
        self._kept.append((self.features(images), self.on_canvas(points, weight), kept))

    @torch.no_grad()
    def update(self) -> int:
        """Closed-form steps of every group's leaves; how many were dead in the last. Forgets what was kept.

        Raises:
            RuntimeError: nothing was accumulated since the last update.
        """
        kept, self._kept = self._kept, []
        if not kept:
            raise RuntimeError(
                "GroupedForest.update: nothing was accumulated since the last update: call accumulate first"
            )
        dead = 0
        for _ in range(self.leaf_iterations):
            for batch in kept:
                self.head.accumulate(*batch)
            dead = self.head.update()
        return dead

    def selections(self, images: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """(name, leaves [T L, H, W] of the middle landmark, prob [B, P, T L]) of the group that has it, to look at."""
        middle = self.landmarks // 2
        group = next(index for index, member in enumerate(self.head.members) if middle in member)
        trees, features = self.head.groups[group], self.features(images)
        prob = trees.routing(features if isinstance(features, Tensor) else features[group]).flatten(1) / trees.trees
        leaves = trees.leaves[:, :, self.head.members[group].index(middle)].flatten(0, 1)
        return [(f"group {group + 1}", leaves, prob[:, None].expand(-1, self.landmarks, -1))]


class SharedPool(_OnCanvas):
    """One pool of heatmap leaves that all landmarks select from (`nn.LeafPool`), by the backbone's vector.

    Args:
        landmarks, mean_shape, image_size, canvas, residual, reach, sigma: as `GroupedForest`.
        leaves: N.
        selection: "softmax" or "forest"; trees, depth: of the latter, T 2^D = N.
        rank: of the selection.
        objective: "kl", "l2" or "two_sided" (which stores the mixtures); leaf_update: "bounding" or "least_squares", None:
            the objective's own.
        leaf_rate: of the leaf updates, in (0, 1]; see `LeafPool.update`.
        backbone, backbone_options, pretrain: as `CoordinateRegression`.
    """

    name = "pool"

    def __init__(
        self,
        landmarks: int,
        mean_shape: Shape,
        image_size: int = 96,
        *,
        leaves: int = 256,
        canvas: int = 32,
        residual: bool = True,
        reach: float = 0.3,
        sigma: float = 1.5,
        selection: str = "softmax",
        trees: int | None = None,
        depth: int | None = None,
        rank: int = 32,
        objective: str = "kl",
        leaf_update: str | None = None,
        leaf_rate: float = 0.5,
        backbone: str | nn.Module = "small",
        backbone_options: dict[str, Any] | None = None,
        pretrain: bool = False,
    ) -> None:
        super().__init__(locals())
        if not 0 < leaf_rate <= 1:
            raise ValueError(f"SharedPool: leaf_rate must be in (0, 1], got {leaf_rate}")
        self.leaf_rate = leaf_rate
        self.head = LeafPool(
            self.backbone.features,
            landmarks,
            leaves,
            (canvas, canvas),
            sigma,
            selection=selection,
            trees=trees,
            depth=depth,
            rank=rank,
            objective="l2" if objective == "l2" else "kl",
            leaf_update=leaf_update,
            allow_mismatch=leaf_update is not None,
        )

    @property
    def steepness(self) -> float:
        """Of the selection; see `LeafPool.steepness`."""
        return self.head.steepness

    @steepness.setter
    def steepness(self, value: float) -> None:
        self.head.steepness = value

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] in [0, 1] -> points [B, P, 2], image pixels, float32."""
        return self.distribution(images)[0]

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, P, 2] and covariance [B, P, 2, 2], image pixels and their squares."""
        mean, covariance = self.head.distribution(self.backbone.vector(images))
        return self.from_canvas(mean), covariance * self.pixel**2

    def loss(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar, mean over landmarks by weight. points: [B, P, 2], image pixels."""
        vector, target = self.backbone.vector(images), self.on_canvas(points, weight)
        if self.objective == "two_sided":
            return two_sided_kl(self._mixture(vector), target, self.sigma, weight)
        return self.head.loss(vector, target, weight)

    @torch.no_grad()
    def accumulate(self, images: Tensor, points: Tensor, weight: Tensor | None = None) -> None:
        """Adds the leaf statistics of a batch; arguments as `loss`. Additive until `update`."""
        self.head.accumulate(self.backbone.vector(images), self.on_canvas(points, weight), weight)

    def update(self) -> int:
        """Closed-form update of the pool; returns how many leaves were dead."""
        return self.head.update(self.leaf_rate)

    def _mixture(self, vector: Tensor) -> Tensor:
        """[B, P, H, W], float32 under autocast too, as in the other objectives."""
        prob = self.head.select(vector)
        with torch.autocast(prob.device.type, enabled=False):
            return torch.einsum("bpn,hwn->bphw", prob, self.head.pool)

    def selections(self, images: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """(name, leaves [N, H, W], prob [B, P, N]), to look at."""
        return [("pool", self.head.pool.permute(2, 0, 1), self.head.select(self.backbone.vector(images)))]


def _groups(groups: Groups) -> Sequence[int] | Sequence[Sequence[int]] | None:
    """As `nn.HeatmapForest` takes them."""
    if isinstance(groups, int) and groups != 1:
        raise ValueError(
            f"GroupedForest: groups = {groups} needs points to be told apart by: use models.build(..., points=...)"
        )
    return None if isinstance(groups, int) else groups
