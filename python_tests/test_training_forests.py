"""`fastforest.training.fit_forest`: both schemes learn, schedules act, failures are told, runs repeat."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastforest.nn import GaussianForest, HeatmapForest, LabelDistributionForest
from fastforest.training import TrainingError, fit_forest

N, F = 240, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def features() -> torch.Tensor:
    return torch.randn(N, F, generator=torch.Generator().manual_seed(1))


def problem(kind: str, **changes: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    x, shape = features(), {"trees": 2, "depth": 3, "units": 16, **changes}
    if kind == "gaussian":
        return GaussianForest(F, 2, **shape), x, 40 + torch.stack([x[:, 0] + x[:, 1], 3 * x[:, 2].tanh()], 1)
    if kind == "labels":
        return LabelDistributionForest(F, 4, **shape), x, (-((torch.arange(4) - 1.5 - x[:, :1]) ** 2)).softmax(-1)
    points = (torch.tensor([[3.0, 4.0], [6.0, 5.0]]) + torch.stack([x[:, :2], x[:, 1:3]], 1)).clamp(0, 9)
    return HeatmapForest(F, 2, (10, 10), groups=[0, 1], **shape), x, points


def shares(head: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Squared error over that of the labels' mean."""
    with torch.no_grad():
        return float((head(x) - y).square().mean() / (y.mean(0) - y).square().mean())


@pytest.mark.parametrize("kind", ["gaussian", "labels", "heatmaps"])
@pytest.mark.parametrize("scheme", ["alternating", "sequential"])
def test_both_schemes_learn_better_than_the_mean(kind: str, scheme: str) -> None:
    head, x, y = problem(kind)
    history = fit_forest(head, x, y, scheme=scheme, steps=150, batch=80, rate=0.03, update_every=30)
    assert shares(head, x, y) < 0.45
    assert sum(history.loss[-10:]) < sum(history.loss[:10]) - 0.5
    assert len(history.leaf_updates) == (5 if scheme == "alternating" else 1)
    assert all(after <= before + 0.01 for _, before, after, _ in history.leaf_updates)
    assert not head.training


@pytest.mark.parametrize("kind", ["gaussian", "labels", "heatmaps"])
def test_leaves_fitted_to_the_labels_alone_explain_them_better(kind: str) -> None:
    """The evidence of the labels never falls, the posteriors are distributions, and the leaves do not become equal."""
    head, _, y = problem(kind)
    head.initialize(y)
    before = head.posterior(y)
    head.fit_leaves(y, iterations=10)
    after = head.posterior(y)
    torch.testing.assert_close(after.sum(-1), torch.ones(after.shape[:2]))
    assert not torch.equal(before, after)
    if kind == "gaussian":
        evidence = [density(head, y)]
        for _ in range(5):
            head.fit_leaves(y, iterations=1)
            evidence.append(density(head, y))
        assert all(b >= a - 1e-3 for a, b in itertools.pairwise(evidence))
    else:
        assert after.amax(-1).mean() > 0.5  # leaves stay apart
    weight = torch.ones(y.shape[:2] if kind == "heatmaps" else (N,))
    weight[:9] = 0
    assert (head.posterior(y, weight)[:9] == 0).all()


def density(head: GaussianForest, y: torch.Tensor) -> float:
    leaves = torch.distributions.MultivariateNormal(head.mean, scale_tril=head.scale_tril)
    return float(leaves.log_prob(y[:, None, None]).logsumexp(-1).mean())


def test_routing_loss_is_least_at_the_posterior() -> None:
    head, x, _ = problem("gaussian")
    assert head.routing_loss(x, head.routing(x)).abs() < 1e-6
    other = torch.rand(N, 2, 8).softmax(-1)
    expected = (other * (other.log() - head.routing.log_prob(x))).sum(-1).mean()
    torch.testing.assert_close(head.routing_loss(x, other), expected)
    hidden = torch.where(torch.arange(N)[:, None, None] % 2 == 0, other, 0.0)
    torch.testing.assert_close(head.routing_loss(x, hidden), head.routing_loss(x[::2], other[::2]))
    with pytest.raises(ValueError, match=r"posterior must be \[240, 2, 8\], got \[240, 8\]"):
        head.routing_loss(x, other[:, 0])


