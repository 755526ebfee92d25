"""Dense landmarks: interpolation along the contours, tables of them, the networks that predict them."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from fastforest import data
from fastforest.data import dense
from fastforest.models.dense import ResNet, UNet

FACE = data.draw_face(0, 3, 128)[1]


def inner(points: np.ndarray, landmarks: int) -> list[np.ndarray]:
    """The inner points of each segment."""
    return np.split(points[68:], np.cumsum(dense.allotment(landmarks))[:-1])


def contour(points: np.ndarray, line: tuple[int, ...], landmarks: int) -> np.ndarray:
    """All points of a contour in order, its landmarks included."""
    parts = inner(points, landmarks)
    pieces = []
    for pair in pairwise(line):
        pieces += [points[pair[:1], :], parts[dense.SEGMENTS_68.index(pair)]]
    return np.concatenate([*pieces, points[[line[-1]], :]])


# how many points a segment has


@pytest.mark.parametrize("landmarks", [68, 69, 98, 971, 1000])
def test_allotment_is_complete_and_mirrored(landmarks):
    counts = dense.allotment(landmarks)
    assert len(counts) == 63 and sum(counts) == landmarks - 68 and min(counts) >= 0
    flip = dense.dense_flip(landmarks)
    assert sorted(flip) == list(range(landmarks)) and flip[:68] == data.FLIP_68
    assert [flip[i] for i in flip] == list(range(landmarks))


def test_allotment_is_by_length_on_the_mean_face():
    mean = data.mean_shape_68().astype(np.float64)
    points = dense.interpolate(mean, 971).astype(np.float64)
    gaps = [
        np.linalg.norm(np.diff(np.vstack([mean[a], part, mean[b]]), axis=0), axis=1).mean()
        for (a, b), part in zip(dense.SEGMENTS_68, inner(points, 971), strict=True)
    ]
    # Before a segment got its last point its gap was the widest; the bridge also takes what is odd.
    before = [
        gap * (n + 1) / n
        for (a, _), gap, n in zip(dense.SEGMENTS_68, gaps, dense.allotment(971), strict=True)
        if a not in range(27, 30)
    ]
    assert max(gaps) < min(before) * 1.001


def test_too_few_landmarks():
    with pytest.raises(ValueError, match="landmarks must be at least 68, got 67"):
        dense.interpolate(FACE, 67)
    with pytest.raises(ValueError, match="at least 68"):
        dense.DenseFaces(data.SyntheticFaces(1, 32), 10)


# where they lie


def test_the_68_stay_and_come_first():
    points = dense.interpolate(FACE, 971)
    assert points.shape == (971, 2) and points.dtype == np.float32
    assert np.array_equal(points[:68], FACE)
    assert np.array_equal(dense.interpolate(FACE, 68), FACE)


@pytest.mark.parametrize("index", [0, 5, 8])
def test_points_lie_on_smooth_contours_at_even_arc_length(index):
    face = data.draw_face(1, index, 256)[1]
    points = dense.interpolate(face, 971).astype(np.float64)
    parts = inner(points, 971)
    for (a, b), part in zip(dense.SEGMENTS_68, parts, strict=True):
        steps = np.linalg.norm(np.diff(np.vstack([points[a], part, points[b]]), axis=0), axis=1)
        assert steps.max() < 1.06 * steps.min() + 0.01, (a, b)  # chords of even arcs: shorter where the curve bends
        # The curve stays by its chord: no loops between landmarks.
        chord = np.linalg.norm(points[b] - points[a])
        assert steps.sum() < 1.35 * chord + 0.5, (a, b)


def test_a_circle_stays_a_circle():
    """Closed contours have no corner where they begin: eyes drawn as circles give points on the circle."""
    face = FACE.copy()
    angle = np.arange(6) * np.pi / 3
    face[36:42] = 50 + 20 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = dense.interpolate(face, 971).astype(np.float64)
    eye = contour(points, (*range(36, 42), 36), 971)
    assert np.abs(np.linalg.norm(eye - 50, axis=1) - 20).max() < 0.1
    turning = np.arctan2(*(eye - 50).T[::-1])
    around = np.unwrap(turning)
    assert (np.diff(around) > 0).all() and around[-1] - around[0] == pytest.approx(2 * np.pi)


def test_a_straight_line_stays_straight_and_runs_one_way():
    face = FACE.copy()
    face[27:31] = np.stack([np.full(4, 64.0), [20.0, 22.0, 50.0, 51.0]], axis=1)
    bridge = contour(dense.interpolate(face, 971), (27, 28, 29, 30), 971)
    assert np.abs(bridge[:, 0] - 64).max() < 1e-5
    assert (np.diff(bridge[:, 1]) > 0).all() and bridge[0, 1] == 20 and bridge[-1, 1] == 51


def test_similar_faces_have_similar_points():
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    moved = dense.interpolate((2.5 * FACE.astype(np.float64) @ turn + 7).astype(np.float64), 971)
    np.testing.assert_allclose(moved, 2.5 * dense.interpolate(FACE, 971) @ turn + 7, atol=1e-3)


def test_a_mirrored_face_is_a_permutation():
    mirrored = (127 - FACE[list(data.FLIP_68)] * (1, 0)) * (1, 0) + FACE[list(data.FLIP_68)] * (0, 1)
    points = dense.interpolate(FACE, 971)[list(dense.dense_flip(971))]
    points[:, 0] = 127 - points[:, 0]
    np.testing.assert_allclose(dense.interpolate(mirrored.astype(np.float32), 971), points, atol=2e-3)


@pytest.mark.parametrize(
    "same", [range(68), range(36, 42), (36, 37), (41, 36), (0, 1), (15, 16), (28, 29, 30), (60, 61, 62, 63, 64, 65, 66)]
)
def test_identical_neighbours(same):
    face = FACE.copy()
    face[list(same)] = face[same[0]]
    points = dense.interpolate(face, 971)
    assert np.isfinite(points).all()
    low, high = face.min(axis=0) - 12, face.max(axis=0) + 12
    assert ((points > low) & (points < high)).all()
    chosen = set(same)
    for (a, b), part in zip(dense.SEGMENTS_68, inner(points, 971), strict=True):
        if a in chosen and b in chosen:
            np.testing.assert_allclose(part, np.broadcast_to(face[a], part.shape), atol=1e-4)


def test_a_closed_mouth_goes_there_and_back():
    face = FACE.copy()
    line = np.linspace(face[60], face[64], 5)
    face[60:68] = np.concatenate([line, line[3:0:-1]])
    mouth = contour(dense.interpolate(face, 971), (*range(60, 68), 60), 971)
    along = face[64] - face[60]
    across = (mouth - face[60]) @ np.array([-along[1], along[0]]) / np.linalg.norm(along)
    assert np.abs(across).max() < 1e-3


@pytest.mark.parametrize("bad", [FACE[:67], np.full((68, 2), np.nan), np.zeros((1, 68, 2))])
def test_unusable_points(bad):
    with pytest.raises(ValueError, match=r"points must be finite \[68, 2\]"):
        dense.interpolate(bad)


def test_dense_faces_read_what_their_set_reads():
    faces = data.SyntheticFaces(3, 32)
    found = dense.DenseFaces(faces, 200)
    assert len(found) == 3
    assert torch.equal(found[1].image, faces[1].image) and found[1].name == faces[1].name
    assert np.array_equal(found[1].points.numpy(), dense.interpolate(faces[1].points.numpy(), 200))
    with pytest.raises(data.DataError, match="expected 68 finite points to interpolate, got"):
        dense.DenseFaces(found, 971)[0]


# tables


@pytest.fixture
def table(tmp_path):
    pytest.importorskip("pyarrow")
    return dense.write_csv(dense.DenseFaces(data.SyntheticFaces(5, 32), 971), tmp_path / "in" / "faces.csv")


def test_a_table_gives_back_the_faces(table):
    faces, read = dense.DenseFaces(data.SyntheticFaces(5, 32), 971), dense.CsvFaces(table, 971)
    assert len(read) == 5
    for index in range(-5, 5):
        assert torch.equal(read[index].points, faces[index].points)
        assert torch.equal(read[index].image, faces[index].image)
    assert read[4].name == "faces/000004.png"
    with pytest.raises(IndexError):
        read[5]
    assert sorted(path.name for path in table.parent.iterdir()) == ["faces", "faces.csv"]


def test_images_are_decoded_when_asked_for(table):
    picture = table.parent / "faces" / "000003.png"
    picture.write_bytes(b"no image")
    read = dense.CsvFaces(table)
    assert read[2].image.shape == (3, 32, 32)
    with pytest.raises(data.DataError, match=r"000003.png: not an image"):
        read[3]
    Image.new("RGB", (3, 4)).save(picture)
    with pytest.raises(data.DataError, match=r"must be square, got 3 x 4"):
        read[3]


def test_numbers_round_trip_at_every_size(tmp_path):
    pytest.importorskip("pyarrow")
    points = torch.tensor([[[1e-30, -3.4028234e38], [0.1, 16777217.0]]])
    faces = [data.Face(torch.zeros(3, 2, 2, dtype=torch.uint8), points[0], "a")]
    read = dense.CsvFaces(dense.write_csv(faces, tmp_path / "t.csv"))
    assert torch.equal(read.points[:, :, 1:], points[:, :, 1:]) and torch.equal(read.points[0, 0, 0], points[0, 0, 0])


def test_what_cannot_be_written(tmp_path):
    pytest.importorskip("pyarrow")
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    two = [data.Face(image, torch.zeros(2, 2), "a"), data.Face(image, torch.zeros(3, 2), "b")]
    with pytest.raises(data.DataError, match=r"b: expected finite points, as many as the others', got \[3, 2\]"):
        dense.write_csv(two, tmp_path / "t.csv")
    with pytest.raises(data.DataError, match="b: expected"):
        dense.write_csv([data.Face(image, torch.full((1, 2), torch.nan), "b")], tmp_path / "t.csv")
    with pytest.raises(data.DataError, match="no face to write"):
        dense.write_csv(two, tmp_path / "t.csv", [])
    assert not (tmp_path / "t.csv").exists()


HEADER = "image,x0,y0,x1,y1\n"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "the first line must be image,x0,y0,x1,y1"),
        ("name,x0,y0\n", "the first line must be"),
        ("image,x0\n", "the first line must be"),
        ("image,x0,y0,x2,y2\n", "the first line must be"),
        ("image,x0,y0\na.png,1,2\n", "expected 2 landmarks, got 1"),
        (HEADER, "holds no faces"),
        (HEADER + "\n\n", "holds no faces"),
        (HEADER + "a.png,1,2,3,4\na.png,1,2,3\n", "line 3 has 4 fields, not 5"),
        (HEADER + "a.png,1,2,3,4\n\na.png,1,2,3,4,5\n", "line 4 has 6 fields, not 5"),
        (HEADER + "a.png,1,2,3,4\na.png,1,2,nan,4\n", "line 3: x1 must be a finite number, got 'nan'"),
        (HEADER + "\na.png,1,2,3,4\na.png,1,inf,3,4\n", "line 4: y0 must be a finite number, got 'inf'"),
        (HEADER + "a.png,1,2,3,\n", "line 2: y1 must be a finite number, got ''"),
        (HEADER + "a.png,1,1e39,3,4\n", "line 2: y0 must be a finite number, got '1e39'"),
        (HEADER + "a.png,1,2,three,4\n", "line 2: x1 must be a finite number, got 'three'"),
        (HEADER + "a.png,1,2,3,4\n\nb.png,1,2,3,4\n", "b.png: no such file"),
    ],
)
def test_unusable_tables_name_file_and_line(tmp_path, text, complaint):
    pytest.importorskip("pyarrow")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(data.DataError) as raised:
        dense.CsvFaces(tmp_path / "t.csv", 2)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 't.csv'}: ") and complaint in message and "\n" not in message
    if "no such file" in complaint:
        assert "line 4: " in message


def test_a_table_with_a_cut_row_among_many(table):
    lines = table.read_text().splitlines()
    lines[4] = lines[4][: len(lines[4]) // 2].rsplit(",", 1)[0]
    table.write_text("\n".join(lines) + "\n")
    fields = lines[4].count(",") + 1
    with pytest.raises(data.DataError, match=rf"faces.csv: line 5 has {fields} fields, not 1943"):
        dense.CsvFaces(table)


def test_no_table(tmp_path):
    with pytest.raises(data.DataError, match=r"t.csv: no such file"):
        dense.CsvFaces(tmp_path / "t.csv")
    with pytest.raises(data.DataError, match="is a folder, not a table"):
        dense.CsvFaces(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x81" * 20)
    with pytest.raises(data.DataError, match="not a table of text"):
        dense.CsvFaces(tmp_path / "t.csv")


def test_tables_need_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.csv").write_text(HEADER + "a.png,1,2,3,4\n")
    with pytest.raises(data.DataError, match=r"need pyarrow: pip install 'fastforest\[csv\]'"):
        dense.CsvFaces(tmp_path / "t.csv")


# networks


@pytest.mark.parametrize("landmarks, size, levels", [(1, 4, 1), (7, 16, 3), (971, 32, 4)])
def test_unet_gives_a_contiguous_map_a_landmark(landmarks, size, levels):
    net = UNet(landmarks, width=4, levels=levels, features=8)
    maps = net(torch.rand(2, 3, size, size))
    assert maps.shape == (2, landmarks, size, size) and maps.is_contiguous()
    maps.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_resnet_starts_at_the_mean_shape():
    shape = torch.rand(971, 2) * 63
    net = ResNet(shape, 64, width=4)
    points = net(torch.rand(2, 3, 64, 64))
    assert torch.equal(points, shape.expand(2, -1, -1))
    points.square().sum().backward()
    assert bool(net.points.weight.grad.abs().sum() > 0)
    assert sum(module.kernel_size == (3, 3) for module in net.modules() if isinstance(module, torch.nn.Conv2d)) == 32


def test_networks_say_what_they_take():
    with pytest.raises(
        ValueError, match=r"UNet: images must be \[B, 3, S, S\], S a multiple of 8, got \[1, 3, 12, 12\]"
    ):
        UNet(2, width=2, levels=4)(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match=r"S = 64, got \[1, 1, 64, 64\]"):
        ResNet(torch.zeros(2, 2), 64, width=2)(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="must be at least 1, got 0, "):
        UNet(0)
    with pytest.raises(ValueError, match="mean_shape must be finite"):
        ResNet(torch.full((2, 2), torch.nan), 64)
    with pytest.raises(ValueError, match=r"expected image_size, .* got 0, 4"):
        ResNet(torch.zeros(2, 2), 0, width=4)
