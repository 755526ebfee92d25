"""A model as its users need it: points and how sure they are, here or as a file that `torch.export` made.

Shapes: B images of side S, P landmarks. Points are (x, y) in image pixels, 0-based, pixel centres at integers. The spread
of a landmark is the square root of its covariance's trace, pixels: the root mean square distance from the point.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from .training.checkpoint import CheckpointError, write_atomically

__all__ = ["PIXELS", "Exported", "distribution", "export", "load_exported", "spread"]

PIXELS = ("uint8", "float")
"""What an exported model takes: 0..255, or float32 in [0, 1]."""

FORMAT = "fastforest exported"
VERSION = 1
METADATA = "fastforest.json"


def distribution(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Points [B, P, 2] and their covariance [B, P, 2, 2], pixels squared; None where the model has none.

    Args:
        model: any of `fastforest.models`, in evaluation mode.
        images: [B, 3, S, S] in [0, 1].
    """
    return model.distribution(images) if hasattr(model, "distribution") else (model(images), None)


def spread(points: Tensor, covariance: Tensor | None) -> Tensor:
    """[B, P], pixels; NaN where there is no covariance."""
    if covariance is None:
        return points.new_full(points.shape[:2], torch.nan)
    return covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(0).sqrt()


class Exported(NamedTuple):
    """A loaded file of `export`.

    module: images [B, 3, S, S] of `pixels` -> points [B, P, 2], spread [B, P]. size: S. mean_shape: float32 [P, 2],
    pixels of such an image. pixels: one of `PIXELS`. device: where the module runs. padding: of its crops, see `Crop`.
    crop: what they are around, "landmarks" or "box".
    """

    module: nn.Module
    size: int
    mean_shape: Tensor
    pixels: str
    device: torch.device
    padding: float = 0.25
    crop: str = "landmarks"

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: uint8 [B, 3, S, S] on any device -> points [B, P, 2], spread [B, P]."""
        images = images.to(self.device)
        return self.module(images if self.pixels == "uint8" else images.float() / 255)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    size: int,
    mean_shape: Tensor,
    *,
    pixels: str = "uint8",
    padding: float = 0.25,
    crop: str = "landmarks",
) -> None:
    """Writes the way from images to points and spread as a file for `load_exported` or `torch.export.load`, atomically.

    The file holds the weights and the graph, takes any number of images a call, and needs none of this library's Python.
    A model with one of its operators (split nodes are) still needs that: `import fastforest` before `torch.export.load`.
    Without, PyTorch fails to resolve `torch.ops.fastforest...` and says so.

    Args:
        model: any of `fastforest.models`, on the CPU; set to evaluation mode. `load_exported` moves it.
        path: to write; its suffix must be .pt2.
        size: S.
        mean_shape: [P, 2], pixels of an image; goes along.
        pixels: one of `PIXELS`.
        padding, crop: of the crops that the model was trained on, see `data.RecordFaces`; go along.

    Raises:
        ValueError: another suffix or unknown pixels. OSError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"export: path must end in .pt2, got {path}")
    if pixels not in PIXELS:
        raise ValueError(f"export: pixels must be one of {', '.join(PIXELS)}, got {pixels!r}")
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8 if pixels == "uint8" else torch.float32)
    with torch.no_grad():
        batch = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(_Inference(model.eval(), pixels), (example,), dynamic_shapes=batch)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "mean_shape": mean_shape.tolist(),
        "pixels": pixels,
        "padding": padding,
        "crop": crop,
        "torch": torch.__version__,
    }
    extra = {METADATA: json.dumps(metadata)}
    with warnings.catch_warnings():
        # of weights in channels_last order, which are written and read whole all the same
        warnings.filterwarnings("ignore", "No complete tensor found")
        write_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))


def load_exported(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Exported:
    """Reads what `export` wrote.

    Raises:
        CheckpointError: file missing, damaged, not written by `export`, or of a later version.
    """
    extra = {METADATA: ""}
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        program = torch.export.load(path, extra_files=extra)
        metadata = json.loads(extra[METADATA])
    except Exception:
        # torch.export.load raises many kinds on files that are cut or were never its own
        raise CheckpointError(f"{path}: not an exported model of fastforest, or a damaged one") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not an exported model of fastforest")
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path}: export version {metadata.get('version')}, this library reads {VERSION}")
    place = torch.device(device)
    if place.type != "cpu":
        program = move_to_device_pass(program, place)
    mean_shape = torch.tensor(metadata["mean_shape"], dtype=torch.float32)
    crop = metadata.get("crop", "landmarks")  # files of the first export had no other
    return Exported(
        program.module(), metadata["size"], mean_shape, metadata["pixels"], place, metadata["padding"], crop
    )


class _Inference(nn.Module):
    def __init__(self, model: nn.Module, pixels: str) -> None:
        super().__init__()
        self.model, self.pixels = model, pixels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        points, covariance = distribution(self.model, images.float() / 255 if self.pixels == "uint8" else images)
        return points, spread(points, covariance)
