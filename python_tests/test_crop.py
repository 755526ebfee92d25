"""fastforest.data: a crop's pixels and points, faces of records."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest.data import (
    Crop,
    DataError,
    Record,
    RecordFaces,
    Records,
    crop_box,
    draw_face,
    open_dataset,
    read_records,
    write_pts,
)


def spots(width: int, height: int, points: np.ndarray, sigma: float) -> Image.Image:
    """One Gaussian spot of peak 250 in each of the three channels."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    planes = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)) for px, py in points]
    return Image.fromarray(np.rint(250 * np.stack(planes, axis=-1)).astype(np.uint8))


def centroids(image: torch.Tensor) -> np.ndarray:
    """Centre of mass (x, y) of each channel of [3, H, W]."""
    mass = image.double().numpy()
    rows, columns = (np.arange(count) for count in mass.shape[1:])
    total = mass.sum(axis=(1, 2))
    return (
        np.stack([(mass.sum(axis=1) * columns).sum(axis=1), (mass.sum(axis=2) * rows).sum(axis=1)], axis=1)
        / total[:, None]
    )


def smooth(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize("angle", [0.0, 33.0, -90.0, 180.0, 271.5])
@pytest.mark.parametrize(("side", "size"), [(151.0, 64), (40.25, 128), (1.0, 1), (3017.7, 97)])
def test_points_come_back(side: float, size: int, angle: float) -> None:
    crop = Crop((1234.5, -67.25), side, size, angle)
    points = np.random.default_rng(0).uniform(-500, 4000, (98, 2))
    assert np.abs(crop.to_image(crop.to_crop(points)) - points).max() < 1e-9
    assert np.abs(crop.to_crop(crop.to_image(points)) - points).max() < 1e-9
    assert np.array_equal(crop.to_crop(torch.from_numpy(points)), crop.to_crop(points))
    edges = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert np.allclose(np.linalg.norm(np.diff(crop.to_crop(points), axis=0), axis=1), edges * crop.scale)


def test_upright_points_follow_the_formula() -> None:
    crop = Crop.around(np.array([[10.0, 20.0], [110.2, 60.0], [np.nan, np.nan]]), 64)
    x0, y0, side = crop_box(np.array([[10.0, 20.0], [110.2, 60.0]]))
    points = np.array([[10.0, 20.0], [np.nan, np.nan], [50.3, 99.9]])
    expected = (points - (x0, y0) + 0.5) * 64 / side - 0.5
    assert np.allclose(crop.to_crop(points), expected, atol=1e-12, equal_nan=True)


def test_the_crops_axis_points_along_its_angle() -> None:
    crop = Crop((50.0, 40.0), 20.0, 20, 90.0)
    assert np.allclose(crop.to_image(np.array([[9.5, 9.5], [10.5, 9.5]])), [[50, 40], [50, 41]])


@pytest.mark.parametrize("angle", [0.0, 12.0, -45.0, 90.0, 165.0])
@pytest.mark.parametrize(
    ("side", "size", "sigma"),
    [(150.0, 150, 4.0), (171.3, 48, 12.0), (75.5, 160, 4.0), (333.0, 37, 24.0)],
    ids=["as-is", "shrunk", "enlarged", "far-shrunk"],
)
def test_pixels_and_points_agree(side: float, size: int, sigma: float, angle: float) -> None:
    """Spots stay at their points to 0.05 pixels of the crop, in one that is partly outside the image too."""
    middle = np.array([230.2, 180.7])
    points = middle + side * np.array([[-0.12, -0.05], [0.17, 0.0], [0.02, 0.18]])
    image = spots(400, 300, points, sigma)
    crop = Crop((float(middle[0]), float(middle[1])), side, size, angle)
    pixels = crop.apply(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    assert np.abs(centroids(pixels) - crop.to_crop(points)).max() < 0.05


def test_a_turned_crop_is_the_turned_upright_one() -> None:
    image = smooth()
    upright, turned = (Crop((45.0, 34.0), 40.0, 40, angle).apply(image) for angle in (0.0, 90.0))
    # one pixel of the crop to the right is one of the image down
    expected = upright.rot90(1, (1, 2))[:, 2:-2, 2:-2]
    assert (turned[:, 2:-2, 2:-2].int() - expected.int()).abs().max() <= 1


def test_shrinking_is_antialiased() -> None:
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    for angle in (0.0, 30.0):
        inner = Crop((127.5, 127.5), 160.0, 20, angle).apply(image)[:, 2:-2, 2:-2]
        assert inner.min() > 120 and inner.max() < 136


def test_outside_the_image_is_black() -> None:
    white = Image.new("RGB", (40, 30), (255, 255, 255))
    pixels = Crop((0.0, 0.0), 20.0, 20).apply(white)
    assert pixels[:, :9].max() == 0 and pixels[:, :, :9].max() == 0 and pixels[:, 11:, 11:].min() == 255
    turned = Crop((0.0, 0.0), 20.0, 20, 45.0).apply(white)
    assert turned[:, 9:11, :8].max() == 0 and turned[:, 9:11, 13:].min() == 255 and turned[:, :, :1].max() == 0


def test_what_a_crop_contains() -> None:
    crop = Crop((9.5, 9.5), 20.0, 10)
    points = np.array([[-0.5, 5], [-0.6, 5], [19.5, 19.5], [19.6, 0], [np.nan, np.nan]])
    assert crop.contains(points).tolist() == [True, False, True, False, False]


def test_boxes() -> None:
    crop = Crop.of_box((10.0, 20.0, 100.0, 60.0), 50, padding=0.0)
    assert (crop.side, crop.size, crop.scale, crop.centre) == (100, 50, 0.5, (59.5, 49.5))
    wide = Crop.of_box((10.0, 20.0, 100.0, 60.0), 50, padding=0.5)
    assert (wide.side, wide.centre) == (200, (59.5, 49.5))
    corners = np.array([[10.0, 20], [110, 80]])
    assert Crop.around(corners, 50, padding=0.5) == wide


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Crop((0, 0), 1.0, 0), "Crop: size must be at least 1, got 0"),
        (lambda: Crop((0, 0), 0.0, 1), "Crop: side must be positive and finite, got 0.0"),
        (lambda: Crop((0, np.nan), 1.0, 1), r"Crop: centre must be finite, got \(0, nan\)"),
        (lambda: Crop((0, 0), 1.0, 1, np.inf), "Crop: angle must be finite, got inf"),
        (lambda: Crop.around(np.full((3, 2), np.nan), 8), "no landmark is known"),
        (lambda: Crop.around(np.full((3, 2), 4.0), 8), "all landmarks are the same point"),
        (lambda: Crop.around(np.eye(2), 8, padding=-0.5), "padding must be greater than -0.5 and finite, got -0.5"),
        (lambda: Crop.of_box((0, 0, 0, 5), 8, padding=0.0), "the box must be finite with positive width .*got 0 0 0 5"),
        (lambda: Crop.of_box((0, 0, np.inf, 5), 8, padding=0.0), "the box must be finite .*got 0 0 inf 5"),
        (lambda: Crop((100.0, 0.0), 20.0, 8).apply(Image.new("RGB", (90, 90))), "does not lie in the image"),
        (lambda: Crop((45.0, 45.0), 721.0, 8).apply(Image.new("RGB", (90, 90))), "does not lie in the image"),
    ],
)
def test_crop_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# faces of records


