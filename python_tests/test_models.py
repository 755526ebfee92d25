"""The models: each learns, hides unknown landmarks, is rebuilt from its configuration, exported, and fits any backbone."""

import copy
import math

import pytest
import torch
from torch import nn

from fastforest import data, models, render_gaussian, training
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


SPOTS = {"landmarks": 6, "image_size": 32, "backbone_options": {"width": 4, "code": 8, "norm": "group"}}


def spots():
    """Images [8, 3, 32, 32], points [8, 6, 2] and their mean shape: a landmark is a spot in a channel."""
    generator = torch.Generator().manual_seed(3)
    shape = torch.tensor([[9.0, 9.0], [22.0, 9.0], [16.0, 15.0], [10.0, 22.0], [21.0, 22.0], [16.0, 26.0]])
    points = shape + 2.5 * torch.randn(8, 6, 2, generator=generator)
    return render_gaussian(points, 1.5, (32, 32)).unflatten(1, (3, 2)).amax(2), points, shape


def step(model, optimizer, images, points):
    optimizer.zero_grad()
    loss = model.loss(images, points)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


TREES = {"trees": 2, "depth": 4, "units": 16}


@pytest.mark.parametrize(
    "name, options",
    [
        ("coordinates", {"residual": False, "loss": "l1"}),
        ("dense", {"objective": "mse", "upsample": 2}),
        ("heatmap_forest", TREES),
        ("heatmap_forest", TREES | {"groups": [[0, 3, 5], [1, 2, 4]], "branch": 4, "objective": "two_sided"}),
        ("heatmap_forest", TREES | {"objective": "l2"}),
        ("pool", {"leaves": 32}),
        ("pool", {"leaves": 32, "selection": "forest", "depth": 4, "objective": "l2"}),
        ("pool", {"leaves": 64, "residual": False}),
        ("pool", {"leaves": 32, "objective": "two_sided"}),
        ("forest", {"leaves": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key}={one}" for key, one in value.items()),
)
def test_learns_eight_faces_by_heart(name, options):
    images, points, shape = spots()
    canvas = {} if name == "coordinates" else {"sigma": 1.0} if name == "dense" else {"canvas": 12, "sigma": 1.0}
    torch.manual_seed(0)
    model = models.build(name, SPOTS | {"mean_shape": shape.tolist()} | canvas | options)
    if hasattr(model, "start"):
        model.start(images, points)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for number in range(150):
        step(model, optimizer, images, points)
        if number % 10 == 9 and hasattr(model, "accumulate"):
            model.accumulate(images, points)
            assert model.update() >= 0
    error = (model.eval()(images) - points).norm(dim=-1).mean()
    assert error < 0.3 * (shape - points).norm(dim=-1).mean()


def test_units_of_the_trees_start_spread_over_the_features_of_training():
    images, points, shape = spots()
    points[2, 4] = math.nan  # a face that the leaves' clusters leave out
    options = {"mean_shape": shape.tolist(), "canvas": 12, "backbone_options": {"width": 4, "code": 8}} | TREES
    model = models.build("heatmap_forest", SPOTS | options).eval()
    model.start(images, points)
    assert not model.training and all(bool(value.isfinite().all()) for value in model.state_dict().values())
    routing = model.head.groups[0].routing
    units = nn.functional.linear(model.train().features(images), routing.weight, routing.bias)
    torch.testing.assert_close(units.std(0, correction=0), torch.ones(16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("residual", [True, False])
def test_canvas_and_back(residual):
    _, points, shape = spots()
    options = {"mean_shape": shape.tolist(), "leaves": 4, "canvas": 8, "reach": 0.25, "residual": residual}
    model = models.build("pool", SPOTS | options)
    torch.testing.assert_close(model.from_canvas(model.to_canvas(points)), points)
    # On 8 pixels: 16 of the image about the mean shape, or all 32.
    centre = shape if residual else torch.full((6, 2), 15.5)
    torch.testing.assert_close(model.to_canvas(centre + 3), torch.full((6, 2), 5.0 if residual else 4.25))


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


def test_mixtures_of_the_two_sided_loss_are_float32_under_autocast(faces):
    images = faces[0]
    model = make("pool-two-sided", faces).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixture = model._mixture(model.backbone.vector(images))
    assert mixture.dtype == torch.float32
    torch.testing.assert_close(mixture.sum((2, 3)), torch.ones(12, 68), rtol=1e-5, atol=1e-5)


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


def test_what_was_accumulated_is_not_the_callers(faces):
    images, points, _ = faces
    leaves = []
    for reuse in (False, True):
        model = make("heatmap_forest", faces).eval()
        given = images.clone(), points.clone(), torch.ones(12, 68)
        model.accumulate(*given)
        if reuse:
            for tensor in given:
                tensor.zero_()
        model.update()
        leaves.append(model.head.groups[0].leaves)
    assert torch.equal(*leaves)


@pytest.mark.parametrize("case", CASES)
def test_without_a_known_landmark_the_loss_is_nought(case, faces):
    images, points, _ = faces
    model = make(case, faces)
    loss = model.loss(images, torch.full_like(points, math.nan), torch.zeros(12, 68))
    loss.backward()
    assert float(loss.detach()) == 0 and not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["heatmap_forest-groups-branches", "dense"])
def test_covariance_is_that_of_the_maps(case, faces):
    images = faces[0][:3]
    model = make(case, faces).eval()
    with torch.no_grad():
        maps = model.heatmap(images).double()
        found = model.distribution(images)[1].double()
    pixel = SIZE / maps.shape[-1] if case == "dense" else model.pixel
    if case == "dense":
        maps = maps.flatten(2).softmax(-1).view_as(maps)
    grid = torch.stack(torch.meshgrid(*(torch.arange(maps.shape[-1]),) * 2, indexing="xy"), -1).double()
    apart = grid - torch.einsum("bphw,hwd->bpd", maps, grid)[:, :, None, None]
    expected = torch.einsum("bphw,bphwd,bphwe->bpde", maps, apart, apart) * pixel**2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_covariance_of_large_heatmaps_is_that_of_their_peak(monkeypatch):
    shape = torch.tensor([[100.3, 80.0], [20.0, 40.5]])
    options = {"image_size": 256, "objective": "mse", "backbone_options": {"width": 4, "code": 4}}
    model = models.build("dense", {"landmarks": 2, "mean_shape": shape.tolist(), **options, "upsample": 4}).eval()
    heatmap = render_gaussian(shape[None], 2.0, (256, 256), truncate=6.0)
    monkeypatch.setattr(model, "heatmap", lambda images: heatmap - 1e-3 * (heatmap == 0))
    points, covariance = model.distribution(torch.zeros(1, 3, 256, 256))
    torch.testing.assert_close(points[0], shape, rtol=0, atol=0.2)
    torch.testing.assert_close(covariance[0], 4 * torch.eye(2).expand(2, 2, 2), rtol=0.01, atol=0.01)


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


def test_a_backbone_that_made_heatmaps_can_still_learn_a_vector(faces):
    images, points, _ = faces
    own = models.Backbone(SIZE, width=4, code=4)
    make("dense", faces, backbone=own, backbone_options={}).loss(images, points).backward()
    make("pool", faces, backbone=own, backbone_options={}).loss(images, points).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in own.narrow.parameters())


def test_groups_are_found_once_and_kept(faces):
    model = make("heatmap_forest-groups-branches", faces)
    labels = model.config()["groups"]
    assert len(labels) == 68 and sorted(set(labels)) == [0, 1, 2]
    assert models.build(model.name, model.config()).head.members == model.head.members
    assert sorted(p for member in model.head.members for p in member) == list(range(68))


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
        ("heatmap_forest", {"groups": [[0], [0]]}, "groups must hold each of the 2 landmarks in exactly one group"),
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
