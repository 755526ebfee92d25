"""Pictures: landmarks on photographs, contact sheets, curves. Numpy arrays in, numpy arrays out; drawn by Agg.

Shapes: B images of H x W pixels, uint8 RGB [H, W, 3]; P landmarks. Points are (x, y), 0-based, pixel centres at
integers; a covariance [P, 2, 2] is in pixels squared. Lines are antialiased; pixels
that no line touches are the image's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .data import LINES_68, layout_of
from .metrics import auc, aurc, ced, failure_rate, risk_coverage

__all__ = [
    "annotate",
    "ced_figure",
    "contact_sheet",
    "curves_figure",
    "regions_figure",
    "risk_coverage_figure",
    "rows_figure",
]

Array = np.ndarray
Points = np.ndarray | Tensor

PALETTE = {"jaw": "#35c2ff", "brows": "#ffb000", "nose": "#b78bff", "eyes": "#3df29b", "mouth": "#ff5d8f"}
TRUTH = "#ffffff"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DPI = 100
INK = "#222222"


def annotate(
    image: Array,
    points: Points,
    *,
    covariance: Points | None = None,
    truth: Points | None = None,
    min_side: int = 512,
    deviations: float = 2.0,
) -> Array:
    """The image with landmarks: polylines by part for 68 points, dots alone for any other number, in the parts' colours
    where `data.layout_of` knows them.

    Args:
        image: uint8 [H, W, 3]; a smaller one than `min_side` is enlarged to it, so that lines stay thin on it.
        points: [P, 2], pixels of `image`.
        covariance: [P, 2, 2], pixels squared of `image`: ellipses at `deviations` standard deviations.
        truth: [P, 2], drawn in white beneath.
        min_side: least longer side of the result, pixels.

    Returns:
        uint8 [H', W', 3].

    Raises:
        ValueError: image not uint8 [H, W, 3], points not [P, 2], covariance not [P, 2, 2].
    """
    _check_image("annotate", image)
    predicted = _points("annotate", "points", points)
    factor = max(1, math.ceil(min_side / max(image.shape[:2])))
    canvas, scaled = _enlarged(image, factor), _scaled(predicted, factor)
    # The line follows the face, not the picture: a small face in a large photograph keeps thin lines.
    unit = float(np.clip(np.nanmax(np.ptp(scaled, axis=0)) / 340, 0.55, 6.0)) if len(scaled) else 1.0
    figure, axes = _overlay(canvas)
    if truth is not None:
        _draw_truth(axes, [_scaled(_points("annotate", "truth", truth), factor)], unit)
    if covariance is not None:
        matrices = _numpy(covariance)
        if matrices.shape != (len(scaled), 2, 2):
            raise ValueError(f"annotate: covariance must be [{len(scaled)}, 2, 2], got {list(matrices.shape)}")
        _draw_ellipses(axes, scaled, matrices * factor**2, deviations, unit)
    _draw_faces(axes, [scaled], unit)
    return _composed(canvas, figure)


def contact_sheet(
    images: Array | Tensor,
    points: Points,
    truth: Points | None = None,
    *,
    captions: Sequence[str] | None = None,
    title: str = "",
    columns: int = 6,
    tile: int = 192,
) -> Array:
    """Faces side by side, predictions in colour over the truth in white.

    Args:
        images: uint8 [B, 3, S, S] or [B, S, S, 3].
        points: [B, P, 2], pixels of the images.
        truth: as points, or None.
        captions: B words, written in the tiles' lower left corners.
        title: one line above.
        columns: faces a row.
        tile: side of a face on the sheet, pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: images not uint8 squares, or another number of points, truths or captions than of images.
    """
    pictures = _numpy_images(images)
    predicted = _batch_points("points", points, len(pictures))
    true = None if truth is None else _batch_points("truth", truth, len(pictures))
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"contact_sheet: captions must hold {len(pictures)} words, got {len(captions)}")
    gap, top = 4, 30 if title else 4
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((top + rows * (tile + gap), gap + columns * (tile + gap), 3), 24, np.uint8)
    origins = [(gap + i % columns * (tile + gap), top + i // columns * (tile + gap)) for i in range(len(pictures))]
    for picture, (x, y) in zip(pictures, origins, strict=True):
        resized = Image.fromarray(picture).resize((tile, tile), Image.Resampling.LANCZOS)
        canvas[y : y + tile, x : x + tile] = np.asarray(resized)
    factor = tile / pictures.shape[1]
    figure, axes = _overlay(canvas)
    if true is not None:
        _draw_truth(axes, [_placed(p, factor, o, tile) for p, o in zip(true, origins, strict=True)], 0.5)
    _draw_faces(axes, [_placed(p, factor, o, tile) for p, o in zip(predicted, origins, strict=True)], 0.5)
    for caption, (x, y) in zip(captions or [], origins, strict=False):
        box = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "edgecolor": "none"}
        axes.text(x + 4, y + tile - 6, caption, color="white", fontsize=7, va="baseline", bbox=box, zorder=9)
    if title:
        axes.text(gap + 2, top / 2, title, color="white", fontsize=9.5, va="center", zorder=9)
    return _composed(canvas, figure)


def curves_figure(histories: Mapping[str, Sequence[Mapping[str, float]]], normalizer: str, title: str = "") -> Array:
    """Training loss (left; each model's own scale, so logarithmic) and held-out NME (right) against minutes.

    Args:
        histories: by name, the rounds of a `training.History`: "seconds", "loss" and "NME[normalizer]".
        normalizer: which NME.

    Returns:
        uint8 [440, 1000, 3].
    """
    figure = Figure(figsize=(10, 4.4), dpi=DPI, layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for colour, (name, rounds) in zip(_cycle(len(histories)), histories.items(), strict=True):
        minutes = [record["seconds"] / 60 for record in rounds]
        mark = "o" if len(rounds) <= 60 else None
        losses.plot(minutes, [record["loss"] for record in rounds], color=colour, label=name, marker=mark, ms=2.5)
        percent = [100 * record[f"NME[{normalizer}]"] for record in rounds]
        label = f"{name}: {percent[-1]:.2f} %" if percent else name
        errors.plot(minutes, percent, color=colour, label=label, marker=mark, ms=2.5)
    losses.set(xlabel="minutes", ylabel="training loss")
    errors.set(xlabel="minutes", ylabel=f"held-out NME[{normalizer}], %")
    if all(record["loss"] > 0 for rounds in histories.values() for record in rounds) and any(histories.values()):
        losses.set_yscale("log")
    _finish(figure, [losses, errors], title)
    return _rgb(figure)


def ced_figure(
    errors: Mapping[str, Array | Tensor], normalizer: str, threshold: float = 0.08, title: str = ""
) -> Array:
    """Cumulative error distributions to half beyond the threshold, a line there, its AUC and FR in the legend.

    Args:
        errors: by name, the NME of each image [B], fractions (NaN: a failure).

    Returns:
        uint8 [480, 640, 3].
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for colour, (name, values) in zip(_cycle(len(errors)), errors.items(), strict=True):
        thresholds, reached = ced(values, 1.5 * threshold)
        missed = 100 * failure_rate(values, threshold)
        label = f"{name}: AUC@{threshold:g} {100 * auc(values, threshold):.1f} %, FR@{threshold:g} {missed:.1f} %"
        axes.plot(100 * thresholds, 100 * reached, color=colour, label=label)
    axes.axvline(100 * threshold, color=INK, linewidth=0.9, linestyle="--", label=f"threshold {100 * threshold:g} %")
    axes.set(xlabel=f"NME[{normalizer}], %", ylabel="images, %", xlim=(0, 150 * threshold), ylim=(0, 101))
    _finish(figure, [axes], title, "lower right")
    return _rgb(figure)


def risk_coverage_figure(
    doubts: Mapping[str, tuple[Array | Tensor, Array | Tensor]], normalizer: str, title: str = ""
) -> Array:
    """Mean error of the faces predicted with most certainty, against their share; dashed: by an oracle that knows the
    errors, dotted: by an uncertainty that tells nothing.

    Args:
        doubts: by name, the NME of each image [B], fractions, finite, and its uncertainty [B].

    Returns:
        uint8 [480, 640, 3].
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for colour, (name, (errors, uncertainty)) in zip(_cycle(len(doubts)), doubts.items(), strict=True):
        coverage, risk = risk_coverage(errors, uncertainty)
        oracle, mean = risk_coverage(errors, errors)[1], float(risk[-1])
        areas = [100 * aurc(errors, uncertainty), 100 * aurc(errors, errors), 100 * mean]
        prefix = "" if len(doubts) == 1 else f"{name}, "
        axes.plot(100 * coverage, 100 * risk, color=colour, label=f"{name}: AURC {areas[0]:.2f} %")
        axes.plot(
            100 * coverage, 100 * oracle, color=colour, ls="--", lw=1.0, label=f"{prefix}oracle: {areas[1]:.2f} %"
        )
        axes.axhline(100 * mean, color=colour, ls=":", lw=1.2, label=f"{prefix}random: {areas[2]:.2f} %")
    axes.set(xlabel="coverage: most certain faces, %", ylabel=f"risk: mean NME[{normalizer}], %", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    _finish(figure, [axes], title, "lower right")
    return _rgb(figure)


def regions_figure(regions: Mapping[str, Mapping[str, float]], normalizer: str, title: str = "") -> Array:
    """Mean NME of each part of the face, bars side by side.

    Args:
        regions: by name, fractions by region; every name has the same regions.

    Returns:
        uint8 [400, 640, 3].
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    parts = list(next(iter(regions.values())))
    width = 0.8 / len(regions)
    for number, (colour, (name, values)) in enumerate(zip(_cycle(len(regions)), regions.items(), strict=True)):
        places = np.arange(len(parts)) + (number - (len(regions) - 1) / 2) * width
        bars = axes.bar(places, [100 * values[part] for part in parts], 0.92 * width, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8 if len(regions) <= 3 else 6, color=INK)
    axes.set_xticks(np.arange(len(parts)), parts)
    axes.set(ylabel=f"NME[{normalizer}], %")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_axisbelow(True)
    _finish(figure, [axes], title)
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=min(4, len(regions)))
    axes.grid(axis="x", visible=False)
    return _rgb(figure)


