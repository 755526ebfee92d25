"""fastforest.Aligner and exported models: kinds of images, places, several faces, videos, threads, fresh processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastforest
from fastforest import aligner as module
from fastforest import data, inference, models, photos, training
from fastforest.aligner import Aligner, NoFace, NotFinite, load_exported

ROOT = Path(fastforest.__file__).parents[1]
SIZE = 64
MEAN_SHAPE = torch.tensor(data.mean_shape_68() * (SIZE / 1.5) + (SIZE - 1) / 2)
NARROW = {"backbone_options": {"width": 4, "code": 8, "blocks": [0, 0, 0, 0]}}
SMALL = {
    "forest": NARROW | {"leaves": 16, "canvas": 8},
    "forest of trees": NARROW | {"leaves": 16, "canvas": 8, "selection": "forest", "depth": 4},
    "dense": NARROW,
    "coordinates": NARROW | {"hidden_units": 16},
    "pool": NARROW | {"leaves": 16, "canvas": 8},
    "heatmap_forest": NARROW | {"canvas": 8, "trees": 2, "depth": 3, "units": 16},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str = "forest"):
    torch.manual_seed(0)
    given = {"landmarks": 68, "mean_shape": MEAN_SHAPE.tolist(), "image_size": SIZE}
    return models.build(kind.split()[0], given | SMALL[kind]).eval()


class Centroid(torch.nn.Module):
    """Finds the bright spot of its crop: what the crop shows where is seen in what it says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        light = images.mean(dim=1)
        light = light / light.sum(dim=(1, 2), keepdim=True)
        grid = torch.arange(images.shape[-1], dtype=torch.float32)
        return torch.stack([(light.sum(dim=1) * grid).sum(dim=1), (light.sum(dim=2) * grid).sum(dim=1)], dim=-1)[
            :, None
        ]


class Corners(Centroid):
    """Four landmarks at two standard deviations of the light: they settle on a spot, and grow where there is none."""

    def forward(self, images):
        light = images.mean(dim=1).double() + 1e-4
        light = light / light.sum(dim=(1, 2), keepdim=True)
        grid = torch.arange(images.shape[-1], dtype=torch.float64)
        ends = []
        for axis in (1, 2):
            marginal = light.sum(dim=axis)
            mean = (marginal * grid).sum(dim=1, keepdim=True)
            reach = 2 * (marginal * (grid - mean) ** 2).sum(dim=1, keepdim=True).sqrt()
            ends.append(torch.cat([mean - reach, mean + reach], dim=1))
        return torch.stack([ends[0], ends[1]], dim=-1)


class Sure(Centroid):
    """Its covariance is that of a landmark known to one pixel along x and two along y."""

    def distribution(self, images):
        points = self(images)
        return points, torch.diag(torch.tensor([1.0, 4.0])).expand(len(points), 1, 2, 2)