def drawn_records(folder: Path, count: int = 3, *, boxes: bool = True, files: int = 3) -> Records:
    """Records over a few drawn faces of 80 pixels on files of 100 x 90."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_face(0, number, 80) for number in range(files)]
    for number, (face, _) in enumerate(drawn):
        canvas = np.full((90, 100, 3), 40, np.uint8)
        canvas[5:85, 12:92] = face
        Image.fromarray(canvas).save(folder / f"{number}.png")
    rows = []
    for index in range(count):
        points = drawn[index % files][1] + np.array([12, 5], np.float32)
        low, extent = points.min(axis=0), np.ptp(points, axis=0)
        box = (float(low[0]), float(low[1]), float(extent[0]), float(extent[1])) if boxes else None
        visible = np.ones(len(points), bool)
        rows.append(Record(folder / f"{index % files}.png", points, visible, box, "drawn", f"face_{index}"))
    return Records(rows)


def changed(records: Records, index: int, **changes: Any) -> Records:
    return Records(replace(row, **changes) if i == index else row for i, row in enumerate(records))


def test_faces_are_those_of_a_folder_of_pts_files(tmp_path: Path) -> None:
    records = drawn_records(tmp_path)
    for record in records:
        write_pts(record.image.with_suffix(".pts"), record.points)
    folder, faces = open_dataset(tmp_path, size=48), RecordFaces(records, 48)
    assert len(folder) == len(faces) == 3
    for index in range(3):
        assert torch.equal(folder[index].image, faces[index].image)
        assert torch.equal(folder[index].points, faces[index].points)
        assert faces[index].name == faces.names[index] == f"face_{index}"
    assert torch.equal(faces[-1].image, faces[2].image)
    with pytest.raises(IndexError, match=r"face index must be in \[-3, 3\), got 3"):
        faces[3]


def test_landmarks_outside_are_masked_and_counted(tmp_path: Path) -> None:
    records = drawn_records(tmp_path)
    points = records[1].points
    points[7] = np.nan
    x, y = points[30]
    records = changed(records, 1, points=points, box=(float(x) - 10, float(y) - 10, 20.0, 20.0))
    faces = RecordFaces(records, 32, crop="box", padding=0.1)
    kept = RecordFaces(records, 32, crop="box", padding=0.1, keep_outside=True)
    assert faces.crop(1).side == 24
    within = np.abs(points - faces.crop(1).centre).max(axis=1) <= 12
    lost = int((np.isfinite(points[:, 0]) & ~within).sum())
    assert 20 < lost < 67 and faces.masked_counts().tolist() == [0, lost, 0] and faces.masked == lost
    known = faces[1].points.isfinite().all(dim=1).numpy()
    assert np.array_equal(known, within)
    assert torch.equal(faces[1].points[known], kept[1].points[known])
    assert np.array_equal(kept[1].points.isfinite().all(dim=1).numpy(), np.isfinite(points[:, 0]))
    back = faces.crop(1).to_image(faces[1].points)
    assert np.abs(back[known] - points[known]).max() < 1e-4
    assert np.array_equal(records[1].points, points, equal_nan=True)


def test_counting_decodes_nothing(tmp_path: Path) -> None:
    records = drawn_records(tmp_path)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    faces = RecordFaces(records, 32, padding=-0.1)
    assert (faces.masked_counts() > 0).all()
    with pytest.raises(DataError, match=r"0\.png: no such file"):
        faces[0]
    with pytest.raises(DataError, match=r"0\.png: no such file"):
        faces.fingerprint()


def test_records_that_cannot_be_cropped(tmp_path: Path) -> None:
    records = drawn_records(tmp_path)
    unknown = np.full((68, 2), np.nan, np.float32)
    with pytest.raises(DataError, match=r"1\.png \(face_1\): no landmark is known$"):
        RecordFaces(changed(records, 1, points=unknown), 32)
    with pytest.raises(DataError, match=r"1\.png \(face_1\): no landmark is known$"):
        RecordFaces(changed(records, 1, points=unknown), 32, crop="box")
    with pytest.raises(DataError, match=r"2\.png \(face_2\): all landmarks are the same point$"):
        RecordFaces(changed(records, 2, points=np.full((68, 2), 9.0)), 32)
    with pytest.raises(
        DataError, match=r"0\.png \(face_0\): the box must be finite with positive width and height, got 1 2 0 5$"
    ):
        RecordFaces(changed(records, 0, box=(1.0, 2.0, 0.0, 5.0)), 32, crop="box")
    without = changed(records, 1, box=None)
    with pytest.raises(DataError, match=r"1\.png \(face_1\): has no box to crop by$"):
        RecordFaces(without, 32, crop="box")
    mixed = RecordFaces(without, 32, crop="box", padding=0.0, fallback="landmarks")
    assert mixed.crop(1) == Crop.around(records[1].points, 32, padding=0.0)
    assert mixed.crop(0) == Crop.of_box(records[0].box, 32, padding=0.0)
    beside = RecordFaces(changed(records, 0, points=records[0].points + 500), 32)
    with pytest.raises(DataError, match=r"0\.png \(face_0\): the face lies outside the image of 100 x 90 pixels$"):
        beside[0]
    nameless = RecordFaces(changed(records, 0, points=records[0].points + 500, name=""), 32)
    with pytest.raises(DataError, match=r"0\.png: the face lies outside"):
        nameless[0]


def test_square_that_memory_would_not_hold(tmp_path: Path) -> None:
    """Within eight sides of the image, but Pillow would refuse it in words of its own."""
    records, wild = drawn_records(tmp_path), np.zeros((68, 2), np.float32)
    Image.new("RGB", (2000, 1500)).save(tmp_path / "large.png")
    wild[5] = 9000
    faces = RecordFaces(changed(records, 0, image=tmp_path / "large.png", points=wild), 32)
    with pytest.raises(
        DataError, match=r"large\.png \(face_0\): the face lies outside the image of 2000 x 1500 pixels$"
    ):
        faces[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "RecordFaces: size must be at least 1, got 0"),
        ({"crop": "eyes"}, "RecordFaces: crop must be one of landmarks, box, got 'eyes'"),
        ({"fallback": "box"}, "RecordFaces: fallback must be landmarks or None, got 'box'"),
        ({"padding": -0.5}, "RecordFaces: padding must be greater than -0.5, got -0.5"),
        ({"padding": np.nan}, "RecordFaces: padding must be greater than -0.5, got nan"),
    ],
)
def test_settings_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordFaces(drawn_records(tmp_path), **settings)


def test_fingerprints(tmp_path: Path) -> None:
    records = drawn_records(tmp_path)
    own = RecordFaces(records, 32).fingerprint()
    moved = records[1].points + 0.25
    others = [
        RecordFaces(records, 33),
        RecordFaces(records, 32, padding=0.3),
        RecordFaces(records, 32, crop="box", padding=0.0),
        RecordFaces(records, 32, keep_outside=True),
        RecordFaces(changed(records, 1, points=moved), 32),
        RecordFaces(changed(records, 1, name="other"), 32),
        RecordFaces(changed(records, 1, member=1), 32),
        RecordFaces(records[0:2], 32),
    ]
    prints = [own, *(faces.fingerprint() for faces in others)]
    assert len(set(prints)) == len(prints)
    assert RecordFaces(records, 32).fingerprint() == own
    with open(tmp_path / "2.png", "ab") as file:
        file.write(b" ")
    assert RecordFaces(records, 32).fingerprint() != own


# memory

MEASURED = """
import sys
from pathlib import Path

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024

