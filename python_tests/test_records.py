"""fastforest.data.records: one annotated face, many of them, their pictures."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from fastforest.data import DataError, Record, Records, open_record_image
from fastforest.data.matlab import read_member


def record(number: int = 0, points: int = 4, **more: object) -> Record:
    places = np.arange(2 * points, dtype=np.float32).reshape(points, 2) + number
    return Record(Path(f"{number}.png"), places, np.ones(points, dtype=bool), name=f"face {number}", **more)  # type: ignore[arg-type]


def save_cells(path: Path, pictures: list[np.ndarray], name: str = "IsT") -> Path:
    """Pictures [H, W] or [H, W, 3] as MATLAB 7.3 keeps a cell array of them."""
    with h5py.File(path, "w", userblock_size=512) as file:
        cells = file.create_dataset(name, (1, len(pictures)), dtype=h5py.ref_dtype)
        for number, picture in enumerate(pictures):
            cells[0, number] = file.create_dataset(f"#refs#/{number}", data=picture.T).ref
    return path


def test_records_give_back_what_they_were_made_of() -> None:
    masked = record(1)
    masked.points[2] = np.nan
    masked.visible[2] = False
    rows = [record(0, box=(1.0, 2.0, 3.0, 4.5), member=7, attributes={"blur": True}, source="set/part"), masked]
    records = Records(iter(rows), left_out=3)
    assert (len(records), records.landmarks, records.left_out) == (2, 4, 3)
    assert records.points.dtype == np.float32 and records.points.shape == (2, 4, 2)
    assert np.isnan(records.points[1, 2]).all() and np.isfinite(records.points[1, 1]).all()
    for row, again in zip(rows, records, strict=True):
        assert np.array_equal(row.points, again.points, equal_nan=True) and np.array_equal(row.visible, again.visible)
        assert (row.image, row.box, row.source, row.name, row.member, row.attributes) == (
            again.image,
            again.box,
            again.source,
            again.name,
            again.member,
            again.attributes,
        )


def test_records_slice_and_hand_out_copies() -> None:
    records = Records(record(number) for number in range(5))
    assert [row.name for row in records[1:4:2]] == ["face 1", "face 3"] and isinstance(records[1:2], Records)
    assert records[-1].name == "face 4"
    records[0].points[:] = -1
    assert records[0].points.min() == 0
    with pytest.raises(IndexError):
        records[5]


def test_records_must_agree() -> None:
    with pytest.raises(DataError, match="no record: there is nothing to read"):
        Records([])
    with pytest.raises(DataError, match=r"^1\.png: expected 4 points as of face 0, got 5$"):
        Records([record(0), record(1, points=5)])
    with pytest.raises(DataError, match="there is nothing to read"):
        Records([record()])[1:]


def test_picture_of_a_record_with_a_file_of_its_own(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 9, dtype=np.uint8)).save(tmp_path / "0.png")
    row = Record(tmp_path / "0.png", np.zeros((1, 2), np.float32), np.ones(1, bool))
    assert np.array_equal(np.asarray(open_record_image(row)), np.full((4, 6, 3), 9))


def test_picture_of_a_member_is_upright(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (4, 6), dtype=np.uint8), rng.integers(0, 256, (5, 3, 3), dtype=np.uint8)
    path = save_cells(tmp_path / "COFW_test.mat", [grey, colour])
    picture = open_record_image(Record(path, np.zeros((1, 2), np.float32), np.ones(1, bool), member=0))
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert np.array_equal(np.asarray(picture), np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(np.asarray(read_member(path, 1)), colour)


def test_members_that_are_none(tmp_path: Path) -> None:
    path = save_cells(tmp_path / "a.mat", [np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.float32)])
    with pytest.raises(DataError, match=r"a\.mat: has no image 2, it holds 2$"):
        read_member(path, 2)
    with pytest.raises(DataError, match=r"a\.mat: has no image -1"):
        read_member(path, -1)
    with pytest.raises(DataError, match=r"a\.mat: image 1 must be uint8 \[W, H\] or \[3, W, H\], got float32 \[2, 2\]"):
        read_member(path, 1)
    with pytest.raises(DataError, match=r"b\.mat: has no cell array of images named IsTr or IsT"):
        read_member(save_cells(tmp_path / "b.mat", [], name="other"), 0)
    with pytest.raises(DataError, match=r"c\.mat: no such file"):
        read_member(tmp_path / "c.mat", 0)
    (tmp_path / "d.mat").write_bytes(b"not MATLAB's")
    with pytest.raises(DataError, match=r"d\.mat: not a MATLAB 7\.3 file that can be read: "):
        read_member(tmp_path / "d.mat", 0)
    with h5py.File(tmp_path / "e.mat", "w") as file:
        file["IsT"] = np.zeros((1, 2))
    with pytest.raises(DataError, match=r"e\.mat: IsT must be a cell array of images, got float64"):
        read_member(tmp_path / "e.mat", 0)


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = save_cells(tmp_path / "a.mat", [np.full((3, 3), 1, np.uint8)])
    assert np.asarray(read_member(path, 0)).max() == 1
    other = save_cells(tmp_path / "b.mat", [np.full((5, 5), 2, np.uint8), np.full((5, 5), 3, np.uint8)])
    other.replace(path)
    assert np.asarray(read_member(path, 1)).max() == 3


def _sums(path: Path, members: list[int]) -> list[int]:
    return [int(np.asarray(read_member(path, member), dtype=np.int64).sum()) for member in members]


def test_forked_processes_read_at_once(tmp_path: Path) -> None:
    """Children of a process that has the file open read the right pictures, whatever the others read meanwhile."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 50 + i), dtype=np.uint8) for i in range(12)]
    path = save_cells(tmp_path / "COFW_train.mat", pictures, name="IsTr")
    expected = _sums(path, list(range(12)))
    assert expected == [3 * int(picture.sum(dtype=np.int64)) for picture in pictures]
    orders = [list(rng.permutation(12)) * 20 for _ in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(_sums, [(path, order) for order in orders])
    assert found == [[expected[i] for i in order] for order in orders]
