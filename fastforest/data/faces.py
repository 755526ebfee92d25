"""Datasets of faces with landmarks: lazy, square images, points in the image's own pixels.

Shapes: S the image's side in pixels, P landmarks, N faces. Points are (x, y), 0-based, pixel centres at integers.
Resizing from side S to side T maps a coordinate to (old + 0.5) T / S - 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from .errors import DataError
from .pts import PathLike, open_image, read_pts, to_tensor
from .synthetic import draw_face

if TYPE_CHECKING:
    from .recordfaces import RecordFaces

__all__ = [
    "Cached",
    "CropPackage",
    "Face",
    "FaceDataset",
    "PtsFolder",
    "SyntheticFaces",
    "crop_box",
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
        self.folder = _folder(folder)
        self.names, self.points = _read_landmarks(self.folder / "landmarks.npz")
        for name in self.names:
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder / name}: no such file, but landmarks.npz names it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Face:
        index = _checked(index, len(self))
        path = self.folder / self.names[index]
        image = open_image(path)
        if image.width != image.height:
            raise DataError(f"{path}: a cropped face must be square, got {image.width} x {image.height}")
        return Face(to_tensor(image), self.points[index].clone(), self.names[index])


class PtsFolder(Dataset[Face]):
    """Images beside .pts files of the same stem, in a folder and the folders below it, in order of path.

    Each face is the square that `crop_box` places around its landmarks, resampled to `size` with antialiasing; what
    lies outside the image is black. Images without a .pts file are ignored. Files are read when a face is asked for.

    Args:
        folder: where to look.
        size: side of the faces, pixels.
        expected: number of points that every file must hold.
        one_based: as `read_pts`.

    Raises:
        DataError: folder missing, no .pts file in it, a .pts file without an image; on reading a face: as `read_pts`
            and `read_image`, or landmarks that do not lie around the image.
        ValueError: size < 1.
    """

    def __init__(self, folder: PathLike, size: int = 256, *, expected: int = 68, one_based: bool = True) -> None:
        _check_size("PtsFolder", size)
        self.folder, self.size, self.expected, self.one_based = _folder(folder), size, expected, one_based
        self.files = [(path, _image_beside(path)) for path in sorted(self.folder.rglob("*.pts")) if path.is_file()]
        if not self.files:
            raise DataError(f"{self.folder}: holds no .pts file")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Face:
        pts_path, image_path = self.files[_checked(index, len(self))]
        points = read_pts(pts_path, expected=self.expected, one_based=self.one_based)
        image = open_image(image_path)
        x0, y0, side = _box_within(points, image, pts_path)
        crop = image.crop((x0, y0, x0 + side, y0 + side))
        resized = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        mapped = rescale(torch.from_numpy(points.astype(np.float64)) - torch.tensor([x0, y0]), side, self.size)
        return Face(to_tensor(resized), mapped.float(), pts_path.relative_to(self.folder).with_suffix("").as_posix())


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
        index = _checked(index, self.count)
        image, points = draw_face(self.seed, index, self.size)
        tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return Face(tensor, torch.from_numpy(points), f"synthetic_{self.seed}_{index}")


def open_dataset(
    name_or_dir: PathLike, *, size: int = 256, count: int = 2000, seed: int = 0, subset: str | None = None
) -> CropPackage | PtsFolder | SyntheticFaces | RecordFaces:
    """The dataset of that name, in that folder, or of that file of annotations.

    "synthetic" gives `SyntheticFaces(count, size, seed)`; a folder with landmarks.npz `CropPackage`, whose images
    keep their own size; a file or folder that a reader knows (see `readers.read_records`) `RecordFaces(records, size)`;
    another folder with .pts files, at any depth, `PtsFolder(folder, size)`.

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
    from .readers.recognise import FILES, LOOKED_FOR, find_reader

    reader = find_reader(path, subset)
    if reader is not None:
        from .recordfaces import RecordFaces

        return RecordFaces(reader(), size)
    if path.is_file():
        raise DataError(f"{path}: is not a folder, nor {FILES}")
    folder = _folder(path)
    if next(folder.rglob("*.pts"), None) is not None:
        return PtsFolder(folder, size)
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


