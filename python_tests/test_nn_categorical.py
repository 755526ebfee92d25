"""`LabelDistributionForest`, `HeatmapForest`, `group_landmarks`: losses, leaf updates, masks, groups."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastforest.nn import HeatmapForest, LabelDistributionForest, group_landmarks
from fastforest.reference import heatmap as reference_heatmap

N, F, C, SIZE = 120, 6, 5, (10, 12)
PAIRS = ["kl", "l2"]
OBJECTIVES = [("per_tree", "average"), ("forest", "average"), ("forest", "sequential")]


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


def distributions() -> torch.Tensor:
    place = 2 + features()[:, :1] + 0.5 * features()[:, 1:2]
    return (-((torch.arange(C) - place) ** 2) / 2).softmax(-1)


def landmarks() -> torch.Tensor:
    """Three landmarks: the first two move together, the third by itself."""
    x = features()
    centre = torch.tensor([[3.0, 3.0], [7.0, 4.0], [5.0, 7.0]])
    motion = torch.stack([x[:, :2], x[:, :2], x[:, 2:4]], 1)
    return (centre + 1.2 * motion).clamp(0, 9)


def label_head(**changes: Any) -> LabelDistributionForest:
    torch.manual_seed(0)
    head = LabelDistributionForest(F, C, **{"trees": 3, "depth": 3, "units": 16, **changes})
    head.initialize(distributions())
    return head


def map_head(**changes: Any) -> HeatmapForest:
    torch.manual_seed(0)
    head = HeatmapForest(F, 3, SIZE, **{"trees": 2, "depth": 3, "units": 16, "sigma": 1.2, **changes})
    head.initialize(landmarks())
    return head


@pytest.mark.parametrize("objective", ["per_tree", "forest"])
@pytest.mark.parametrize("loss", PAIRS)
def test_label_loss_is_that_of_the_mixtures(objective: str, loss: str) -> None:
    head, x, y = label_head(objective=objective, loss=loss).double(), features().double(), distributions().double()
    prediction = torch.einsum("ntl,tlc->ntc", head.routing(x), head.leaves)
    torch.testing.assert_close(head(x), prediction.mean(1))
    torch.testing.assert_close(head(x).sum(1), torch.ones(N).double())
    if objective == "forest":
        prediction = prediction.mean(1, keepdim=True)
    y3 = y[:, None]
    rows = (y3 * (y3 / prediction).log()).sum(-1) if loss == "kl" else (y3 - prediction).square().sum(-1)
    torch.testing.assert_close(head.loss(x, y), rows.mean())
    weight = torch.rand(N).double()
    weight[:7] = 0
    torch.testing.assert_close(head.loss(x, y, weight), (rows.mean(1) * weight).sum() / weight.sum())


def test_classes_and_one_hot_distributions_are_the_same_labels() -> None:
    head, x, classes = label_head(), features(), distributions().argmax(-1)
    one_hot = torch.nn.functional.one_hot(classes, C).float()
    torch.testing.assert_close(head.loss(x, classes), head.loss(x, one_hot))
    predicted = head.distribution(x)
    torch.testing.assert_close(predicted.log_prob(classes), head(x).gather(1, classes[:, None])[:, 0].log())
    torch.testing.assert_close(predicted.log_prob(one_hot), predicted.log_prob(classes))
    torch.testing.assert_close(predicted.expectation(torch.arange(C)), head(x) @ torch.arange(C).float())
    with pytest.raises(ValueError, match="labels must be classes from 0 to 4, got 0 to 5"):
        head.loss(x[:2], torch.tensor([0, 5]))


@pytest.mark.parametrize("method", ["loss", "accumulate", "initialize", "fit_leaves"])
def test_labels_that_are_no_distributions_are_told(method: str) -> None:
    head, x, sound = label_head(), features(), distributions()

    def call(labels: torch.Tensor, *weight: torch.Tensor) -> None:
        getattr(head, method)(*((x,) if method in ("loss", "accumulate") else ()), labels, *weight)

    for values, words in (
        ((0.2, 0.2, 0.2, 0.2, 0.198), "of sum 1 to 0.001; got a sum of 0.998, least 0.198 in row 7, the worst of 1"),
        ((0.7, 0.4, -0.1, 0.0, 0.0), "at least 0, .*got a sum of 1, least -0.1 in row 7"),
        ((0.5, 0.5, torch.nan, 0.0, 0.0), "finite, .*got NaN or inf in row 7"),
        ((0.5, 0.5, torch.inf, 0.0, 0.0), "finite, .*got NaN or inf in row 7"),
    ):
        labels = sound.clone()
        labels[7] = torch.tensor(values)
        with pytest.raises(
            ValueError, match="LabelDistributionForest: rows of labels must be distributions: .*" + words
        ):
            call(labels)
        if method != "initialize":
            hidden = torch.ones(N)
            hidden[7] = 0
            call(labels, hidden)
    labels[3] *= 2
    with pytest.raises(ValueError, match="got NaN or inf in row 7, the worst of 2"):
        call(labels)
    for near in (sound * 1.0009, sound.bfloat16(), sound.half(), sound.double()):
        call(near)


@pytest.mark.parametrize(("objective", "tree_update"), OBJECTIVES)
@pytest.mark.parametrize("kind", ["labels", "heatmaps"])
@pytest.mark.parametrize("loss", PAIRS)
def test_leaf_updates_never_raise_their_loss(objective: str, tree_update: str, kind: str, loss: str) -> None:
    head: Any = (label_head if kind == "labels" else map_head)(
        objective=objective, tree_update=tree_update, loss=loss, floor=0.0
    )
    x, y = features(), distributions() if kind == "labels" else landmarks()
    losses = [head.loss(x, y).item()]
    for _ in range(9):
        head.accumulate(x, y)
        head.update()
        losses.append(head.loss(x, y).item())
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.97 * losses[0]
    for leaves in [head.leaves.flatten(2)] if kind == "labels" else [g.leaves.flatten(3) for g in head.groups]:
        assert (leaves >= 0).all()
        torch.testing.assert_close(leaves.sum(-1), torch.ones(leaves.shape[:-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "tree_update"), OBJECTIVES)
@pytest.mark.parametrize("kind", ["labels", "heatmaps"])
@pytest.mark.parametrize("loss", PAIRS)
def test_leaf_updates_heed_the_mask(objective: str, tree_update: str, kind: str, loss: str) -> None:
    """They never raise the masked loss; nothing but what counts moves a leaf."""
    head: Any = (label_head if kind == "labels" else map_head)(
        objective=objective, tree_update=tree_update, loss=loss, floor=0.0, mask_threshold=0.25
    )
    x, y = features(), distributions() if kind == "labels" else landmarks()
    weight = torch.rand(y.shape[: 1 if kind == "labels" else 2]) + 0.1
    losses = [head.loss(x, y, weight).item()]
    for _ in range(12):
        head.accumulate(x, y, weight)
        head.update()
        losses.append(head.loss(x, y, weight).item())
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.95 * losses[0]
    if kind == "labels":
        twin, other = copy.deepcopy(head), y.clone()
        masked = (y <= 0.25) & (torch.arange(C) > 0)
        other[masked] = 0
        other[:, 0] += torch.where(masked, y, 0.0).sum(1)
        rows = y[:, 0] + torch.where(masked, y, 0.0).sum(1) <= 0.25  # the first class, which took the rest, is out too
        assert rows.sum() > 5
        for forest, labels in ((head, y[rows]), (twin, other[rows])):
            forest.accumulate(x[rows], labels)
            forest.update()
        torch.testing.assert_close(head.leaves, twin.leaves)


@pytest.mark.parametrize("loss", PAIRS)
@pytest.mark.parametrize("objective", ["per_tree", "forest"])
def test_learns_label_distributions(loss: str, objective: str) -> None:
    head, x, y = (
        label_head(loss=loss, objective=objective, replay=N, update_every=20, iterations=5),
        features(),
        distributions(),
    )
    head.calibrate(x)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    losses = []
    for _ in range(120):
        value = head.loss(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    error = (head(x) - y).square().sum(1).mean()
    spread = (y.mean(0) - y).square().sum(1).mean()
    assert losses[-1] < 0.7 * losses[0] and error < 0.35 * spread
    assert head(x).std(0).max() > 0.1  # outputs follow inputs


@pytest.mark.parametrize(("loss", "leaf_update"), [("kl", "least_squares"), ("l2", "bounding")])
def test_crosswise_pairings_are_refused_unless_asked_for(loss: str, leaf_update: str) -> None:
    with pytest.raises(ValueError, match=f"LabelDistributionForest: loss '{loss}' goes with.*'{leaf_update}'"):
        label_head(loss=loss, leaf_update=leaf_update)
    with pytest.raises(ValueError, match=f"HeatmapForest: loss '{loss}' goes with.*'{leaf_update}'"):
        map_head(loss=loss, leaf_update=leaf_update)
    head = label_head(loss=loss, leaf_update=leaf_update, allow_mismatch=True)
    head.accumulate(features(), distributions())
    head.update()
    assert head.leaves.isfinite().all()


def test_a_class_that_an_update_did_not_see_returns() -> None:
    """Bounding multiplies: without a floor a cell that is 0 once is 0 for good."""
    x = features()
    for floor, learned in ((1e-6, True), (0.0, False)):
        head = label_head(floor=floor)
        for classes in (torch.zeros(N, dtype=torch.int64), torch.ones(N, dtype=torch.int64)):
            for _ in range(40):
                head.accumulate(x, classes)
                head.update()
        assert bool(head(x)[:, 1].min() > 0.99) == learned


@pytest.mark.parametrize("loss", PAIRS)
def test_hidden_labels_and_landmarks_may_be_nan(loss: str) -> None:
    x = features()
    head: Any = label_head(loss=loss)
    y, weight = distributions(), torch.ones(N)
    weight[::4] = 0
    shown = weight > 0
    poisoned = torch.where(shown[:, None], y, torch.nan)
    value = head.loss(x, poisoned, weight)
    torch.testing.assert_close(value, head.loss(x[shown], y[shown]))
    value.backward()
    assert head.routing.weight.grad.isfinite().all()
    twin = copy.deepcopy(head)
    head.accumulate(x, poisoned, weight)
    twin.accumulate(x[shown], y[shown])
    head.update()
    twin.update()
    torch.testing.assert_close(head.leaves, twin.leaves, rtol=1e-4, atol=1e-5)

    maps, points, seen = map_head(loss=loss), landmarks(), torch.ones(N, 3)
    seen[::3, 1] = seen[:5] = 0
    poisoned = torch.where((seen == 0)[..., None], torch.nan, points)
    elsewhere = torch.where((seen == 0)[..., None], 4.0, points)
    torch.testing.assert_close(maps.loss(x, poisoned, seen), maps.loss(x, elsewhere, seen))
    maps.accumulate(x, poisoned, seen)
    maps.update()
    assert maps.groups[0].leaves.isfinite().all()
    assert maps.loss(x, poisoned, torch.zeros(N, 3)).item() == 0


@pytest.mark.parametrize("loss", PAIRS)
@pytest.mark.parametrize("masked", [None, 0.1])
def test_heatmap_loss_is_the_mean_over_landmarks(loss: str, masked: float | None) -> None:
    head, x, points = map_head(loss=loss, mask_threshold=masked).double(), features().double(), landmarks().double()
    weight = torch.rand(N, 3).double()
    weight[0, 1] = 0
    y = reference_heatmap.render_gaussian(points, 1.2, SIZE, normalize="sum", truncate=3.0).flatten(2)[:, None]
    (trees,) = head.groups
    prediction = torch.einsum("ntl,tlpc->ntpc", trees.routing(x), trees.leaves.flatten(3))
    rows = torch.special.xlogy(y, y) - y * prediction.log() if loss == "kl" else (y - prediction).square()
    if masked is not None:
        rows = rows * (y > masked / (2 * torch.pi * 1.2**2))
    rows = rows.sum(-1).mean(1)
    torch.testing.assert_close(head.loss(x, points, weight), (rows * weight).sum() / weight.sum(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head.loss(x, points), rows.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", PAIRS)
def test_points_are_the_expectation_of_the_heatmaps_and_are_learned(loss: str) -> None:
    head, x, points = map_head(loss=loss, groups=[[0, 1], [2]]), features(), landmarks()
    head.calibrate(x)
    maps = head.heatmap(x)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(N, 3))
    expected = torch.stack([maps.sum(2) @ torch.arange(12.0), maps.sum(3) @ torch.arange(10.0)], -1)
    torch.testing.assert_close(head(x), expected)
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    for step in range(90):
        value = head.loss(x, points)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 15 == 14:
            for _ in range(3):
                head.accumulate(x, points)
                head.update()
    error = (head(x) - points).norm(dim=-1).mean()
    assert error < 0.6 * (points - points.mean(0)).norm(dim=-1).mean()


def test_distribution_of_landmarks_is_that_of_the_heatmaps() -> None:
    head, x, points = map_head(groups=[[0, 2], [1]]).double(), features().double(), landmarks().double()
    predicted, maps = head.distribution(x), head.heatmap(x)
    assert torch.equal(predicted.probability, maps)
    torch.testing.assert_close(predicted.mean, head(x))
    place = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(12.0), indexing="ij")[::-1], -1).double()
    apart = place - predicted.mean[:, :, None, None]
    expected = torch.einsum("nphw,nphwi,nphwj->npij", maps, apart, apart)
    torch.testing.assert_close(predicted.covariance, expected)
    column, row = (points + 0.5).floor().long().unbind(-1)
    there = maps[torch.arange(N)[:, None], torch.arange(3), row, column]
    torch.testing.assert_close(predicted.log_prob(points), there.log())
    one_hot = torch.zeros(N, 3, 10, 12)
    one_hot[torch.arange(N)[:, None], torch.arange(3), row, column] = 1
    torch.testing.assert_close(predicted.log_prob(one_hot), predicted.log_prob(points))

    points[0, 0], points[1, 1], points[2, 2], points[3, 0] = -0.51, torch.nan, 1e30, torch.tensor([11.49, 9.49])
    told = predicted.log_prob(points)
    assert told[0, 0] == told[2, 2] == math.log(1e-12) and told[1, 1].isnan()
    torch.testing.assert_close(told[3, 0], maps[3, 0, 9, 11].log())
    assert told[4:].isfinite().all()
    empty = head.distribution(x[:0])
    assert empty.covariance.shape == (0, 3, 2, 2) and empty.log_prob(points[:0]).shape == (0, 3)
    with pytest.raises(
        ValueError, match=r"labels must be points \[120, 3, 2\] or heatmaps \[120, 3, 10, 12\], got \[3\]"
    ):
        predicted.log_prob(torch.zeros(3))
    with pytest.raises(TypeError, match="labels must be floating-point"):
        predicted.log_prob(points.long())


def test_groups_have_their_own_trees_and_keep_the_order_of_landmarks() -> None:
    head, x = map_head(groups=torch.tensor([1, 0, 1])), features()
    assert head.group.tolist() == [1, 0, 1]
    assert [tuple(g.leaves.shape[2:]) for g in head.groups] == [(1, *SIZE), (2, *SIZE)]
    assert not torch.equal(head.groups[0].routing.phi, head.groups[1].routing.phi)
    before = head(x)
    with torch.no_grad():
        head.groups[0].routing.weight.mul_(-1)
    changed = (head(x) != before).any(-1).any(0)
    assert changed.tolist() == [False, True, False]
    head.steepness = 3.0
    assert [g.steepness for g in head.groups] == [3.0, 3.0] and head.steepness == 3.0


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []], [0, 1], [[0, 1, 3]]])
def test_groups_must_be_a_partition(groups: Any) -> None:
    with pytest.raises(ValueError, match="each of the 3 landmarks in exactly one group"):
        HeatmapForest(F, 3, SIZE, groups=groups)


def test_landmarks_are_grouped_by_their_motion() -> None:
    """Four blocks of landmarks, each with a motion of its own and opposite in half of its landmarks, under a common
    similarity motion that is larger than all of them."""
    generator = torch.Generator().manual_seed(4)
    block = torch.arange(24) % 4
    mean = 20 * torch.randn(24, 2, generator=generator)
    sign = torch.where(torch.arange(24) < 12, 1.0, -1.0)[:, None]
    motion = torch.randn(300, 4, 2, generator=generator)[:, block] * sign
    shapes = mean + motion + 0.1 * torch.randn(300, 24, 2, generator=generator)
    angle = 0.5 * torch.randn(300, generator=generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(300, 2, 2)
    moved = 1.5 * shapes @ turn + 30 * torch.randn(300, 1, 2, generator=generator)
    found = group_landmarks(moved, 4)
    assert torch.equal(found, block)
    assert torch.equal(found, group_landmarks(moved, 4))
    for groups in (1, 7, 24):
        assert group_landmarks(moved, groups).unique().tolist() == list(range(groups))
    still = torch.zeros(5, 4, 2)
    assert group_landmarks(still, 2).unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("points", "groups", "words"),
    [
        (torch.zeros(5, 4), 2, r"points must be \[N, P, 2\]"),
        (torch.zeros(1, 4, 2), 2, "N of at least 2"),
        (torch.full((5, 4, 2), torch.nan), 2, "must be finite"),
        (torch.zeros(5, 4, 2), 5, "groups must be an integer between 1 and 4, got 5"),
    ],
)
def test_grouping_errors(points: torch.Tensor, groups: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        group_landmarks(points, groups)


@pytest.mark.parametrize("kind", ["labels", "heatmaps"])
@pytest.mark.parametrize("loss", PAIRS)
def test_statistics_add_up_and_state_dict_and_deepcopy_keep_everything(kind: str, loss: str) -> None:
    make: Any = label_head if kind == "labels" else map_head
    whole, x, y = make(loss=loss), features(), distributions() if kind == "labels" else landmarks()
    parts = copy.deepcopy(whole)
    whole.accumulate(x, y)
    twin = copy.deepcopy(whole)
    parts.accumulate(x[:50], y[:50])
    parts.accumulate(x[50:], y[50:])
    assert whole.update() == parts.update() == twin.update()
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(twin(x), whole(x))
    whole.steepness = 2.0
    other = make(loss=loss, seed=3)
    other.load_state_dict(whole.state_dict())
    torch.testing.assert_close(other(x), whole(x))
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        whole.update()


def test_replay_keeps_weights_and_updates_by_itself() -> None:
    head, x, y = map_head(replay=60, update_every=2, iterations=2), features(), landmarks()
    seen = torch.ones(N, 3)
    seen[:, 2] = 0
    before = head.groups[0].leaves.clone()
    head.loss(x[:30], torch.where((seen == 0)[..., None], torch.nan, y)[:30], seen[:30])
    assert torch.equal(head.groups[0].leaves, before)
    head.loss(x[30:60], y[30:60], seen[30:60])
    after = head.groups[0].leaves
    assert after.isfinite().all() and not torch.equal(after[:, :, 0], before[:, :, 0])
    assert head.dead_leaves == 2 * 8  # nothing was seen of the third landmark
    torch.testing.assert_close(after[:, :, 2], before[:, :, 2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "heatmaps"])
@pytest.mark.parametrize("loss", PAIRS)
def test_compiled_autocast_double_and_empty(kind: str, loss: str) -> None:
    head: Any = (label_head if kind == "labels" else map_head)(loss=loss)
    x, y = features(), distributions() if kind == "labels" else landmarks()
    head.loss(x, y).backward()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    compiled = torch.compile(lambda f, label: head.loss(f, label), fullgraph=True, backend="aot_eager")
    value = compiled(x, y)
    value.backward()
    torch.testing.assert_close(value, head.loss(x, y))
    torch.testing.assert_close([p.grad for p in head.parameters()], expected)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_loss = head(x), head.loss(x, y)
        low_loss.backward()
        head.accumulate(x, y)
    head.update()
    assert low.dtype == low_loss.dtype == torch.float32
    torch.testing.assert_close(low_loss, value, rtol=0.02, atol=0.01)
    double = copy.deepcopy(head).double()
    torch.testing.assert_close(double(x).float(), head(x), rtol=1e-4, atol=1e-4)
    double.accumulate(x, y)
    double.update()
    assert head(x[:0]).shape == (0, *y.shape[1:]) and head.loss(x[:0], y[:0]).item() == 0
    before = head(x)
    head.accumulate(x[:0], y[:0])
    assert head.update() == head.dead_leaves > 0
    torch.testing.assert_close(head(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["per_tree", "forest"])
@pytest.mark.parametrize("loss", PAIRS)
def test_gradients_agree_with_finite_differences(objective: str, loss: str) -> None:
    head = label_head(loss=loss, objective=objective).double()
    x, y = features()[:3].double().requires_grad_(), distributions()[:3].double()
    assert torch.autograd.gradcheck(lambda f: head.loss(f, y), (x,))


@pytest.mark.parametrize("labels", [torch.zeros(N, dtype=torch.int64), torch.full((N, C), 1 / C)])
def test_identical_labels_survive(labels: torch.Tensor) -> None:
    head, x = label_head(), features()
    head.initialize(labels)
    for _ in range(30):
        head.accumulate(x, labels)
        head.update()
    value = head.loss(x, labels)
    value.backward()
    assert value.abs() < 1e-3 and head.routing.weight.grad.isfinite().all()
    maps, points = map_head(), torch.full((N, 3, 2), 4.0)
    maps.initialize(points)
    for _ in range(30):
        maps.accumulate(x, points)
        maps.update()
    torch.testing.assert_close(maps(x), points, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "mse"}, "loss must be 'kl' or 'l2', got 'mse'"),
        ({"leaf_update": "sgd"}, "leaf_update must be 'bounding' or 'least_squares', got 'sgd'"),
        ({"floor": 1.0}, r"floor must be in \[0, 1\), got 1.0"),
        ({"mask_threshold": -1.0}, "mask_threshold must be a finite number of at least 0"),
        ({"eps": 0.0}, "eps must be a positive finite number"),
        ({"trees": 0}, "trees must be an integer of at least 1"),
        ({"depth": 0}, "depth must be an integer between 1 and 16"),
    ],
)
def test_errors_say_what_is_wrong(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match="LabelDistributionForest: " + words):
        label_head(**changes)
    with pytest.raises(ValueError, match="HeatmapForest: " + words):
        map_head(**changes)


def test_labels_of_another_shape() -> None:
    head, x = label_head(), features()
    with pytest.raises(ValueError, match=r"class indices \[N\] or distributions \[N, 5\], got float32 \[120, 4\]"):
        head.loss(x, torch.zeros(N, 4))
    with pytest.raises(ValueError, match=r"labels must be of 120 samples, got \[3\]"):
        head.loss(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight must be \[120\], got \[2\]"):
        head.loss(x, distributions(), torch.ones(2))
    with pytest.raises(ValueError, match=r"points must be \[N, 3, 2\], got \[120, 2, 2\]"):
        map_head().loss(x, torch.zeros(N, 2, 2))
    with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
        HeatmapForest(F, 3, (0, 4))


def test_groups_may_have_features_of_their_own() -> None:
    """As two layers, one a group; one tensor for all is the same as that tensor for each."""
    torch.manual_seed(0)
    options: Any = {"trees": 2, "depth": 3, "units": 8, "sigma": 1.0}
    head = HeatmapForest(6, 5, (9, 9), groups=[[0, 3], [1, 2, 4]], seed=4, **options)
    alone = [HeatmapForest(6, len(m), (9, 9), seed=4 + i, **options) for i, m in enumerate(head.members)]
    features, points = [torch.randn(7, 6) for _ in range(2)], 8 * torch.rand(7, 5, 2)
    for layer in alone:
        layer.groups[0].load_state_dict(head.groups[alone.index(layer)].state_dict())
    for _ in range(2):
        expected = torch.empty(7, 5, 2)
        for layer, own, member in zip(alone, features, head.members, strict=True):
            expected[:, member] = layer(own)
        torch.testing.assert_close(head(features), expected)
        parts = [
            layer.loss(own, points[:, m]) * len(m) / 5
            for layer, own, m in zip(alone, features, head.members, strict=True)
        ]
        torch.testing.assert_close(head.loss(features, points), torch.stack(parts).sum())
        head.accumulate(features, points)
        for layer, own, member in zip(alone, features, head.members, strict=True):
            layer.accumulate(own, points[:, member])
        assert head.update() == sum(layer.update() for layer in alone)
    assert torch.equal(head(features[0]), head([features[0]] * 2))
    with pytest.raises(ValueError, match="HeatmapForest: features must be a tensor or 2 of them, got 3"):
        head([features[0]] * 3)