def spots(*centres, sigma=10.0, shape=(300, 300)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    light = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)) for x, y in centres)
    return np.repeat(np.rint(255 * np.minimum(light, 1)).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("box", [(60, 50, 64, 40), (100, 80, 30, 30), (-20, -30, 150, 160), (90, 90, 120, 100)])
def test_points_are_mapped_back_to_the_photograph(box):
    found = Aligner(Centroid(), 64)(spots((112.3, 93.8), sigma=3.0, shape=(150, 180)), box)
    assert found.covariance is None and np.isnan(found.spread).all() and found.box == box
    assert found.points.dtype == np.float32 and found.points[0] == pytest.approx([112.3, 93.8], abs=0.05)


def test_spread_and_covariance_are_in_pixels_of_the_photograph():
    found = Aligner(Sure(), 64)(spots((150, 150)), (100, 110, 80, 60))
    scale = 1.5 * 80 / 64
    assert found.covariance[0] == pytest.approx(np.diag([scale**2, 4 * scale**2]), rel=1e-6)
    assert found.spread == pytest.approx([np.sqrt(5) * scale], rel=1e-6)


def test_a_crop_is_that_of_the_training_sets():
    image = data.draw_face(0, 0, 120)[0]
    for box in ((20, 30, 50, 60), (-10, 40, 90, 50), (60.4, 70.6, 80, 30)):
        crop, (x0, y0, side) = photos.crop(image, box, 32)
        assert (x0, y0, side) == data.crop_box(np.array([box[:2], np.add(box[:2], box[2:])]))
        pixels = np.array(Image.fromarray(image).crop((x0, y0, x0 + side, y0 + side)))
        assert torch.equal(crop, data.resize(torch.from_numpy(pixels).permute(2, 0, 1), 32))


def test_kinds_of_images_give_the_same_points(tmp_path):
    image, points = data.draw_face(3, 7, 160)
    path = tmp_path / "face.png"
    Image.fromarray(image).save(path)
    box = photos.box_around(points, image)
    align = Aligner(build(), SIZE)
    expected = align(image, box)
    others = [path, str(path), Image.open(path), Image.open(path).convert("RGBA"), torch.tensor(image).permute(2, 0, 1)]
    for other in [*others, image[:, ::-1][:, ::-1]]:
        assert np.array_equal(align(other, box).points, expected.points)
    grey = np.array(Image.fromarray(image).convert("L"))
    repeated = align(np.repeat(grey[..., None], 3, axis=2), box)
    assert np.array_equal(align(grey, box).points, repeated.points)
    assert np.array_equal(align(Image.fromarray(grey), box).points, repeated.points)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((9, 9, 3)), ValueError, r"uint8 \[H, W, 3\] or \[H, W\], got an array float64 \[9, 9, 3\]"),
        (np.zeros((9, 9, 4), np.uint8), ValueError, r"got an array uint8 \[9, 9, 4\]"),
        (np.zeros((0, 9), np.uint8), ValueError, r"got an array uint8 \[0, 9\]"),
        (
            torch.zeros(9, 9, 3, dtype=torch.uint8),
            ValueError,
            r"uint8 \[3, H, W\], got a tensor torch.uint8 \[9, 9, 3\]",
        ),
        (torch.zeros(3, 9, 9), ValueError, r"got a tensor torch.float32 \[3, 9, 9\]"),
        (Image.new("I;16", (9, 9)), ValueError, "must have 8 bits a channel, got Pillow's mode 'I;16'"),
        (7, TypeError, "must be a path, a Pillow image, an array or a tensor, got int"),
        ("none.png", data.DataError, "none.png: no such file"),
    ],
)
def test_what_is_not_an_image(image, error, message):
    with pytest.raises(error, match=message):
        Aligner(Centroid(), 64)(image, (1, 1, 5, 5))


def test_boxes_and_batches_are_single_calls():
    image = data.draw_face(3, 7, 160)[0]
    boxes = [(20, 30, 100, 100), (30, 40, 80, 90), (10, 10, 120, 130)]
    align = Aligner(build(), SIZE)
    single = [align(image, box) for box in boxes]
    for many in (align.boxes(image, boxes), align.batch([image] * 3, boxes)):
        for one, other in zip(single, many, strict=True):
            assert np.allclose(one.points, other.points, atol=1e-3) and one.box == other.box
            assert np.allclose(one.covariance, other.covariance, rtol=1e-3, atol=1e-3)
    assert align.boxes(image, []) == [] and align.batch([]) == []
    with pytest.raises(ValueError, match="the box 900 0 5 5 does not lie in the image of 160 x 160 pixels"):
        align.boxes(image, [boxes[0], (900, 0, 5, 5)])


def test_given_and_found_faces_share_a_batch(monkeypatch):
    monkeypatch.setattr(module, "find_faces", lambda image: [(190, 200, 25, 25)] if image.any() else [])
    image, dark = spots((200, 210)), np.zeros((300, 300, 3), np.uint8)
    found = Aligner(Corners(), 64).batch([image, dark, image], [None, None, (170, 180, 50, 50)])
    assert found[1] is None and found[2].box == (170, 180, 50, 50)
    assert found[0].points.mean(axis=0) == pytest.approx([200, 210], abs=0.5)


