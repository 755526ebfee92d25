"""`fastforest.nn.LeafPool`: selection, residual mode, leaf updates, and a problem small enough to learn in a test."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator

import pytest
import torch

from fastforest import models
from fastforest.nn import LeafPool
from fastforest.ops import pool as ops_pool

SELECTIONS = ("softmax", "forest")
B, P, F, N, SIZE = 4, 3, 6, 16, (12, 14)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(selection: str = "softmax", **changes: object) -> LeafPool:
    torch.manual_seed(0)
    arguments: dict = {"selection": selection, "rank": 8, **({"depth": 3} if selection == "forest" else {}), **changes}
    return LeafPool(F, P, N, SIZE, 1.2, **arguments)


def batch(seed: int = 1, images: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([SIZE[1] - 1.0, SIZE[0] - 1.0])
    points = torch.rand(images, P, 2, generator=generator) * limit
    return torch.randn(images, F, generator=generator), points


@pytest.mark.parametrize("selection", SELECTIONS)
def test_shapes(selection: str) -> None:
    head, (features, points) = layer(selection), batch()
    mean, covariance = head.distribution(features)
    assert head.select(features).shape == (B, P, N)
    assert head(features).shape == mean.shape == (B, P, 2)
    assert covariance.shape == (B, P, 2, 2)
    assert (torch.linalg.eigvalsh(covariance) > 0).all()
    assert head.heatmap(features).shape == (B, P, *SIZE)
    assert head.loss(features, points).shape == ()
    torch.testing.assert_close(head(features), mean)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_feature_vector_a_landmark_is_the_same_layer(selection: str) -> None:
    head, (features, _) = layer(selection), batch()
    repeated = features[:, None].expand(B, P, F)
    torch.testing.assert_close(head.select(repeated), head.select(features))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_sum_to_one_and_so_do_leaves(selection: str) -> None:
    head, (features, _) = layer(selection), batch()
    torch.testing.assert_close(head.select(features).sum(-1), torch.ones(B, P))
    torch.testing.assert_close(head.pool.sum((0, 1)), torch.ones(N))
    if selection == "forest":
        each = head.select(features).unflatten(-1, (head.trees, 2**head.depth)).sum(-1)
        torch.testing.assert_close(each, torch.full_like(each, 1 / head.trees))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_starts_as_a_broad_bump_at_the_centre_that_the_query_moves(selection: str) -> None:
    head = LeafPool(F, P, 256, (32, 32), 1.5, selection=selection)
    with torch.no_grad():
        head.query_weight.zero_()
        mean, covariance = head.distribution(torch.zeros(1, F))
        assert (mean - 15.5).abs().max() < 1
        assert covariance.diagonal(dim1=-2, dim2=-1).min() > 9 and covariance.abs().max() < 100
        head.query_bias[:, 0] += 0.25
        right = head(torch.zeros(1, F))
    assert (right - mean)[..., 0].min() > 2 and (right - mean)[..., 1].abs().max() < 1


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("objective", ["kl", "l2"])
def test_gradients_reach_features_and_every_parameter(selection: str, objective: str) -> None:
    head, (features, points) = layer(selection, objective=objective), batch()
    features.requires_grad_()
    head.loss(features, points).backward()
    for name, tensor in (("features", features), *head.named_parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0, name
    assert not head.pool.requires_grad


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradient_agrees_with_finite_differences(selection: str) -> None:
    head, (features, points) = layer(selection).double(), batch(images=2)
    features = features.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: head.loss(f, points.double()), (features,))


def test_residual_mode_shifts_points_and_nothing_else() -> None:
    shape = torch.tensor([[-40.0, 3.0], [5.5, 100.0], [0.0, 0.0]])  # two of the three lie off the canvas
    plain, residual = layer(), layer(mean_shape=shape)
    features, points = batch()
    shift = shape - plain.centre
    torch.testing.assert_close(residual(features), plain(features) + shift)
    torch.testing.assert_close(residual.loss(features, points + shift), plain.loss(features, points))
    torch.testing.assert_close(residual.from_canvas(residual.to_canvas(points)), points)
    torch.testing.assert_close(residual.distribution(features)[1], plain.distribution(features)[1])


@pytest.mark.parametrize(("objective", "leaf_update"), [("kl", "least_squares"), ("l2", "bounding")])
def test_crosswise_pairings_are_refused_unless_asked_for(objective: str, leaf_update: str) -> None:
    with pytest.raises(ValueError, match=f"'{objective}'.*'{leaf_update}'"):
        layer(objective=objective, leaf_update=leaf_update)
    head, (features, points) = layer(objective=objective, leaf_update=leaf_update, allow_mismatch=True), batch()
    head.accumulate(features, points)
    head.update()
    assert head.pool.isfinite().all()
    torch.testing.assert_close(head.pool.sum((0, 1)), torch.ones(N))


@pytest.mark.parametrize("objective", ["kl", "l2"])
def test_statistics_add_up_over_batches(objective: str) -> None:
    whole, parts = layer(objective=objective), layer(objective=objective)
    features, points = batch()
    whole.accumulate(features, points)
    parts.accumulate(features[:1], points[:1])
    parts.accumulate(features[1:], points[1:])
    for name in ("_statistics", "_gram") if objective == "l2" else ("_statistics",):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
    assert whole.update() == parts.update()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_bounding_never_increases_the_loss(selection: str, rate: float) -> None:
    head, (features, points) = layer(selection), batch(images=16)
    losses = [head.loss(features, points).item()]
    for _ in range(8):
        head.accumulate(features, points)
        head.update(rate)
        losses.append(head.loss(features, points).item())
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("images", [2, 64])
def test_least_squares_never_increases_the_loss(images: int) -> None:
    head, (features, points) = layer(objective="l2"), batch(images=images)
    losses = [head.loss(features, points).item()]
    for _ in range(4):
        head.accumulate(features, points)
        head.update()
        losses.append(head.loss(features, points).item())
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 1e-4
    assert (head.pool >= 0).all()
    torch.testing.assert_close(head.pool.sum((0, 1)), torch.ones(N))


def test_update_refuses_to_guess() -> None:
    head, (features, points) = layer(), batch()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        head.update()
    head.accumulate(features, points)
    with pytest.raises(ValueError, match="rate must be in"):
        head.update(0.0)
    head.update()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        head.update()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_equal_and_huge_logits(selection: str, scale: float) -> None:
    """Zero keys give equal logits; huge ones a one-hot selection. Both stay finite, also in the gradient."""
    head, (features, points) = layer(selection), batch()
    with torch.no_grad():
        head.key.mul_(scale)
    features.requires_grad_()
    prob = head.select(features)
    torch.testing.assert_close(prob.sum(-1), torch.ones(B, P))
    if scale:
        trees = max(head.trees, 1)
        best = prob.unflatten(-1, (trees, N // trees)).amax(-1)
        torch.testing.assert_close(best, torch.full_like(best, 1 / trees))
    elif selection == "softmax":
        torch.testing.assert_close(prob, torch.full_like(prob, 1 / N))
    loss = head.loss(features, points)
    loss.backward()
    assert loss.isfinite() and features.grad is not None and features.grad.isfinite().all()
    head.accumulate(features.detach(), points)
    head.update()
    assert head.pool.isfinite().all()


def test_one_hot_selection_shows_one_leaf_and_kills_the_others() -> None:
    head, (_, points) = layer(), batch()
    prob = torch.zeros(B, P, N)
    prob[..., 5] = 1
    torch.testing.assert_close(ops_pool.pool_heatmap(prob, head.pool)[0, 0], head.pool[..., 5])
    head.accumulate_selection(prob, points)
    assert head.update() == N - 1
    torch.testing.assert_close(head.pool, head.pool[..., 5:6].expand_as(head.pool))


@pytest.mark.parametrize("objective", ["kl", "l2"])
def test_hidden_landmarks_may_be_nan(objective: str) -> None:
    head, (features, points) = layer(objective=objective), batch()
    weight = torch.ones(B, P)
    weight[0, 1] = weight[2] = 0
    poisoned = torch.where((weight == 0)[..., None], torch.nan, points)
    features.requires_grad_()
    loss = head.loss(features, poisoned, weight)
    torch.testing.assert_close(loss, head.loss(features, points, weight))
    loss.backward()
    assert features.grad is not None and features.grad.isfinite().all() and (features.grad[2] == 0).all()
    head.accumulate(features.detach(), poisoned, weight)
    head.update()
    assert head.pool.isfinite().all()
    assert head.loss(features, poisoned, torch.zeros(B, P)).item() == 0


def test_loss_is_the_mean_over_visible_landmarks() -> None:
    head, (features, points) = layer(), batch()
    weight = torch.zeros(B, P)
    weight[1, 2] = 3
    alone = ops_pool.pool_kl_loss(head.select(features), head.pool, points, head.sigma)
    torch.testing.assert_close(head.loss(features, points), alone.mean())
    torch.testing.assert_close(head.loss(features, points, weight), alone[1, 2])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_empty_batch(selection: str) -> None:
    head = layer(selection)
    features, points = torch.zeros(0, F), torch.zeros(0, P, 2)
    mean, covariance = head.distribution(features)
    assert mean.shape == (0, P, 2) and covariance.shape == (0, P, 2, 2)
    assert head.loss(features, points).item() == 0
    head.accumulate(features, points)
    before = head.pool.clone()
    assert head.update() == N
    torch.testing.assert_close(head.pool, before)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_smallest_layer(selection: str) -> None:
    """One leaf on one pixel: the tree is a single leaf, and every landmark is the pixel."""
    head = LeafPool(F, 1, 1, (1, 1), 1.0, selection=selection)
    assert (head(torch.randn(2, F)) == 0).all()
    assert head.loss(torch.randn(2, F), torch.zeros(2, 1, 2)).abs() < 1e-6


@pytest.mark.parametrize("selection", SELECTIONS)
def test_steepness_goes_from_even_to_hard(selection: str) -> None:
    head, (features, _) = layer(selection), batch()
    trees = max(head.trees, 1)

    def best_of_tree() -> torch.Tensor:
        return head.select(features).unflatten(-1, (trees, N // trees)).amax(-1) * trees

    head.steepness = 1e-6
    torch.testing.assert_close(head.select(features), torch.full((B, P, N), 1 / N), atol=1e-4, rtol=0)
    soft = best_of_tree()
    head.steepness = 3.0
    assert (best_of_tree() > soft).all()
    head.steepness = 1e6
    torch.testing.assert_close(best_of_tree(), torch.ones(B, P, trees))
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="steepness"):
            head.steepness = wrong


@pytest.mark.parametrize("selection", SELECTIONS)
def test_state_dict_and_deepcopy_keep_everything(selection: str) -> None:
    head, (features, points) = layer(selection, mean_shape=torch.randn(P, 2)), batch()
    head.accumulate(features, points)
    twin = copy.deepcopy(head)
    assert twin.update() == head.update()
    head.steepness = 2.5
    torch.manual_seed(7)
    other = LeafPool(
        F,
        P,
        N,
        SIZE,
        1.2,
        selection=selection,
        rank=8,
        mean_shape=torch.zeros(P, 2),
        **({"depth": 3} if selection == "forest" else {}),
    )
    other.load_state_dict(head.state_dict())
    assert other.steepness == 2.5
    torch.testing.assert_close(other(features), head(features))
    twin.steepness = 2.5
    torch.testing.assert_close(twin(features), head(features))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_is_factorised(selection: str) -> None:
    head = LeafPool(64, 20, 256, SIZE, 1.2, selection=selection, rank=16)
    assert max(p.numel() for p in head.parameters()) == 20 * 16 * 64
    assert sum(p.numel() for p in head.parameters()) < 64 * 20 * 256 / 4


@pytest.mark.parametrize("selection", SELECTIONS)
def test_bfloat16_autocast(selection: str) -> None:
    head, (features, points) = layer(selection), batch()
    exact, exact_loss = head(features), head.loss(features, points)
    with torch.autocast("cpu", torch.bfloat16):
        points_low, loss = head(features), head.loss(features, points)
        head.loss(features[:, None].expand(B, P, F), points).backward()
    assert head.select(features.bfloat16()).dtype == points_low.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(points_low, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(loss, exact_loss, atol=0.02, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_compiles_without_a_break(selection: str) -> None:
    head, (features, _) = layer(selection, mean_shape=torch.randn(P, 2)), batch()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), head(features))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection": "hard"}, "selection must be 'softmax' or 'forest', got 'hard'"),
        ({"objective": "mse"}, "objective must be 'kl' or 'l2', got 'mse'"),
        ({"leaf_update": "sgd"}, "leaf_update must be"),
        ({"rank": 2}, "rank must be an integer of at least 3, got 2"),
        ({"truncate": -1.0}, "truncate must be a positive finite number"),
        ({"depth": 3}, "trees and depth belong to selection='forest'"),
        ({"selection": "forest", "trees": 3, "depth": 2}, "leaves=16, trees=3, depth=2"),
        ({"mean_shape": torch.zeros(2, 2)}, r"mean_shape must be \[3, 2\], got \[2, 2\]"),
        ({"mean_shape": torch.full((3, 2), torch.nan)}, "mean_shape must be finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LeafPool(F, P, N, SIZE, 1.2, **changes)


def test_wrong_inputs_are_named() -> None:
    head, (features, points) = layer(), batch()
    with pytest.raises(ValueError, match=r"features must be \[B, 6\] or \[B, 3, 6\], got \[4, 5\]"):
        head(features[:, :5])
    with pytest.raises(TypeError, match="features must be floating-point"):
        head(features.long())
    with pytest.raises(ValueError, match=r"points must be \[4, 3, 2\], got \[3, 3, 2\]"):
        head.loss(features, points[:3])
    with pytest.raises(ValueError, match=r"weight must be \[4, 3\], got \[4\]"):
        head.loss(features, points, torch.ones(B))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_learns_a_linear_problem_and_leaf_updates_help(selection: str) -> None:
    """Points are a linear function of the features; the error must fall well under a pixel on a 24 x 24 canvas."""
    torch.manual_seed(0)
    features = torch.randn(128, 8)
    points = 11.5 + (features @ (torch.randn(8, 10) * 0.9)).view(-1, 5, 2).clamp(-9, 9)
    head = LeafPool(8, 5, 64, (24, 24), 1.5, selection=selection, rank=16)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)

    def error() -> float:
        return (head(features) - points).norm(dim=-1).mean().item()

    start = error()
    for step in range(240):
        loss = head.loss(features, points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (80, 160):
            head.accumulate(features, points)
            head.update(0.5)
    assert start > 2
    assert error() < (0.5 if selection == "softmax" else 0.8)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_models_built_on_it(name: str) -> None:
    """The protocol of `fastforest.models`: config round trip, hidden NaN points, autocast, statistics."""
    torch.manual_seed(0)
    shape = 8 + 16 * torch.rand(5, 2)
    config = {
        "landmarks": 5,
        "mean_shape": shape.tolist(),
        "image_size": 32,
        "backbone_options": {"width": 4, "code": 8},
    }
    model = models.build(name, config)
    images, points, weight = torch.rand(2, 3, 32, 32), shape + torch.randn(2, 5, 2), torch.ones(2, 5)
    weight[1, 3] = 0
    points[1, 3] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = model.loss(images, points, weight), model(images)
    loss.backward()
    assert found.shape == (2, 5, 2) and found.dtype == loss.dtype == torch.float32
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    idle = {name for name, grad in gradients.items() if grad is None}
    by_vector = isinstance(model, models.CoordinateRegression | models.GroupedForest | models.SharedPool)
    # Heads that read the vector alone leave what only the map passes through.
    assert all(by_vector and name.startswith(("backbone.lateral", "backbone.merge")) for name in idle)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients.values() if grad is not None)
    if isinstance(model, models.LandmarkForest):
        model.steepness = 1.5
        model.accumulate(images, points, weight)
        assert 0 <= model.update() < 2 * model.coarse.leaves
        mean, covariance = model.eval().distribution(images)
        torch.testing.assert_close(mean, model(images))
        assert covariance.shape == (2, 5, 2, 2)
    twin = models.build(name, json.loads(json.dumps(model.config())))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(images), model.eval()(images))
    assert model(images[:0]).shape == (0, 5, 2)
    with pytest.raises(ValueError, match="unexpected keyword argument 'depths'"):
        models.build(name, config | {"depths": 3})


def test_dense_loss_is_the_divergence_from_rendered_targets() -> None:
    torch.manual_seed(0)
    shape = 8 + 16 * torch.rand(4, 2)
    model = models.DenseHeatmap(4, shape, 32, backbone_options={"width": 4, "code": 8}, upsample=2, sigma=1.0).eval()
    images, points = torch.rand(2, 3, 32, 32), shape + torch.randn(2, 4, 2)
    maps = model.heatmap(images).double()
    pixels = (torch.arange(16) + 0.5) * 2 - 0.5
    d = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), -1) - points.double()[..., None, None, :]
    target = (-(d**2).sum(-1) / (2 * 2.0**2)).flatten(2).softmax(-1)
    expected = (target * (target.log() - maps.flatten(2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(model.loss(images, points).double(), expected, rtol=1e-4, atol=1e-4)
