"""fastforest.data: batches read ahead, faces kept on disk, unknown landmarks on their way to a model."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest import models, training
from fastforest.data import (
    Cached,
    DataError,
    DiskCache,
    Face,
    FaceLoader,
    Plain,
    Record,
    RecordFaces,
    Records,
    SyntheticFaces,
    draw_face,
)
from fastforest.data.faces import resized


class Named:
    """Drawn faces that can be told from others, that count how often each is read, and may fail."""

    def __init__(self, count: int, size: int = 32, key: str = "a", broken: int | None = None) -> None:
        self.faces = SyntheticFaces(count, size)
        self.names = [f"synthetic_0_{index}" for index in range(count)]
        self.reads, self.key, self.broken = [0] * count, key, broken

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> Face:
        self.reads[index] += 1
        if index == self.broken:
            raise DataError(f"{self.names[index]}: cannot be read")
        return self.faces[index]

    def fingerprint(self) -> str:
        return self.key


class Given:
    """Faces as they are."""

    def __init__(self, faces: list[Face]) -> None:
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> Face:
        return self.faces[index]


def on_disk(folder: Path, count: int) -> RecordFaces:
    rows = []
    for index in range(count):
        image, points = draw_face(0, index, 40)
        Image.fromarray(image).save(folder / f"{index}.png")
        rows.append(Record(folder / f"{index}.png", points, np.ones(68, bool), None, "drawn", str(index)))
    return RecordFaces(Records(rows), 24)


ORDERS = [torch.tensor([3, 0]), torch.tensor([1]), torch.tensor([2, 2, 4]), torch.tensor([0, 1]), torch.tensor([4, 3])]


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# batches


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_give_the_same_batches_in_the_same_order(workers: int) -> None:
    faces = SyntheticFaces(5, 32)
    reference, state = Cached(faces, 24), torch.get_rng_state()
    batches = list(FaceLoader(faces, 24, workers=workers).batches(ORDERS))
    assert len(batches) == len(ORDERS)
    for order, batch, again in zip(ORDERS, batches, reference.batches(ORDERS), strict=True):
        assert batch[0].dtype == torch.uint8 and batch[0].shape == (len(order), 3, 24, 24)
        assert same(batch, reference.batch(order)) and same(again, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children() == []


def test_orders_are_read_as_they_are_needed() -> None:
    loader = FaceLoader(SyntheticFaces(5, 16), 16, workers=2)
    taken: list[int] = []

    def orders() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield [number % 5, (number + 1) % 5]

    stream = loader.batches(orders())
    batches = list(itertools.islice(stream, 3))
    assert same(batches[2], loader.batch([2, 3])) and len(taken) <= 3 + 2 * 2
    stream.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_turn_and_as_they_are(workers: int) -> None:
    stream = FaceLoader(Named(5, broken=4), 16, workers=workers).batches(ORDERS)
    assert len(list(itertools.islice(stream, 2))) == 2
    with pytest.raises(DataError, match=r"^synthetic_0_4: cannot be read$"):
        next(stream)
    assert multiprocessing.active_children() == []
    with pytest.raises(IndexError, match=r"^face index must be in \[-5, 5\), got 5$"):
        list(FaceLoader(Named(5), 16, workers=workers).batches([[5]]))


def test_pinned_only_where_there_is_a_device() -> None:
    images, points = next(FaceLoader(SyntheticFaces(3, 16), 16, pin=True).batches([[0, 2]]))
    assert images.is_pinned() == points.is_pinned() == torch.cuda.is_available()


def test_loader_errors() -> None:
    faces = SyntheticFaces(3, 16)
    with pytest.raises(ValueError, match="FaceLoader: size must be at least 1, got 0"):
        FaceLoader(faces, 0)
    with pytest.raises(ValueError, match="FaceLoader: workers must not be negative, got -1"):
        FaceLoader(faces, 16, workers=-1)
    with pytest.raises(ValueError, match=r"FaceLoader.batch: indices must hold at least one index, got none"):
        FaceLoader(faces, 16).batch([])
    odd = Given([faces[0], Face(faces[1].image, faces[1].points[:5], "odd")])
    with pytest.raises(DataError, match=r"^odd: expected 68 points as in synthetic_0_0, got 5$"):
        FaceLoader(odd, 16).batch([0, 1])
    assert len(FaceLoader(faces, 16)) == 3 and FaceLoader(faces, 16).size == 16


# the cache on disk


def test_faces_are_decoded_once_by_whoever_comes_first(tmp_path: Path) -> None:
    source = Named(5)
    cache = DiskCache(source, tmp_path / "new" / "folder", 16)
    first = [cache[index] for index in (4, 1, -1)]
    assert source.reads == [1, 1, 0, 0, 1]  # face 0 is read to know P
    again = Named(5)
    reopened = DiskCache(again, tmp_path / "new" / "folder", 16)
    for face, index in zip(first, (4, 1, 4), strict=True):
        own = reopened[index]
        assert torch.equal(own.image, face.image) and torch.equal(own.points, face.points) and own.name == face.name
        expected = Cached(again.faces, 16)[index]
        assert torch.equal(own.image, expected.image) and torch.equal(own.points, expected.points)
    assert again.reads == [1, 0, 0, 0, 0]


def test_faces_of_the_cache_are_the_callers(tmp_path: Path) -> None:
    cache = DiskCache(Named(2), tmp_path, 16)
    for _ in range(2):
        before = cache[1]
        image, points = before.image.clone(), before.points.clone()
        before.image.zero_(), before.points.zero_()
        assert torch.equal(cache[1].image, image) and torch.equal(cache[1].points, points)


def test_other_faces_have_another_file(tmp_path: Path) -> None:
    files = {DiskCache(Named(3, key=key), tmp_path, size).path for key, size in (("a", 16), ("b", 16), ("a", 17))}
    assert len(files) == 3 and set(tmp_path.iterdir()) == files
    records = on_disk(tmp_path, 2)
    one = DiskCache(records, tmp_path / "cache", 24)
    one[0]
    Image.fromarray(draw_face(7, 7, 40)[0]).save(tmp_path / "0.png")
    other = DiskCache(records, tmp_path / "cache", 24)
    assert other.path != one.path and not torch.equal(other[0].image, one[0].image)


@pytest.mark.parametrize("damage", ["zeros", "cut", "flipped-bit", "points"])
def test_damaged_rows_are_decoded_again(tmp_path: Path, damage: str) -> None:
    source = Named(4)
    cache = DiskCache(source, tmp_path, 16)
    truth = [cache[index] for index in range(4)]
    length, row = cache.path.stat().st_size, cache.row.itemsize
    assert length == 4 * row == 4 * (4 + 8 * 68 + 3 * 16 * 16)
    with open(cache.path, "r+b") as file:
        if damage == "cut":
            file.truncate(2 * row + 100)
        else:
            place = 2 * row + {"zeros": 0, "flipped-bit": 700, "points": 4}[damage]
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes(row) if damage == "zeros" else bytes([old[0] ^ 4]))
    again = Named(4)
    reopened = DiskCache(again, tmp_path, 16)
    assert reopened.path.stat().st_size == length
    for _ in range(2):
        for index, face in enumerate(truth):
            assert torch.equal(reopened[index].image, face.image) and torch.equal(reopened[index].points, face.points)
    assert again.reads == [1, 0, 1, 1 if damage == "cut" else 0]


def test_unknown_landmarks_are_kept(tmp_path: Path) -> None:
    source = Named(2)
    face = source.faces[1]
    face.points[5] = torch.nan
    faces = Given([source.faces[0], face])
    known: Any = source
    known.faces = faces
    cache = DiskCache(known, tmp_path, 16)
    for _ in range(2):
        assert cache[1].points.isnan().nonzero()[:, 0].tolist() == [5, 5]
    assert source.reads == [1, 1]


def test_cache_on_disk_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DiskCache: size must be at least 1, got 0"):
        DiskCache(Named(2), tmp_path, 0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.*\.faces: cannot be made: "):
        DiskCache(Named(2), tmp_path / "file", 16)
    cache = DiskCache(Named(3), tmp_path / "cache", 16)
    with open(cache.path, "ab") as file:
        file.write(b"more")
    message = (
        rf"\.faces: expected at most {3 * cache.row.itemsize} bytes for 3 faces, got {3 * cache.row.itemsize + 4}$"
    )
    with pytest.raises(DataError, match=message):
        DiskCache(Named(3), tmp_path / "cache", 16)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"\.faces: cannot be written: "):
        cache[1]
    odd: Any = Named(2)
    odd.faces = Given([odd.faces[0], Face(odd.faces[1].image, odd.faces[1].points[:5], "odd")])
    with pytest.raises(DataError, match=r"^odd: expected 68 points as in the other faces, got 5$"):
        DiskCache(odd, tmp_path, 16)[1]
    empty: Any = Given([])
    with pytest.raises(DataError, match="there is no face to keep"):
        DiskCache(empty, tmp_path, 16)


def test_workers_fill_the_cache_and_read_it(tmp_path: Path) -> None:
    faces = on_disk(tmp_path, 5)
    cache = pickle.loads(pickle.dumps(DiskCache(faces, tmp_path / "cache", 24)))
    direct = [FaceLoader(faces, 24).batch(order) for order in ORDERS]
    for _ in range(2):  # the second time from the file: the images are gone
        batches = list(FaceLoader(cache, 24, workers=2).batches(ORDERS))
        assert all(same(batch, expected) for batch, expected in zip(batches, direct, strict=True))
        for path in tmp_path.glob("*.png"):
            path.unlink()


def killed_in_a_write(folder: Path) -> None:
    cache = DiskCache(Named(6), folder, 16)
    _ = cache[0], cache[1]
    with open(cache.path, "r+b", buffering=0) as file:
        file.seek(2 * cache.row.itemsize)
        file.write(b"9" * (cache.row.itemsize // 2))
        os.kill(os.getpid(), signal.SIGKILL)


def read_twice(folder: Path, order: list[int]) -> None:
    """Ends with a status other than 0 if a face differs."""
    cache = DiskCache(Named(len(order)), folder, 16)
    for index in order * 2:
        face, expected = cache[index], resized(cache.dataset[index], 16)
        assert torch.equal(face.image, expected.image) and torch.equal(face.points, expected.points)


def forked(work: Callable[..., None], *arguments: Any) -> Any:
    def quietly() -> None:
        torch.set_num_threads(1)  # a forked process has no more
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    return process


def test_a_killed_process_leaves_a_good_cache(tmp_path: Path) -> None:
    process = forked(killed_in_a_write, tmp_path)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    source = Named(6)
    cache = DiskCache(source, tmp_path, 16)
    for index in range(6):
        assert torch.equal(cache[index].image, Cached(source.faces, 16)[index].image)
    assert source.reads == [1, 0, 1, 1, 1, 1]


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    orders = [list(range(40)), [7 * index % 40 for index in range(40)]]
    processes = [forked(read_twice, tmp_path, order) for order in orders]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(os.listdir(tmp_path)) == 1


# unknown landmarks on the way to a model


def masked(index: int, *unknown: int) -> Face:
    face = SyntheticFaces(index + 1, 32)[index]
    face.points[list(unknown)] = torch.nan
    return face


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_unknown_landmarks_pass_the_cache_and_plain(max_bytes: int) -> None:
    cached = Cached(Given([masked(0, 3), masked(1), masked(2, 60, 3)]), 24, max_bytes).load()
    for _ in range(2):
        images, points = cached.batch([0, 1, 2])
        assert points.isnan().all(dim=-1).nonzero().tolist() == [[0, 3], [2, 3], [2, 60]]
        plain = Plain(16)(images, points)
        assert torch.equal(plain[1].isnan(), points.isnan()) and bool(plain[0].isfinite().all())
    assert torch.equal(cached[0].points.isnan(), points[0].isnan())


def test_mean_shape_is_over_known_landmarks() -> None:
    faces = [masked(0, 3), masked(1), masked(2, 60, 3)]
    mean = training.mean_shape(Cached(Given(faces), 32))
    assert torch.equal(mean[3], faces[1].points[3]) and mean.dtype == torch.float32
    assert torch.allclose(mean[60], (faces[0].points[60] + faces[1].points[60]) / 2)
    assert torch.allclose(mean[0], torch.stack([face.points[0] for face in faces]).mean(0))
    with pytest.raises(DataError, match=r"^landmark 3 is known in none of the 2 faces$"):
        training.mean_shape(Cached(Given([faces[0], faces[2]]), 32))


def test_reading_refuses_faces_without_a_known_landmark() -> None:
    partly = Cached(Given([masked(0, 3), masked(1)]), 16)
    assert training.read(partly, "partly") is partly
    nothing = Cached(Given([masked(0), masked(1, *range(68))]), 16)
    with pytest.raises(DataError, match=r"^synthetic_0_1: no landmark is known$"):
        training.read(nothing, "nothing")


def test_a_run_is_the_same_with_workers_and_with_unknown_landmarks() -> None:
    faces, held_out = Given([masked(index, 3 * index) for index in range(8)]), Cached(SyntheticFaces(3, 32, 1), 32)
    config = training.TrainConfig(rounds=2, steps=2, batch=3, leaf_faces=0)
    histories = []
    for train in (Cached(faces, 32), FaceLoader(faces, 32, workers=1)):
        torch.manual_seed(0)
        model = models.build(
            "coordinates",
            {"landmarks": 68, "mean_shape": training.mean_shape(train).tolist(), "image_size": 32},
        )
        history = training.fit(model, train, held_out, config)
        histories.append(
            [{key: value for key, value in record.items() if key != "seconds"} for record in history.rounds]
        )
    assert histories[0] == histories[1] and len(histories[0]) == 2
    assert all(math.isfinite(record["loss"]) for record in histories[0])
