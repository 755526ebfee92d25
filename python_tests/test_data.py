"""fastforest.data: files, datasets, drawn faces, augmentation."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from fastforest.data import (
    FLIP_68,
    LINES_68,
    REGIONS_68,
    Augment,
    Cached,
    CropPackage,
    DataError,
    Face,
    Plain,
    RecordFaces,
    SyntheticFaces,
    crop_box,
    draw_face,
    horizontal_flip,
    mean_shape_68,
    open_dataset,
    read_ibug,
    read_image,
    read_pts,
    resize,
    split,
    write_pts,
)
from fastforest.data.augment import warp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dot(size: int, x: float, y: float, sigma: float) -> torch.Tensor:
    """A Gaussian spot of peak 250 at (x, y): uint8 [3, size, size]."""
    cell = torch.arange(size, dtype=torch.float64)
    spot = torch.exp(-((cell - x) ** 2)[None] / (2 * sigma**2) - ((cell - y) ** 2)[:, None] / (2 * sigma**2))
    return (spot * 250).round().to(torch.uint8).expand(3, -1, -1).contiguous()


def centroid(image: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) of the first channel of [3, H, W]."""
    mass = image[0].double()
    height, width = mass.shape
    x = (mass.sum(0) * torch.arange(width)).sum() / mass.sum()
    y = (mass.sum(1) * torch.arange(height)).sum() / mass.sum()
    return float(x), float(y)


def save_image(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path)
    return path


# files: .pts

HEADER = "version: 1\nn_points:  3\n{\n"
BODY = "1.5 2.25\n10 20\n-3.5 1e1\n"
POINTS = np.array([[0.5, 1.25], [9, 19], [-4.5, 9]], np.float32)


@pytest.mark.parametrize(
    "text",
    [
        HEADER + BODY + "}\n",
        HEADER + BODY + "}",
        (HEADER + BODY + "}\n").replace("\n", "\r\n"),
        "\ufeff" + HEADER + BODY + "}\n\n",
        "version: 1.0\nn_points: 3\n{\n 1.5\t2.25 \n\n10 20\n-3.5 10\n}\n",
        BODY,
        BODY.replace(" ", "   "),
    ],
    ids=["header", "no-final-newline", "crlf", "bom", "blanks", "headerless", "headerless-wide"],
)
def test_pts_dialects(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.pts"
    path.write_bytes(text.encode())
    points = read_pts(path, expected=3)
    assert points.dtype == np.float32 and np.array_equal(points, POINTS)
    assert np.array_equal(read_pts(str(path), one_based=False), POINTS + 1)


@pytest.mark.parametrize("one_based", [True, False])
def test_pts_round_trip_is_exact(tmp_path: Path, one_based: bool) -> None:
    points = np.random.default_rng(0).uniform(-50, 4000, (68, 2)).astype(np.float32)
    write_pts(tmp_path / "a.pts", torch.from_numpy(points), one_based=one_based)
    assert np.array_equal(read_pts(tmp_path / "a.pts", expected=68, one_based=one_based), points)
    assert (tmp_path / "a.pts").read_text().startswith("version: 1\nn_points: 68\n{\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + BODY, "truncated, no closing brace after 3 of 3 lines of points"),
        (HEADER + "1.5 2.25\n10 2", "truncated, no closing brace after 2 of 3 lines of points"),
        (HEADER + "1 2\n}\n", "the header announces 3 points, got 1"),
        ("version: 1\nn_points: 3\n", "truncated, the header has no opening brace"),
        ("version: 1\n{\n1 2\n}\n", "the header has no n_points"),
        ("version: 1\nn_points: many\n{\n1 2\n}\n", "line 2: n_points is not a number: 'many'"),
        ("version: 1\nn_points: 0\n{\n}\n", "holds no points"),
        ("", "is empty"),
        ("1 2\n3\n", "line 2 is not two numbers: '3'"),
        ("1 2\n3 4 5\n", "line 2 is not two numbers: '3 4 5'"),
        ("hello world\n", "line 1 is not two numbers: 'hello world'"),
        ("x" * 100, "line 1 is not two numbers: '" + "x" * 40 + "...'"),
        ("1 2\nnan 4\n", "point 1 is not finite: nan 4.0"),
        ("1 2\n3 inf\n", "point 1 is not finite: 3.0 inf"),
        (b"V\x00\x00\x00\x00\x00\xceB", "not a text file"),
        ("1 2\n3 4\n", "expected 68 points, got 2"),
    ],
)
def test_pts_errors_name_file_and_reason(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.pts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_pts(path, expected=68)
    assert str(caught.value) == f"{path}: {message}"
    assert isinstance(caught.value, ValueError)


def test_pts_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pts: no such file$"):
        read_pts(tmp_path / "none.pts")
    with pytest.raises(DataError, match="is a folder, not a file"):
        read_pts(tmp_path)


def test_every_truncation_of_a_pts_file_is_an_error(tmp_path: Path) -> None:
    text = (HEADER + BODY + "}\n").encode()
    path = tmp_path / "a.pts"
    for length in range(len(text) - 2):
        path.write_bytes(text[:length])
        with pytest.raises(DataError):
            read_pts(path, expected=3)


def test_write_pts_refuses(tmp_path: Path) -> None:
    for bad, message in ((np.zeros((0, 2)), "P > 0"), (np.zeros(4), "P, 2"), (np.full((3, 2), np.nan), "finite")):
        with pytest.raises(ValueError, match=f"write_pts: points must be .*{message}"):
            write_pts(tmp_path / "a.pts", bad)
    assert not (tmp_path / "a.pts").exists()


# files: images


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("L", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("L", "pgm"),
    ],
)
def test_read_image_gives_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = save_image(tmp_path / f"a.{suffix}", (7, 5), mode)
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape == (5, 7, 3)
    with Image.open(path) as reference:
        assert np.array_equal(image, np.asarray(reference.convert("RGB")))


