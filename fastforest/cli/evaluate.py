"""fastforest evaluate: the figures of one or several checkpoints on a set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .. import data, evaluation, metrics, training
from ..config import DataConfig
from ..training import checkpoint
from .common import BadInput, add_data, add_machine, check_writable, device, real
from .sets import open_evaluated

__all__ = ["add_arguments", "evaluate"]

CROP = ("crop", "padding", "fallback")
"""Keys of `DataConfig` that an evaluation shares with the training."""


def evaluate(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(options.out)
    names = _names(options.checkpoint)
    found = {name: _evaluated(path, options) for name, path in zip(names, options.checkpoint, strict=True)}
    for name, one in found.items():
        print(one.metrics if len(found) == 1 else f"{name}: {one.metrics}")
    print(f"\n{evaluation.markdown(found)}", end="")
    if options.out:
        images = next(iter(found.values())).metrics.images
        part = f"all {images} faces" if options.all else f"{images} held-out faces"
        evaluation.write(options.out, found, f"{Path(options.data).resolve().name}: {part}")
        print(f"written to {options.out}")


def _evaluated(path: Path, options: argparse.Namespace) -> evaluation.Evaluation:
    saved = checkpoint.load(path)
    model = saved.build(path).to(device(options.device))
    crop = {key: value for key, value in saved.settings.get("data", {}).items() if key in CROP}
    chosen = DataConfig(options.data, options.faces, options.face_seed, saved.size, options.subset, **crop)
    dataset = open_evaluated(chosen)
    if not options.all and len(dataset) < 10:
        raise BadInput(f"{options.data}: has only {len(dataset)} faces, of which none is held out: add --all")
    faces = training.read(data.Cached(dataset if options.all else data.split(dataset)[1], saved.size), options.data)
    landmarks = faces.batch([0])[1].shape[1]
    if landmarks != saved.landmarks:
        raise BadInput(f"{options.data}: has {landmarks} points, but {path} predicts {saved.landmarks}")
    names = [faces[index].name for index in range(len(faces))]
    try:
        return evaluation.evaluate(model, faces, options.normalizer, options.threshold, names=names)
    except ValueError as error:
        raise BadInput(f"{options.data}: {error}") from None


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells the checkpoints apart: their folders' names, else their whole paths."""
    if len(set(paths)) < len(paths):
        raise BadInput(f"{next(path for path in paths if paths.count(path) > 1)}: is given twice")
    folders = [path.absolute().parent.name for path in paths]
    if len(set(folders)) == len(paths):
        return folders
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return [str(path.absolute().relative_to(common).with_suffix("")).replace(os.sep, "-") for path in paths]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add = parser.add_argument
    several = "several are compared in one table and one plot"
    add("--checkpoint", type=Path, required=True, nargs="+", help=several)
    add("--out", type=Path, metavar="DIR", help="write the figures, pictures and every face's numbers (default: print)")
    add("--all", action="store_true", help="all faces, not only every tenth, which training holds out")
    add("--normalizer", choices=metrics.KINDS, help="(default: inter_ocular where the landmarks have it, else box)")
    add("--threshold", type=real(0), default=0.08, help="of failure rate and AUC, a fraction (default: 0.08)")
    add_machine(parser)
    parser.set_defaults(run=evaluate)