import torch
torch.set_num_threads(1)
bare = resident("VmRSS")
from fastforest.data import Record, RecordFaces, Records
imported = resident("VmRSS")
import numpy as np
rng = np.random.default_rng(0)
folder = Path(sys.argv[1])
base = np.load(folder / "points.npy")
def record(index):
    points = base[index % 3] + rng.uniform(-0.5, 0.5, (68, 2)).astype(np.float32)
    name = f"300W/some_folder/image_{index}"
    return Record(folder / f"{index % 3}.png", points, np.ones(68, bool), (1.0, 2.0, 80.0, 80.0), "drawn", name)
faces = RecordFaces(Records(record(index) for index in range(10000)), 128)
opened = resident("VmRSS")
assert faces.masked == 0
for index in range(0, 10000, 25):
    assert faces[index].image.shape == (3, 128, 128)
print(bare, imported, opened, resident("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: resident memory cannot be read")
def test_ten_thousand_records_stay_small(tmp_path: Path) -> None:
    """Under 80 MB beside PyTorch itself, whose import takes 219 MB without CUDA: under 300 MB in all. Of these the records
    and 400 of their faces take less than 40."""
    records = drawn_records(tmp_path)
    np.save(tmp_path / "points.npy", records.points)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    bare, imported, opened, peak = (float(word) for word in done.stdout.split())
    parts = f"MB: import torch {bare:.0f}, fastforest.data {imported:.0f}, records {opened:.0f}, peak {peak:.0f}"
    assert peak - bare < 80 and peak - imported < 40, parts


# photographs

DATA = os.environ.get("FASTFOREST_DATA")


@pytest.mark.skipif(not DATA, reason="FASTFOREST_DATA is not set: no photographs to read")
@pytest.mark.parametrize("folder", ["afw", "aflw2000", "bioid", "imm", "lfpw_testset", "menpo", "scut_fbp5500"])
def test_faces_of_photographs(folder: str) -> None:
    """Points go from the photograph to the face and back, to a hundredth of a pixel."""
    records = read_records(Path(str(DATA)) / "originals" / folder)
    faces = RecordFaces(records, 96)
    assert faces.masked == 0 and len(faces) == len(records) > 1
    for index, face in enumerate(faces):  # type: ignore[arg-type]
        known = face.points.isfinite().all(dim=1).numpy()
        assert np.array_equal(known, np.isfinite(records[index].points).all(axis=1)) and known.any()
        back = faces.crop(index).to_image(face.points)
        assert np.abs(back - records[index].points)[known].max() < 0.01
        assert face.image.float().std() > 5
        centre = face.points[known].amin(0) + face.points[known].amax(0)
        assert (centre / 2 - 47.5).abs().max() < 96 / faces.crop(index).side + 0.5