def test_a_given_optimizer_keeps_its_own_rates() -> None:
    head, x, y = problem("gaussian")
    rates = [1e-5, 0.5]
    optimizer = torch.optim.SGD([{"params": [p], "lr": r} for p, r in zip(head.parameters(), rates, strict=True)])
    for _ in range(2):
        fit_forest(head, x, y, steps=2, batch=32, schedule="constant", optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_sequential_sees_augmented_labels() -> None:
    losses = []
    for shift in (0.0, 2.0):
        head, x, y = problem("gaussian")
        history = fit_forest(
            head, x, y, scheme="sequential", steps=2, batch=32, augment=lambda f, l, _, s=shift: (f, l + s)
        )
        losses.append(history.loss)
    assert losses[0] != losses[1]


def test_landmarks_may_be_hidden_in_every_sample() -> None:
    x, points = torch.randn(16, 6), torch.rand(16, 4, 2) * 11
    weight = 1 - torch.eye(4).repeat(4, 1)
    head = HeatmapForest(6, 4, (12, 12), sigma=1.0, trees=2, depth=2, units=8)
    history = fit_forest(head, x, points, weight, steps=2, batch=8, update_every=2)
    assert all(math.isfinite(loss) for loss in history.loss)
    with pytest.raises(ValueError, match="weight must show every landmark"):
        fit_forest(head, x, points, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(16, 4), steps=2)
    with pytest.raises(ValueError, match="weight must be above 0 for at least one sample"):
        fit_forest(head, x, points, torch.zeros(16, 4), steps=2)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        head.loss(x, points, -torch.ones(16, 4))
    with pytest.raises(ValueError, match="steepness must be two positive numbers"):
        fit_forest(head, x, points, steepness=(1.0, 2.0, 3.0))


def test_trees_of_a_forest_reseed_at_different_samples() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randn(40, 4) * 3
    head = GaussianForest(4, 4, trees=2, depth=2, units=8, objective="forest", dead="reseed", min_count=30.0)
    head.initialize(y)
    head.accumulate(x, y)
    assert head.update() == 8
    assert len(head.mean.flatten(0, 1).unique(dim=0)) == 8


def test_a_backbone_is_trained_below_the_head() -> None:
    """The radius of a point: no linear unit tells it, a small network does."""
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(2))
    y = x.norm(dim=1, keepdim=True)
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    head = GaussianForest(16, 1, trees=3, depth=3, units=16)
    fit_forest(head, x, y, backbone=backbone, steps=250, batch=80, rate=0.02, update_every=25)
    with torch.no_grad():
        assert shares(head, backbone(x), y) < 0.3
    assert not backbone.training


def test_steepness_is_annealed_over_the_run() -> None:
    head, x, y = problem("gaussian")
    seen: list[float] = []

    def watch(f: torch.Tensor, label: torch.Tensor, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(head.steepness)
        return f, label

    fit_forest(head, x, y, steps=5, batch=20, steepness=(1.0, 16.0), annealing="exponential", augment=watch)
    torch.testing.assert_close(seen, [1.0, 2.0, 4.0, 8.0, 16.0], rtol=1e-5, atol=0)
    seen.clear()
    fit_forest(head, x, y, steps=4, batch=20, steepness=(1.0, 4.0), annealing="linear", augment=watch)
    torch.testing.assert_close(seen, [1.0, 2.0, 3.0, 4.0], rtol=1e-5, atol=0)


def test_runs_repeat_and_go_on() -> None:
    first, x, y = problem("labels")
    second = copy.deepcopy(first)
    for head in (first, second):
        fit_forest(head, x, y, steps=12, batch=50, update_every=5, seed=3)
    assert torch.equal(first(x), second(x))
    history = fit_forest(first, x, y, steps=12, batch=50, update_every=5, start=False)
    assert history.loss[0] < fit_forest(problem("labels")[0], x, y, steps=1, batch=50).loss[0]


def test_hidden_labels_are_left_out() -> None:
    head, x, y = problem("heatmaps")
    weight = torch.ones(N, 2)
    weight[::3, 0] = 0
    poisoned = torch.where((weight == 0)[..., None], torch.nan, y)
    for scheme in ("alternating", "sequential"):
        fit_forest(head, x, poisoned, weight, scheme=scheme, steps=60, batch=80, rate=0.03, update_every=20)
        assert shares(head, x, y) < 0.8


def test_a_loss_that_is_not_finite_is_told() -> None:
    head, x, y = problem("gaussian")
    y[5] = torch.nan
    with pytest.raises(TrainingError, match="the loss is nan"):
        fit_forest(head, x, y, steps=10, batch=N)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "both"}, "scheme must be one of alternating, sequential, got 'both'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"leaf_samples": 0}, "leaf_samples must be an integer of at least 1"),
        ({"steepness": (0.0, 1.0)}, "steepness must be two positive numbers"),
        ({"weight": torch.ones(3)}, "weight must be of 240 samples, got 3"),
        ({"schedule": "up"}, "kind must be one of cosine, step, constant"),
    ],
)
def test_errors_say_what_is_wrong(changes: dict, words: str) -> None:
    head, x, y = problem("gaussian")
    with pytest.raises(ValueError, match=words):
        fit_forest(head, x, y, **changes)
    with pytest.raises(ValueError, match="at least one sample"):
        fit_forest(head, x[:0], y[:0])


