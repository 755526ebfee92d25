"""What layers with leaves share: routing, a replay of past batches, and closed-form leaf updates over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastforest.nn._checks import check_integer, looked_at
from fastforest.nn._precision import PreciseBuffers
from fastforest.nn.routing import DEEPEST, SoftForest
from fastforest.ops._checks import check_choice

TREE_UPDATES = ("average", "sequential")


class Replay:
    """The last `capacity` rows of what was stored, with their labels.

    No buffer of a module: it belongs to its rank, and a wrapper that copies buffers between ranks must not see it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._columns: list[Tensor] = []
        self._stored = 0

    def __len__(self) -> int:
        return min(self._stored, self.capacity)

    def add(self, columns: Sequence[Tensor]) -> None:
        columns = [column.detach()[-self.capacity :] for column in columns]
        if [c.shape[1:] for c in columns] != [c.shape[1:] for c in self._columns]:
            self._columns = [column.new_empty(self.capacity, *column.shape[1:]) for column in columns]
            self._stored = 0
        rows = len(columns[0])
        place = torch.arange(self._stored, self._stored + rows) % self.capacity
        for kept, column in zip(self._columns, columns, strict=True):
            kept[place.to(kept.device)] = column.to(kept)
        self._stored += rows
        if self._stored >= 2 * self.capacity:
            self._stored = self.capacity + self._stored % self.capacity

    def rows(self, device: torch.device) -> list[Tensor]:
        return [column[: len(self)].to(device) for column in self._columns]


class ForestOptions(TypedDict, total=False):
    """What every layer with leaves takes by keyword; `LeafForest` has the defaults."""

    trees: int
    depth: int
    units: int
    steepness: float
    objective: str
    tree_update: str
    update_every: int
    iterations: int
    replay: int | None