def test_one_of_the_faces_found_is_the_face():
    image, points = data.draw_face(3, 7, 160)
    photo = np.full((300, 400, 3), 128, np.uint8)
    photo[100:260, 180:340] = image
    points = points + np.array([180, 100], np.float32)
    low, high = points.min(axis=0), points.max(axis=0)
    side = (high - low).max()
    boxes = photos.find_faces(photo)
    assert 1 <= len(boxes) <= photos.CANDIDATES
    assert [box[2] for box in boxes] == sorted((box[2] for box in boxes), reverse=True)
    shifts = [np.abs(np.array(box[:2]) + box[2] / 2 - (low + high) / 2).max() / side for box in boxes]
    nearest = int(np.argmin(shifts))
    assert shifts[nearest] < 0.15 and 0.75 < boxes[nearest][2] / side < 1.35


@pytest.mark.parametrize("shape", [(10, 10), (25, 400), (26, 26), (300, 200)])
def test_without_a_face(shape):
    align = Aligner(Centroid(), 64)
    blank = np.full((*shape, 3), 90, np.uint8)
    assert photos.find_faces(blank) == [] == align.all(blank)
    with pytest.raises(NoFace, match="no face found, give its box"):
        align(blank)


def test_a_false_find_is_told_from_a_face_by_landmarks_that_do_not_settle(monkeypatch):
    monkeypatch.setattr(module, "find_faces", lambda image: [(20, 20, 60, 60), (175, 190, 42, 42)])
    align = Aligner(Corners(), 64)
    found = align(spots((200, 210)))
    assert found.points.mean(axis=0) == pytest.approx([200, 210], abs=1)
    assert len(align.all(spots((200, 210)))) == 1


def test_all_faces_each_once_in_the_order_of_the_finds(monkeypatch):
    finds = [(170, 180, 60, 60), (45, 40, 40, 40), (178, 192, 40, 40), (100, 250, 30, 30)]
    monkeypatch.setattr(module, "find_faces", lambda image: finds)
    faces = Aligner(Corners(), 64).all(spots((200, 210), (64, 60)))
    assert [face.points.mean(axis=0).round().tolist() for face in faces] == [[200, 210], [64, 60]]


def test_where_no_find_settles_the_steadiest_is_taken(monkeypatch):
    monkeypatch.setattr(module, "find_faces", lambda image: [(20, 20, 60, 60), (175, 190, 42, 42)])
    monkeypatch.setattr(module, "SETTLED", 0.0)
    faces = Aligner(Corners(), 64).all(spots((200, 210)))
    assert len(faces) == 1 and faces[0].points.mean(axis=0) == pytest.approx([200, 210], abs=1)


def test_track_follows_the_face_and_finds_it_again(monkeypatch):
    searched = []

    def find(image):
        searched.append(int(image[..., 0].argmax()))
        bright = np.unravel_index(searched[-1], image.shape[:2])
        return [(bright[1] - 20.0, bright[0] - 20.0, 40.0, 40.0)] if image.any() else []

    monkeypatch.setattr(module, "find_faces", find)
    places = [(80, 90), (84, 93), (89, 95), None, (220, 60), (222, 62)]
    frames = [np.zeros((300, 300, 3), np.uint8) if place is None else spots(place) for place in places]
    align = Aligner(Corners(), 64)
    found = list(align.track(iter(frames)))
    for place, face in zip(places, found, strict=True):
        assert (face is None) == (place is None)
        if place is not None:
            assert face.points.mean(axis=0) == pytest.approx(place, abs=0.5)
    assert len(searched) == 3  # the first frame, the empty one, the one after it
    searched.clear()
    assert len(list(align.track(frames[:3], (60, 70, 40, 40)))) == 3 and searched == []
    with pytest.raises(ValueError, match="the box must be finite with positive width and height, got nan 1 2 3"):
        next(align.track(frames, (float("nan"), 1, 2, 3)))


