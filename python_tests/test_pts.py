"""fastforest.data: .pts files and images, whole, odd and damaged."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import save_image

from fastforest.data import DataError, draw_face, read_image, read_pts, write_pts

DATA = os.environ.get("FASTFOREST_DATA")
photographs = pytest.mark.skipif(not DATA, reason="FASTFOREST_DATA is not set: no photographs to read")

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
