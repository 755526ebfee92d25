"""Files: iBUG .pts landmarks and images.

Shapes: P landmarks, H x W pixels. Points are (x, y), 0-based, pixel centres at integers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError, one_line
from .text import PathLike, read_lines

__all__ = ["existing_folder", "open_image", "read_image", "read_pts", "write_pts"]


def existing_folder(folder: PathLike) -> Path:
    """Raises DataError where there is no such folder."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if path.exists() else 'no such folder'}")
    return path


def read_pts(path: PathLike, *, expected: int | None = None, one_based: bool = True) -> np.ndarray:
    """Landmarks of an iBUG .pts file, with its header (`version: 1`, `n_points: 68`, braces) or without.

    Args:
        path: the file: text, one `x y` a line.
        expected: how many points it must hold; None takes any number.
        one_based: the file counts pixels from 1, as iBUG's do: 1 is subtracted.

    Returns:
        float32 [P, 2], 0-based pixels.

    Raises:
        DataError: file missing or unreadable, not text, a line that is not two numbers, truncated (no closing brace,
            or fewer points than its header says), a point that is not finite, or not `expected` points.
    """
    rows = _rows(Path(path))
    for number, row in enumerate(rows):
        if not (math.isfinite(row[0]) and math.isfinite(row[1])):
            raise DataError(f"{path}: point {number} is not finite: {row[0]} {row[1]}")
    if expected is not None and len(rows) != expected:
        raise DataError(f"{path}: expected {expected} points, got {len(rows)}")
    return (np.array(rows, dtype=np.float64) - (1.0 if one_based else 0.0)).astype(np.float32)


def write_pts(path: PathLike, points: np.ndarray | Tensor, *, one_based: bool = True) -> None:
    """Writes 0-based points [P, 2] as an iBUG .pts file with header; numbers have nine decimals.

    Raises:
        ValueError: points are not [P, 2] with P > 0, or not finite.
        OSError: the file cannot be written.
    """
    array = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != 2:
        raise ValueError(f"write_pts: points must be [P, 2] with P > 0, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("write_pts: points must be finite, got NaN or infinity")
    rows = "".join(f"{x:.9f} {y:.9f}\n" for x, y in array + (1.0 if one_based else 0.0))
    Path(path).write_text(f"version: 1\nn_points: {len(array)}\n{{\n{rows}}}\n", encoding="ascii")


def read_image(path: PathLike) -> np.ndarray:
    """An image file as RGB. Grey is repeated, alpha dropped, 16-bit grey scaled to 8 bits; EXIF rotation is ignored.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: file missing, truncated (never filled with grey), or not an image that Pillow reads.
    """
    return np.array(open_image(path))


def open_image(path: PathLike) -> Image.Image:
    """As `read_image`, a decoded Pillow image of mode RGB."""
    try:
        with Image.open(path) as image:
            image.load()
            return _as_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not an image") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not an image in a known format") from None
    except Exception as error:
        # Pillow's decoders raise many kinds on broken files: OSError, SyntaxError, struct.error, EOFError, ...
        raise DataError(f"{path}: cannot decode the image: {one_line(error)}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey at 255 instead of scaling it
        grey = np.clip(np.asarray(image).astype(np.float64) / 257.0, 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    return image.convert("RGB")


def _rows(path: Path) -> list[tuple[float, float]]:
    lines = read_lines(path)
    opening = next((i for i, (_, line) in enumerate(lines) if line == "{"), None)
    if opening is None:
        if any(":" in line for _, line in lines[:2]):
            raise DataError(f"{path}: truncated, the header has no opening brace")
        return [_row(where, line) for where, line in lines]
    announced = _announced(path, lines[:opening])
    body = lines[opening + 1 :]
    closing = next((i for i, (_, line) in enumerate(body) if line == "}"), None)
    if closing is None:
        raise DataError(f"{path}: truncated, no closing brace after {len(body)} of {announced} lines of points")
    rows = [_row(where, line) for where, line in body[:closing]]
    if len(rows) != announced:
        raise DataError(f"{path}: the header announces {announced} points, got {len(rows)}")
    if not rows:
        raise DataError(f"{path}: holds no points")
    return rows


def _announced(path: Path, header: list[tuple[str, str]]) -> int:
    for where, line in header:
        key, colon, value = line.partition(":")
        if colon and key.strip() == "n_points":
            if not value.strip().isdecimal():
                raise DataError(f"{where}: n_points is not a number: {_shown(value.strip())}")
            return int(value)
    raise DataError(f"{path}: the header has no n_points")


def _row(where: str, line: str) -> tuple[float, float]:
    try:
        x, y = (float(field) for field in line.split())
    except ValueError:
        raise DataError(f"{where} is not two numbers: {_shown(line)}") from None
    return x, y


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
