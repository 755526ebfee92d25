"""The models: each learns, hides unknown landmarks, is rebuilt from its configuration, exported, and fits any backbone."""

import copy
import math

import pytest
import torch
from torch import nn

from fastforest import data, models, training
from fastforest.models.base import two_sided_kl

SIZE = 64
SMALL = {"backbone_options": {"width": 8, "code": 16}}
CASES = {
    "coordinates": ("coordinates", {}),
    "coordinates-absolute-l1": ("coordinates", {"residual": False, "loss": "l1"}),
    "dense": ("dense", {}),
    "dense-awing-upsampled": ("dense", {"objective": "awing", "upsample": 2}),
    "heatmap_forest": ("heatmap_forest", {"trees": 2, "depth": 4, "canvas": 16}),
    "heatmap_forest-groups-branches": (
        "heatmap_forest",
        {"groups": 3, "branch": 4, "trees": 1, "depth": 3, "canvas": 16, "pretrain": True},
    ),
    "heatmap_forest-two-sided": (
        "heatmap_forest",
        {"trees": 2, "depth": 3, "canvas": 16, "objective": "two_sided", "residual": False},
    ),
    "heatmap_forest-l2-mask": (
        "heatmap_forest",
        {"trees": 1, "depth": 3, "canvas": 12, "objective": "l2", "mask": 0.05},
    ),
    "pool": ("pool", {"leaves": 64, "canvas": 16}),
    "pool-absolute-forest": ("pool", {"leaves": 64, "canvas": 16, "residual": False, "selection": "forest"}),
    "pool-l2": ("pool", {"leaves": 64, "canvas": 16, "objective": "l2"}),
    "pool-two-sided": ("pool", {"leaves": 32, "canvas": 16, "objective": "two_sided"}),
    "forest": ("forest", {"leaves": 64, "canvas": 16, "pretrain": True}),
}
LEARNERS = ("coordinates", "dense", "heatmap_forest", "heatmap_forest-groups-branches", "pool", "pool-l2", "forest")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def faces():
    cached = data.Cached(data.SyntheticFaces(12, SIZE), SIZE)
    images, points = data.Plain(SIZE)(*cached.batch(range(12)))
    return images, points, training.mean_shape(cached)


def make(case, faces, seed=0, **changes):
    name, options = CASES[case]
    images, points, shape = faces
    given = {"landmarks": 68, "mean_shape": shape.tolist(), "image_size": SIZE, **SMALL, **options, **changes}
    torch.manual_seed(seed)
    model = models.build(name, given, points)
    if hasattr(model, "start"):
        model.eval().start(images, points)
    return model.train()


def step(model, optimizer, images, points):
    optimizer.zero_grad()
    loss = model.loss(images, points)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("case", LEARNERS)
def test_learns_what_it_sees(case, faces):
    images, points, shape = faces
    model = make(case, faces)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = step(model, optimizer, images, points)
    for number in range(60):
        last = step(model, optimizer, images, points)
        if number % 15 == 14 and hasattr(model, "accumulate"):
            model.accumulate(images, points)
            assert model.update() >= 0
    assert last < first
    error = (model.eval()(images) - points).norm(dim=-1).mean()
    floor = (shape - points).norm(dim=-1).mean()
    # Dense maps have cells of 4 pixels, and see one image a step less than the forests see leaves.
    assert error < (1.0 if case == "dense" else 0.85) * floor


