"""fastforest predict: the landmarks of photographs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import data, draw
from ..training import checkpoint, report
from ..training.photos import Prediction, locate
from .common import BadInput, add_machine, check_writable, device

__all__ = ["add_arguments", "predict"]


def predict(options: argparse.Namespace) -> None:
    """All predictions first, then all files: bad input leaves nothing behind."""
    saved = checkpoint.load(options.checkpoint)
    model = saved.build(options.checkpoint).to(device(options.device))
    check_writable(options.out)
    _check_stems(options.image)
    found = [_located(model, saved.size, path, options.box) for path in options.image]
    options.out.mkdir(parents=True, exist_ok=True)
    for path, prediction in zip(options.image, found, strict=True):
        covariance = prediction.covariance if options.ellipses else None
        picture = draw.annotate(data.read_image(path), prediction.points, covariance=covariance)
        target = options.out / f"{path.stem}_landmarks.png"
        report.save_png(target, picture)
        _write_pts(target.with_suffix(".pts"), prediction)
        print(f"{path}: {target}")


def _located(model: Any, size: int, path: Path, box: Sequence[float] | None) -> Prediction:
    image = data.read_image(path)
    try:
        prediction = locate(model, size, image, None if box is None else (box[0], box[1], box[2], box[3]))
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if prediction is None:
        raise BadInput(f"{path}: no face found, give its place with --box X Y W H")
    return prediction


def _write_pts(path: Path, prediction: Prediction) -> None:
    checkpoint.write_atomically(path, lambda temporary: data.write_pts(temporary, prediction.points))


def _check_stems(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise BadInput(f"{path}: would write the same files as {seen[path.stem]}, predict them one by one")
        seen[path.stem] = path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, nargs="+", metavar="IMAGE")
    add("--checkpoint", type=Path, required=True)
    box = "around the landmarks, brows to chin, pixels (default: the largest face found)"
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help=box)
    add("--out", type=Path, default=Path("."), help="folder for STEM_landmarks.png and .pts (default: here)")
    add("--ellipses", action="store_true", help="draw two standard deviations of each landmark, if the model has them")
    add_machine(parser)
    parser.set_defaults(run=predict)