class Cached(Dataset[Face]):
    """A dataset resized to one size and kept in memory as uint8, up to a bound.

    The first `max_bytes // (3 size^2)` faces have a place in one tensor that is allocated once; each is decoded when
    it is first asked for (or by `load`). Faces beyond them are decoded every time.

    Args:
        dataset: faces that all have the same number of points.
        size: side of the kept images, pixels.
        max_bytes: bound of the image memory, bytes; 0 keeps nothing.

    Raises:
        ValueError: size < 1 or negative max_bytes.
        DataError: on reading a face: as the dataset, or a number of points that differs from the first face read.
    """

    def __init__(self, dataset: FaceDataset, size: int, max_bytes: int = 1 << 30) -> None:
        _check_size("Cached", size)
        if max_bytes < 0:
            raise ValueError(f"Cached: max_bytes must not be negative, got {max_bytes}")
        self.dataset, self.size = dataset, size
        self.capacity = min(len(dataset), max_bytes // (3 * size * size))
        self.images = torch.empty(self.capacity, 3, size, size, dtype=torch.uint8)
        self._points: Tensor | None = None
        self._names: list[str | None] = [None] * self.capacity
        self._count: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Face:
        index = _checked(index, len(self))
        if index < self.capacity and self._points is not None and (name := self._names[index]) is not None:
            return Face(self.images[index].clone(), self._points[index].clone(), name)
        face = self._read(index)
        if index < self.capacity:
            if self._points is None:
                self._points = torch.empty(self.capacity, *face.points.shape)
            self.images[index], self._points[index] = face.image, face.points
            self._names[index] = face.name
        return face

    def load(self) -> Cached:
        """Decodes every face that has a place, so that a broken file shows at once. Returns self."""
        for index in range(self.capacity):
            if self._names[index] is None:
                self[index]
        return self

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Faces by index: images uint8 [B, 3, size, size] and points float32 [B, P, 2], copies.

        Raises:
            ValueError: no index. IndexError: an index outside the dataset. DataError: as the dataset.
        """
        order = [_checked(int(index), len(self)) for index in indices]
        if not order:
            raise ValueError("Cached.batch: indices must hold at least one index, got none")
        if self._points is not None and all(i < self.capacity and self._names[i] is not None for i in order):
            rows = torch.tensor(order)
            return self.images[rows], self._points[rows]
        faces = [self[index] for index in order]
        return torch.stack([face.image for face in faces]), torch.stack([face.points for face in faces])

    def _read(self, index: int) -> Face:
        face = self.dataset[index]
        self._count = len(face.points) if self._count is None else self._count
        if len(face.points) != self._count:
            raise DataError(f"{face.name}: expected {self._count} points as in the other faces, got {len(face.points)}")
        points = rescale(face.points, face.image.shape[-1], self.size)
        return Face(resize(face.image, self.size), points, face.name)


def crop_box(points: np.ndarray) -> tuple[int, int, int]:
    """The square (x0, y0, S) around landmarks [P, 2], in whole pixels: S = ceil(1.5 x the longer side of their
    bounding box), centred on the box: x0 = round(cx - S / 2).

    A crop resampled to side T maps points by (p - (x0, y0) + 0.5) T / S - 0.5.
    """
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    side = max(1, math.ceil(1.5 * float((high - low).max())))
    x0, y0 = (round(float(center) - side / 2) for center in (low + high) / 2)
    return x0, y0, side


def resize(images: Tensor, size: int) -> Tensor:
    """Square uint8 images [..., 3, S, S] at side `size`: bilinear, antialiased, pixel areas (not centres) aligned."""
    if images.shape[-1] == size:
        return images
    batch = images.reshape(-1, *images.shape[-3:])
    resized = functional.interpolate(batch, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.reshape(*images.shape[:-2], size, size)


def rescale(points: Tensor, old: int, new: int) -> Tensor:
    """Points of an image of side `old` in the pixels of the same image at side `new`: (p + 0.5) new / old - 0.5."""
    return points if old == new else (points + 0.5) * (new / old) - 0.5


def _box_within(points: np.ndarray, image: Image.Image, path: Path) -> tuple[int, int, int]:
    """`crop_box`, refused when a wrong annotation would make it huge, empty or miss the image."""
    x0, y0, side = crop_box(points)
    if float(np.ptp(points, axis=0).max()) == 0:
        raise DataError(f"{path}: all landmarks are the same point")
    outside = x0 >= image.width or y0 >= image.height or x0 + side <= 0 or y0 + side <= 0
    if outside or side > 8 * max(image.size):
        raise DataError(f"{path}: the landmarks lie outside the image of {image.width} x {image.height} pixels")
    return x0, y0, side


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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an .npz file: {reason}") from error
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


def _folder(folder: PathLike) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if path.exists() else 'no such folder'}")
    return path


def _image_beside(pts_path: Path) -> Path:
    for suffix in IMAGE_SUFFIXES:
        for candidate in (pts_path.with_suffix(suffix), pts_path.with_suffix(suffix.upper())):
            if candidate.is_file():
                return candidate
    raise DataError(f"{pts_path}: no image of the same name beside it")


def _check_size(function: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{function}: size must be at least 1, got {size}")


def _checked(index: int, count: int) -> int:
    """Negative indices count from the end; IndexError also ends Python's iteration protocol."""
    if not -count <= index < count:
        raise IndexError(f"face index must be in [{-count}, {count}), got {index}")
    return index % count