@pytest.mark.parametrize("case", CASES)
def test_forward_distribution_and_gradients(case, faces):
    images, points, _ = faces
    model = make(case, faces)
    found = model.eval()(images)
    assert found.shape == points.shape and found.dtype == torch.float32 and bool(found.isfinite().all())
    if hasattr(model, "distribution"):
        mean, covariance = model.distribution(images)
        torch.testing.assert_close(mean, found)
        assert covariance.shape == (12, 68, 2, 2) and bool((torch.linalg.eigvalsh(covariance) > -1e-3).all())
    model.train().loss(images, points).backward()
    assert float(model.backbone.stem[0].weight.grad.abs().sum()) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.loss(images, points)
    assert bool(low.isfinite()) and low.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_hidden_landmarks_do_not_matter_even_if_nan(case, faces):
    images, points, _ = faces
    model = make(case, faces).eval()
    weight = torch.ones(12, 68)
    weight[0, 3] = weight[5] = 0
    results = []
    for value in (0.0, 55.0, math.nan):
        labels = torch.where((weight == 0)[..., None], value, points)
        loss = model.loss(images, labels, weight)
        (gradient,) = torch.autograd.grad(loss, [model.backbone.stem[0].weight])
        results.append((loss.detach(), gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    assert bool(results[0][0].isfinite())
    if hasattr(model, "accumulate"):
        model.accumulate(images, torch.where((weight == 0)[..., None], math.nan, points), weight)
        model.update()
        assert bool(model(images).isfinite().all())
    if model.__dict__.get("dense") is not None or getattr(model, "dense", None) is not None:
        labels = torch.where((weight == 0)[..., None], math.nan, points)
        assert bool(model.pretrain_loss(images, labels, weight).isfinite())


@pytest.mark.parametrize("case", CASES)
def test_configuration_and_weights_rebuild_it(case, faces):
    images = faces[0]
    model = make(case, faces).eval()
    again = models.build(model.name, model.config()).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images)) and again.config() == model.config()
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("case", [case for case in CASES if "two-sided" not in case and "l1" not in case])
def test_export(case, faces):
    images = faces[0]
    model = make(case, faces).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (images,), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(images[:5]), model(images[:5]))


def test_a_dense_model_is_decoded_in_many_ways(faces):
    images = faces[0]
    model = make("dense", faces).eval()
    found = {}
    for decode in ("soft_argmax", "argmax", "quarter", "dark", "dark_udp"):
        model.decode = decode
        found[decode] = model(images)
    cell = model.backbone.stride
    offset = (found["argmax"] + 0.5) / cell - 0.5
    torch.testing.assert_close(offset, offset.round())
    moved = (found["quarter"] - found["argmax"]).abs()
    assert bool(((moved == 0) | (moved == cell / 4)).all()) and bool((moved > 0).any())
    with pytest.raises(ValueError, match=r"decode must be one of .*, got 'best'"):
        model.decode = "best"


def test_stacks_are_all_supervised(faces):
    images, points, _ = faces
    options = {"backbone": "stacked", "backbone_options": {"stacks": 3, "depth": 2, "width": 8, "code": 4}}
    model = make("dense", faces, **options)
    assert len(model.heatmaps(images)) == 3
    model.loss(images, points).backward()
    assert all(float(head.weight.grad.abs().sum()) > 0 for head in model.maps)
    torch.testing.assert_close(model.eval().heatmap(images), model.heatmaps(images)[-1])
    forest = make("forest", faces, **options)
    forest.pretrain_loss(images, points).backward()
    assert all(float(head[1].weight.grad.abs().sum()) > 0 for head in forest.dense.heads)


