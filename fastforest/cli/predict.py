"""fastforest predict: the landmarks of photographs, of folders of them, of the frames of a video."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import data, draw
from ..aligner import Aligner, Alignment, NotFinite
from ..data.faces import IMAGE_SUFFIXES
from ..photos import Box, Picture, check_box
from ..training import checkpoint, report
from .boxes import read_boxes
from .common import BadInput, add_machine, check_writable, device

__all__ = ["add_arguments", "predict"]

FORMATS = ("png", "pts", "json")
SUFFIX = "_landmarks"
BATCH = 16
"""Images in memory at a time."""


class Job(NamedTuple):
    """An image, the start of its outputs' paths, and the names by which a file of boxes may call it."""

    path: Path
    target: Path
    names: tuple[str, ...]


def predict(options: argparse.Namespace) -> None:
    """An image that cannot be used does not stop the others: it is named, and all are counted at the end."""
    if options.track and options.boxes:
        raise BadInput("--track and --boxes exclude each other: --box gives the place in the first frame")
    aligner = Aligner.from_checkpoint(options.checkpoint, device(options.device))
    check_writable(options.out)
    jobs = _jobs(options.image, options.out)
    boxes = read_boxes(options.boxes) if options.boxes else {}
    failed: list[str] = []
    records = []
    images = _read(jobs, options.box and tuple(options.box), boxes, failed)
    try:
        for job, picture, face in (_tracked if options.track else _batched)(aligner, images):
            if face is None:
                _fail(failed, f"{job.path}: no face found, give its place with --box X Y W H", len(jobs))
            else:
                _write(job, picture, face, options)
                records.append(_record(job, face))
    except NotFinite as error:
        raise BadInput(f"{options.checkpoint}: {error}") from None
    if "json" in options.format and records:
        path = options.out / "predictions.json"
        options.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps({"faces": records, "failed": failed}, indent=1) + "\n")
        print(f"{path}: {len(records)} of {len(jobs)} images")
    if failed:
        raise BadInput(failed[0] if len(jobs) == 1 else f"{len(failed)} of {len(jobs)} images without landmarks")


def _read(
    jobs: Sequence[Job], box: Box | None, boxes: Mapping[str, Box], failed: list[str]
) -> Iterator[tuple[Job, Picture, Box | None]]:
    """The images that can be used, with their boxes where given."""
    for job in jobs:
        place = box or next((boxes[name] for name in job.names if name in boxes), None)
        try:
            picture = data.read_image(job.path)
        except data.DataError as error:
            _fail(failed, str(error), len(jobs))
            continue
        try:
            if place is not None:
                check_box(place, picture)
        except ValueError as error:
            _fail(failed, f"{job.path}: {error}", len(jobs))
            continue
        yield job, picture, place


def _batched(
    aligner: Aligner, images: Iterator[tuple[Job, Picture, Box | None]]
) -> Iterator[tuple[Job, Picture, Alignment | None]]:
    while ready := list(itertools.islice(images, BATCH)):
        jobs, pictures, boxes = zip(*ready, strict=True)
        yield from zip(jobs, pictures, aligner.batch(pictures, boxes), strict=True)


def _tracked(
    aligner: Aligner, images: Iterator[tuple[Job, Picture, Box | None]]
) -> Iterator[tuple[Job, Picture, Alignment | None]]:
    first = next(images, None)
    if first is None:
        return
    frames, followed = itertools.tee(itertools.chain([first], images))
    faces = aligner.track((picture for _, picture, _ in followed), first[2])
    yield from ((job, picture, face) for (job, picture, _), face in zip(frames, faces, strict=True))


def _fail(failed: list[str], sentence: str, total: int) -> None:
    """Among several images, said at once; a single one's sentence is the command's."""
    failed.append(sentence)
    if total > 1:
        print(f"fastforest: {sentence}", file=sys.stderr)


def _write(job: Job, picture: Picture, face: Alignment, options: argparse.Namespace) -> None:
    job.target.parent.mkdir(parents=True, exist_ok=True)
    outputs = []
    if "png" in options.format:
        outputs.append(job.target.with_name(f"{job.target.name}{SUFFIX}.png"))
        covariance = face.covariance if options.ellipses else None
        report.save_png(outputs[-1], draw.annotate(picture, face.points, covariance=covariance))
    if "pts" in options.format:
        outputs.append(job.target.with_name(f"{job.target.name}{SUFFIX}.pts"))
        checkpoint.write_atomically(outputs[-1], lambda temporary: data.write_pts(temporary, face.points))
    if outputs:
        print(f"{job.path}: {outputs[0]}")


def _record(job: Job, face: Alignment) -> dict[str, Any]:
    """Pixels to three decimals; spread and covariance are null where the model has none."""
    sure = face.covariance is not None
    return {
        "image": str(job.path),
        "box": _rounded(np.array(face.box)),
        "points": _rounded(face.points),
        "spread": _rounded(face.spread) if sure else None,
        "covariance": _rounded(face.covariance) if sure else None,
    }


def _rounded(values: Any) -> Any:
    return np.round(np.asarray(values, dtype=np.float64), 3).tolist()


def _jobs(paths: Sequence[Path], out: Path) -> list[Job]:
    jobs: list[Job] = []
    for path in paths:
        jobs += _folder_jobs(path, out) if path.is_dir() else [Job(path, out / path.stem, (str(path), path.name))]
    seen: dict[Path, Path] = {}
    for job in jobs:
        if job.target in seen:
            raise BadInput(f"{job.path}: would write the same files as {seen[job.target]}, predict them one by one")
        seen[job.target] = job.path
    return jobs


def _folder_jobs(folder: Path, out: Path) -> list[Job]:
    """The images below a folder in natural order (frame_2 before frame_10), but hidden files and our own pictures."""
    images = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.stem.endswith(SUFFIX)
    ]
    if not images:
        raise BadInput(f"{folder}: holds no image ({' '.join(IMAGE_SUFFIXES)})")
    jobs = []
    for path in sorted(images, key=lambda path: _natural(str(path))):
        below = path.relative_to(folder)
        jobs.append(Job(path, out / below.with_suffix(""), (str(path), below.as_posix(), path.name)))
    return jobs


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", text)]


def _formats(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(FORMATS)}, got {unknown[0]!r}")
    return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, nargs="+", metavar="IMAGE|DIR", help="folders with all that is below them")
    add("--checkpoint", type=Path, required=True)
    place = parser.add_mutually_exclusive_group()
    box = "around the landmarks, brows to chin, pixels (default: the largest face found)"
    place.add_argument("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help=box)
    boxes = 'boxes by image name: .json {"a.png": [x, y, w, h]} or lines name,x,y,w,h; other images are searched'
    place.add_argument("--boxes", type=Path, metavar="FILE", help=boxes)
    add("--track", action="store_true", help="the images are frames of a video: follow the face from one to the next")
    add("--out", type=Path, default=Path("."), help="folder for what --format says (default: here)")
    formats = "some of png,pts (NAME_landmarks.*), json (predictions.json, all images) (default: png,pts)"
    add("--format", type=_formats, default=("png", "pts"), help=formats)
    add("--ellipses", action="store_true", help="draw two standard deviations of each landmark, if the model has them")
    add_machine(parser)
    parser.set_defaults(run=predict)
