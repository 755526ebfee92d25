"""`SoftForest`: features to the leaf probabilities of soft trees.

Shapes: N samples, F units, T trees of depth D, L = 2^D leaves a tree, left to right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastforest.nn._checks import check_features, check_integer, check_positive
from fastforest.nn._precision import PreciseBuffers
from fastforest.nn._ranks import sum_over_ranks
from fastforest.ops import routing as ops_routing
from fastforest.ops._checks import check_choice

__all__ = ["SoftForest"]

OBJECTIVES = ("per_tree", "forest")
DEEPEST = 16


class SoftForest(PreciseBuffers):
    r"""Soft decision trees over a linear layer: each split reads one unit, and every sample reaches every leaf a little.

    .. math::  d_n = \mathrm{sigmoid}(s f_{\phi(n)}), \qquad
               P_\ell = \prod_{n \ni \ell} d_n^{[\ell\ \mathrm{left\ of}\ n]} (1 - d_n)^{[\ell\ \mathrm{right\ of}\ n]}

    f [N, F] = W x + b are the units. `phi` [T, 2^D - 1] is a fixed random draw, kept in the state dict: which unit a
    node reads, without replacement within a tree while units last.

    The units start at standard deviation 1 for features of mean 0 and variance 1. For any other features call
    `calibrate` once: units that hardly vary send every sample to the same leaves, saturated ones pass no gradient, and
    either looks like a network that does not learn.

    Args:
        in_features: of the input.
        trees, depth: T and D, 1 to 16.
        units: F.
        steepness: s > 0, settable, kept in the state dict; raised, it hardens the trees.
        objective: what a loss over these trees is taken of: "per_tree", the mean of the trees' losses, or "forest", the
            loss of their mean prediction. The layers that hold leaves act on it.
        seed: of phi.

    Raises:
        ValueError: an argument out of range.

    Autocast, and a layer in bfloat16 or float16: the units are computed in these 16 bits; routing is float32 (float64 for
    a layer of that dtype).

    >>> forest = SoftForest(16, trees=3, depth=4)
    >>> prob = forest(torch.randn(2, 16))
    >>> prob.shape, bool((prob.sum(-1) - 1).abs().max() < 1e-5)
    (torch.Size([2, 3, 16]), True)
    """

    PRECISE = ("_steepness",)
    phi: Tensor
    _steepness: Tensor

    def __init__(
        self,
        in_features: int,
        trees: int = 5,
        depth: int = 6,
        *,
        units: int = 128,
        steepness: float = 1.0,
        objective: str = "per_tree",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("trees", trees), ("units", units)):
            check_integer("SoftForest", name, value, 1)
        check_integer("SoftForest", "depth", depth, 1, DEEPEST)
        check_integer("SoftForest", "seed", seed, 0)
        check_choice("SoftForest", "objective", objective, OBJECTIVES)
        self.in_features, self.trees, self.depth, self.units = in_features, trees, depth, units
        self.objective = objective
        self.weight = nn.Parameter(torch.randn(units, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(units))
        self.register_buffer("phi", ops_routing.draw_phi(units, trees, depth, seed))
        self.register_buffer("_steepness", torch.tensor(1.0))
        self.steepness = steepness

    @property
    def leaves(self) -> int:
        """L, of a tree."""
        return 2**self.depth

    @property
    def steepness(self) -> float:
        """s, multiplies the units: raise it to harden the trees."""
        return float(self._steepness)

    @steepness.setter
    def steepness(self, value: float) -> None:
        check_positive("SoftForest", "steepness", value)
        self._steepness.fill_(value)

    def forward(self, features: Tensor) -> Tensor:
        """Leaf probabilities [N, T, L] of features [N, in_features]; each tree's sum to 1."""
        return self._route(features, log=False)

    def log_prob(self, features: Tensor) -> Tensor:
        """Their logarithms, exact where probabilities underflow."""
        return self._route(features, log=True)

    @torch.no_grad()
    def calibrate(self, features: Tensor, spread: float = 1.0) -> None:
        """Rescales and shifts the units: mean 0 and standard deviation `spread` over these features [N, in_features].

        A unit that is constant over them keeps its weights and is only shifted. Ranks of a process group pool their
        features.
        """
        check_positive("SoftForest.calibrate", "spread", spread)
        check_features("SoftForest", features, self.in_features)
        with torch.autocast(features.device.type, enabled=False):
            units = functional.linear(features.to(self.weight.dtype), self.weight).double()
        count, first = units.new_tensor(float(len(units))), units.sum(0)
        sum_over_ranks([count, first])
        if not float(count):
            return
        mean = first / count
        second = (units - mean).square().sum(0)
        sum_over_ranks([second])
        deviation = (second / count).sqrt()
        varies = deviation > 1e-6 * mean.abs()
        scale = torch.where(varies, spread / torch.where(varies, deviation, 1.0), 1.0)
        self.weight.mul_(scale.to(self.weight.dtype)[:, None])
        self.bias.copy_(-scale * mean)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, trees={self.trees}, depth={self.depth}, units={self.units}, "
            f"objective={self.objective!r}"
        )

    def _route(self, features: Tensor, log: bool) -> Tensor:
        check_features("SoftForest", features, self.in_features)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.weight.dtype)
        units = functional.linear(features, self.weight, self.bias)
        with torch.autocast(features.device.type, enabled=False):
            return ops_routing.route(units.to(self.weight.dtype), self.phi, self._steepness, log=log)
