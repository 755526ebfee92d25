"""Predictions of a model on a set of faces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import Plain
from . import ranks
from .feed import Batches

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
    for rows in order.split(batch):
        images, points = faces.batch(rows)
        images, points = plain(images.to(device), points.to(device))
        predicted.append(model(images).float())
        truths.append(points)
    return torch.cat(predicted), torch.cat(truths)


def default_normalizer(landmarks: int) -> str:
    """ "inter_ocular" where the outer eye corners are known, else "box"."""
    return "inter_ocular" if landmarks in metrics.OUTER_EYE_CORNERS else "box"
