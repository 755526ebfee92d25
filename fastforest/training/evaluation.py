"""Predictions of a model on a set of faces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import Plain
from . import ranks
from .feed import Batches, read_ahead
from .steps import is_out_of_memory

__all__ = ["default_normalizer", "predict", "predict_over_ranks"]


def predict(model: Any, faces: Batches, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Predictions and truth [N, P, 2] on the CPU, pixels of images of side `faces.size`; evaluation mode, float32."""
    predicted, truth = _predict(model, faces, torch.arange(len(faces)), batch)
    return predicted.cpu(), truth.cpu()


def predict_over_ranks(model: Any, faces: Batches, batch: int = 64) -> tuple[Tensor, Tensor]:
    """As `predict`, every rank a part of the faces; all ranks get all predictions."""
    rows = torch.arange(len(faces))[ranks.mine(len(faces))]
    # A rank without faces must still know the shape of the others' rows.
    found = _predict(model, faces, rows if len(rows) else torch.zeros(1, dtype=torch.int64), batch)
    predicted, truth = (ranks.rows_of_ranks(tensor[: len(rows)]).cpu() for tensor in found)
    return predicted, truth


@torch.no_grad()
def _predict(model: Any, faces: Batches, order: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    model.eval()
    device = next(model.parameters()).device
    plain, predicted, truths = Plain(faces.size), [], []
    for images, points in read_ahead(faces, order.split(batch)):
        images, points = plain(images.to(device), points.to(device))
        predicted.append(_found(model, images))
        truths.append(points)
    return torch.cat(predicted), torch.cat(truths)


def _found(model: Any, images: Tensor) -> Tensor:
    """Points [B, P, 2], float32, of half the images at a time, or of half of those, where memory does not do."""
    try:
        return model(images).float()
    except (RuntimeError, MemoryError) as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    half = len(images) // 2  # beyond the handler, whose error holds on to the memory
    return torch.cat([_found(model, images[:half]), _found(model, images[half:])])


def default_normalizer(landmarks: int) -> str:
    """ "inter_ocular" where the outer eye corners are known, else "box"."""
    return "inter_ocular" if landmarks in metrics.OUTER_EYE_CORNERS else "box"
