"""What goes on inside: the leaves of a model, those that one landmark of a face selects, and the curves of the run.

Shapes: S the image's side, P landmarks, N leaves on canvases of H x W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..data import Plain
from .feed import Batches

__all__ = ["Inside", "Stage", "inside_figure", "leaf_mosaic", "look_inside"]

SHOWN = 36
"""Leaves of a stage in the picture; of more, evenly spaced ones."""
SELECTED = 7
DPI = 100


class Stage(NamedTuple):
    """leaves: [N, H, W], each sums to 1. prob: [N], those of one landmark. name: of the stage."""

    name: str
    leaves: np.ndarray
    prob: np.ndarray


class Inside(NamedTuple):
    """image: uint8 [S, S, 3]. landmark: its number. point, truth: (x, y) of the landmark, pixels of the image."""

    image: np.ndarray
    landmark: int
    point: np.ndarray
    truth: np.ndarray
    stages: list[Stage]


@torch.no_grad()
def look_inside(model: Any, faces: Batches) -> Inside | None:
    """The middle landmark of the first face; None for a model that does not tell its leaves.

    A model tells them by `selections(images)`: a list of (name, leaves [N, H, W], prob [B, P, N]), one a stage.
    `LandmarkForest` does by its stages.
    """
    if not hasattr(model, "selections") and not hasattr(model, "stages"):
        return None
    device = next(model.parameters()).device
    image, points = faces.batch([0])
    plain, truth = Plain(faces.size)(image.to(device), points)
    landmark = truth.shape[1] // 2
    if hasattr(model, "selections"):
        told = model.selections(plain)
    else:
        names = ("coarse", "fine")
        told = [(n, s.head.pool.permute(2, 0, 1), s.prob) for n, s in zip(names, model.stages(plain), strict=True)]
    stages = [Stage(name, _numpy(leaves), _numpy(prob[0, landmark])) for name, leaves, prob in told]
    picture = (255 * plain[0]).round().byte().permute(1, 2, 0).cpu().numpy()
    return Inside(picture, landmark, _numpy(model(plain)[0, landmark]), _numpy(truth[0, landmark]), stages)


def inside_figure(inside: Inside | None, rounds: Sequence[Mapping[str, Any]], normalizer: str) -> np.ndarray:
    """A row a stage (face, leaves, selected leaves with their probabilities), then loss and held-out error by step.

    Args:
        inside: None: the curves alone.
        rounds: of a `History`.
        normalizer: whose NME is drawn.

    Returns:
        uint8 [height, 1200, 3].
    """
    stages = inside.stages if inside is not None else []
    figure = Figure(figsize=(12, 3.4 * (len(stages) + 1)), dpi=DPI, layout="constrained")
    rows = list(figure.subfigures(len(stages) + 1, 1, squeeze=False).flat)
    for row, stage in zip(rows, stages, strict=False):
        assert inside is not None
        face, leaves, selected = row.subplots(1, 3, width_ratios=[1, 1, 2])
        _draw_face(face, inside)
        _draw_maps(leaves, leaf_mosaic(stage.leaves[_spread(len(stage.leaves))]))
        leaves.set_title(f"{stage.name}: {min(SHOWN, len(stage.leaves))} of {len(stage.leaves)} leaves", fontsize=9)
        _draw_selected(selected, stage)
    losses, errors = rows[-1].subplots(1, 2)
    steps = [record["step"] for record in rounds]
    _draw_curve(losses, steps, [record["loss"] for record in rounds], "training loss, mean of the round")
    percent = [100 * record[f"NME[{normalizer}]"] for record in rounds]
    _draw_curve(errors, steps, percent, f"held-out NME[{normalizer}], %")
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def leaf_mosaic(leaves: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Leaves [N, H, W] side by side, each scaled to its own largest value, NaN between them.

    >>> leaf_mosaic(np.ones((3, 2, 2)), columns=2).shape
    (5, 5)
    """
    count, height, width = leaves.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for index, leaf in enumerate(leaves):
        y, x = index // columns * (height + 1), index % columns * (width + 1)
        mosaic[y : y + height, x : x + width] = leaf / max(leaf.max(), 1e-30)
    return mosaic


def _spread(count: int) -> np.ndarray:
    shown = min(SHOWN, count)
    return np.arange(shown) * count // shown


def _draw_face(axes: Axes, inside: Inside) -> None:
    axes.imshow(inside.image)
    axes.plot(*inside.truth, "o", mfc="none", mec="white", ms=9, mew=1.5)
    axes.plot(*inside.point, "o", color="#ff5d8f", ms=5, mec="black", mew=0.5)
    side = inside.image.shape[0]
    axes.set(xticks=[], yticks=[], xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    axes.set_title(f"landmark {inside.landmark}: found, true (ring)", fontsize=9)


def _draw_selected(axes: Axes, stage: Stage) -> None:
    """The landmark's mixture, then the leaves that weigh most in it."""
    most = np.argsort(-stage.prob, kind="stable")[:SELECTED]
    mixture = np.tensordot(stage.prob, stage.leaves, 1)
    tiles = np.concatenate([mixture[None], stage.leaves[most]])
    columns = math.ceil(len(tiles) / 2)
    _draw_maps(axes, leaf_mosaic(tiles, columns))
    height, width = stage.leaves.shape[1:]
    words = ["mixture", *(f"leaf {index}: {100 * stage.prob[index]:.1f} %" for index in most)]
    for index, word in enumerate(words):
        place = index % columns * (width + 1) - 0.2, index // columns * (height + 1) - 0.2
        axes.text(*place, word, color="white", fontsize=8, va="top", ha="left")
    share = 100 * stage.prob[most].sum()
    axes.set_title(f"{stage.name}: {len(most)} leaves hold {share:.0f} % of the landmark", fontsize=9)


def _draw_maps(axes: Axes, mosaic: np.ndarray) -> None:
    axes.imshow(mosaic, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")


def _draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(steps, values, color="#0072b2", marker="o" if len(steps) <= 60 else None, ms=2.5)
    axes.set(xlabel="step", ylabel=label)
    if 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
