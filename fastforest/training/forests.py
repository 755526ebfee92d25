"""Training of forests on tensors or batches: the sequential and the alternating scheme.

Shapes: N samples; features are whatever the backbone takes, [N, in_features] without one; labels as the head takes them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._ranks import many_ranks
from .errors import TrainingError
from .schedules import anneal, learning_rate_factor

__all__ = ["SCHEMES", "ForestHistory", "fit_forest"]

SCHEMES = ("alternating", "sequential")
EVALUATED = 1024
"""Samples of a forward pass without gradient."""

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor, Tensor | None]
"""features, labels, and weight or None"""


@dataclass
class ForestHistory:
    """loss: of every step. leaf_updates: (step, loss before, loss after, dead leaves) of every leaf update, the losses
    over the samples that it used."""

    loss: list[float] = field(default_factory=list)
    leaf_updates: list[tuple[int, float, float, int]] = field(default_factory=list)


def fit_forest(
    head: Any,
    features: Tensor | Iterable[Any],
    labels: Tensor | None = None,
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
    """Trains a forest, and the backbone below it, on tensors in memory or on batches as a `DataLoader` gives them.

    "alternating": steps of the network on `head.loss`; after every `update_every` of them `iterations` closed-form leaf
    updates over `leaf_samples` samples, with the network held fixed. "sequential": first the leaves are fitted to the
    labels alone (`head.fit_leaves`), then the network to the leaves' posteriors (`head.routing_loss`), and at last the
    leaves once more to the routing that came out. Sequential needs no schedule of leaf updates and settles fast, but
    asks the network for an assignment that the features may not show; alternating finds one that they do.

    In a process group every rank gives its own samples, gradients are averaged and statistics summed over all ranks;
    the ranks must have equally many samples and the same weights at the start.

    Args:
        head: `nn.GaussianForest`, `LabelDistributionForest` or `HeatmapForest`.
        features: [N, ...], on the head's device, with labels [N, ...] and weight as the head's loss takes it, or None. Or,
            in place of all three, an iterable of batches (features, labels) or (features, labels, weight), such as a
            `DataLoader` or a list, on any device: every epoch, and every leaf update, begins a pass over it, so it must
            be one that can be iterated again. All labels are kept in memory, of the features `leaf_samples` at a time.
        scheme: "alternating" or "sequential".
        backbone: features -> [n, in_features]; None: features are that. Trained with the head.
        steps, rate, weight_decay, schedule: of AdamW; see `learning_rate_factor`. Of a given optimizer the schedule scales
            each group's own rate.
        batch: samples of a step; given batches are taken as they are.
        update_every, iterations, leaf_samples: of the leaf updates; sequential: iterations of the last one, and four times
            as many of the first. The samples are drawn anew for each update; of given batches they are the first, so
            shuffle these.
        steepness: (start, end) over the run, by `anneal` of kind `annealing`; None leaves it alone.
        clip: largest norm of the gradient; None: not clipped.
        start: first sets the leaves (`head.initialize`) and units (`head.calibrate`) by the data. False goes on from
            where the head is.
        augment: (features, labels, generator) -> (features, labels) of a batch, for instance label noise.
        optimizer: over all parameters, to keep its state between calls; None: AdamW.
        seed: of the order of the samples; given batches come in their own.

    Returns:
        `ForestHistory`. The head and the backbone end in evaluation mode.

    Raises:
        TypeError: batches of another form.
        ValueError: an argument out of range; batches that can be read only once, or none.
        TrainingError: a loss or gradient that is not finite.

    >>> from fastforest.nn import GaussianForest
    >>> head, features = GaussianForest(4, 1, trees=2, depth=3), torch.randn(64, 4)
    >>> history = fit_forest(head, features, features[:, :1], steps=20, batch=16, update_every=10)
    >>> len(history.loss), len(history.leaf_updates)
    (20, 2)
    >>> loader = torch.utils.data.DataLoader([(x, x[:1]) for x in features], batch_size=16, shuffle=True)
    >>> history = fit_forest(head, loader, steps=20, start=False)
    """
    _check(scheme, steepness)
    _check_counts(steps=steps, batch=batch, update_every=update_every, iterations=iterations, leaf_samples=leaf_samples)
    generator = torch.Generator().manual_seed(seed)
    samples: _Tensors | _Batches
    if isinstance(features, Tensor):
        _check_tensors(features, labels, weight)
        assert labels is not None
        samples = _Tensors(features, labels, weight, batch, generator)
    else:
        _check_batches(features, labels, weight)
        samples = _Batches(features, next(head.parameters()).device)
    run = _Run(head, backbone, samples, iterations, leaf_samples, generator)
    modules = [head] if backbone is None else [head, backbone]
    if start:
        run.start()
    if optimizer is None:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    if scheme == "sequential":
        head.fit_leaves(*samples.labels(), 4 * iterations)
        run.to_posteriors()
    for module in modules:
        module.train()
    batches = samples.forever()
    for step in range(steps):
        if steepness is not None:
            head.steepness = anneal(annealing, *steepness, step / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * learning_rate_factor(schedule, step / steps)
        run.history.loss.append(run.step(optimizer, next(batches), augment, clip))
        if scheme == "alternating" and (step + 1) % update_every == 0:
            run.leaves(step + 1)
    if scheme == "sequential":
        run.leaves(steps)
    for module in modules:
        module.eval()
    return run.history


class _Tensors:
    """Samples in memory, in an order drawn anew for every epoch."""

    def __init__(
        self, features: Tensor, labels: Tensor, weight: Tensor | None, batch: int, generator: torch.Generator
    ) -> None:
        self._features, self._labels, self._weight = features, labels, weight
        self._batch, self._generator = batch, generator

    def labels(self) -> tuple[Tensor, Tensor | None]:
        return self._labels, self._weight

    def forever(self) -> Iterator[Batch]:
        """Batches, every sample once before any twice."""
        while True:
            yield from self._of(self._order(), self._batch)

    def some(self, count: int) -> Iterator[Batch]:
        """Other `count` samples, or all there are, in parts for a forward pass."""
        return self._of(self._order()[:count], EVALUATED)

    def _order(self) -> Tensor:
        return torch.randperm(len(self._features), generator=self._generator)

    def _of(self, order: Tensor, batch: int) -> Iterator[Batch]:
        for chosen in order.to(self._features.device).split(batch):
            weight = None if self._weight is None else self._weight[chosen]
            yield self._features[chosen], self._labels[chosen], weight


class _Batches:
    """As `_Tensors`, of batches in the order that they come in."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def labels(self) -> tuple[Tensor, Tensor | None]:
        if self._kept is None:
            self._kept = _joined([(labels, weight) for _, labels, weight in self._once()])
        return self._kept

    def forever(self) -> Iterator[Batch]:
        while True:
            yield from self._once()

    def some(self, count: int) -> Iterator[Batch]:
        for features, labels, weight in self._once():
            yield features[:count], labels[:count], None if weight is None else weight[:count]
            count -= len(labels)
            if count <= 0:
                return

    def _once(self) -> Iterator[Batch]:
        got = False
        for given in self._batches:
            features, labels, weight = _parts(given)
            got = got or len(labels) > 0
            device = self._device
            yield features.to(device), labels.to(device), None if weight is None else weight.to(device)
        if not got:
            raise ValueError("fit_forest: batches need at least one sample in every pass, got none")


