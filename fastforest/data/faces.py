"""Datasets of faces with landmarks: lazy, square images, points in the image's own pixels.

Shapes: S the image's side in pixels, P landmarks, N faces. Points are (x, y), 0-based, pixel centres at integers.
Resizing from side S to side T maps a coordinate to (old + 0.5) T / S - 0.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from .errors import DataError, one_line
from .pts import existing_folder, open_image, to_tensor
from .synthetic import draw_face
from .text import PathLike

if TYPE_CHECKING:
    from .recordfaces import RecordFaces

__all__ = [
    "CropPackage",
    "Face",
    "FaceDataset",
    "SyntheticFaces",
    "open_dataset",
    "rescale",
    "resize",
    "split",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Face(NamedTuple):
    """image: uint8 [3, S, S], RGB. points: float32 [P, 2], pixels of that image. name: tells faces of a set apart."""

    image: Tensor
    points: Tensor
    name: str


class FaceDataset(Protocol):
    """What the functions here need of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Face: ...


class CropPackage(Dataset[Face]):
    """Faces cropped beforehand: `landmarks.npz` and the images that it names, in one folder.

    landmarks.npz holds `image` (N paths relative to the folder, str) and `landmarks` (float [N, P, 2], pixels of the
    crops); other arrays are ignored. The points are read at once, the images when asked for.

    Raises:
        DataError: folder or file missing, arrays missing or of the wrong shape, landmarks that are not finite, an
            image that is missing; on reading a face: an image that is broken or not square.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = existing_folder(folder)
        self.names, self.points = _read_landmarks(self.folder / "landmarks.npz")
        for name in self.names:
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder / name}: no such file, but landmarks.npz names it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Face:
        index = checked_index(index, len(self))
        path = self.folder / self.names[index]
        image = open_image(path)
        if image.width != image.height:
            raise DataError(f"{path}: a cropped face must be square, got {image.width} x {image.height}")
        return Face(to_tensor(image), self.points[index].clone(), self.names[index])


class SyntheticFaces(Dataset[Face]):
    """Drawn faces with 68 landmarks; face i is a function of (seed, i, size) alone. See `synthetic.draw_face`.

    Raises:
        ValueError: count < 1, size < 16 or a negative seed.
    """

    def __init__(self, count: int, size: int = 128, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"SyntheticFaces: count must be at least 1, got {count}")
        if size < 16:
            raise ValueError(f"SyntheticFaces: size must be at least 16, got {size}")
        if seed < 0:
            raise ValueError(f"SyntheticFaces: seed must not be negative, got {seed}")
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Face:
        index = checked_index(index, self.count)
        image, points = draw_face(self.seed, index, self.size)
        tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return Face(tensor, torch.from_numpy(points), f"synthetic_{self.seed}_{index}")


def open_dataset(
    name_or_dir: PathLike, *, size: int = 256, count: int = 2000, seed: int = 0, subset: str | None = None
) -> CropPackage | SyntheticFaces | RecordFaces:
    """The dataset of that name, in that folder, or of that file of annotations.

    "synthetic" gives `SyntheticFaces(count, size, seed)`; a folder with landmarks.npz `CropPackage`, whose images
    keep their own size; a file or folder that a reader knows (see `readers.read_records`), or another folder with .pts
    files of 68 points, at any depth, `RecordFaces(records, size)`.

    subset: which part of 300-W, COFW or WFLW, as `readers.read_records`; None gives the training part of those.

    Raises:
        DataError: none of these, or a subset of something that has none.
        ValueError: an unknown subset.
    """
    if name_or_dir == "synthetic" and subset is None:
        return SyntheticFaces(count, size, seed)
    path = Path(name_or_dir)
    if subset is None and (path / "landmarks.npz").is_file():
        return CropPackage(path)
    # the readers and the crops stand on this module
    from .readers.ibug import read_ibug
    from .readers.recognise import FILES, LOOKED_FOR, find_reader
    from .recordfaces import RecordFaces

    reader = find_reader(path, subset)
    if reader is not None:
        return RecordFaces(reader(), size)
    if path.is_file():
        raise DataError(f"{path}: is not a folder, nor {FILES}")
    folder = existing_folder(path)
    if next(folder.rglob("*.pts"), None) is not None:
        return RecordFaces(read_ibug(folder), size)
    raise DataError(f"{folder}: holds neither landmarks.npz nor .pts files, and none of: {LOOKED_FOR}")


def split(dataset: FaceDataset, every: int = 10) -> tuple[Subset[Face], Subset[Face]]:
    """(train, held_out) by a fixed rule: face i is held out if i % every == every - 1. Nothing is drawn at random.

    Raises:
        ValueError: every < 2, or fewer than `every` faces: nothing would be held out.
    """
    if every < 2:
        raise ValueError(f"split: every must be at least 2, got {every}")
    if len(dataset) < every:
        raise ValueError(f"split: dataset must hold at least every = {every} faces, got {len(dataset)}")
    held_out = range(every - 1, len(dataset), every)
    train = [index for index in range(len(dataset)) if index % every != every - 1]
    source: Any = dataset
    return Subset(source, train), Subset(source, held_out)


def resize(images: Tensor, size: int) -> Tensor:
    """Square uint8 images [..., 3, S, S] at side `size`: bilinear, antialiased, pixel areas (not centres) aligned.

    Equal on one kind of device; a byte may round to its neighbour on another.
    """
    if images.shape[-1] == size:
        return images
    batch = images.reshape(-1, *images.shape[-3:])
    on_cpu = batch.device.type == "cpu"  # the one device that resizes bytes with antialiasing
    pixels = batch if on_cpu else batch.float()
    result = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    if not on_cpu:
        result = result.round().clamp(0, 255).to(batch.dtype)
    return result.reshape(*images.shape[:-2], size, size)


def rescale(points: Tensor, old: int, new: int) -> Tensor:
    """Points of an image of side `old` in the pixels of the same image at side `new`: (p + 0.5) new / old - 0.5."""
    return points if old == new else (points + 0.5) * (new / old) - 0.5


def resized(face: Face, size: int) -> Face:
    """`resize` of the image and `rescale` of the points."""
    points = rescale(face.points, face.image.shape[-1], size)
    return Face(resize(face.image, size), points, face.name)


def _read_landmarks(path: Path) -> tuple[list[str], Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("image", "landmarks") if key not in arrays]
            if missing:
                raise DataError(f"{path}: holds no array '{missing[0]}'")
            names, landmarks = arrays["image"], arrays["landmarks"]
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:
        # numpy and zipfile raise ValueError, BadZipFile, EOFError, zlib.error, ... on broken archives
        raise DataError(f"{path}: cannot be read as an .npz file: {one_line(error)}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{path}: image must be N strings, got {names.dtype} {list(names.shape)}")
    if landmarks.dtype.kind != "f" or landmarks.shape[0:1] != names.shape or landmarks.shape[2:] != (2,):
        expected = f"floats [{len(names)}, P, 2]"
        raise DataError(f"{path}: landmarks must be {expected}, got {landmarks.dtype} {list(landmarks.shape)}")
    if len(names) == 0:
        raise DataError(f"{path}: holds no faces")
    finite = np.isfinite(landmarks).all(axis=(1, 2))
    if not finite.all():
        raise DataError(f"{path}: landmarks of {names[int(finite.argmin())]} are not finite")
    return [str(name) for name in names], torch.from_numpy(landmarks.astype(np.float32))


def checked_size(function: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{function}: size must be at least 1, got {size}")


def checked_index(index: int, count: int) -> int:
    """Negative indices count from the end; IndexError also ends Python's iteration protocol."""
    if not -count <= index < count:
        raise IndexError(f"face index must be in [{-count}, {count}), got {index}")
    return index % count
