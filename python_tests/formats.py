"""Every format of annotations as the tests write it: a writer writes faces [P, 2] (0-based; one may be short of points)
with pictures and returns the file of annotations of the last one, or of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastforest.data import (
    Records,
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
    read_scut,
    read_wflw,
)

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