class LeafForest(PreciseBuffers):
    """Base of the layers whose leaves are learned in closed form, by `accumulate` and `update`.

    A subclass gives `_checked` (labels and weights), `_rows` (losses), `_statistics_of` (sums that add up over batches)
    and `_fit` (leaves from sums).
    """

    NAME = "LeafForest"

    def __init__(
        self,
        in_features: int,
        *,
        trees: int = 5,
        depth: int = 6,
        units: int = 128,
        steepness: float = 1.0,
        objective: str = "per_tree",
        tree_update: str = "average",
        update_every: int = 50,
        iterations: int = 20,
        replay: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer(self.NAME, "trees", trees, 1)
        check_integer(self.NAME, "depth", depth, 1, DEEPEST)
        check_integer(self.NAME, "seed", seed, 0)
        check_choice(self.NAME, "tree_update", tree_update, TREE_UPDATES)
        check_integer(self.NAME, "update_every", update_every, 1)
        check_integer(self.NAME, "iterations", iterations, 1)
        if replay is not None:
            check_integer(self.NAME, "replay", replay, 1)
        self.routing = SoftForest(
            in_features, trees, depth, units=units, steepness=steepness, objective=objective, seed=seed
        )
        self.in_features, self.trees, self.depth, self.seed = in_features, trees, depth, seed
        self.objective, self.tree_update = objective, tree_update
        self.update_every, self.iterations, self.replay = update_every, iterations, replay
        self.dead_leaves = 0
        """How many leaves were dead in the last update."""
        self.register_buffer("_turn", torch.zeros((), dtype=torch.int64))
        self._replay = None if replay is None else Replay(replay)
        self._since_update = 0
        self._statistics: Any = None

    _turn: Tensor

    @property
    def steepness(self) -> float:
        """Of the routing, see `SoftForest`."""
        return self.routing.steepness

    @steepness.setter
    def steepness(self, value: float) -> None:
        self.routing.steepness = value

    def calibrate(self, features: Tensor, spread: float = 1.0) -> None:
        """Sets where the units start, see `SoftForest.calibrate`."""
        self.routing.calibrate(features, spread)

    def loss(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean loss of the samples, sum w R / sum w: a scalar, 0 where nothing has weight.

        With a replay, a call in training mode also stores the batch, and every `update_every`-th call updates the leaves
        before it takes its loss.

        Args:
            features: [N, in_features].
            labels: as the class says.
            weight: >= 0, as the class says; 0 hides a label, even NaN.
        """
        total, mass = self.loss_sums(features, labels, weight)
        return total / torch.where(mass > 0, mass, 1.0)

    def loss_sums(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum w R, sum w), whose quotient is `loss`."""
        labels, weight = self._checked(features, labels, weight)
        self._check_weight(weight)
        if self._replay is not None and self.training:
            # as a decorator, disable would import the compiler with the library: 70 MB and some seconds
            observe = torch.compiler.disable(self._observe) if torch.compiler.is_compiling() else self._observe
            observe(features, labels, weight)
        log_prob = self.routing.log_prob(features)
        with torch.autocast(features.device.type, enabled=False):
            return self._rows(log_prob, labels, weight).sum(), weight.sum()

    @torch.no_grad()
    def accumulate(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds the closed-form statistics of a batch; arguments as `loss`. Additive over batches until `update`."""
        labels, weight = self._checked(features, labels, weight)
        self._check_weight(weight)
        self._add(self.routing.log_prob(features), labels, weight)

    @torch.no_grad()
    def update(self, group: Any = None) -> int:
        """Moves the leaves in closed form; returns how many were dead, also kept as `dead_leaves`.

        From what was accumulated since the last update, if anything was, which it forgets: one step. Otherwise from
        the replay: `iterations` steps with the routing held fixed. In a process group the sums are taken over all ranks,
        each of which must call it, and every rank gets the same leaves.

        tree_update "average" moves all trees at once against their present mean; "sequential" moves tree after tree,
        each seeing the others' updates (from accumulated sums one tree a call, in turn). They differ only for the
        objective "forest".

        Raises:
            RuntimeError: neither a replay nor anything accumulated.
        """
        if self._statistics is not None:
            self.dead_leaves = self._step(int(self._turn) if self._sequential else None, group)
            self._turn.copy_((self._turn + 1) % self.trees)
            return self.dead_leaves
        if self._replay is None or not len(self._replay):
            raise RuntimeError(
                f"{self.NAME}.update: nothing was accumulated since the last update: call accumulate first"
                + ("" if self._replay is None else ", or loss in training mode, which fills the replay")
            )
        features, labels, weight = self._replay.rows(self.routing.weight.device)
        log_prob = self.routing.log_prob(features)
        for _ in range(self._replay_steps):
            dead = 0
            for tree in range(self.trees) if self._sequential else (None,):
                self._add(log_prob, labels, weight)
                dead += self._step(tree, group)
            self.dead_leaves = dead
        return self.dead_leaves

    @torch.no_grad()
    def posterior(self, labels: Tensor, weight: Tensor | None = None, scale: Any = None) -> Tensor:
        """[N, T, L]: to which leaf of each tree the labels alone assign every sample, all leaves being as likely.

        scale: what `posterior_scale` gave for more labels than these; None: of these.
        """
        raise NotImplementedError

    def posterior_scale(self, labels: Tensor, weight: Tensor | None = None) -> Any:
        """What the posterior of a sample takes from the others, for `posterior` of one batch of many."""
        raise NotImplementedError

    @torch.no_grad()
    def fit_leaves(self, labels: Tensor, weight: Tensor | None = None, iterations: int = 20, group: Any = None) -> int:
        """Fits every tree's leaves to the labels alone, by EM with all leaves as likely; returns the dead leaves.

        The first half of the sequential scheme; `initialize` first. No mixing weights are learned: here they would only
        say how many labels a leaf took, which is the network's to say.
        """
        raise NotImplementedError

    def routing_loss(self, features: Tensor, posterior: Tensor) -> Tensor:
        """KL(posterior || routing), mean over samples and trees: the second half of the sequential scheme.

        Args:
            features: [N, in_features].
            posterior: [N, T, L], of `posterior`; rows of zeros count nothing.
        """
        log_prob = self.routing.log_prob(features)
        if posterior.shape != log_prob.shape:
            raise ValueError(
                f"{self.NAME}.routing_loss: posterior must be {list(log_prob.shape)}, got {list(posterior.shape)}"
            )
        rows = (torch.special.xlogy(posterior, posterior) - posterior * log_prob).sum(-1)
        return rows.sum() / (posterior.sum(-1) > 0).sum().clamp_min(1)

    @property
    def _sequential(self) -> bool:
        return self.tree_update == "sequential" and self.objective == "forest"

    @property
    def _replay_steps(self) -> int:
        return self.iterations

    def _observe(self, features: Tensor, labels: Tensor, weight: Tensor) -> None:
        assert self._replay is not None
        self._replay.add((features, labels, weight))
        self._since_update += 1
        if self._since_update >= self.update_every:
            self._since_update = 0
            self.update()

    def _check_weight(self, weight: Tensor) -> None:
        if looked_at(weight) and not bool((weight >= 0).all()):
            raise ValueError(f"{self.NAME}: weight must be at least 0, got {float(weight.min()):g}")

    def _add(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> None:
        with torch.autocast(log_prob.device.type, enabled=False):
            fresh = self._statistics_of(log_prob, labels, weight)
        self._statistics = (
            fresh if self._statistics is None else [a + b for a, b in zip(self._statistics, fresh, strict=True)]
        )

    def _step(self, tree: int | None, group: Any) -> int:
        statistics, self._statistics = self._statistics, None
        with torch.autocast(self.routing.weight.device.type, enabled=False):
            return self._fit(statistics, tree, group)

    def _checked(self, features: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _rows(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _statistics_of(self, log_prob: Tensor, labels: Tensor, weight: Tensor) -> list[Any]:
        raise NotImplementedError

    def _fit(self, statistics: list[Any], tree: int | None, group: Any) -> int:
        raise NotImplementedError

    def _forest_repr(self) -> str:
        return (
            f"tree_update={self.tree_update!r}, update_every={self.update_every}, iterations={self.iterations}, "
            f"replay={self.replay}"
        )