def test_a_model_of_other_boxes_sees_landmarks_where_its_mean_shape_has_them(monkeypatch):
    shape = np.array([[20.0, 36.0], [42.0, 36.0], [20.0, 54.0], [42.0, 54.0]])  # low in the crop, and small
    align = Aligner(Corners(), 64, padding=0.1, shape=torch.from_numpy(shape))
    image, place = spots((140, 160), sigma=8.0), (140.0, 160.0)
    given = (100.0, 90.0, 80.0, 90.0)
    assert align(image, given).box == given  # of the kind that the model knows: taken as it is
    monkeypatch.setattr(module, "find_faces", lambda picture: [(120.0, 145.0, 36.0, 36.0)])
    for found in (align(image), list(align.track([image, image], given))[1]):
        x0, y0, side = photos.crop(image, found.box, 64, 0.1)[1]
        seen = (found.points + 0.5 - (x0, y0)) * 64 / side - 0.5
        assert found.points.mean(axis=0) == pytest.approx(place, abs=0.5)
        assert seen.mean(axis=0) == pytest.approx(shape.mean(axis=0), abs=0.7)  # squares are of whole pixels
        assert np.ptp(seen, axis=0).max() == pytest.approx(22.0, abs=0.7)
    for wrong in (torch.ones(2, 2), torch.rand(4, 3), torch.rand(0, 2), torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])):
        with pytest.raises(ValueError, match=r"shape must be \[P, 2\], finite, of points that differ, got \["):
            Aligner(Corners(), 64, shape=wrong)


def test_predictions_that_are_not_finite_are_refused():
    class Broken(Centroid):
        def forward(self, images):
            return super().forward(images) * float("nan")

    with pytest.raises(NotFinite, match="the model predicts points that are not finite"):
        Aligner(Broken(), 64)(spots((10, 10)), (10, 10, 50, 50))


def test_threads_share_an_aligner():
    align = Aligner(build("forest of trees"), SIZE)
    image = data.draw_face(3, 7, 160)[0]
    boxes = [(20 + i, 30, 100, 100) for i in range(8)]
    expected = [align(image, box).points for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda box: align(image, box).points, boxes * 4))
    for row, points in enumerate(found):
        assert np.array_equal(points, expected[row % 8])
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_from_checkpoint_is_three_lines(tmp_path):
    faces = data.Cached(data.SyntheticFaces(20, 32), 32)
    model = models.build(
        "forest",
        {"landmarks": 68, "mean_shape": training.mean_shape(faces).tolist(), "image_size": 32} | SMALL["forest"],
    )
    config = training.TrainConfig(rounds=1, steps=1, batch=4)
    checkpoint = training.fit(model, faces, faces, config, tmp_path).checkpoint
    image, points = data.draw_face(0, 3, 100)

    align = fastforest.Aligner.from_checkpoint(checkpoint)
    found = align(image, photos.box_around(points, image))
    assert found.points.shape == (68, 2) and found.spread.shape == (68,) and (found.spread > 0).all()

    saved = training.load(checkpoint)
    again = Aligner(saved.build(checkpoint), saved.size)(image, photos.box_around(points, image))
    assert np.array_equal(again.points, found.points)
    with pytest.raises(training.CheckpointError, match=r"none\.pt: no such file"):
        Aligner.from_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="Aligner: size must be the side of the model's images, got None"):
        Aligner(model)


# export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind, pixels -> (model, file); each exported once."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def export(kind="forest of trees", pixels="uint8"):
        if (kind, pixels) not in done:
            model, path = build(kind), folder / f"{kind.replace(' ', '_')}_{pixels}.pt2"
            inference.export(model, path, SIZE, MEAN_SHAPE, pixels=pixels)
            done[kind, pixels] = model, path
        return done[kind, pixels]

    return export


