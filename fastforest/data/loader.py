"""Batches of faces, read ahead by worker processes.

Shapes: B faces of P landmarks, T the side of the images, pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .faces import FaceDataset, checked_index, checked_size, resized

__all__ = ["FaceLoader"]

Images = tuple[Tensor, Tensor]


class FaceLoader:
    """Batches of faces that need not fit into memory, for training: like `Cached`, but nothing is kept.

    Args:
        dataset: faces that all have the same number of points; a `DiskCache` makes the second pass fast.
        size: T; faces of another size are resized.
        workers: processes that read ahead in `batches`, two batches each; 0 reads in this process when asked. They are
            started by each call of `batches` and end with its iterator. A dataset is pickled for them where the
            platform does not fork.
        pin: `batches` gives page-locked memory, which a CUDA device copies from while it computes. Without a CUDA
            device it changes nothing.

    Raises:
        ValueError: size < 1 or negative workers.
    """

    def __init__(self, dataset: FaceDataset, size: int, *, workers: int = 0, pin: bool = False) -> None:
        checked_size("FaceLoader", size)
        if workers < 0:
            raise ValueError(f"FaceLoader: workers must not be negative, got {workers}")
        self.dataset, self.size, self.workers, self.pin = dataset, size, workers, pin

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int] | Tensor) -> Images:
        """Faces by index, read in this process: images uint8 [B, 3, T, T] and points float32 [B, P, 2].

        Raises:
            ValueError: no index. IndexError: an index outside the dataset. DataError: as the dataset, or faces that
                differ in their number of points.
        """
        order = [checked_index(int(index), len(self)) for index in indices]
        if not order:
            raise ValueError("FaceLoader.batch: indices must hold at least one index, got none")
        faces = [resized(self.dataset[index], self.size) for index in order]
        count = len(faces[0].points)
        for face in faces:
            if len(face.points) != count:
                expected = f"expected {count} points as in {faces[0].name}"
                raise DataError(f"{face.name}: {expected}, got {len(face.points)}")
        return torch.stack([face.image for face in faces]), torch.stack([face.points for face in faces])

    def batches(self, orders: Iterable[Sequence[int] | Tensor]) -> Iterator[Images]:
        """`batch` of each order, in their order and with the same values, whatever the number of workers.

        The workers run ahead in `orders` by two batches each. What a worker raises is raised here, in its batch's turn.
        The caller's random number generators are not used.
        """
        pin = self.pin and torch.cuda.is_available()
        # the generator: without one, the loader would draw the workers' seeds from the caller's
        loader = DataLoader(
            _Outcomes(self),
            batch_size=None,
            sampler=orders,
            num_workers=self.workers,
            pin_memory=pin,
            generator=torch.Generator(),
        )
        for outcome in loader:
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


class _Outcomes(Dataset[Images | Exception]):
    """Batches by order. An error is a value, because the loader would wrap its sentence in a traceback."""

    def __init__(self, faces: FaceLoader) -> None:
        self.faces = faces

    def __getitem__(self, order: Sequence[int] | Tensor) -> Images | Exception:
        try:
            return self.faces.batch(order)
        except (DataError, ValueError, IndexError) as error:
            return error