class _Run:
    def __init__(
        self,
        head: Any,
        backbone: nn.Module | None,
        samples: _Tensors | _Batches,
        iterations: int,
        leaf_samples: int,
        generator: torch.Generator,
    ) -> None:
        self.head, self.backbone, self.samples = head, backbone, samples
        self.iterations, self.leaf_samples = iterations, leaf_samples
        self.generator = generator
        self.history = ForestHistory()
        self._scale: Any = None
        self._to_posteriors = False

    def start(self) -> None:
        self.head.initialize(_seen(*self.samples.labels()))
        with self._evaluating():
            self.head.calibrate(self._encoded()[0])

    def to_posteriors(self) -> None:
        """From here on `step` moves the network to the posteriors of the leaves as they are."""
        self._to_posteriors, self._scale = True, self.head.posterior_scale(*self.samples.labels())

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        augment: Augmentation | None,
        clip: float | None,
    ) -> float:
        features, labels, weight = batch
        if augment is not None:
            features, labels = augment(features, labels, self.generator)
        encoded = features if self.backbone is None else self.backbone(features)
        if self._to_posteriors:
            loss = self.head.routing_loss(encoded, self.head.posterior(labels, weight, self._scale))
        else:
            loss = self.head.loss(encoded, labels, weight)
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
        with self._evaluating():
            encoded, labels, weight = self._encoded()
            before, dead = float(self.head.loss(encoded, labels, weight)), 0
            for _ in range(self.iterations):
                self.head.accumulate(encoded, labels, weight)
                dead = self.head.update()
            after = float(self.head.loss(encoded, labels, weight))
        self.history.leaf_updates.append((step, before, after, dead))

    @torch.no_grad()
    def _encoded(self) -> Batch:
        """`leaf_samples` samples, their features as the head sees them."""
        encoded, rest = [], []
        for features, labels, weight in self.samples.some(self.leaf_samples):
            encoded.append(features if self.backbone is None else self.backbone(features))
            rest.append((labels, weight))
        return torch.cat(encoded), *_joined(rest)

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


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    weights = [weight for _, weight in parts if weight is not None]
    if weights and len(weights) < len(parts):
        raise TypeError("fit_forest: every batch or none must hold a weight")
    return torch.cat([labels for labels, _ in parts]), torch.cat(weights) if weights else None


