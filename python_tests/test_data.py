"""fastforest.data: sets of faces, from the disk and kept in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import centroid, dot, save_image

from fastforest.data import (
    Cached,
    CropPackage,
    DataError,
    Face,
    RecordFaces,
    SyntheticFaces,
    crop_box,
    draw_face,
    mean_shape_68,
    open_dataset,
    read_ibug,
    resize,
    split,
    write_pts,
)

DATA = os.environ.get("FASTFOREST_DATA")
photographs = pytest.mark.skipif(not DATA, reason="FASTFOREST_DATA is not set: no photographs to read")


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


# photographs


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
