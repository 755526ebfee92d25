"""Training of forests on tensors: the sequential and the alternating scheme.

Shapes: N samples; features are whatever the backbone takes, [N, in_features] without one; labels as the head takes them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._ranks import many_ranks
from .loop import TrainingError
from .schedules import anneal, learning_rate_factor

__all__ = ["SCHEMES", "ForestHistory", "fit_forest"]

SCHEMES = ("alternating", "sequential")
EVALUATED = 1024
"""Samples of a forward pass without gradient."""

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class ForestHistory:
    """loss: of every step. leaf_updates: (step, loss before, loss after, dead leaves) of every leaf update, the losses
    over the samples that it used."""

    loss: list[float] = field(default_factory=list)
    leaf_updates: list[tuple[int, float, float, int]] = field(default_factory=list)


def fit_forest(
    head: Any,
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    scheme: str = "alternating",
    backbone: nn.Module | None = None,
    steps: int = 1000,
    batch: int = 128,
    rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    update_every: int = 50,
    iterations: int = 5,
    leaf_samples: int = 4096,
    steepness: tuple[float, float] | None = None,
    annealing: str = "exponential",
    clip: float | None = 5.0,
    start: bool = True,
    augment: Augmentation | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> ForestHistory:
    """Trains a forest, and the backbone below it, on tensors in memory.

    "alternating": steps of the network on `head.loss`; after every `update_every` of them `iterations` closed-form leaf
    updates over `leaf_samples` samples, with the network held fixed. "sequential": first the leaves are fitted to the
    labels alone (`head.fit_leaves`), then the network to the leaves' posteriors (`head.routing_loss`), and at last the
    leaves once more to the routing that came out. Sequential needs no schedule of leaf updates and settles fast, but
    asks the network for an assignment that the features may not show; alternating finds one that they do.

    In a process group every rank gives its own samples, gradients are averaged and statistics summed over all ranks;
    the ranks must have equally many samples and the same weights at the start.

    Args:
        head: `nn.GaussianForest`, `LabelDistributionForest` or `HeatmapForest`.
        features: [N, ...], on the head's device.
        labels: [N, ...]; weight: as the head's loss takes it, or None.
        scheme: "alternating" or "sequential".
        backbone: features -> [n, in_features]; None: features are that. Trained with the head.
        steps, batch, rate, weight_decay, schedule: of AdamW; see `learning_rate_factor`. Of a given optimizer the schedule
            scales each group's own rate.
        update_every, iterations, leaf_samples: of the leaf updates; sequential: iterations of the last one, and four times
            as many of the first.
        steepness: (start, end) over the run, by `anneal` of kind `annealing`; None leaves it alone.
        clip: largest norm of the gradient; None: not clipped.
        start: first sets the leaves (`head.initialize`) and units (`head.calibrate`) by the data. False goes on from
            where the head is.
        augment: (features, labels, generator) -> (features, labels) of a batch, for instance label noise.
        optimizer: over all parameters, to keep its state between calls; None: AdamW.
        seed: of the order of the samples.

    Returns:
        `ForestHistory`. The head and the backbone end in evaluation mode.

    Raises:
        ValueError: an argument out of range.
        TrainingError: a loss or gradient that is not finite.

    >>> from fastforest.nn import GaussianForest
    >>> head, features = GaussianForest(4, 1, trees=2, depth=3), torch.randn(64, 4)
    >>> history = fit_forest(head, features, features[:, :1], steps=20, batch=16, update_every=10)
    >>> len(history.loss), len(history.leaf_updates)
    (20, 2)
    """
    _check(scheme, features, labels, weight, steepness, steps=steps, batch=batch, update_every=update_every)
    _check_counts(iterations=iterations, leaf_samples=leaf_samples)
    run = _Run(head, backbone, features, labels, weight, iterations, leaf_samples, seed)
    modules = [head] if backbone is None else [head, backbone]
    if start:
        run.start()
    if optimizer is None:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    posterior = None
    if scheme == "sequential":
        head.fit_leaves(labels, weight, 4 * iterations)
        posterior = head.posterior(labels, weight)
    for module in modules:
        module.train()
    order = run.order(batch)
    for step in range(steps):
        if steepness is not None:
            head.steepness = anneal(annealing, *steepness, step / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * learning_rate_factor(schedule, step / steps)
        chosen = next(order)
        run.history.loss.append(run.step(optimizer, chosen, posterior, augment, clip))
        if scheme == "alternating" and (step + 1) % update_every == 0:
            run.leaves(step + 1)
    if scheme == "sequential":
        run.leaves(steps)
    for module in modules:
        module.eval()
    return run.history


class _Run:
    def __init__(
        self,
        head: Any,
        backbone: nn.Module | None,
        features: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        iterations: int,
        leaf_samples: int,
        seed: int,
    ) -> None:
        self.head, self.backbone = head, backbone
        self.features, self.labels, self.weight = features, labels, weight
        self.iterations, self.leaf_samples = iterations, leaf_samples
        self.generator = torch.Generator().manual_seed(seed)
        self.history = ForestHistory()

    def start(self) -> None:
        self.head.initialize(self.labels if self.weight is None else self._seen())
        with self._evaluating():
            self.head.calibrate(self._encoded(self._sample()))

    def order(self, batch: int) -> Iterator[Tensor]:
        """Batches of indices, every sample once before any twice."""
        while True:
            yield from torch.randperm(len(self.features), generator=self.generator).split(batch)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        chosen: Tensor,
        posterior: Tensor | None,
        augment: Augmentation | None,
        clip: float | None,
    ) -> float:
        chosen = chosen.to(self.features.device)
        features, labels = self.features[chosen], self.labels[chosen]
        if augment is not None:
            features, labels = augment(features, labels, self.generator)
        encoded = features if self.backbone is None else self.backbone(features)
        if posterior is None:
            loss = self.head.loss(encoded, labels, None if self.weight is None else self.weight[chosen])
        else:
            if augment is None:
                target = posterior[chosen]
            else:  # of the labels as they were changed
                target = self.head.posterior(labels, None if self.weight is None else self.weight[chosen])
            loss = self.head.routing_loss(encoded, target)
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss is {float(loss.detach())}: lower the rate, or look for labels that are not finite"
            )
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        _average([p.grad for p in parameters])
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        if not bool(norm.isfinite()):
            raise TrainingError(f"the gradient's norm is {float(norm)}: lower the rate")
        optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def leaves(self, step: int) -> None:
        """Closed-form updates with the network held fixed; features are computed once."""
        sample = self._sample()
        with self._evaluating():
            encoded, labels = self._encoded(sample), self.labels[sample]
            weight = None if self.weight is None else self.weight[sample]
            before, dead = float(self.head.loss(encoded, labels, weight)), 0
            for _ in range(self.iterations):
                self.head.accumulate(encoded, labels, weight)
                dead = self.head.update()
            after = float(self.head.loss(encoded, labels, weight))
        self.history.leaf_updates.append((step, before, after, dead))

    def _sample(self) -> Tensor:
        kept = torch.randperm(len(self.features), generator=self.generator)[: self.leaf_samples]
        return kept.to(self.features.device)

    @torch.no_grad()
    def _encoded(self, sample: Tensor) -> Tensor:
        features = self.features[sample]
        if self.backbone is None:
            return features
        return torch.cat([self.backbone(part) for part in features.split(EVALUATED)])

    def _seen(self) -> Tensor:
        """Labels of samples of which something is visible; a hidden landmark is where it is in the mean."""
        assert self.weight is not None
        seen = self.weight > 0
        if seen.dim() == 1:
            return self.labels[seen]
        if not bool(seen.any(0).all()):
            raise ValueError("fit_forest: weight must show every landmark in at least one sample")
        visible = torch.where(seen[..., None], self.labels, 0.0)
        mean = visible.sum(0) / seen.sum(0)[:, None]
        return torch.where(seen[..., None], self.labels, mean)[seen.any(1)]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        modules = [m for m in (self.head, self.backbone) if m is not None]
        modes = [m.training for m in modules]
        for module in modules:
            module.eval()
        yield
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def _average(grads: list[Any]) -> None:
    if many_ranks():
        for grad in grads:
            torch.distributed.all_reduce(grad)
            grad /= torch.distributed.get_world_size()


def _check(
    scheme: str,
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    steepness: tuple[float, float] | None,
    **counts: int,
) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"fit_forest: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not len(features):
        raise ValueError("fit_forest: features need at least one sample, got none")
    for name, given in (("labels", labels), ("weight", weight)):
        if given is not None and len(given) != len(features):
            raise ValueError(f"fit_forest: {name} must be of {len(features)} samples, got {len(given)}")
    if weight is not None and not bool((weight > 0).any()):
        raise ValueError("fit_forest: weight must be above 0 for at least one sample, got none")
    if steepness is not None and not (
        isinstance(steepness, (tuple, list))
        and len(steepness) == 2
        and all(0 < value < math.inf for value in steepness)
    ):
        raise ValueError(f"fit_forest: steepness must be two positive numbers, got {steepness!r}")
    _check_counts(**counts)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"fit_forest: {name} must be an integer of at least 1, got {value!r}")