def test_read_image_goes_by_content_not_by_name(tmp_path: Path) -> None:
    png = save_image(tmp_path / "a.png", mode="RGBA")
    (tmp_path / "a.jpg").write_bytes(png.read_bytes())
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(png))


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_truncated_image_is_an_error_not_grey(tmp_path: Path, suffix: str) -> None:
    whole = save_image(tmp_path / f"whole.{suffix}", (200, 160)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.02, 0.3, 0.6, 0.9, 0.97):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError) as caught:
            read_image(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message


def test_images_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("text.jpg", "empty.png"):
        with pytest.raises(DataError, match=f"{name}: not an image in a known format$"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"none\.jpg: no such file$"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="is a folder, not an image"):
        read_image(tmp_path)
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: cannot decode the image: floating-point pixels"):
        read_image(tmp_path / "float.tif")


# layout


def test_flip_permutation_is_an_involution_that_mirrors_the_mean_shape() -> None:
    flip = np.array(FLIP_68)
    assert sorted(FLIP_68) == list(range(68)) and np.array_equal(flip[flip], np.arange(68))
    mean = mean_shape_68()
    assert np.allclose(mean[flip] * [-1, 1], mean, atol=1e-6)
    # a second permutation that mirrors the shape as well would need two landmarks at one place
    gaps = np.linalg.norm(mean[:, None] - mean[None], axis=-1) + np.eye(68)
    assert gaps.min() > 0.005
    fixed = [index for index in range(68) if FLIP_68[index] == index]
    assert fixed == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    assert (FLIP_68[36], FLIP_68[39], FLIP_68[48], FLIP_68[60], FLIP_68[17], FLIP_68[31]) == (45, 42, 54, 64, 26, 35)


def test_regions_cover_everything_once_and_survive_the_flip() -> None:
    assert [i for region in REGIONS_68.values() for i in region] == list(range(68))
    for region in REGIONS_68.values():
        assert {FLIP_68[i] for i in region} == set(region)


def test_lines_visit_every_landmark_and_stay_in_their_region() -> None:
    assert {i for line in LINES_68 for i in line} == set(range(68))
    for line in LINES_68:
        assert any(set(line) <= set(region) for region in REGIONS_68.values())


def test_mean_shape() -> None:
    mean = mean_shape_68()
    assert mean.shape == (68, 2) and mean.dtype == np.float32
    assert np.allclose(mean.min(0), -mean.max(0), atol=1e-6)
    assert np.ptp(mean, axis=0).max() == pytest.approx(1, abs=1e-6)
    assert mean[36:42, 0].max() < 0 < mean[42:48, 0].min()
    assert mean[19, 1] < mean[37, 1] < mean[30, 1] < mean[51, 1] < mean[57, 1] < mean[8, 1]


# drawn faces


def test_drawn_face_is_a_function_of_its_arguments() -> None:
    image, points = draw_face(3, 5, 64)
    again, same = draw_face(3, 5, 64)
    assert np.array_equal(image, again) and np.array_equal(points, same)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert points.dtype == np.float32 and points.shape == (68, 2)
    for other in (draw_face(4, 5, 64), draw_face(3, 6, 64), draw_face(5, 3, 64)):
        assert not np.array_equal(points, other[1]) and not np.array_equal(image, other[0])


def test_landmarks_do_not_depend_on_the_size() -> None:
    small, large = draw_face(0, 1, 64)[1], draw_face(0, 1, 256)[1]
    assert np.allclose((small + 0.5) * 4 - 0.5, large, atol=1e-3)


def test_drawn_faces_are_framed_as_crops_and_plausible() -> None:
    shapes = np.stack([draw_face(1, index, 32)[1] for index in range(60)]).astype(np.float64)
    low, high = shapes.min(1), shapes.max(1)
    assert np.allclose((low + high) / 2, 15.5, atol=1e-3)
    assert np.allclose((high - low).max(1), 32 / 1.5, atol=1e-3)
    ocular = np.linalg.norm(shapes[:, 36] - shapes[:, 45], axis=1) / (high - low).max(1)
    assert ocular.min() > 0.3 and ocular.max() < 0.85
    spread = np.linalg.norm(shapes - shapes.mean(0), axis=-1).mean(1) / np.linalg.norm(
        shapes[:, 36] - shapes[:, 45], axis=1
    )
    assert 0.08 < spread.mean() < 0.4
    # mouths open and close, eyes too
    gap = np.linalg.norm(shapes[:, 66] - shapes[:, 62], axis=1)
    assert gap.min() < 0.5 < 2 < gap.max()


def profile(grey: np.ndarray, point: np.ndarray, normal: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    places = point + offsets[:, None] * normal
    return map_coordinates(grey, places[:, ::-1].T, order=1, mode="nearest")


@pytest.mark.parametrize("marks", [(4, 5, 6, 7, 8, 9, 10, 11, 12), (37, 38, 43, 44)], ids=["jaw", "upper-lids"])
def test_landmarks_lie_on_drawn_edges(marks: tuple[int, ...]) -> None:
    """Along the outline's normal, the picture's mean change is greatest at the landmark, to a pixel of 128."""
    offsets = np.arange(-8, 8.5, 0.5)
    change = np.zeros(len(offsets) - 1)
    for index in range(24):
        image, points = draw_face(2, index, 128)
        for mark in marks:
            along = points[mark + 1] - points[mark - 1]
            normal = np.array([-along[1], along[0]]) / np.linalg.norm(along)
            change += np.abs(np.diff(profile(image.mean(2), points[mark], normal, offsets)))
    peak = float(offsets[change.argmax()] + 0.25)
    assert abs(peak) < 1 and change.max() > 1.5 * np.median(change)


def test_synthetic_dataset() -> None:
    faces: Any = SyntheticFaces(3, size=32, seed=9)
    face = faces[1]
    assert isinstance(face, Face) and face.name == "synthetic_9_1"
    assert face.image.dtype == torch.uint8 and face.image.shape == (3, 32, 32) and face.points.dtype == torch.float32
    image, points = draw_face(9, 1, 32)
    assert np.array_equal(face.image.permute(1, 2, 0).numpy(), image) and np.array_equal(face.points.numpy(), points)
    assert len(list(faces)) == 3 and torch.equal(faces[-1].image, faces[2].image)
    with pytest.raises(IndexError, match=r"face index must be in \[-3, 3\), got 3"):
        faces[3]
    for arguments, message in (((0,), "count"), ((3, 15), "size"), ((3, 32, -1), "seed")):
        with pytest.raises(ValueError, match=f"SyntheticFaces: {message} must"):
            SyntheticFaces(*arguments)


# datasets on disk


def make_package(folder: Path, count: int = 5, size: int = 32) -> np.ndarray:
    (folder / "images").mkdir(parents=True)
    names, points = [], []
    for index in range(count):
        image, marks = draw_face(0, index, size)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        names.append(f"images/{index}.png")
        points.append(marks)
    np.savez(folder / "landmarks.npz", image=np.array(names), landmarks=np.stack(points))
    return np.stack(points)


def test_package_round_trip(tmp_path: Path) -> None:
    points = make_package(tmp_path)
    faces = open_dataset(tmp_path)
    assert isinstance(faces, CropPackage) and len(faces) == 5
    image, _ = draw_face(0, 3, 32)
    face = faces[3]
    assert np.array_equal(face.image.permute(1, 2, 0).numpy(), image)
    assert np.array_equal(face.points.numpy(), points[3]) and face.name == "images/3.png"
    face.points.zero_()
    assert np.array_equal(faces[3].points.numpy(), points[3])


def test_package_errors(tmp_path: Path) -> None:
    make_package(tmp_path / "a", 3)
    npz = tmp_path / "a" / "landmarks.npz"
    good = dict(np.load(npz))

    def refused(message: str, **arrays: Any) -> None:
        np.savez(npz, **arrays)
        with pytest.raises(DataError, match=message) as caught:
            CropPackage(tmp_path / "a")
        assert str(npz) in str(caught.value)

    refused("holds no array 'landmarks'", image=good["image"])
    refused("image must be N strings, got int64", image=np.arange(3), landmarks=good["landmarks"])
    refused(
        r"landmarks must be floats \[3, P, 2\], got float32 \[2, 68, 2\]",
        image=good["image"],
        landmarks=good["landmarks"][:2],
    )
    refused(
        r"landmarks must be floats .*got float32 \[3, 68\]", image=good["image"], landmarks=good["landmarks"][..., 0]
    )
    refused("holds no faces", image=good["image"][:0], landmarks=good["landmarks"][:0])
    broken = good["landmarks"].copy()
    broken[1, 4, 0] = np.nan
    refused(r"landmarks of images/1\.png are not finite", image=good["image"], landmarks=broken)
    refused("cannot be read as an .npz file", image=np.array(["a", None]), landmarks=good["landmarks"])
    npz.write_bytes(npz.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot be read as an \.npz file"):
        CropPackage(tmp_path / "a")
    npz.unlink()
    with pytest.raises(DataError, match=r"landmarks\.npz: no such file"):
        CropPackage(tmp_path / "a")


def test_package_image_errors(tmp_path: Path) -> None:
    make_package(tmp_path, 3)
    save_image(tmp_path / "images" / "1.png", (32, 30))
    with pytest.raises(DataError, match=r"1\.png: a cropped face must be square, got 32 x 30"):
        CropPackage(tmp_path)[1]
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: no such file, but landmarks\.npz names it"):
        CropPackage(tmp_path)


def test_crop_box_follows_the_formula() -> None:
    points = np.array([[10.0, 20.0], [110.2, 60.0]])
    assert crop_box(points) == (round(60.1 - 151 / 2), round(40 - 151 / 2), 151)


def test_pts_folder_crops_as_described(tmp_path: Path) -> None:
    """Spots at the landmarks stay at the landmarks of the crop, which partly lies outside the image."""
    truth = np.array([[30.25, 22.5], [90.75, 40.0], [50.0, 75.5]], np.float32)
    (tmp_path / "deep").mkdir()
    for number, (x, y) in enumerate(truth):
        spot = dot(120, float(x), float(y), 4.0)[:, :100]
        Image.fromarray(spot.permute(1, 2, 0).numpy()).save(tmp_path / "deep" / f"{number}.png")
        write_pts(tmp_path / "deep" / f"{number}.pts", truth)
    faces: Any = RecordFaces(read_ibug(tmp_path, expected=3), 64)
    x0, y0, side = crop_box(truth)
    for number, face in enumerate(faces):
        assert face.name == f"deep/{number}" and face.image.shape == (3, 64, 64)
        expected = (truth - (x0, y0) + 0.5) * 64 / side - 0.5
        assert np.allclose(face.points.numpy(), expected, atol=1e-4)
        assert centroid(face.image) == pytest.approx(face.points[number].tolist(), abs=0.05)
    low, high = face.points.min(0).values, face.points.max(0).values
    assert float((high - low).max()) == pytest.approx(64 / 1.5, abs=0.5)


def test_pts_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: holds no .pts file"):
        read_ibug(tmp_path)
    fitting = np.random.default_rng(0).uniform(0, 40, (68, 2))
    write_pts(tmp_path / "a.pts", fitting)
    with pytest.raises(DataError, match=r"a\.pts: no image of the same name beside it"):
        open_dataset(tmp_path)
    save_image(tmp_path / "a.JPG")
    assert open_dataset(tmp_path, size=16)[0].image.shape == (3, 16, 16)
    with pytest.raises(ValueError, match="RecordFaces: size must be at least 1, got 0"):
        open_dataset(tmp_path, size=0)
    for points, file, message in (
        (np.full((68, 2), 5.0), "a.JPG", "all landmarks are the same point"),
        (np.random.default_rng(0).uniform(500, 540, (68, 2)), "a.JPG", "lies outside the image of 64 x 48 pixels"),
        (np.random.default_rng(0).uniform(-1e6, 1e6, (68, 2)), "a.JPG", "lies outside the image of 64 x 48 pixels"),
        (np.zeros((5, 2)), "a.pts", "expected 68 points, got 5"),
    ):
        write_pts(tmp_path / "a.pts", points)
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(tmp_path)[0]
        assert str(tmp_path / file) in str(caught.value)


def test_open_dataset(tmp_path: Path) -> None:
    drawn = open_dataset("synthetic", size=48, count=7, seed=2)
    assert isinstance(drawn, SyntheticFaces) and (len(drawn), drawn.size, drawn.seed) == (7, 48, 2)
    with pytest.raises(DataError, match=f"{tmp_path}: holds neither landmarks.npz nor .pts files"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset("nowhere")
    file = tmp_path / "a.txt"
    file.touch()
    with pytest.raises(DataError, match=r"a\.txt: is not a folder"):
        open_dataset(file)
    save_image(tmp_path / "a.png")
    write_pts(tmp_path / "a.pts", np.random.default_rng(0).uniform(0, 40, (68, 2)))
    folder = open_dataset(tmp_path, size=20)
    assert isinstance(folder, RecordFaces) and folder[0].image.shape[-1] == 20


def test_split_is_a_fixed_rule() -> None:
    train, held_out = split(SyntheticFaces(23, 16))
    assert list(held_out.indices) == [9, 19]
    assert sorted([*train.indices, *held_out.indices]) == list(range(23))
    assert held_out[1].name == "synthetic_0_19"
    train, held_out = split(SyntheticFaces(6, 16), every=2)
    assert list(held_out.indices) == [1, 3, 5] and list(train.indices) == [0, 2, 4]
    with pytest.raises(ValueError, match="split: every must be at least 2, got 1"):
        split(SyntheticFaces(6, 16), every=1)
    with pytest.raises(ValueError, match="at least every = 10 faces, got 6"):
        split(SyntheticFaces(6, 16))


# the cache


class Counting:
    """Counts how often each face is read."""

    def __init__(self, faces: list[Face]) -> None:
        self.faces, self.reads = faces, [0] * len(faces)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> Face:
        self.reads[index] += 1
        return self.faces[index]


def drawn_faces(count: int, size: int = 32) -> list[Face]:
    return [SyntheticFaces(count, size)[index] for index in range(count)]


def test_cache_keeps_to_its_bound_and_decodes_the_rest_on_demand() -> None:
    source = Counting(drawn_faces(6))
    per_image = 3 * 16 * 16
    cached = Cached(source, 16, max_bytes=4 * per_image + per_image - 1)
    assert cached.images.nbytes == 4 * per_image and cached.images.dtype == torch.uint8 and source.reads == [0] * 6
    place = cached.images.data_ptr()
    first = cached.batch(range(6))
    again = cached.batch(torch.tensor([5, 4, 3, 2, 1, 0]))
    assert source.reads == [1, 1, 1, 1, 2, 2]
    assert torch.equal(first[0].flip(0), again[0]) and torch.equal(first[1].flip(0), again[1])
    assert cached.images.data_ptr() == place and cached.images.nbytes == 4 * per_image
    assert first[0].shape == (6, 3, 16, 16) and first[0].dtype == torch.uint8 and first[1].shape == (6, 68, 2)


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_cache_gives_the_same_with_and_without_memory(max_bytes: int) -> None:
    source = drawn_faces(4)
    cached = Cached(Counting(source), 16, max_bytes)
    for _ in range(2):
        images, points = cached.batch([2, 0, 2])
        for row, index in enumerate((2, 0, 2)):
            assert torch.equal(images[row], resize(source[index].image, 16))
            assert torch.allclose(points[row], (source[index].points + 0.5) / 2 - 0.5, atol=1e-5)


def test_cache_hands_out_copies() -> None:
    cached = Cached(Counting(drawn_faces(2)), 32).load()
    images, points = cached.batch([0])
    before = images.clone(), points.clone()
    images.zero_(), points.zero_(), cached[0].image.zero_(), cached[0].points.zero_()
    after = cached.batch([0])
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert cached[1].name == "synthetic_0_1" and len(cached) == 2


def test_load_reads_each_face_once() -> None:
    source = Counting(drawn_faces(3))
    cached = Cached(source, 16).load().load()
    cached.batch([0, 1, 2])
    assert source.reads == [1, 1, 1]


def test_cache_resizes_about_pixel_areas() -> None:
    for size, new in ((64, 32), (64, 24), (32, 64)):
        x, y = 0.4 * size, 0.55 * size
        face = Face(dot(size, x, y, size / 16), torch.tensor([[x, y]]), "dot")
        image, points = Cached(Counting([face]), new).batch([0])
        assert points[0, 0].tolist() == pytest.approx([(x + 0.5) * new / size - 0.5, (y + 0.5) * new / size - 0.5])
        assert centroid(image[0]) == pytest.approx(points[0, 0].tolist(), abs=0.03)


def test_cache_errors() -> None:
    cached = Cached(SyntheticFaces(3, 16), 16)
    with pytest.raises(ValueError, match=r"Cached.batch: indices must hold at least one index, got none"):
        cached.batch([])
    with pytest.raises(IndexError, match="got 3"):
        cached.batch([0, 3])
    with pytest.raises(ValueError, match="Cached: size must be at least 1, got 0"):
        Cached(SyntheticFaces(3, 16), 0)
    with pytest.raises(ValueError, match="Cached: max_bytes must not be negative, got -1"):
        Cached(SyntheticFaces(3, 16), 16, -1)
    faces = drawn_faces(2)
    mixed = Cached(Counting([faces[0], Face(faces[1].image, faces[1].points[:5], "odd")]), 16)
    with pytest.raises(DataError, match="odd: expected 68 points as in the other faces, got 5"):
        mixed.load()


# augmentation

STILL: dict[str, Any] = {
    "rotation": 0.0,
    "scale": 0.0,
    "shift": 0.0,
    "flip": None,
    "colour": 0.0,
    "occlude": 0.0,
    "blur": 0.0,
}


def faces_batch(count: int = 6, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return Cached(SyntheticFaces(count, size), size).batch(range(count))


def test_flip_twice_is_the_identity() -> None:
    images, points = faces_batch()
    once = horizontal_flip(images, points, FLIP_68)
    twice = horizontal_flip(*once, FLIP_68)
    assert torch.equal(twice[0], images) and torch.allclose(twice[1], points, atol=1e-5)
    assert not torch.equal(once[0], images)
    single = horizontal_flip(images[0], points[0], FLIP_68)
    assert torch.equal(single[0], once[0][0]) and torch.equal(single[1], once[1][0])
    # the person's right eye is again at smaller x
    assert (once[1][:, 36, 0] < once[1][:, 45, 0]).all()


def test_flip_moves_pixels_and_points_together() -> None:
    image = torch.zeros(1, 4, 5)
    image[0, 1, 3] = 1
    flipped, points = horizontal_flip(image, torch.tensor([[3.0, 1.0], [0.0, 0.0]]), (0, 1))
    assert flipped[0, 1, 1] == 1 and points.tolist() == [[1.0, 1.0], [4.0, 0.0]]


def test_still_augmentation_is_plain() -> None:
    images, points = faces_batch()
    for size in (48, 24, 96):
        changed = Augment(size, **STILL)(images, points, generator())
        plain = Plain(size)(images, points)
        assert torch.allclose(changed[1], plain[1], atol=1e-4)
        if size <= 48:
            assert torch.allclose(changed[0], plain[0], atol=1e-5)
        assert plain[0].dtype == torch.float32 and plain[0].min() >= 0 and plain[0].max() <= 1
    same = Plain(48)(images, points)
    assert torch.equal(same[0], images.float() / 255) and torch.equal(same[1], points)


def smooth_bump(size: int, x: float, y: float, radius: float) -> torch.Tensor:
    cell = torch.arange(size, dtype=torch.float64)
    square = (cell - x)[None] ** 2 + (cell - y)[:, None] ** 2
    return torch.exp(-square / (2 * radius**2))


def test_warp_moves_a_rendered_dot_to_the_mapped_point() -> None:
    """Whole-pixel maps are exact; others keep the dot's centre of mass, which bilinear sampling does not bias, to 1e-4
    of the side."""
    size = 64
    rotations = [0.0, 90.0, 180.0, 17.0, -33.0]
    for degrees in rotations:
        turn = math.radians(degrees)
        matrix = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])[None]
        offset = torch.tensor([[4 / 64, -6 / 64]])
        x, y = 36.0, 27.0
        image = (smooth_bump(size, x, y, 5.0) * 255).round().to(torch.uint8).expand(1, 3, -1, -1)
        moved, points = warp(image, torch.tensor([[[x, y]]], dtype=torch.float64), matrix, offset, size)
        expected = points[0, 0].tolist()
        assert centroid(moved[0]) == pytest.approx(expected, abs=1e-4 * size if degrees % 90 else 1e-4)
        if degrees == 0:
            assert expected == pytest.approx([38.0, 24.0])


@pytest.mark.parametrize("size", [40, 64, 100])
def test_warp_inverts_its_own_point_map_to_1e_4(size: int) -> None:
    """Pixels that hold their own coordinates, which bilinear sampling keeps exactly, tell where each pixel came from;
    the point map must take that place back to the pixel."""
    cell = torch.arange(64, dtype=torch.uint8)
    columns, rows = torch.meshgrid(cell, cell, indexing="xy")
    image = torch.stack([columns, rows, torch.full_like(rows, 255)])[None]
    matrix = torch.tensor([[[0.71, -0.42], [0.47, 0.83]], [[-0.9, 0.1], [0.05, 1.2]]])
    offset = torch.tensor([[0.11, -0.07], [0.0, 0.2]])
    moved, _ = warp(image.expand(2, -1, -1, -1), torch.zeros(2, 1, 2), matrix, offset, size)
    came_from = (moved[:, :2] * 255).flatten(2).mT
    _, back = warp(image.expand(2, -1, -1, -1), came_from, matrix, offset, size)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), dim=-1).reshape(-1, 2)
    inside = (moved[:, 2] > 0.99999).flatten(1)
    assert int(inside.sum()) > size * size / 2
    for row in range(2):
        assert float((back[row] - grid)[inside[row]].abs().max()) < 1e-4


@pytest.mark.parametrize("size", [32, 64, 100])
def test_warp_to_another_size_keeps_the_convention(size: int) -> None:
    image = dot(64, 30.0, 35.0, 5.0)[None]
    moved, points = warp(image, torch.tensor([[[30.0, 35.0]]]), torch.eye(2)[None], torch.zeros(1, 2), size)
    assert points[0, 0].tolist() == pytest.approx([30.5 * size / 64 - 0.5, 35.5 * size / 64 - 0.5], abs=1e-5)
    assert centroid(moved[0]) == pytest.approx(points[0, 0].tolist(), abs=0.01)


def test_warp_agrees_with_affine_grid() -> None:
    images, points = faces_batch(3)
    matrix = torch.tensor([[[0.9, -0.3], [0.2, 1.1]], [[1, 0], [0, 1]], [[-1.0, 0.1], [0, 0.8]]])
    offset = torch.tensor([[0.1, -0.2], [0, 0], [0.05, 0]])
    inverse = torch.linalg.inv(matrix)
    theta = torch.cat([inverse, -inverse @ offset[:, :, None]], dim=2)
    grid = torch.nn.functional.affine_grid(theta, [3, 3, 40, 40], align_corners=False)
    expected = torch.nn.functional.grid_sample(images.float() / 255, grid, align_corners=False)
    assert torch.allclose(warp(images, points, matrix, offset, 40)[0], expected, atol=1e-4)


def test_points_follow_the_picture_through_the_whole_augmentation() -> None:
    """Dots at asymmetric places stay under their landmark through rotation, scale, shift and mirror images."""
    size, count = 64, 24
    truth = torch.tensor([[22.0, 30.0], [42.0, 34.0]])
    images = torch.stack([dot(size, float(x), float(y), 3.0) for x, y in truth.repeat(count // 2, 1)])
    points = truth.expand(count, 2, 2).clone()
    changed, moved = Augment(size, **{**STILL, "rotation": 30.0, "scale": 0.2, "shift": 0.05, "flip": (1, 0)})(
        images, points, generator(4)
    )
    mirrored = 0
    for row in range(count):
        center = torch.tensor(centroid(changed[row]), dtype=torch.float32)
        distances = (moved[row] - center).norm(dim=-1)
        own = row % 2
        assert float(distances.min()) < 0.05
        mirrored += int(distances.argmin()) != own
    assert 4 < mirrored < 20


def test_random_parameters_keep_to_their_ranges() -> None:
    images = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    points = torch.tensor([[3.5, 3.5], [7.5, 3.5]]).expand(400, 2, 2)
    augment = Augment(8, **{**STILL, "rotation": 20.0, "scale": 0.25, "shift": 0.1})
    _, moved = augment(images, points, generator())
    arm = moved[:, 1] - moved[:, 0]
    angle = torch.atan2(arm[:, 1], arm[:, 0]).rad2deg()
    factor = arm.norm(dim=-1) / 4
    shift = (moved[:, 0] - 3.5) / 8
    assert 19 < float(angle.abs().max()) <= 20.001
    assert 0.8 - 1e-4 <= float(factor.min()) < 0.82 and 1.23 < float(factor.max()) <= 1.25 + 1e-4
    assert 0.095 < float(shift.abs().max()) <= 0.1 + 1e-5


def test_augmentation_repeats_with_its_generator_and_leaves_its_input() -> None:
    images, points = faces_batch()
    before = images.clone(), points.clone()
    augment = Augment(32)
    one, two, other = (augment(images, points, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])
    assert torch.equal(images, before[0]) and torch.equal(points, before[1])
    assert one[0].shape == (6, 3, 32, 32) and one[0].dtype == torch.float32
    assert float(one[0].min()) >= 0 and float(one[0].max()) <= 1
    assert augment(images, points.double(), generator())[1].dtype == torch.float64


def test_each_pixel_change_acts_alone() -> None:
    images, points = faces_batch(32)
    plain = Plain(48)(images, points)[0]
    for name in ("colour", "occlude", "blur"):
        changed, moved = Augment(48, **{**STILL, name: 1.0})(images, points, generator())
        assert torch.allclose(moved, points, atol=1e-4)
        different = (changed - plain).abs().amax(dim=1) > 1e-3
        share = different.float().mean(dim=(1, 2))
        if name == "occlude":
            assert float(share.min()) > 0.005 and float(share.max()) < 0.17
        else:
            assert float(share.min()) > 0.3
        if name == "blur":
            assert (changed.var(dim=(1, 2, 3)) < plain.var(dim=(1, 2, 3))).all()
    half = Augment(48, **{**STILL, "occlude": 0.5})(images, points, generator())[0]
    touched = int(((half - plain).abs().amax(dim=(1, 2, 3)) > 1e-3).sum())
    assert 6 < touched < 26


def test_outside_the_image_is_black() -> None:
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    moved, _ = warp(white, torch.zeros(1, 1, 2), torch.eye(2)[None], torch.tensor([[0.5, 0.0]]), 16)
    assert moved[0, :, :, :4].max() == 0 and moved[0, :, :, 5:].min() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, p: Augment(0), "Augment: size must be at least 1, got 0"),
        (lambda i, p: Augment(8, rotation=-1.0), "Augment: rotation must not be negative, got -1.0"),
        (lambda i, p: Augment(8, occlude=1.5), r"Augment: occlude must be a probability in \[0, 1\], got 1.5"),
        (
            lambda i, p: Augment(8)(i.float(), p, generator()),
            r"images must be uint8 .*got torch.float32 \[6, 3, 48, 48\]",
        ),
        (
            lambda i, p: Augment(8)(i[..., :40], p, generator()),
            r"images must be uint8 \[B, 3, S, S\].*\[6, 3, 48, 40\]",
        ),
        (lambda i, p: Augment(8)(i, p[:2], generator()), r"points must be \[6, P, 2\], got \[2, 68, 2\]"),
        (
            lambda i, p: Augment(8)(i, p[:, :5], generator()),
            r"Augment: the flip permutation must hold each of 0..4 once",
        ),
        (lambda i, p: Plain(8)(i[0], p), r"Plain: images must be uint8 \[B, 3, S, S\]"),
        (lambda i, p: horizontal_flip(i, p, [0, 0]), "horizontal_flip: the flip permutation must hold each of 0..67"),
    ],
)
def test_augmentation_errors(call: Callable[[torch.Tensor, torch.Tensor], object], message: str) -> None:
    images, points = faces_batch()
    with pytest.raises(ValueError, match=message):
        call(images, points)


# photographs

DATA = os.environ.get("FASTFOREST_DATA")
photographs = pytest.mark.skipif(not DATA, reason="FASTFOREST_DATA is not set: no photographs to read")


@photographs
def test_300w_package() -> None:
    faces = open_dataset(Path(str(DATA)) / "300w")
    assert isinstance(faces, CropPackage) and len(faces) == 2012
    train, held_out = split(faces)
    assert (len(train), len(held_out)) == (1811, 201)
    images, points = Cached(held_out, 64).load().batch(range(201))
    assert images.shape == (201, 3, 64, 64) and points.shape == (201, 68, 2)
    low, high = points.amin(1), points.amax(1)
    assert ((high - low).amax(1) - 64 / 1.5).abs().max() < 1
    # photographs and drawings share frame and order: mean shapes differ by a few percent of the face
    mean = (points.mean(0) - 31.5) / (64 / 1.5)
    assert float((mean - torch.from_numpy(mean_shape_68())).norm(dim=-1).mean()) < 0.06


@photographs
def test_original_crops_follow_the_package() -> None:
    """Cropping the untouched AFW files gives the package's landmarks of the same face."""
    faces: Any = RecordFaces(read_ibug(Path(str(DATA)) / "originals" / "afw"))
    package = CropPackage(Path(str(DATA)) / "300w")
    known = {name: index for index, name in enumerate(package.names)}
    compared = 0
    for face in faces:
        index = known.get(f"images/afw_{face.name}.jpg")
        if index is not None:
            reference = package[index]
            assert torch.allclose(face.points, reference.points, atol=0.01)
            assert float((face.image.float() - reference.image.float()).abs().mean()) < 4
            compared += 1
    assert compared >= 2


@photographs
def test_original_pts_files_parse() -> None:
    counts: dict[int, int] = {}
    for path in sorted((Path(str(DATA)) / "originals").rglob("*.pts")):
        if "scut" in str(path):
            with pytest.raises(DataError, match=r"not a text file|is not two numbers"):
                read_pts(path)
            continue
        points = read_pts(path)
        assert np.isfinite(points).all() and points.min() > -200 and points.max() < 5000
        counts[len(points)] = counts.get(len(points), 0) + 1
    assert counts[68] >= 15 and counts[20] == 2 and set(counts) == {20, 68}


@photographs
def test_original_images_decode_and_cut_ones_do_not(tmp_path: Path) -> None:
    root = Path(str(DATA)) / "originals"
    folders = ("youtube_p1", "lfpw_testset", "bioid", "menpo", "afw")
    paths = [
        path for folder in folders for path in (root / folder).iterdir() if path.suffix in {".jpg", ".png", ".pgm"}
    ]
    assert len(paths) >= 10
    for path in paths:
        image = read_image(path)
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 1
    whole = (root / "afw" / "9545523490_2.jpg").read_bytes()
    for share in (0.2, 0.5, 0.95):
        (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError):
            read_image(tmp_path / "cut.jpg")


def test_jpeg_that_misses_its_last_bytes_is_an_error(tmp_path: Path) -> None:
    """A JPEG whose end is cut by a few bytes only, within the coded data, is still an error."""
    buffer = io.BytesIO()
    Image.fromarray(draw_face(0, 0, 128)[0]).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    for missing in (12, 40, 200):
        (tmp_path / "a.jpg").write_bytes(data[:-missing])
        with pytest.raises(DataError, match=r"a\.jpg: cannot decode the image: "):
            read_image(tmp_path / "a.jpg")