def _seen(labels: Tensor, weight: Tensor | None) -> Tensor:
    """Labels of samples of which something is visible; a hidden landmark is where it is in the mean."""
    if weight is None:
        return labels
    seen = weight > 0
    if seen.dim() == 1:
        return labels[seen]
    if not bool(seen.any(0).all()):
        raise ValueError("fit_forest: weight must show every landmark in at least one sample")
    visible = torch.where(seen[..., None], labels, 0.0)
    mean = visible.sum(0) / seen.sum(0)[:, None]
    return torch.where(seen[..., None], labels, mean)[seen.any(1)]


def _parts(batch: Any) -> Batch:
    tensors = isinstance(batch, (tuple, list)) and all(isinstance(part, Tensor) for part in batch)
    if not tensors or len(batch) not in (2, 3):
        got = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(
            f"fit_forest: a batch must be tensors (features, labels) or (features, labels, weight), got {got}"
        )
    if any(len(part) != len(batch[0]) for part in batch):
        shapes = ", ".join(str(list(part.shape)) for part in batch)
        raise ValueError(f"fit_forest: the tensors of a batch must be of equally many samples, got {shapes}")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _check_tensors(features: Tensor, labels: Tensor | None, weight: Tensor | None) -> None:
    if labels is None:
        raise TypeError("fit_forest: features [N, ...] need labels [N, ...], got None")
    if not len(features):
        raise ValueError("fit_forest: features need at least one sample, got none")
    for name, given in (("labels", labels), ("weight", weight)):
        if given is not None and len(given) != len(features):
            raise ValueError(f"fit_forest: {name} must be of {len(features)} samples, got {len(given)}")
    if weight is not None and not bool((weight > 0).any()):
        raise ValueError("fit_forest: weight must be above 0 for at least one sample, got none")


def _check_batches(batches: Any, labels: Tensor | None, weight: Tensor | None) -> None:
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"fit_forest: features must be a tensor or an iterable of batches, got {type(batches).__name__}"
        )
    if labels is not None or weight is not None:
        raise TypeError("fit_forest: labels and weight belong to features in a tensor; batches hold their own")
    if isinstance(batches, Iterator):
        raise ValueError(
            "fit_forest: batches are read again for every epoch, but a "
            f"{type(batches).__name__} can be read only once: give a list, a DataLoader, or an object with __iter__"
        )


def _check(scheme: str, steepness: tuple[float, float] | None) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"fit_forest: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if steepness is not None and not (
        isinstance(steepness, (tuple, list))
        and len(steepness) == 2
        and all(0 < value < math.inf for value in steepness)
    ):
        raise ValueError(f"fit_forest: steepness must be two positive numbers, got {steepness!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"fit_forest: {name} must be an integer of at least 1, got {value!r}")
