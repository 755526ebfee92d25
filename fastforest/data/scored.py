"""Faces with scores: drawn ones, whose true score is a known function of the face, and files with a table.

Scores lie in [1, 5]. Two groups of annotators see every face; a group is a scale of its own, y = k s + b, and a noise.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError
from .pts import open_image, to_tensor
from .synthetic import draw_face
from .text import PathLike

__all__ = ["SECOND_GROUP", "ScoredFaces", "face_score", "read_scored_faces", "synthetic_scored_faces"]

SECOND_GROUP = (0.8, 0.3)
"""k, b of the drawn faces' second group: narrower, and lower at the top."""

FIRST_NOISE = (0.12, 0.5)
SECOND_NOISE = (0.25, 0.0)
"""Deviation of a group's noise: constant, and per unit of asymmetry. The first group disagrees about turned faces."""

STREAM = 7_919  # keeps the annotators' noise apart from the drawing's


class ScoredFaces(NamedTuple):
    """images uint8 [N, 3, S, S]; first, second [N] float32: the groups' scores, NaN where there is none; truth [N]:
    the noiseless score, NaN where nobody knows it."""

    images: Tensor
    first: Tensor
    second: Tensor
    truth: Tensor


def face_score(points: np.ndarray) -> float:
    """The score that the drawn faces' annotators mean, in (1, 5), from 68 landmarks [68, 2]; similarities keep it.

    3 + 2 tanh(z / 2), z = 0.7 mouth - 0.7 asymmetry - 0.3 length, each in deviations from its mean over drawn faces.
    mouth: its height over its width. asymmetry: |r - l| / (r + l), r and l from the tip of the nose to the cheeks.
    length: from the eyes down to the chin, over the width at the ears.
    """
    mouth, asymmetry, length = _ratios(points)
    z = 0.7 * (mouth - 0.393) / 0.147 - 0.7 * (asymmetry - 0.247) / 0.167 - 0.3 * (length - 0.852) / 0.078
    return 3 + 2 * math.tanh(z / 2)


def synthetic_scored_faces(count: int, size: int = 64, seed: int = 0, start: int = 0) -> ScoredFaces:
    """Drawn faces start .. start + count - 1 with scores; face i is a function of (seed, i, size) alone.

    The first group gives the true score and noise that grows with the asymmetry; the second k s + b of it
    (`SECOND_GROUP`) and a noise that does not.

    Raises:
        ValueError: count < 1, size < 16, or a negative seed or start.
    """
    if count < 1 or size < 16 or min(seed, start) < 0:
        raise ValueError(
            "synthetic_scored_faces: expected count >= 1, size >= 16, seed, start >= 0, "
            f"got {count}, {size}, {seed}, {start}"
        )
    images, scores = [], []
    for index in range(start, start + count):
        image, points = draw_face(seed, index, size)
        noise = np.random.default_rng((seed, index, STREAM)).standard_normal(2)
        images.append(image.transpose(2, 0, 1))
        scores.append(_annotated(points.astype(np.float64), noise))
    first, second, truth = torch.tensor(scores, dtype=torch.float32).T
    return ScoredFaces(torch.from_numpy(np.stack(images)), first.clone(), second.clone(), truth.clone())


def read_scored_faces(folder: PathLike, size: int = 64) -> ScoredFaces:
    """Images and `scores.csv`: a header `image,score` or `image,score,second`, then a line an image, its path relative
    to the folder; an empty score means none. Images are resized to squares of `size` pixels.

    Raises:
        DataError: no such folder or table, another header, a line that is not an image and its scores, a score outside
            [1, 5], or an image that cannot be read.
    """
    table = Path(folder) / "scores.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise DataError(f"{table}: no such file") from None
    except NotADirectoryError:
        raise DataError(f"{folder}: is not a folder") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{table}: not a table of text") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if header not in (["image", "score"], ["image", "score", "second"]):
        raise DataError(f"{table}: the first line must be image,score or image,score,second")
    if len(rows) < 2:
        raise DataError(f"{table}: holds no images")
    images, scores = [], []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{table}: line {line} has {len(row)} fields, not {len(header)}")
        scores.append([_score(table, line, cell) for cell in row[1:]] + [math.nan] * (3 - len(header)))
        picture = open_image(Path(folder) / row[0].strip())
        images.append(to_tensor(picture.resize((size, size), Image.Resampling.LANCZOS)))
    first, second = torch.tensor(scores, dtype=torch.float32).T
    return ScoredFaces(torch.stack(images), first.clone(), second.clone(), torch.full_like(first, math.nan))


def _annotated(points: np.ndarray, noise: np.ndarray) -> tuple[float, float, float]:
    """(first, second, truth) of a face; noise [2] of variance 1."""
    truth = face_score(points)
    spread = [constant + slope * _ratios(points)[1] for constant, slope in (FIRST_NOISE, SECOND_NOISE)]
    k, b = SECOND_GROUP
    first, second = truth + spread[0] * noise[0], k * truth + b + spread[1] * noise[1]
    return float(np.clip(first, 1, 5)), float(np.clip(second, 1, 5)), truth


def _ratios(points: np.ndarray) -> tuple[float, float, float]:
    """mouth, asymmetry, length of `face_score`."""
    eyes = np.stack([points[36:42].mean(axis=0), points[42:48].mean(axis=0)])
    across = (eyes[1] - eyes[0]) / math.dist(*eyes)
    down = np.array([-across[1], across[0]])
    mouth = math.dist(points[51], points[57]) / math.dist(points[48], points[54])
    right, left = (math.dist(points[30], points[cheek]) for cheek in (2, 14))
    length = (points[8] - eyes.mean(axis=0)) @ down / math.dist(points[0], points[16])
    return mouth, abs(right - left) / (right + left), float(length)


def _score(table: Path, line: int, cell: str) -> float:
    if not cell.strip():
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 5:
        raise DataError(f"{table}: line {line}: a score must be a number from 1 to 5, got {cell.strip()[:40]!r}")
    return value
