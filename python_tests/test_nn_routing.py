"""`fastforest.nn.SoftForest`: units that start well, the draw of phi, steepness, and what a layer must survive."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch

from fastforest.nn import SoftForest
from fastforest.reference import routing as reference


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def test_is_the_reference_over_a_linear_layer() -> None:
    forest, features = SoftForest(6, 3, 4, units=20, steepness=1.75).double(), torch.randn(5, 6, dtype=torch.float64)
    units = features @ forest.weight.T + forest.bias
    torch.testing.assert_close(forest(features), reference.route(units, forest.phi, 1.75), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(forest.log_prob(features).exp(), forest(features))
    torch.testing.assert_close(forest(features).sum(-1), torch.ones(5, 3, dtype=torch.float64))


def test_phi_is_drawn_by_the_seed_without_replacement() -> None:
    first, again, other = (SoftForest(4, 3, 6, units=64, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.phi, again.phi) and not torch.equal(first.phi, other.phi)
    assert all(len(set(tree.tolist())) == 63 for tree in first.phi)
    assert "phi" in first.state_dict()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_calibrated_units_neither_saturate_nor_agree(scale: float, shift: float) -> None:
    """Features of any scale and mean: samples reach different leaves, none of them for sure, and gradients arrive."""
    forest, features = SoftForest(16, 3, 5), scale * (torch.randn(400, 16) + shift)
    forest.calibrate(features)
    units = features @ forest.weight.T + forest.bias
    torch.testing.assert_close(units.std(0, unbiased=False), torch.ones(128), rtol=1e-2, atol=0)
    prob = forest(features)
    assert prob.std(0).mean() > 0.01
    assert prob.amax(-1).mean() < 0.8
    best = prob.argmax(-1)
    assert min(len(best[:, tree].unique()) for tree in range(3)) > 16


def test_calibration_keeps_units_that_are_constant_and_takes_no_samples() -> None:
    forest = SoftForest(4, 2, 3)
    weight = forest.weight.detach().clone()
    forest.calibrate(torch.zeros(0, 4))
    assert torch.equal(forest.weight, weight)
    forest.calibrate(torch.ones(10, 4))
    assert torch.equal(forest.weight, weight)
    torch.testing.assert_close(forest(torch.ones(1, 4)), torch.full((1, 2, 8), 1 / 8))
    with pytest.raises(ValueError, match="spread must be a positive"):
        forest.calibrate(torch.ones(10, 4), 0.0)


def test_steepness_hardens_and_is_kept() -> None:
    forest, features = SoftForest(8, 2, 4), torch.randn(50, 8)
    soft = forest(features).amax(-1).mean().item()
    forest.steepness = 50.0
    assert forest(features).amax(-1).mean().item() > max(0.9, soft)
    twin = SoftForest(8, 2, 4, seed=9)
    twin.load_state_dict(forest.state_dict())
    assert twin.steepness == 50.0
    torch.testing.assert_close(twin(features), forest(features))
    torch.testing.assert_close(copy.deepcopy(forest)(features), forest(features))
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="steepness"):
            forest.steepness = wrong


def test_deep_and_hard_trees_stay_finite_in_log_space() -> None:
    forest, features = SoftForest(4, 1, 12, units=4095, steepness=1e4), torch.randn(3, 4)
    log = forest.log_prob(features)
    assert log.isfinite().all()
    (-log[:, :, 0].sum()).backward()
    assert forest.weight.grad is not None and forest.weight.grad.isfinite().all() and forest.weight.grad.abs().max() > 0


def test_gradients_agree_with_finite_differences() -> None:
    forest = SoftForest(3, 2, 3, units=4).double()  # fewer units than nodes: shared
    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, w: torch.func.functional_call(forest, {"weight": w}, (f,)), (features, forest.weight)
    )


def test_autocast_empty_and_compiled() -> None:
    forest, features = SoftForest(8, 2, 4), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = forest(features)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, forest(features), atol=0.03, rtol=0)
    assert forest(torch.zeros(0, 8)).shape == (0, 2, 16)
    compiled = torch.compile(forest, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), forest(features))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trees": 0}, "trees must be an integer of at least 1, got 0"),
        ({"depth": 17}, "depth must be an integer between 1 and 16, got 17"),
        ({"units": 0}, "units must be an integer of at least 1"),
        ({"objective": "sum"}, "objective must be one of 'per_tree', 'forest', got 'sum'"),
        ({"steepness": 0.0}, "steepness must be a positive finite number"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_errors_say_what_is_wrong(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SoftForest(4, **changes)


def test_features_of_another_shape_or_type() -> None:
    forest = SoftForest(4)
    with pytest.raises(ValueError, match=r"features must be \[N, 4\], got \[2, 3\]"):
        forest(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        forest(torch.zeros(2, 4, dtype=torch.int64))