def rows_figure(tables: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> Array:
    """Tables as dots: a panel a table, a line a row; small dots are its values, the large one their mean.

    Args:
        tables: by title, by row, its values (one a seed).
        unit: of the values, below the last panel.

    Returns:
        uint8 [H, 900, 3], H as the rows need.
    """
    heights = [len(rows) + 1.2 for rows in tables.values()]
    figure = Figure(figsize=(9, 0.32 * sum(heights) + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(tables), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, tables.items(), strict=True):
        best = min(rows, key=lambda label: float(np.mean(rows[label])))
        for place, (label, values) in enumerate(rows.items()):
            colour = SERIES[2] if label == best else SERIES[0]
            mean = float(np.mean(values))
            axes.plot(values, [place] * len(values), "o", color=colour, ms=3.5, alpha=0.6)
            axes.plot([mean], [place], "o", color=colour, ms=7)
            axes.annotate(
                f"{mean:.2f}", (max(values), place), (7, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    panels[-1].set_xlabel(unit)
    _finish(figure, list(panels), "")
    return _rgb(figure)


def _overlay(canvas: Array) -> tuple[Figure, Axes]:
    """A transparent figure whose data coordinates are the canvas's pixels."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.axis("off")
    return figure, axes


def _composed(canvas: Array, figure: Figure) -> Array:
    """The figure over the canvas; Agg's colours are not premultiplied."""
    agg = FigureCanvasAgg(figure)
    agg.draw()
    drawn = np.asarray(agg.buffer_rgba())
    opacity = drawn[..., 3:].astype(np.float32) / 255
    mixed = canvas + (drawn[..., :3].astype(np.float32) - canvas) * opacity
    return np.rint(mixed).astype(np.uint8)


def _rgb(figure: Figure) -> Array:
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def _draw_faces(axes: Axes, faces: Sequence[Array], unit: float) -> None:
    """Coloured polylines over a dark halo, and a dot a landmark."""
    for colour, lines, dots in _parts(faces):
        halo = LineCollection(lines, colors="black", alpha=0.45, linewidths=2.6 * unit, zorder=4, capstyle="round")
        stroke = LineCollection(lines, colors=colour, linewidths=1.3 * unit, zorder=5, capstyle="round")
        axes.add_collection(halo)
        axes.add_collection(stroke)
        _draw_dots(axes, dots, (2.6 if lines else 4.0) * unit, colour, 0.35 * unit, 6)


def _draw_truth(axes: Axes, faces: Sequence[Array], unit: float) -> None:
    for _, lines, dots in _parts(faces):
        axes.add_collection(LineCollection(lines, colors=TRUTH, alpha=0.9, linewidths=0.9 * unit, zorder=3))
        if not lines:
            _draw_dots(axes, dots, 3.0 * unit, TRUTH, 0.3 * unit, 3)


def _draw_dots(axes: Axes, dots: Array, points: float, colour: str, edge: float, zorder: int) -> None:
    """Discs of `points` typographic points; Axes.scatter would round their places to whole pixels."""
    pixels = np.full(len(dots), points * DPI / 72)
    discs = EllipseCollection(pixels, pixels, np.zeros(len(dots)), units="xy", offsets=dots, transOffset=axes.transData)
    discs.set(facecolor=colour, edgecolor="black", linewidth=edge, zorder=zorder)
    axes.add_collection(discs)


def _parts(faces: Sequence[Array]) -> list[tuple[str, list[Array], Array]]:
    """(colour, polylines, dots) of each part of all faces together; one part where the layout is not known."""
    stacked = np.stack(faces)
    layout = layout_of(stacked.shape[1])
    if layout is None:
        return [(PALETTE["eyes"], [], stacked.reshape(-1, 2))]
    parts = []
    for part, indices in layout.regions.items():
        drawn = LINES_68 if stacked.shape[1] == 68 else ()
        lines = [face[list(line)] for face in faces for line in drawn if line[0] in indices]
        parts.append((PALETTE[part], lines, stacked[:, list(indices)].reshape(-1, 2)))
    return parts


def _draw_ellipses(axes: Axes, points: Array, covariance: Array, deviations: float, unit: float) -> None:
    values, vectors = np.linalg.eigh(covariance)
    axis = 2 * deviations * np.sqrt(np.maximum(values, 0))
    angle = np.degrees(np.arctan2(vectors[:, 1, 1], vectors[:, 0, 1]))
    # Angles are measured in the data's coordinates, whose y points down: "xy" units turn them along.
    for colour, alpha, width in (("white", 0.10, 0.0), ("none", 0.75, 0.7 * unit)):
        ellipses = EllipseCollection(
            axis[:, 1],
            axis[:, 0],
            angle,
            units="xy",
            offsets=points,
            transOffset=axes.transData,
            facecolors=colour,
            edgecolors="white" if width else "none",
            linewidths=width,
            alpha=alpha,
            zorder=2,
        )
        axes.add_collection(ellipses)


def _finish(
    figure: Figure, panels: Sequence[Axes], title: str, legend: Literal["upper right", "lower right"] = "upper right"
) -> None:
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc=legend)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)


def _cycle(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _enlarged(image: Array, factor: int) -> Array:
    if factor == 1:
        return image
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BICUBIC))


def _scaled(points: Array, factor: float) -> Array:
    return (points + 0.5) * factor - 0.5


def _placed(points: Array, factor: float, origin: tuple[int, int], tile: int) -> Array:
    """Points of a face in the sheet's pixels, held inside the tile so that no line crosses a neighbour's."""
    return np.clip(_scaled(points, factor), 0, tile - 1) + np.asarray(origin)


def _numpy(value: Points) -> Array:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)


def _numpy_images(images: Array | Tensor) -> Array:
    pictures = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    if pictures.ndim == 4 and pictures.shape[1] == 3 and pictures.shape[3] != 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    square = pictures.ndim == 4 and pictures.shape[1] == pictures.shape[2] and pictures.shape[3] == 3
    if pictures.dtype != np.uint8 or not square or len(pictures) == 0:
        expected = "uint8 [B, 3, S, S] with B > 0"
        raise ValueError(f"contact_sheet: images must be {expected}, got {pictures.dtype} {list(pictures.shape)}")
    return np.ascontiguousarray(pictures)


def _batch_points(argument: str, value: Points, count: int) -> Array:
    points = _numpy(value)
    if points.ndim != 3 or points.shape[0] != count or points.shape[2] != 2:
        raise ValueError(f"contact_sheet: {argument} must be [{count}, P, 2], got {list(points.shape)}")
    return points


def _points(function: str, argument: str, value: Points) -> Array:
    points = _numpy(value)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{function}: {argument} must be [P, 2], got {list(points.shape)}")
    return points


def _check_image(function: str, image: Array) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{function}: image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
