"""fastforest.data.readers: every format as the tests write it, whole and damaged, and what each says besides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from formats import FORMATS, SIDE, coco, dlib_box, every_format, picture, shapes, whole, write_box_mat, written
from scipy.io import savemat

from fastforest.data import (
    DataError,
    open_dataset,
    open_record_image,
    read_aflw2000,
    read_bioid,
    read_coco,
    read_cofw,
    read_cofw68,
    read_dlib,
    read_ibug,
    read_keypoints_csv,
    read_lfpw35,
    read_ljson,
    read_muct,
    read_records,
    read_wflw,
    write_pts,
)


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
    file = written(name, tmp_path)
    faces = open_dataset(file if name == "dlib" else tmp_path, size=24)
    assert len(faces) == 2
    assert faces[1].image.shape == (3, 24, 24) and faces[1].points.shape == FORMATS[name].faces.shape[1:]


def test_images_whose_names_differ_in_case_only(tmp_path: Path) -> None:
    for name in ("a", "A"):
        picture(tmp_path / f"{name}.jpg")
        write_pts(tmp_path / f"{name}.pts", shapes(68)[0])
    assert all(record.image.stem == record.name for record in read_ibug(tmp_path))
    (tmp_path / "A.jpg").unlink()
    assert {record.image.stem for record in read_ibug(tmp_path)} == {"a"}