class Plain(nn.Module):
    """A user's backbone: a map alone, at a stride of 8."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 7, 8, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images):
        return self.stem(images)


@pytest.mark.parametrize("case", ["coordinates", "dense", "heatmap_forest", "pool", "forest"])
def test_any_backbone_fits_by_what_it_gives(case, faces):
    images, points, _ = faces
    own = Plain()
    state = copy.deepcopy(own.state_dict())
    model = make(case, faces, backbone=own, backbone_options={})
    assert case == "heatmap_forest" or all(torch.equal(own.state_dict()[key], state[key]) for key in state)
    model.loss(images, points).backward()
    assert float(own.stem[0].weight.grad.abs().sum()) > 0
    assert model.eval()(images).shape == points.shape
    with pytest.raises(ValueError, match="was given as a Plain, which a configuration cannot name"):
        model.config()


def test_groups_are_found_once_and_kept(faces):
    model = make("heatmap_forest-groups-branches", faces)
    labels = model.config()["groups"]
    assert len(labels) == 68 and sorted(set(labels)) == [0, 1, 2]
    assert models.build(model.name, model.config()).members == model.members
    assert sorted(p for member in model.members for p in member) == list(range(68))


def test_two_sided_kl_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 3, 9, 9, generator=generator).flatten(2).softmax(-1).view(2, 3, 9, 9)
    points = torch.rand(2, 3, 2, generator=generator) * 8
    grid = torch.arange(9, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for p in range(3):
            x, y = points[b, p].double()
            near = lambda centre: (grid - centre.round()).abs() <= math.ceil(3.0)  # noqa: E731
            gx, gy = (torch.exp(-((grid - c) ** 2) / 2) * near(c) for c in (x, y))
            target = gy[:, None] * gx / (gx.sum() * gy.sum())
            wide = q[b, p].double()
            one = torch.xlogy(target, target / wide).nan_to_num() + (1 - target) * ((1 - target) / (1 - wide)).log()
            total += float(one.sum())
    assert float(two_sided_kl(q, points, 1.0)) == pytest.approx(total / 6, rel=1e-5)
    certain = torch.zeros(1, 1, 9, 9)
    certain[0, 0, 4, 4] = 1.0
    certain.requires_grad_()
    loss = two_sided_kl(certain, torch.tensor([[[4.0, 4.0]]]), 1.0)
    loss.backward()
    assert bool(loss.isfinite()) and bool(certain.grad.isfinite().all())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("nothing", {}, r"name must be one of forest, pool, heatmap_forest, dense, coordinates, got 'nothing'"),
        ("pool", {"leafs": 3}, "config of 'pool': got an unexpected keyword argument 'leafs'"),
        ("pool", {"mean_shape": [[0.0, 0.0]]}, r"SharedPool: mean_shape must be finite \[2, 2\], got \[1, 2\]"),
        ("pool", {"reach": 1.5}, r"SharedPool: reach must be a fraction of the image in \(0, 1\), got 1.5"),
        ("pool", {"objective": "l3"}, "SharedPool: objective must be one of .*, got 'l3'"),
        ("pool", {"leaf_rate": 0.0}, r"SharedPool: leaf_rate must be in \(0, 1\], got 0.0"),
        ("heatmap_forest", {"groups": 2}, "groups = 2 needs points to be told apart by"),
        ("heatmap_forest", {"groups": [[0], [0]]}, "groups must hold each of the 2 landmarks once"),
        ("heatmap_forest", {"objective": "two_sided", "mask": 0.1}, "mask limits the losses 'kl' and 'l2'"),
        ("heatmap_forest", {"branch": -1}, "expected branch >= 0 and leaf_iterations >= 1, got -1 and 5"),
        ("coordinates", {"loss": "l4"}, "CoordinateRegression: loss must be one of 'wing', 'l1', 'l2', got 'l4'"),
        ("dense", {"upsample": 0}, "upsample must be >= 1 and sigma > 0, got 0 and 1.5"),
        ("forest", {"backbone": "smal"}, "unknown backbone 'smal', did you mean 'small'"),
        ("forest", {"backbone_options": {"widht": 4}}, "no option 'widht', did you mean 'width'"),
    ],
)
def test_errors(name, changes, message):
    given = {"landmarks": 2, "mean_shape": [[1.0, 1.0], [2.0, 2.0]], "image_size": 32} | changes
    with pytest.raises(ValueError, match=message):
        models.build(name, given)


def test_pretraining_and_updates_that_were_not_prepared(faces):
    images, points, _ = faces
    with pytest.raises(ValueError, match="pretrain_loss needs a model made with pretrain=True"):
        make("pool", faces).pretrain_loss(images, points)
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        make("heatmap_forest", faces).update()
