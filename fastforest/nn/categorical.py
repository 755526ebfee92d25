"""`LabelDistributionForest`: soft trees whose leaves are distributions over classes.

Shapes: N samples, T trees of L = 2^D leaves, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforest.nn._categorical import MapForest, MapOptions
from fastforest.nn._checks import check_integer, looked_at
from fastforest.nn._clusters import clusters, thinned
from fastforest.nn._ranks import rows_of_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LabelDistribution", "LabelDistributionForest"]

ROUNDED = 1e-3  # by how much the sum of a label's distribution may differ from 1


class LabelDistributionForest(MapForest):
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