def images(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


def outputs(model, batch: torch.Tensor):
    with torch.inference_mode():
        points, covariance = inference.distribution(model, batch.float() / 255)
        return points, inference.spread(points, covariance)


FRESH = """
import sys, torch, fastforest
torch.set_num_threads(1)
batches = torch.load(sys.argv[1], weights_only=True)
models = [torch.export.load(path).module() for path in sys.argv[3:]]
results = [[model(batch) for batch in batches] for model in models]
assert "fastforest.models" not in sys.modules
torch.save(results, sys.argv[2])
"""


def fresh(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_every_exported_model_gives_the_same_bits_in_a_fresh_process(exported, tmp_path):
    assert set(models.MODELS) <= set(SMALL)
    batches = [images(count) for count in (1, 2, 7)]
    torch.save(batches, tmp_path / "images.pt")
    pairs = [exported(kind) for kind in SMALL]
    done = fresh(FRESH, tmp_path / "images.pt", tmp_path / "out.pt", *(path for _, path in pairs))
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for kind, (model, _), found in zip(SMALL, pairs, results, strict=True):
        for batch, (points, spread) in zip(batches, found, strict=True):
            expected = outputs(model, batch)
            assert torch.equal(points, expected[0]), kind
            assert torch.equal(spread.nan_to_num(-1), expected[1].nan_to_num(-1)), kind
            assert bool((spread > 0).all()) == hasattr(model, "distribution"), kind


def test_the_operators_of_a_forest_survive_the_file(exported):
    _, path = exported("forest of trees")
    graphs = [part for part in torch.export.load(path).graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert "fastforest.routing_route.default" in {str(node.target) for part in graphs for node in part.graph.nodes}


def test_without_fastforest_the_error_names_the_operator(exported):
    done = fresh("import sys, torch; torch.export.load(sys.argv[1])", exported("forest of trees")[1])
    assert done.returncode == 1
    assert "failed to resolve torch.ops.fastforest.routing_route.default to an operator" in done.stderr


def test_an_aligner_from_an_exported_file(exported, tmp_path):
    model, path = exported()
    image, points = data.draw_face(3, 7, 160)
    box = photos.box_around(points, image)
    found, expected = Aligner.from_exported(path)(image, box), Aligner(model, SIZE)(image, box)
    assert np.array_equal(found.points, expected.points) and np.array_equal(found.spread, expected.spread)
    assert found.covariance is None
    loaded = load_exported(path)
    assert (loaded.size, loaded.pixels, loaded.device) == (SIZE, "uint8", torch.device("cpu"))
    assert torch.equal(loaded.mean_shape, MEAN_SHAPE)


def test_export_for_images_between_0_and_1(exported):
    model, path = exported("coordinates", "float")
    loaded = load_exported(path)
    assert loaded.pixels == "float"
    with torch.inference_mode():
        points, spread = loaded.module(images(3).float() / 255)  # a model without covariances
    expected = outputs(model, images(3))
    assert torch.equal(points, expected[0]) and spread.isnan().all()
    assert torch.equal(loaded.predict(images(3))[0], points)


def test_export_refuses_other_suffixes_and_pixels(tmp_path):
    shape = torch.zeros(68, 2)
    with pytest.raises(ValueError, match=r"export: path must end in \.pt2, got .*model\.onnx"):
        inference.export(build(), tmp_path / "model.onnx", SIZE, shape)
    with pytest.raises(ValueError, match="export: pixels must be one of uint8, float, got 'half'"):
        inference.export(build(), tmp_path / "model.pt2", SIZE, shape, pixels="half")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_exported_models(exported, tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(training.CheckpointError, match=r"model\.pt2: no such file"):
        load_exported(path)
    path.write_bytes(exported()[1].read_bytes()[:9000])
    with pytest.raises(
        training.CheckpointError, match=r"model\.pt2: not an exported model of fastforest, or a damaged"
    ):
        load_exported(path)
    plain = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(plain, path)
    with pytest.raises(training.CheckpointError, match=r"model\.pt2: not an exported model of fastforest"):
        load_exported(path)
    for content, message in (
        ('{"format": "other"}', "not an exported model of fastforest"),
        ('{"format": "fastforest exported", "version": 9}', "export version 9, this library reads 1"),
    ):
        torch.export.save(plain, path, extra_files={"fastforest.json": content})
        with pytest.raises(training.CheckpointError, match=message):
            load_exported(path)


# the package


def test_importing_the_package_stays_light():
    script = """
import sys, fastforest
names = ("skimage", "matplotlib", "PIL", "fastforest.data", "fastforest.training", "fastforest.aligner")
heavy = [name for name in names if name in sys.modules]
assert not heavy, heavy
assert "Aligner" in dir(fastforest) and "nn" in dir(fastforest) and "TYPE_CHECKING" not in dir(fastforest)
assert fastforest.Aligner.__name__ == "Aligner"
"""
    done = fresh(script)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'fastforest' has no attribute 'Aligned'"):
        fastforest.Aligned  # noqa: B018
