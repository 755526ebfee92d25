"""Landmarks of faces in photographs, for a user's own program.

>>> import fastforest
>>> aligner = fastforest.Aligner.from_checkpoint("runs/faces/checkpoint.pt")  # doctest: +SKIP
>>> points, spread, box, covariance = aligner("photograph.jpg")  # doctest: +SKIP

Shapes: an image of H x W pixels; P landmarks; the model's images have side S. Points are (x, y), 0-based, pixel centres
at integers; a box is (x, y, width, height) in pixels, around the landmarks: brows to chin.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .inference import Exported, distribution, export, load_exported, spread
from .photos import Box, Picture, as_image, box_around, box_showing, check_box, crop, find_faces, overlap
from .training import checkpoint

__all__ = ["Aligner", "Alignment", "NoFace", "NotFinite", "export", "load_exported"]

PASSES = 3
SETTLED = 0.02
"""Landmarks that move by less than this share of their box from one crop to the next have found a face."""
LOST = 0.03
"""The same for a face that is followed, milder: a video loses more by losing it. Of 50 held-out faces of the 300-W training
set in boxes 6 % off, all moved less and 41 less than SETTLED; of the 50 with their parts shuffled, 5 and 1."""
SAME_FACE = 0.3
"""Two finds whose boxes share more than this part of their union are one face."""


class NoFace(ValueError):
    """No box was given and no face found."""


class NotFinite(ValueError):
    """The model predicts NaN or infinity."""


class Alignment(NamedTuple):
    """A face. points: float32 [P, 2], pixels of the image. spread: float32 [P], the root mean square distance from each
    point that the model expects, pixels; NaN where it expects none. box: what was cropped around. covariance: float32
    [P, 2, 2], pixels squared, or None where the model has none or was exported."""

    points: np.ndarray
    spread: np.ndarray
    box: Box
    covariance: np.ndarray | None


class Aligner:
    """`aligner(image)` finds the largest face and its landmarks.

    An image is a path, a Pillow image, a numpy array uint8 [H, W, 3] or [H, W] (grey), or a tensor uint8 [3, H, W]; RGB.
    Nothing is changed by a call: threads may share an aligner.

    A given box is used as it is: around the landmarks, or for a model trained on crops around the boxes of its set, such
    a box. Faces that scikit-image's cascade finds have boxes only near their landmarks' own, and some are none. So each is
    predicted `PASSES` times, every crop taken around the landmarks of the one before: on a face they settle. Those that
    settle are faces, largest first; where none does, the one that moved least is the only one.

    Args:
        model: any of `fastforest.models`, on its device; set to evaluation mode. Or an `Exported`.
        size: S; an `Exported` knows its own.
        padding: what a crop shows on each side of a box, in its longer sides; as in training. An `Exported` knows it.
        shape: [P, 2], the mean shape in pixels of a crop, where the model was trained on crops around other boxes than the
            landmarks': a crop around landmarks then shows them where the mean shape lies. An `Exported` knows it.

    Raises:
        ValueError: no size, or a shape that is not [P, 2], finite, of points that differ.

    Raises, on calling:
        NoFace, NotFinite: as their names say. DataError: a file that cannot be read. TypeError, ValueError: not an image;
        a box that is not finite, is empty, much larger than the image or beside it.
    """

    def __init__(
        self, model: Any, size: int | None = None, padding: float = 0.25, shape: Tensor | np.ndarray | None = None
    ) -> None:
        if isinstance(model, Exported):
            size, padding = model.size, model.padding
            shape = model.mean_shape if model.crop == "box" else None
        if size is None:
            raise ValueError("Aligner: size must be the side of the model's images, got None")
        self.padding = padding
        self.shape = None if shape is None else np.asarray(shape, dtype=np.float64)
        if self.shape is not None and (
            self.shape.shape[1:] != (2,) or not len(self.shape) or not 0 < np.ptp(self.shape, axis=0).max() < np.inf
        ):
            raise ValueError(
                f"Aligner: shape must be [P, 2], finite, of points that differ, got {list(self.shape.shape)}"
            )
        self.model, self.size = model if isinstance(model, Exported) else model.eval(), size

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Aligner:
        """Of what `python -m fastforest train` wrote. CheckpointError where the file cannot be used."""
        saved = checkpoint.load(path)
        shape = saved.mean_shape if saved.crop == "box" else None
        return cls(saved.build(path).to(device), saved.size, saved.padding, shape)  # type: ignore[arg-type]

    @classmethod
    def from_exported(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Aligner:
        """Of what `python -m fastforest export` wrote. CheckpointError where the file cannot be used."""
        return cls(load_exported(path, device))

    def __call__(self, image: Any, box: Box | None = None) -> Alignment:
        """The face in the box, or the largest face found; `NoFace` where there is none."""
        found = self.batch([image], [box])[0]
        if found is None:
            raise NoFace("no face found, give its box")
        return found

    def all(self, image: Any) -> list[Alignment]:
        """Every face found, largest first; empty where there is none."""
        return self._faces([as_image(image)])[0]

    def boxes(self, image: Any, boxes: Sequence[Box]) -> list[Alignment]:
        """The faces in the boxes, in one batch."""
        picture = as_image(image)
        for box in boxes:
            check_box(box, picture)
        return self._predict([(picture, box) for box in boxes])

    def batch(self, images: Sequence[Any], boxes: Sequence[Box | None] | None = None) -> list[Alignment | None]:
        """One face an image: in its box, or where that is None the largest found; None where no face is found.

        All given boxes are one batch, and all finds.
        """
        pictures = [as_image(image) for image in images]
        given = [None] * len(pictures) if boxes is None else list(boxes)
        result: list[Alignment | None] = [None] * len(pictures)
        placed: list[tuple[int, Picture, Box]] = []
        for row, (picture, box) in enumerate(zip(pictures, given, strict=True)):
            if box is not None:
                check_box(box, picture)
                placed.append((row, picture, box))
        for (row, _, _), alignment in zip(placed, self._predict([item[1:] for item in placed]), strict=True):
            result[row] = alignment
        searched = [row for row, box in enumerate(given) if box is None]
        for row, faces in zip(searched, self._faces([pictures[row] for row in searched]), strict=True):
            result[row] = faces[0] if faces else None
        return result

    def track(self, frames: Iterable[Any], box: Box | None = None) -> Iterator[Alignment | None]:
        """One face through the frames of a video, one after the other: None where it is not found.

        A frame is cropped around the landmarks of the frame before (the first around `box`, where given). Where they do
        not settle the face is lost, and the largest face of the frame is found anew.
        """
        for number, frame in enumerate(frames):
            picture = as_image(frame)
            found = None
            if box is not None:
                if number == 0:
                    check_box(box, picture)
                followed, moved = self._settle([(picture, box)])[0]
                found = followed if moved < LOST else None
            if found is None:
                found = next(iter(self._faces([picture])[0]), None)
            box = None if found is None else self._box_around(found.points, picture)
            yield found

    def _faces(self, pictures: Sequence[Picture]) -> list[list[Alignment]]:
        """Of each picture, largest first."""
        starts = [(row, self._box(box)) for row, picture in enumerate(pictures) for box in find_faces(picture)]
        found = self._settle([(pictures[row], box) for row, box in starts])
        rows: list[list[tuple[Alignment, float]]] = [[] for _ in pictures]
        for (row, _), candidate in zip(starts, found, strict=True):
            rows[row].append(candidate)
        return [_distinct(candidates) for candidates in rows]

    def _settle(self, starts: Sequence[tuple[Picture, Box]]) -> list[tuple[Alignment, float]]:
        """The last of `PASSES` predictions, and how far its landmarks moved from the one before."""
        before, last = [], self._predict(starts)
        for _ in range(PASSES - 1):
            before = last
            pictures = [picture for picture, _ in starts]
            last = self._predict(
                [(p, self._box_around(face.points, p)) for p, face in zip(pictures, before, strict=True)]
            )
        return [(b, _moved(a, b)) for a, b in zip(before, last, strict=True)]

    def _box_around(self, points: np.ndarray, picture: Picture) -> Box:
        return self._box(box_around(points, picture))

    def _box(self, landmarks: Box) -> Box:
        """A box such as the model was trained on, from one that landmarks fill."""
        return landmarks if self.shape is None else box_showing(landmarks, self.shape, self.size, self.padding)

    @torch.inference_mode()
    def _predict(self, faces: Sequence[tuple[Picture, Box]]) -> list[Alignment]:
        """One prediction a box, all in one batch."""
        if not faces:
            return []
        crops, squares = zip(*(crop(picture, box, self.size, self.padding) for picture, box in faces), strict=True)
        points, spreads, covariances = self._infer(torch.stack(crops))
        if not bool(points.isfinite().all()):
            raise NotFinite("the model predicts points that are not finite")
        found = []
        for row, ((_, box), (x0, y0, side)) in enumerate(zip(faces, squares, strict=True)):
            scale = side / self.size
            corner = torch.tensor([x0, y0], dtype=torch.float64)
            place = (points[row].double().cpu() + 0.5) * scale - 0.5 + corner
            covariance = None if covariances is None else _float32(covariances[row] * scale**2)
            found.append(Alignment(_float32(place), _float32(spreads[row] * scale), box, covariance))
        return found

    def _infer(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """images: uint8 [B, 3, S, S]."""
        if isinstance(self.model, Exported):
            return *self.model.predict(images), None
        device = next(self.model.parameters()).device
        points, covariance = distribution(self.model, images.to(device).float() / 255)
        return points, spread(points, covariance), covariance


def _distinct(candidates: Sequence[tuple[Alignment, float]]) -> list[Alignment]:
    faces: list[Alignment] = []
    for face, moved in candidates:
        if moved < SETTLED and all(overlap(face.points, other.points) < SAME_FACE for other in faces):
            faces.append(face)
    return faces or [face for face, _ in sorted(candidates, key=lambda candidate: candidate[1])[:1]]


def _moved(first: Alignment, last: Alignment) -> float:
    """Mean distance of the landmarks, over the longer side of their box."""
    distance = np.linalg.norm(last.points - first.points, axis=1).mean()
    return float(distance / max(1e-6, float(np.ptp(last.points, axis=0).max())))


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
