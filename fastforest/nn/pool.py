"""`LeafPool`: landmarks as mixtures of a shared pool of heatmap leaves.

Shapes: B images, P landmarks, F features, R rank, N leaves, T trees of depth D (N = T 2^D), canvas H x W.
Points are (x, y) in canvas pixels, 0-based, pixel centres at integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.nn._checks import check_integer, check_positive, paired
from fastforest.nn._precision import PreciseBuffers
from fastforest.nn._ranks import sum_over_ranks
from fastforest.ops import pool as ops_pool
from fastforest.ops import routing as ops_routing

__all__ = ["LeafPool"]

DAMPING = 1e-2  # of the least-squares update, relative to the mean diagonal of its gram
GEOMETRY = 3  # the first columns of the keys: x, y, x^2 + y^2


class LeafPool(PreciseBuffers):
    r"""A landmark head: features select leaves of a pool, and the selected leaves' mixture is the landmark's heatmap.

    .. math::  \hat y_{bp}(h) = \sum_n p_{bpn}\, q(h, n), \qquad
               p_{bp} = \mathrm{softmax}_n(s\, \langle k_n, u_{bp} \rangle) \ \text{or a forest's leaf probabilities}

    `q` is the buffer `pool` [H, W, N], N distributions over the canvas, learned in closed form (`accumulate`,
    `update`), not by gradient. The selection is factorised: a query u [B, P, R], affine in the features, meets leaf
    keys k [N, R]; there is no matrix of F x P N weights. The first columns of the keys are the leaves' coordinates
    (x, y, x^2 + y^2), in units of half the canvas; the query's first three numbers (m_x, m_y, t) enter as
    tau (m_x, m_y, -1/2) with tau = tau_0 exp(t), so that the selection starts as a bump of precision tau about the
    point m, by design the canvas centre, and an affine change of the query moves it: no harder to train than
    coordinates. The other columns start as x^2 - y^2, xy and low-frequency waves over the canvas. All are learned.

    "forest": T soft trees of depth D over N = T 2^D leaves, each tree weighted 1/T. A split unit is
    f = <k, u> + c with the query (m_x, m_y, ...) as it is, d = sigmoid(s f) the probability of going left. It starts
    as a k-d tree of its leaves' places, its axes turned from tree to tree.

    Residual mode (`mean_shape` given): the canvas shows offsets from the mean shape: points = canvas point - canvas
    centre + mean shape, so all landmarks use the same leaves, and the canvas need only hold the offsets.

    Args:
        in_features: F.
        landmarks: P.
        leaves: N.
        size: (H, W) of the canvas, pixels.
        sigma: of the target Gaussian, canvas pixels, > 0.
        selection: "softmax" or "forest".
        mean_shape: [P, 2], canvas pixels, finite; may lie outside the canvas. None: points are canvas points.
        rank: R >= 3. "forest" uses it for its split units.
        trees, depth: for "forest" only, T 2^D = N; one of them may be left out (both: depth 6, or less for few leaves).
        objective: "kl" (KL of the target to the mixture) or "l2" (squared distance of the heatmaps).
        leaf_update: "bounding" (never increases KL) or "least_squares" (minimises L2); None: the objective's own.
        allow_mismatch: lets the two be paired crosswise.
        leaf_sigma: of the initial leaves, canvas pixels; None: the larger of sigma / 2 and half their spacing.
        truncate: targets are cut at ceil(truncate sigma) pixels.
        eps: floor of the mixture in the KL loss.
        steepness: s, multiplies logits or split units; > 0, settable, kept in the state dict.
        spread: standard deviation of the initial bump as a fraction of half the canvas.

    Raises:
        ValueError: an argument out of range, or a pairing that does not belong together.

    Autocast, and a layer in bfloat16 or float16: queries are computed in these 16 bits; leaves, logits, probabilities and
    losses are float32 (float64 for a layer of that dtype). Deterministic if the operators are. No host synchronisation
    but in `update`.

    >>> head = LeafPool(16, landmarks=5, leaves=32, size=(16, 16), sigma=1.5)
    >>> head(torch.zeros(2, 16)).shape
    torch.Size([2, 5, 2])
    """

    PRECISE = ("pool", "mean_shape", "centre", "_steepness", "_statistics", "_gram")
    pool: Tensor
    mean_shape: Tensor | None
    centre: Tensor
    """[2], of the canvas, (x, y) in its pixels."""
    _steepness: Tensor
    _phi: Tensor
    _statistics: Tensor | None
    _gram: Tensor | None

    def __init__(
        self,
        in_features: int,
        landmarks: int,
        leaves: int,
        size: tuple[int, int],
        sigma: float,
        *,
        selection: str = "softmax",
        mean_shape: Tensor | Sequence[Sequence[float]] | None = None,
        rank: int = 32,
        trees: int | None = None,
        depth: int | None = None,
        objective: str = "kl",
        leaf_update: str | None = None,
        allow_mismatch: bool = False,
        leaf_sigma: float | None = None,
        truncate: float = 3.0,
        eps: float = 1e-12,
        steepness: float = 1.0,
        spread: float = 0.3,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("landmarks", landmarks, 1),
            ("leaves", leaves, 1),
            ("rank", rank, GEOMETRY),
        ):
            check_integer("LeafPool", name, value, least)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"LeafPool: size must be (H, W), both at least 1, got {size!r}")
        for name, number in (("sigma", sigma), ("truncate", truncate), ("eps", eps), ("spread", spread)):
            check_positive("LeafPool", name, number)
        if leaf_sigma is not None:
            check_positive("LeafPool", "leaf_sigma", leaf_sigma)
        if selection not in ("softmax", "forest"):
            raise ValueError(f"LeafPool: selection must be 'softmax' or 'forest', got {selection!r}")
        self.in_features, self.landmarks, self.leaves, self.rank = in_features, landmarks, leaves, rank
        self.size, self.sigma, self.truncate, self.eps = (int(size[0]), int(size[1])), float(sigma), truncate, eps
        self.selection, self.objective = selection, objective
        self.leaf_update = paired("LeafPool", "objective", objective, leaf_update, allow_mismatch)
        self.trees, self.depth = _forest_shape(selection, leaves, trees, depth)

        place = spread_points(leaves)
        if selection == "forest":
            place, key, bias = _forest_start(place, self.trees, self.depth, rank, spread)
            self.key_bias = nn.Parameter(bias)
            self.register_buffer("_phi", torch.arange(len(bias)).view(self.trees, 2**self.depth - 1), persistent=False)
        else:
            key = _leaf_keys(place, rank)
        self.key = nn.Parameter(key)
        self.query_weight = nn.Parameter(torch.randn(landmarks, rank, in_features) * (0.1 * spread / in_features**0.5))
        self.query_bias = nn.Parameter(torch.zeros(landmarks, rank))
        self._precision = 1 / spread**2
        self.register_buffer("pool", _gaussian_leaves(place, self.size, leaf_sigma or _leaf_sigma(sigma, leaves, size)))
        self.register_buffer("mean_shape", self._checked_mean_shape(mean_shape))
        self.register_buffer("centre", torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2]), persistent=False)
        self.register_buffer("_steepness", torch.tensor(1.0))
        self.steepness = steepness
        self.register_buffer("_statistics", None, persistent=False)
        self.register_buffer("_gram", None, persistent=False)

    @property
    def steepness(self) -> float:
        """s, multiplies logits ("softmax") or split units ("forest"): raise it to harden the selection."""
        return float(self._steepness)

    @steepness.setter
    def steepness(self, value: float) -> None:
        check_positive("LeafPool", "steepness", value)
        self._steepness.fill_(value)

    def select(self, features: Tensor) -> Tensor:
        """Leaf probabilities [B, P, N], rows sum to 1, float32. features: [B, F], or [B, P, F] one row a landmark."""
        query, key = self._query(features), self.key.to(self.pool.dtype)
        with torch.autocast(query.device.type, enabled=False):
            if self.selection == "forest":
                return self._route(query @ key.T + self.key_bias)
            tau = self._precision * query[..., 2:3].exp()
            bent = torch.cat([tau * query[..., :2], -0.5 * tau, query[..., 3:]], dim=-1)
            return (self._steepness * (bent @ key.T)).softmax(dim=-1)

    def _route(self, units: Tensor) -> Tensor:
        """[B, P, T (2^D - 1)], a unit a node -> leaf probabilities [B, P, T 2^D], each tree weighted 1/T."""
        if self.depth == 0:
            return units.new_full((*units.shape[:2], self.trees), 1 / self.trees)
        leaf = ops_routing.route(units.flatten(0, 1), self._phi, self._steepness)
        return (leaf / self.trees).view(*units.shape[:2], self.leaves)

    def forward(self, features: Tensor) -> Tensor:
        """Expected points [B, P, 2], float32: canvas pixels, about the mean shape in residual mode."""
        return self.distribution(features)[0]

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, P, 2] and covariance [B, P, 2, 2] of the mixture, pixels and pixels squared."""
        return self.expectation(self.select(features))

    def expectation(self, prob: Tensor) -> tuple[Tensor, Tensor]:
        """As `distribution`, of a selection [B, P, N]."""
        points, covariance = ops_pool.pool_expectation(prob, self.pool)
        return self.from_canvas(points), covariance

    def heatmap(self, features: Tensor) -> Tensor:
        """The mixtures [B, P, H, W], each sums to 1. For looking at: nothing else here stores them."""
        return ops_pool.pool_heatmap(self.select(features), self.pool)

    def loss(self, features: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean loss over the landmarks, sum w R / sum w, float32 scalar; 0 if no landmark is visible.

        Args:
            features: [B, F] or [B, P, F].
            points: [B, P, 2], pixels as `forward` gives them.
            weight: [B, P], >= 0; 0 hides a landmark, even NaN. A landmark off the canvas has R = 0 (and counts in
                the mean).
        """
        return self.selection_loss(self.select(features), points, weight)

    def selection_loss(self, prob: Tensor, points: Tensor, weight: Tensor | None = None) -> Tensor:
        """As `loss`, of a selection [B, P, N]."""
        target = self._target(points, prob.shape[0])
        weight = self._visible(weight, target)
        if self.objective == "kl":
            rows = ops_pool.pool_kl_loss(
                prob, self.pool, target, self.sigma, truncate=self.truncate, weight=weight, eps=self.eps
            )
        else:
            rows = ops_pool.pool_l2_loss(prob, self.pool, target, self.sigma, truncate=self.truncate, weight=weight)
        if weight is None:
            return rows.sum() / max(rows.numel(), 1)
        total = weight.sum()
        return rows.sum() / torch.where(total > 0, total, 1.0)

    @torch.no_grad()
    def accumulate(self, features: Tensor, points: Tensor, weight: Tensor | None = None) -> None:
        """Adds the closed-form statistics of a batch; arguments as `loss`. Additive over batches until `update`."""
        self.accumulate_selection(self.select(features), points, weight)

    @torch.no_grad()
    def accumulate_selection(self, prob: Tensor, points: Tensor, weight: Tensor | None = None) -> None:
        """As `accumulate`, of a selection [B, P, N]."""
        target = self._target(points, prob.shape[0])
        weight = self._visible(weight, target)
        if self.leaf_update == "bounding":
            if self._statistics is None:
                self._statistics = torch.zeros_like(self.pool, dtype=target.dtype)
            ops_pool.pool_kl_statistics(
                prob,
                self.pool,
                target,
                self.sigma,
                truncate=self.truncate,
                weight=weight,
                eps=self.eps,
                out=self._statistics,
            )
            return
        gram, cross = ops_pool.pool_l2_statistics(
            prob, target, self.sigma, self.size, truncate=self.truncate, weight=weight
        )
        if self._statistics is None or self._gram is None:
            self._statistics, self._gram = torch.zeros_like(cross), torch.zeros_like(gram)
        self._statistics += cross
        self._gram += gram

    @torch.no_grad()
    def update(self, rate: float = 1.0, group: Any = None) -> int:
        """Closed-form leaf update from what was accumulated, which it forgets. Returns the number of dead leaves.

        q <- (1 - rate) q + rate q', q' the update. Both losses are convex in q, so neither update lets the loss over
        what was accumulated grow: bounding at any rate (which below 1 also keeps pixels that no target touched);
        least squares, damped towards the present leaves and projected on the simplex, by stopping at the line's
        minimum when that comes before `rate`. In a process group every rank accumulates its own samples and all update
        alike: statistics are summed over the ranks.

        Raises:
            RuntimeError: nothing was accumulated since the last update.
            ValueError: rate not in (0, 1].
        """
        if not 0 < rate <= 1:
            raise ValueError(f"LeafPool.update: rate must be in (0, 1], got {rate}")
        if self._statistics is None:
            raise RuntimeError("LeafPool.update: nothing was accumulated since the last update: call accumulate first")
        sum_over_ranks([self._statistics] if self._gram is None else [self._statistics, self._gram], group)
        step: float | Tensor = rate
        if self.leaf_update == "bounding":
            fresh, dead = ops_pool.pool_kl_update(self._statistics, self.pool)
        else:
            assert self._gram is not None
            fresh, dead = self._least_squares(self._gram, self._statistics)
            way = fresh - self.pool
            slope = (way * (self._statistics - self.pool @ self._gram)).sum()
            step = (slope / ((way @ self._gram) * way).sum().clamp_min(1e-30)).clamp(0, rate)
        self.pool.lerp_(fresh.to(self.pool.dtype), step)
        self._statistics = self._gram = None
        return int(dead)

    def to_canvas(self, points: Tensor) -> Tensor:
        """Points -> canvas points: the same without a mean shape, otherwise points - mean shape + canvas centre."""
        return points if self.mean_shape is None else points - self.mean_shape + self.centre

    def from_canvas(self, points: Tensor) -> Tensor:
        """The inverse of `to_canvas`."""
        return points if self.mean_shape is None else points - self.centre + self.mean_shape

    def extra_repr(self) -> str:
        forest = f" (trees={self.trees}, depth={self.depth})" if self.selection == "forest" else ""
        return (
            f"in_features={self.in_features}, landmarks={self.landmarks}, leaves={self.leaves}, size={self.size}, "
            f"sigma={self.sigma}, selection={self.selection!r}{forest}, rank={self.rank}, "
            f"objective={self.objective!r}, leaf_update={self.leaf_update!r}, "
            f"residual={self.mean_shape is not None}"
        )

    def _least_squares(self, gram: Tensor, cross: Tensor) -> tuple[Tensor, int]:
        """The minimum of L2 + damping |q - pool|^2 in place of a ridge, which would pull leaves to 0."""
        dead = int((gram.diagonal() <= 0).sum())
        damping = DAMPING * gram.diagonal().mean()
        if float(damping) == 0:
            return self.pool.clone(), dead
        damped = gram + damping * torch.eye(self.leaves, dtype=gram.dtype, device=gram.device)
        return ops_pool.pool_l2_update(damped, cross + damping * self.pool, ridge=0.0).pool, dead

    def _query(self, features: Tensor) -> Tensor:
        """[B, P, R] float32 (or the layer's float64)."""
        if not features.is_floating_point():
            raise TypeError(f"LeafPool: features must be floating-point, got {features.dtype}")
        weight, shape = self.query_weight, tuple(features.shape)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        if features.dim() == 2 and shape[1] == self.in_features:
            query = functional.linear(features, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
        elif features.dim() == 3 and shape[1:] == (self.landmarks, self.in_features):
            query = torch.bmm(features.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        else:
            expected = f"[B, {self.in_features}] or [B, {self.landmarks}, {self.in_features}]"
            raise ValueError(f"LeafPool: features must be {expected}, got {list(shape)}")
        return query.to(self.pool.dtype) + self.query_bias

    def _target(self, points: Tensor, batch: int) -> Tensor:
        if tuple(points.shape) != (batch, self.landmarks, 2):
            raise ValueError(f"LeafPool: points must be [{batch}, {self.landmarks}, 2], got {list(points.shape)}")
        if not points.is_floating_point():
            raise TypeError(f"LeafPool: points must be floating-point, got {points.dtype}")
        precise = torch.float64 if self.pool.dtype == torch.float64 else torch.float32
        return self.to_canvas(points.detach().to(precise)).to(precise)

    def _visible(self, weight: Tensor | None, target: Tensor) -> Tensor | None:
        if weight is None:
            return None
        if not isinstance(weight, Tensor) or weight.shape != target.shape[:2]:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"LeafPool: weight must be {list(target.shape[:2])}, got {got}")
        return weight.to(target.dtype)

    def _checked_mean_shape(self, mean_shape: Tensor | Sequence[Sequence[float]] | None) -> Tensor | None:
        if mean_shape is None:
            return None
        shape = torch.as_tensor(mean_shape, dtype=torch.float32).detach().clone()
        if tuple(shape.shape) != (self.landmarks, 2):
            raise ValueError(f"LeafPool: mean_shape must be [{self.landmarks}, 2], got {list(shape.shape)}")
        if not bool(shape.isfinite().all()):
            raise ValueError("LeafPool: mean_shape must be finite, got NaN or inf")
        return shape


def spread_points(count: int) -> Tensor:
    """`count` points evenly over [-1, 1]^2: the R2 sequence (Roberts, 2018), any run of which is even too. [N, 2]."""
    root = 1.32471795724474602596  # x^3 = x + 1
    index = torch.arange(count, dtype=torch.float64)[:, None]
    step = torch.tensor([1 / root, 1 / root**2], dtype=torch.float64)
    return (2 * ((0.5 + index * step) % 1) - 1).float()


def _gaussian_leaves(place: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """[H, W, N]: Gaussians at place [N, 2] of [-1, 1]^2 over the canvas, each summing to 1."""
    axes = []
    for pixels, u in ((size[0], place[:, 1]), (size[1], place[:, 0])):
        centre = ((u.double() + 1) * pixels - 1) / 2
        grid = torch.arange(pixels, dtype=torch.float64)[:, None]
        axes.append((-((grid - centre) ** 2) / (2 * sigma**2)).softmax(dim=0))
    return (axes[0][:, None] * axes[1]).float().contiguous()


def _leaf_sigma(sigma: float, leaves: int, size: tuple[int, int]) -> float:
    return max(sigma / 2, 0.5 * math.sqrt(size[0] * size[1] / leaves))


def _leaf_keys(place: Tensor, rank: int) -> Tensor:
    """[N, R]: x, y, x^2 + y^2, x^2 - y^2, xy, then waves cos, sin(pi k . (x, y) / 2) by growing |k|."""
    x, y = place.unbind(-1)
    columns = [x, y, x * x + y * y, x * x - y * y, x * y]
    reach = math.ceil(math.sqrt(rank)) + 1
    waves = [(i, j) for i in range(reach) for j in range(-reach, reach) if i > 0 or j > 0]
    for i, j in sorted(waves, key=lambda k: (k[0] ** 2 + k[1] ** 2, k)):
        phase = (math.pi / 2) * (i * x + j * y)
        columns += [phase.cos(), phase.sin()]
        if len(columns) >= rank:
            break
    return torch.stack(columns[:rank], dim=-1)


def _forest_start(place: Tensor, trees: int, depth: int, rank: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf places in the order of k-d trees [N, 2], split keys [T (2^D - 1), R] and biases [T (2^D - 1)].

    Tree t splits along axes turned by t / T of a quarter turn. Node: left where u . (x, y) is below the cut c, so its
    unit starts as (c - u . m) / w, w the logistic width that goes with `spread`.
    """
    nodes = 2**depth - 1
    width = spread * math.sqrt(3) / math.pi
    key, bias, ordered = torch.randn(trees, nodes, rank) * 0.1, torch.zeros(trees, nodes), []
    for tree, cells in enumerate(place.reshape(trees, 2**depth, 2)):
        turn = 0.5 * math.pi * tree / trees
        parts = [cells]
        for level in range(depth):
            angle = turn + 0.5 * math.pi * (level % 2)
            axis = torch.tensor([math.cos(angle), math.sin(angle)])
            halves = []
            for offset, part in enumerate(parts):
                part = part[(part @ axis).argsort(stable=True)]
                low, high = part.chunk(2)
                node = 2**level - 1 + offset
                key[tree, node, :2] = -axis / width
                bias[tree, node] = ((low[-1] + high[0]) @ axis) / (2 * width)
                halves += [low, high]
            parts = halves
        ordered.append(torch.cat(parts))
    return torch.cat(ordered), key.flatten(0, 1), bias.flatten()


def _forest_shape(selection: str, leaves: int, trees: int | None, depth: int | None) -> tuple[int, int]:
    """(T, D) with T 2^D = N; (0, 0) without a forest."""
    if selection != "forest":
        if trees is not None or depth is not None:
            raise ValueError(f"LeafPool: trees and depth belong to selection='forest', got selection={selection!r}")
        return 0, 0
    for name, value, least in (("trees", trees, 1), ("depth", depth, 0)):
        if value is not None and value < least:
            raise ValueError(f"LeafPool: {name} must be at least {least}, got {value}")
    if depth is None:
        depth = min(6, (leaves & -leaves).bit_length() - 1) if trees is None else round(math.log2(leaves / trees))
    if trees is None:
        trees = max(1, leaves >> max(depth, 0))
    if depth < 0 or trees * 2**depth != leaves:
        raise ValueError(
            f"LeafPool: leaves must be trees * 2**depth for selection='forest', got leaves={leaves}, trees={trees}, "
            f"depth={depth}"
        )
    return trees, depth
