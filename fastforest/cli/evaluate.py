"""fastforest evaluate: the figures of a checkpoint on a set."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import data, metrics, training
from ..training import checkpoint
from .common import BadInput, add_data, add_machine, device, open_faces, real

__all__ = ["add_arguments", "evaluate"]


def evaluate(options: argparse.Namespace) -> None:
    saved = checkpoint.load(options.checkpoint)
    model = saved.build(options.checkpoint).to(device(options.device))
    dataset = open_faces(options, saved.size)
    if not options.all and len(dataset) < 10:
        raise BadInput(f"{options.data}: has only {len(dataset)} faces, of which none is held out: add --all")
    faces = training.read(data.Cached(dataset if options.all else data.split(dataset)[1], saved.size), options.data)
    landmarks = faces.batch([0])[1].shape[1]
    if landmarks != saved.landmarks:
        raise BadInput(f"{options.data}: has {landmarks} points, but {options.checkpoint} predicts {saved.landmarks}")
    pred, truth = training.predict(model, faces)
    normalizer = options.normalizer or training.default_normalizer(landmarks)
    try:
        print(metrics.evaluate(pred, truth, normalizer, options.threshold))
    except ValueError as error:
        raise BadInput(f"{options.data}: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True)
    add("--all", action="store_true", help="all faces, not only every tenth, which training holds out")
    add("--normalizer", choices=metrics.KINDS, help="(default: inter_ocular where the landmarks have it, else box)")
    add("--threshold", type=real(0), default=0.08, help="of failure rate and AUC, a fraction (default: 0.08)")
    add_machine(parser)
    parser.set_defaults(run=evaluate)
