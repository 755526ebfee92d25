"""`fastforest.nn.GaussianForest`: predictions, expectation maximisation, what kills other forests, ranks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from processes import on_two_ranks

from fastforest.nn import GaussianForest

N, F, D = 200, 6, 2
OBJECTIVES = [("per_tree", "average"), ("forest", "average"), ("forest", "sequential")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def data(samples: int = N, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(samples, F, generator=generator)
    labels = torch.stack([features[:, 0] + features[:, 1], 2 * features[:, 2].tanh()], 1) + 30
    return features.to(dtype), (labels + 0.1 * torch.randn(samples, D, generator=generator)).to(dtype)


def layer(**changes: Any) -> GaussianForest:
    torch.manual_seed(0)
    return GaussianForest(F, D, **{"trees": 3, "depth": 3, "units": 16, **changes})


def started(**changes: Any) -> tuple[GaussianForest, torch.Tensor, torch.Tensor]:
    head, (features, labels) = layer(**changes), data()
    head.initialize(labels)
    head.calibrate(features)
    return head, features, labels


def mixture(head: GaussianForest, features: torch.Tensor) -> torch.distributions.Distribution:
    parts = torch.distributions.MultivariateNormal(
        head.mean.flatten(0, 1).double(), scale_tril=head.scale_tril.flatten(0, 1).double()
    )
    weight = torch.distributions.Categorical(probs=head.routing(features).flatten(1).double())
    return torch.distributions.MixtureSameFamily(weight, parts.expand((len(features), head.trees * 8)))


def test_prediction_is_the_mixture_of_its_leaves() -> None:
    head, features, labels = started()
    expected, predicted = mixture(head, features), head.distribution(features)
    torch.testing.assert_close(
        predicted.log_prob(labels).double(), expected.log_prob(labels.double()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(predicted.mean.double(), expected.mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head(features), predicted.mean)
    variance = predicted.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance.double(), expected.variance, rtol=1e-3, atol=1e-3)
    assert (torch.linalg.eigvalsh(predicted.covariance) > 0).all()


def test_samples_have_the_moments_and_the_entropy_bound_holds() -> None:
    head, features, _ = started()
    predicted = head.distribution(features[:3])
    draws = predicted.sample(torch.Generator().manual_seed(0), 20000)
    assert draws.shape == (20000, 3, D)
    error = 4 * (predicted.covariance.diagonal(dim1=-2, dim2=-1) / 20000).sqrt()
    assert ((draws.mean(0) - predicted.mean).abs() < error).all()
    torch.testing.assert_close(torch.cov(draws[:, 0].T), predicted.covariance[0], rtol=0.1, atol=0.05)
    entropy = -torch.stack([predicted.log_prob(draw) for draw in draws[:2000]]).mean(0)
    assert (predicted.entropy_bound > entropy - 0.1).all()
    assert torch.equal(draws[:5], predicted.sample(torch.Generator().manual_seed(0), 20000)[:5])


def test_quantiles_invert_the_distribution_function() -> None:
    head, features, _ = started()
    predicted, levels = head.distribution(features), torch.tensor([0.05, 0.5, 0.95])
    for dimension in range(D):
        values = predicted.quantile(levels, dimension)
        assert values.shape == (N, 3) and (values.diff(dim=1) > 0).all()
        torch.testing.assert_close(predicted.cdf(values, dimension), levels.expand(N, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(predicted.quantile(0.5, 1), predicted.quantile(torch.tensor([0.5]), 1)[:, 0])
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"q must be a number or \[Q\] in \(0, 1\)"):
            predicted.quantile(wrong)


@pytest.mark.parametrize("objective", ["per_tree", "forest"])
def test_loss_is_the_negative_log_likelihood(objective: str) -> None:
    head, features, labels = started(objective=objective)
    if objective == "forest":
        expected = -mixture(head, features).log_prob(labels.double()).mean()
    else:
        density = torch.distributions.MultivariateNormal(head.mean.double(), scale_tril=head.scale_tril.double())
        joint = head.routing.log_prob(features).double() + density.log_prob(labels.double()[:, None, None])
        expected = -joint.logsumexp(-1).mean()
    torch.testing.assert_close(head.loss(features, labels).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["per_tree", "forest"])
def test_gradients_reach_the_network_and_agree_with_finite_differences(objective: str) -> None:
    head = layer(objective=objective, depth=2, trees=2).double()
    features, labels = data(4, torch.float64)
    head.initialize(labels)
    features.requires_grad_()
    head.loss(features, labels).backward()
    for tensor in (features, *head.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0
    assert torch.autograd.gradcheck(lambda f: head.loss(f, labels), (features,))


@pytest.mark.parametrize(("objective", "tree_update"), OBJECTIVES)
def test_expectation_maximisation_never_lowers_the_likelihood(objective: str, tree_update: str) -> None:
    head, features, labels = started(objective=objective, tree_update=tree_update, floor=1e-6, min_count=1e-9)
    losses = [head.loss(features, labels).item()]
    for _ in range(12):
        head.accumulate(features, labels)
        head.update()
        losses.append(head.loss(features, labels).item())
    assert all(after <= before + 1e-4 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.01


def test_sequential_moves_one_tree_a_call_and_differs_from_average() -> None:
    head, features, labels = started(objective="forest", tree_update="sequential")
    for turn in (0, 1, 2, 0):
        before = head.mean.clone()
        head.accumulate(features, labels)
        head.update()
        moved = (head.mean != before).flatten(1).any(1)
        assert moved.tolist() == [tree == turn for tree in range(3)]


@pytest.mark.parametrize(("objective", "tree_update"), OBJECTIVES)
def test_learns_better_than_the_mean(objective: str, tree_update: str) -> None:
    head, features, labels = started(
        objective=objective, tree_update=tree_update, replay=N, update_every=20, iterations=4
    )
    first = head.loss(features, labels).item()
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(200):
        loss = head.loss(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    assert head.loss(features, labels).item() < first - 0.3
    error, spread = (head(features) - labels).square().mean(), (labels - labels.mean(0)).square().mean()
    assert error < 0.4 * spread
    low, high = head.distribution(features).quantile(torch.tensor([0.05, 0.95])).unbind(1)
    covered = ((labels[:, 0] > low) & (labels[:, 0] < high)).float().mean()
    assert 0.85 < covered <= 1
    assert head(features).std(0).min() > 0.2  # outputs follow inputs


def test_statistics_add_up_over_batches() -> None:
    for objective in ("per_tree", "forest"):
        whole, features, labels = started(objective=objective)
        parts = copy.deepcopy(whole)
        whole.accumulate(features, labels)
        parts.accumulate(features[:70], labels[:70])
        parts.accumulate(features[70:], labels[70:])
        assert whole.update() == parts.update()
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(parts.scale_tril, whole.scale_tril, rtol=1e-3, atol=1e-4)


def test_replay_updates_by_itself_in_training_alone() -> None:
    head, features, labels = started(replay=100, update_every=3, iterations=2)
    before = head.mean.clone()
    for _ in range(2):
        head.loss(features[:50], labels[:50])
    head.eval()
    for _ in range(5):
        head.loss(features[:50], labels[:50])
    assert torch.equal(head.mean, before)
    head.train()
    head.loss(features[50:100], labels[50:100])
    assert not torch.equal(head.mean, before)


def test_replay_keeps_the_last_rows() -> None:
    """A ring that went round equals an update of the rows it should hold."""
    ring, features, labels = started(replay=64, update_every=1000, iterations=1)
    plain = copy.deepcopy(ring)
    for rows in (slice(0, 50), slice(50, 90), slice(90, 200)):
        ring.loss(features[rows], labels[rows])
    ring.loss(features[:10], labels[:10])
    ring.update()
    kept = torch.cat([torch.arange(146, 200), torch.arange(10)])
    plain.accumulate(features[kept], labels[kept])
    plain.update()
    torch.testing.assert_close(ring.mean, plain.mean, rtol=1e-5, atol=1e-4)


def test_replay_in_a_compiled_step() -> None:
    compiled, features, labels = started(replay=100, update_every=2, iterations=1)
    plain = copy.deepcopy(compiled)
    step = torch.compile(lambda x, y: compiled.loss(x, y), backend="aot_eager")
    for rows in (slice(0, 50), slice(50, 100), slice(100, 150), slice(150, 200)):
        torch.testing.assert_close(step(features[rows], labels[rows]), plain.loss(features[rows], labels[rows]))
    torch.testing.assert_close(compiled.mean, plain.mean)


def test_update_refuses_to_guess() -> None:
    head, features, labels = started()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        head.update()
    head.accumulate(features, labels)
    head.update()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        head.update()


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical", "tied"])
@pytest.mark.parametrize("case", ["identical", "three_distinct", "one_sample"])
def test_degenerate_labels_survive(covariance: str, case: str) -> None:
    head, (features, labels) = layer(covariance=covariance), data()
    if case == "one_sample":
        features, labels = features[:1], labels[:1]
    else:
        labels = labels[:1].expand(N, D) if case == "identical" else labels[torch.arange(N) % 3]
    head.initialize(labels)
    for _ in range(30):
        head.accumulate(features, labels)
        head.update()
    assert head.mean.isfinite().all() and head.scale_tril.isfinite().all()
    assert (head.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    loss = head.loss(features, labels)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())
    if case == "identical":
        torch.testing.assert_close(head(features), labels, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_rank_deficient_labels_survive_a_hundred_iterations(covariance: str) -> None:
    torch.manual_seed(0)
    head, features = GaussianForest(F, 136, trees=1, depth=2, units=8, covariance=covariance), torch.randn(40, F)
    labels = 100 + features @ torch.randn(F, 136)
    head.initialize(labels)
    for _ in range(100):
        head.accumulate(features, labels)
        head.update()
    assert head.mean.isfinite().all() and head.scale_tril.isfinite().all()
    assert head.loss(features, labels).isfinite()


@pytest.mark.parametrize("dead", ["keep", "reseed"])
def test_dead_leaves_are_counted_and_kept_or_reseeded(dead: str) -> None:
    head, features, labels = started(dead=dead)
    with torch.no_grad():  # every sample goes left: one leaf a tree lives
        head.routing.weight.zero_()
        head.routing.bias.fill_(1e4)
    before = head.mean.clone()
    head.accumulate(features, labels)
    assert head.update() == head.dead_leaves == 3 * 7
    torch.testing.assert_close(head.mean[:, 0], labels.mean(0).expand(3, D), rtol=1e-4, atol=1e-2)
    if dead == "keep":
        assert torch.equal(head.mean[:, 1:], before[:, 1:])
    else:
        nearest = torch.cdist(head.mean[:, 1:].flatten(0, 1), labels).amin(1)
        assert nearest.max() < 1e-3
        assert all(len(tree[1:].unique(dim=0)) == 7 for tree in head.mean)


def test_hidden_labels_may_be_nan() -> None:
    head, features, labels = started(replay=N, update_every=1000, iterations=1)
    weight = torch.ones(N)
    weight[::3] = 0
    poisoned = torch.where((weight == 0)[:, None], torch.nan, labels)
    loss = head.loss(features, poisoned, weight)
    torch.testing.assert_close(loss, head.loss(features[weight > 0], labels[weight > 0]))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    twin = copy.deepcopy(head)
    head.accumulate(features, poisoned, weight)
    twin.accumulate(features[weight > 0], labels[weight > 0])
    head.update()
    twin.update()
    torch.testing.assert_close(head.mean, twin.mean, rtol=1e-5, atol=1e-4)
    head.initialize(poisoned)
    assert head.mean.isfinite().all()
    assert head.loss(features, poisoned, torch.zeros(N)).item() == 0


@pytest.mark.parametrize(("objective", "tree_update"), OBJECTIVES)
def test_a_weight_counts_as_so_many_samples(objective: str, tree_update: str) -> None:
    """In all three ways to the leaves, and a half is a half: it is the ratios that tell."""
    times = torch.arange(N) % 3
    for factor in (1.0, 0.5):
        head, features, labels = started(
            objective=objective, tree_update=tree_update, replay=2 * N, update_every=1000, iterations=1, min_count=1e-3
        )
        twin = copy.deepcopy(head)
        rows = torch.arange(N).repeat_interleave(times)
        weight = factor * times
        for forest, given in ((head, (features, labels, weight)), (twin, (features[rows], labels[rows]))):
            forest.accumulate(*given)
            forest.update()
            forest.loss(*given)
            forest.update()
            forest.fit_leaves(*given[1:], iterations=1)
        torch.testing.assert_close(head.mean, twin.mean, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(head.scale_tril, twin.scale_tril, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        head.fit_leaves(labels, -torch.ones(N))


def test_a_far_outlier_leaves_the_loss_finite() -> None:
    head, features, labels = started()
    labels[0] = 1e6
    loss = head.loss(features, labels)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())


def test_leaves_start_in_tree_order_and_apart() -> None:
    head, _, labels = started()
    for tree in head.mean:
        assert len(tree.unique(dim=0)) == 8
        halves = tree.view(2, 4, D)
        between = (halves[0].mean(0) - halves[1].mean(0)).norm()
        quarters = tree.view(2, 2, 2, D).mean(2)
        assert between > 0.5 * (quarters[:, 0] - quarters[:, 1]).norm(dim=-1).max()
    assert not torch.equal(head.mean[0], head.mean[1])
    again = layer()
    again.initialize(labels)
    assert torch.equal(again.mean, head.mean)


def test_empty_batch() -> None:
    head, features, labels = started()
    none, nothing = features[:0], labels[:0]
    assert head(none).shape == (0, D) and head.distribution(none).covariance.shape == (0, D, D)
    assert head.loss(none, nothing).item() == 0
    before = head.mean.clone()
    head.accumulate(none, nothing)
    assert head.update() == 24
    assert torch.equal(head.mean, before)
    with pytest.raises(ValueError, match="at least one finite label"):
        head.initialize(nothing)


def test_checkpoint_resumes() -> None:
    """Stopped at an update and restored into a fresh layer, training goes on to the same bits."""
    head, features, labels = started(objective="forest", tree_update="sequential")

    def go(forest: GaussianForest, optimizer: torch.optim.Optimizer, rounds: int) -> None:
        for _ in range(rounds):
            for _ in range(3):
                optimizer.zero_grad()
                forest.loss(features, labels).backward()
                optimizer.step()
            forest.accumulate(features, labels)
            forest.update()

    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    go(head, optimizer, 2)
    saved = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    go(head, optimizer, 2)
    torch.manual_seed(5)
    other = GaussianForest(F, D, trees=3, depth=3, units=16, objective="forest", tree_update="sequential", seed=7)
    other_optimizer = torch.optim.Adam(other.parameters(), 0.01)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    go(other, other_optimizer, 2)
    assert torch.equal(other.mean, head.mean) and torch.equal(other(features), head(features))


def test_autocast_double_and_deepcopy() -> None:
    head, features, labels = started()
    with torch.autocast("cpu", torch.bfloat16):
        low, loss = head(features), head.loss(features, labels)
        loss.backward()
    assert low.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(low, head(features), atol=0.2, rtol=0)
    torch.testing.assert_close(loss, head.loss(features, labels), atol=0.05, rtol=0)
    double = copy.deepcopy(head).double()
    double.accumulate(features, labels)
    double.update()
    assert double(features).dtype == double.loss(features, labels).dtype == torch.float64


@pytest.mark.parametrize("objective", ["per_tree", "forest"])
def test_compiles_with_its_backward_pass(objective: str) -> None:
    head, features, labels = started(objective=objective)
    compiled = torch.compile(lambda f, y: head.loss(f, y), fullgraph=True, backend="aot_eager")
    loss = compiled(features, labels)
    loss.backward()
    grad = head.routing.weight.grad.clone()
    head.routing.weight.grad = None
    expected = head.loss(features, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, head.routing.weight.grad)
    head.accumulate(features, labels)
    head.update()
    torch.testing.assert_close(compiled(features, labels), head.loss(features, labels))


def test_two_ranks_give_the_update_of_one(tmp_path: Path) -> None:
    """Two processes with halves of the data, over gloo: the leaves of one process with all of it."""
    alone, first, second = on_two_ranks(ranks, tmp_path)
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"covariance": "round"}, "covariance must be one of 'full', 'diagonal', 'spherical', 'tied', got 'round'"),
        ({"floor": 0.0}, "floor must be a positive finite number, got 0.0"),
        ({"min_count": -1.0}, "min_count must be a positive finite number"),
        ({"dead": "bury"}, "dead must be one of 'keep', 'reseed', got 'bury'"),
        ({"tree_update": "random"}, "tree_update must be one of 'average', 'sequential'"),
        ({"trees": 0}, "GaussianForest: trees must be an integer of at least 1, got 0"),
        ({"depth": 17}, "GaussianForest: depth must be an integer between 1 and 16, got 17"),
        ({"update_every": 0}, "update_every must be an integer of at least 1"),
        ({"replay": 0}, "replay must be an integer of at least 1"),
        ({"out_features": 257}, "out_features must be an integer between 1 and 256"),
    ],
)
def test_errors_say_what_is_wrong(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaussianForest(F, changes.pop("out_features", D), **changes)


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tree'"):
        GaussianForest(F, D, tree=3)  # type: ignore[call-arg]


def test_labels_and_weights_of_another_shape() -> None:
    head, features, labels = started()
    with pytest.raises(ValueError, match=r"labels must be \[200, 2\], got \[200, 1\]"):
        head.loss(features, labels[:, :1])
    with pytest.raises(ValueError, match=r"weight must be \[200\], got \[3\]"):
        head.loss(features, labels, torch.ones(3))
    with pytest.raises(TypeError, match="labels must be floating-point"):
        head.loss(features, labels.long())
    assert math.isfinite(head.loss(features, labels).item())