class Loader:
    """Batches of tensors; counts the passes, some of which are left early."""

    def __init__(self, *tensors: torch.Tensor, batch: int = 80) -> None:
        self.tensors, self.batch, self.passes = tensors, batch, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        self.passes += 1
        yield from zip(*(t.split(self.batch) for t in self.tensors), strict=True)


@pytest.mark.parametrize("kind", ["gaussian", "labels", "heatmaps"])
@pytest.mark.parametrize("scheme", ["alternating", "sequential"])
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_give_the_result_of_tensors(
    kind: str, scheme: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order, which for tensors is that of a draw: here of a draw that leaves it."""
    first, x, y = problem(kind)
    second = copy.deepcopy(first)
    weight = (torch.rand(y.shape[: 2 if kind == "heatmaps" else 1]) + 0.1,) if weighted else ()
    options: dict[str, Any] = {"scheme": scheme, "steps": 20, "rate": 0.03, "update_every": 7, "leaf_samples": 150}
    loader = Loader(x, y, *weight)
    batches = fit_forest(second, loader, **options)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    tensors = fit_forest(first, x, y, *weight, batch=80, **options)
    torch.testing.assert_close(batches.loss, tensors.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batches.leaf_updates, tensors.leaf_updates, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second(x), first(x), rtol=1e-4, atol=1e-4)
    # The labels, the features to calibrate by, ceil(20 / 3) epochs, and the leaf updates.
    assert loader.passes == 2 + 7 + (2 if scheme == "alternating" else 1)


def test_a_data_loader_trains_a_backbone_on_images() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(N, 1, generator=generator)
    images = y[..., None, None] + torch.randn(N, 1, 6, 6, generator=generator)
    data = torch.utils.data.TensorDataset(images, y)
    loader: Any = torch.utils.data.DataLoader(
        data, 60, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True
    )
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 16))
    head = GaussianForest(16, 1, trees=2, depth=3, units=16)
    fit_forest(head, loader, backbone=backbone, steps=150, rate=0.02, update_every=30)
    with torch.no_grad():
        assert shares(head, backbone(images), y) < 0.3
    assert not head.training and not backbone.training


def test_batches_that_cannot_serve_are_told() -> None:
    head, x, y = problem("gaussian")
    for once in (iter([(x, y)]), ((x, y) for _ in range(3)), zip(x, y, strict=True)):
        with pytest.raises(
            ValueError, match=r"read again for every epoch, but a .* can be read only once: give a list"
        ):
            fit_forest(head, once)
    with pytest.raises(TypeError, match="labels and weight belong to features in a tensor"):
        fit_forest(head, [(x, y)], y)
    with pytest.raises(TypeError, match=r"need labels \[N, ...\], got None"):
        fit_forest(head, x)
    with pytest.raises(TypeError, match="must be a tensor or an iterable of batches, got int"):
        fit_forest(head, 3)  # type: ignore[arg-type]
    for batch, got in ((x, "got Tensor"), ((x,), r"got \['Tensor'\]"), ({"x": x}, "got dict"), ((x, 1), "'int'")):
        with pytest.raises(TypeError, match=r"a batch must be tensors \(features, labels\) or .*" + got):
            fit_forest(head, [batch])
    with pytest.raises(ValueError, match=r"equally many samples, got \[240, 6\], \[239, 2\]"):
        fit_forest(head, [(x, y[1:])])
    with pytest.raises(TypeError, match="every batch or none must hold a weight"):
        fit_forest(head, [(x, y), (x, y, torch.ones(N))])
    for nothing in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="batches need at least one sample in every pass, got none"):
            fit_forest(head, nothing)
