"""Dense landmarks, coordinates against heatmaps: python -m fastforest.recipes.dense [--data DIR|FILE.csv] --out DIR.

Faces with hundreds of landmarks: 68 points carried along their contours by splines (`data.dense`), or a table that has
them. Trains a residual network to coordinates (wing, L1) and a U-Net to heatmaps (mean square, Kullback-Leibler,
Adaptive Wing; two widths of the target), each for as many steps; decodes the heatmaps in six ways; measures all of it on
the held-out tenth (index % 10 == 9). Writes

    results.json results.md predictions.png heatmaps.png errors.png

No target heatmap is ever stored: the losses render it from the points. `--full` is the size that this is for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn
from torch.nn import functional

import fastforest as ff

from .. import data, draw, metrics, training
from ..cli.common import BadInput, Parser, check_writable, guarded, real, whole
from ..data import dense
from ..models.dense import ResNet, UNet
from ..training import report
from ..training.checkpoint import write_text
from ..training.schedules import learning_rate_factor
from ._machine import processor

__all__ = ["DECODINGS", "FULL", "LOSSES", "DenseRecipe", "main", "run"]


@dataclass(frozen=True)
class DenseRecipe:
    """All that is chosen by hand.

    size: side of images and maps, pixels. landmarks: P. faces: how many are drawn. steps: of each training; minutes: of
    each, instead of steps. batch, rate, weight_decay, clip: of AdamW; the rate rises over `warmup` of the training and
    falls with a cosine. sigmas: of the heatmaps' targets, pixels. beta: of soft-argmax where maps have peak 1 (logits have
    1). unet, resnet: keywords of the networks. augment: keywords of `data.Augment`. shown: faces in the pictures.
    """

    size: int = 48
    landmarks: int = 136
    faces: int = 1000
    steps: int = 600
    minutes: float | None = None
    batch: int = 8
    rate: float = 3e-3
    weight_decay: float = 1e-4
    clip: float = 5.0
    warmup: float = 0.05
    sigmas: tuple[float, ...] = (3.0, 7.0)
    beta: float = 20.0
    unet: dict[str, Any] = field(default_factory=lambda: {"width": 12, "levels": 4, "features": 32})
    resnet: dict[str, Any] = field(default_factory=lambda: {"width": 16})
    augment: dict[str, Any] = field(default_factory=lambda: {"rotation": 20.0, "scale": 0.1, "shift": 0.04})
    shown: int = 6


FULL = DenseRecipe(
    size=128,
    landmarks=971,
    faces=4000,
    steps=4000,
    batch=32,
    rate=1e-3,
    unet={"width": 32, "levels": 5, "features": 128},
    resnet={"width": 64},
)
"""971 landmarks on 128 x 128 pixels, 32 faces a step: the maps are 1.9 GiB, so is their gradient; a target would be too."""


LOSSES: dict[str, Callable[..., Tensor]] = {  # of coordinates (pred, points); of maps (maps, points, sigma)
    "wing": ff.wing_loss,
    "L1": functional.l1_loss,
    # Weighted as Adaptive Wing weights it: plain, it stays at empty maps for long.
    "MSE": partial(ff.heatmap_mse_loss, foreground_weight=11.0, mask_threshold=0.2),
    "KL": ff.heatmap_kl_loss,
    "Adaptive Wing": ff.adaptive_wing_loss,
}
COORDINATES = ("wing", "L1")
LOGITS = ("KL",)
BLUR = 17  # pixels of DARK's kernel: sigma 3; wider ones reach over the border, where they see 0


class Way(NamedTuple):
    """One training: its loss, and for heatmaps the target's sigma and soft-argmax's beta (0 for coordinates)."""

    loss: str
    sigma: float
    beta: float

    def __str__(self) -> str:
        return f"{self.loss}, sigma {self.sigma:g}" if self.sigma else f"coordinates, {self.loss}"


def _soft_argmax(maps: Tensor, way: Way, window: bool) -> Tensor:
    """The window is three deviations wide: near its peak, the softmax of beta times a Gaussian has sigma / sqrt(beta)."""
    beta = 1.0 if way.loss in LOGITS else way.beta
    return ff.soft_argmax(maps, beta, window=math.ceil(3 * way.sigma / math.sqrt(beta)) if window else None)


def _peaked(maps: Tensor, way: Way) -> Tensor:
    """Heatmaps whose highest pixel is about 1: what the refinements of `peak` expect."""
    return (maps - maps.amax((2, 3), keepdim=True)).exp() if way.loss in LOGITS else maps


DECODINGS: dict[str, Callable[[Tensor, Way], Tensor]] = {
    "argmax": lambda maps, way: ff.peak(maps).points,
    "quarter shift": lambda maps, way: ff.peak(maps, "quarter_sign").points,
    "DARK": lambda maps, way: ff.peak(_peaked(maps, way), "dark", kernel=BLUR).points,
    "DARK-UDP": lambda maps, way: ff.peak(_peaked(maps, way), "dark_udp", kernel=BLUR).points,
    "soft-argmax, window": lambda maps, way: _soft_argmax(maps, way, True),
    "soft-argmax, global": lambda maps, way: _soft_argmax(maps, way, False),
}


class Faces(NamedTuple):
    """The two parts of the set, and what is known of its landmarks: how to mirror them, whether the 68 come first."""

    train: data.Cached
    held_out: data.Cached
    flip: Sequence[int] | None
    known: bool


class Result(NamedTuple):
    """A training on the held-out faces: points [N, P, 2] by decoding, their row, losses by step, the maps of one face."""

    points: dict[str, Tensor]
    row: dict[str, Any]
    losses: list[float]
    maps: Tensor | None

    def best(self) -> str:
        """The decoding with the lowest NME."""
        return min(self.points, key=lambda name: self.row["decodings"][name]["nme"])

    def nme(self) -> float:
        return self.row["decodings"][self.best()]["nme"]


def run(
    name: str,
    out: Path,
    seed: int = 0,
    recipe: DenseRecipe | None = None,
    *,
    landmarks: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The whole recipe; returns what results.json holds.

    Args:
        name: "synthetic"; a folder as `data.open_dataset`, of faces with 68 points; or a table, as `dense.CsvFaces`.
        out: folder for the results, made if missing.
        seed: of faces, weights, order and augmentation.
        landmarks: overrides the recipe's; a table must have as many.
        device: where to train.

    Raises:
        DataError: the set cannot be used. BadInput: out cannot be written, sizes that do not fit. TrainingError: a loss
            that is not finite.
    """
    recipe = recipe or DenseRecipe()
    check_writable(out)
    faces = _open(name, seed, recipe, landmarks)
    recipe = replace(recipe, landmarks=faces.held_out[0].points.shape[0])
    reader = _reader(name, faces.train, recipe)
    print(
        f"{len(faces.train)} faces of {recipe.size} x {recipe.size} pixels with {recipe.landmarks} landmarks, "
        f"{len(faces.held_out)} held out; {_speed(reader)}",
        flush=True,
    )
    ways = [Way(loss, 0.0, 0.0) for loss in COORDINATES]
    ways += [Way(loss, sigma, recipe.beta) for sigma in recipe.sigmas for loss in LOSSES if loss not in COORDINATES]
    results = {str(way): _train(way, faces, reader, seed, recipe, torch.device(device)) for way in ways}
    return _write(out, name, faces, reader, results, seed, recipe, device)


def _open(name: str, seed: int, recipe: DenseRecipe, landmarks: int | None) -> Faces:
    table = name.lower().endswith(".csv")
    multiple = 2 ** (recipe.unet["levels"] - 1)
    if recipe.size % multiple:
        raise BadInput(f"--size {recipe.size}: must be a multiple of {multiple}")
    if table:
        dataset: Any = dense.CsvFaces(name, landmarks)
        flip = None
    else:
        count = landmarks or recipe.landmarks
        if count < 68:
            raise BadInput(f"--landmarks {count}: must be at least 68, which are kept")
        plain = data.open_dataset(name, size=recipe.size, count=recipe.faces, seed=seed)
        dataset, flip = dense.DenseFaces(plain, count), dense.dense_flip(count)
    return Faces(*training.training_sets(dataset, recipe.size, name), flip, not table)


def _reader(name: str, train: data.Cached, recipe: DenseRecipe) -> dict[str, float] | None:
    """How fast `CsvFaces` reads: the table itself, or one of at most 256 of the faces, written for this. One thread.

    None without pyarrow: drawn faces do not need it.
    """
    if importlib.util.find_spec("pyarrow") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        given = name.lower().endswith(".csv")
        rows = range(min(len(train), 256))
        table = Path(name) if given else dense.write_csv(train, Path(folder) / "faces.csv", rows)
        start = time.perf_counter()
        faces = dense.CsvFaces(table)
        opened = time.perf_counter()
        for index in rows:
            data.resize(faces[index].image, recipe.size)
        seconds = time.perf_counter() - opened
    return {
        "table_rows": len(faces),
        "table_seconds": round(opened - start, 4),
        "images_a_second": round(len(rows) / seconds, 1),
    }


def _train(
    way: Way, faces: Faces, reader: dict[str, float] | None, seed: int, recipe: DenseRecipe, device: torch.device
) -> Result:
    torch.manual_seed(seed)
    memory = _Memory(device)
    model = _model(way, faces, recipe).to(device)
    losses, times = _descend(way, model, faces, seed, recipe, device)
    peak = memory.megabytes()
    points, maps = _predict(way, model, faces.held_out, recipe, device)
    truth = faces.held_out.batch(range(len(faces.held_out)))[1]
    tenth = max(1, len(losses) // 10)
    step = statistics.median(times[min(2, len(times) - 1) :])
    row: dict[str, Any] = {
        "loss": way.loss,
        "sigma": way.sigma or None,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "steps": len(losses),
        "seconds_a_step": round(step, 5),
        "peak_megabytes": peak,
        "reader_share": None if reader is None else round(recipe.batch / reader["images_a_second"] / step, 4),
        "first_loss": statistics.fmean(losses[:tenth]),
        "last_loss": statistics.fmean(losses[-tenth:]),
        "decodings": {decoding: _errors(found, truth, faces.known) for decoding, found in points.items()},
    }
    result = Result(points, row, losses, maps)
    print(f"{way}: {len(losses)} steps, {result.best()}, NME {100 * result.nme():.2f} %", flush=True)
    return result


def _model(way: Way, faces: Faces, recipe: DenseRecipe) -> nn.Module:
    if way.loss in COORDINATES:
        return ResNet(training.mean_shape(faces.train), recipe.size, **recipe.resnet)
    return UNet(recipe.landmarks, **recipe.unet)


def _descend(
    way: Way, model: nn.Module, faces: Faces, seed: int, recipe: DenseRecipe, device: torch.device
) -> tuple[list[float], list[float]]:
    """Trains; the loss and the seconds of each step, the batch's drawing included."""
    descent = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    augment = data.Augment(recipe.size, flip=faces.flip, **recipe.augment)
    losses: list[float] = []
    times: list[float] = []
    order: list[int] = []
    bar, start = report.Bar(str(way), 1), time.perf_counter()
    model.train()
    while (progress := _progress(len(losses), time.perf_counter() - start, recipe)) < 1:
        begin = time.perf_counter()
        while len(order) < recipe.batch:
            order += torch.randperm(len(faces.train), generator=generator).tolist()
        rows, order = order[: recipe.batch], order[recipe.batch :]
        images, points = augment(*faces.train.batch(rows), generator)
        factor = learning_rate_factor("cosine", progress) * min(1.0, (progress + 0.001) / recipe.warmup)
        descent.param_groups[0]["lr"] = recipe.rate * factor
        descent.zero_grad()
        loss = _loss(way, model(images.to(device)), points.to(device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(float(norm)):
            raise training.TrainingError(
                f"{way}: the loss is {losses[-1]} and its gradient's norm {float(norm)} in step {len(losses)}"
            )
        descent.step()
        times.append(time.perf_counter() - begin)
        bar.show(max(progress, 1e-9), f"loss {losses[-1]:.4g}")
    bar.close()
    return losses, times


def _progress(steps: int, seconds: float, recipe: DenseRecipe) -> float:
    """Of a training, 1 at its end; there is always a first step."""
    if recipe.minutes is None:
        return steps / recipe.steps
    return seconds / (60 * recipe.minutes) if steps else 0.0


def _loss(way: Way, output: Tensor, points: Tensor) -> Tensor:
    if way.loss in COORDINATES:
        return LOSSES[way.loss](output, points)
    return LOSSES[way.loss](output, points, way.sigma)


@torch.no_grad()
def _predict(
    way: Way, model: nn.Module, held_out: data.Cached, recipe: DenseRecipe, device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Points [N, P, 2] by decoding, image pixels, and the first face's heatmaps [P, S, S]."""
    model.eval()
    plain = data.Plain(recipe.size)
    found: dict[str, list[Tensor]] = {}
    kept: Tensor | None = None
    for rows in torch.arange(len(held_out)).split(recipe.batch):
        output = model(plain(*held_out.batch(rows))[0].to(device))
        if way.loss in COORDINATES:
            found.setdefault("coordinates", []).append(output.cpu())
            continue
        kept = _peaked(output, way)[0].cpu() if kept is None else kept
        for decoding, decode in DECODINGS.items():
            found.setdefault(decoding, []).append(decode(output, way).cpu())
    return {decoding: torch.cat(parts) for decoding, parts in found.items()}, kept


def _errors(pred: Tensor, truth: Tensor, known: bool) -> dict[str, float]:
    """mse: mean square of the distance, pixels squared. nme: mean over faces, a fraction."""
    square = (pred.double() - truth.double()).square().sum(-1).mean()
    return {"mse": float(square), "nme": float(_nme(pred, truth, known).nanmean())}


def _nme(pred: Tensor, truth: Tensor, known: bool) -> Tensor:
    """[N]: by the distance of the outer eye corners where the 68 come first, else by the landmarks' box."""
    distance = metrics.normalizer_distance(truth[:, :68] if known else truth, "inter_ocular" if known else "box")
    return metrics.nme(pred, truth, distance)


class _Memory:
    """Peak memory since it was made, beyond what stood before: resident on the CPU, the allocator's on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0.0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 2**20
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self.before = math.nan
            return
        self.before = _status("VmRSS")

    def megabytes(self) -> float | None:
        """None where the system does not tell."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before, 1)
        return None if math.isnan(self.before) else round(_status("VmHWM") - self.before, 1)


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _write(
    out: Path,
    name: str,
    faces: Faces,
    reader: dict[str, float] | None,
    results: dict[str, Result],
    seed: int,
    recipe: DenseRecipe,
    device: str,
) -> dict[str, Any]:
    images, truth = faces.held_out.batch(range(len(faces.held_out)))
    mean = training.mean_shape(faces.train).expand_as(truth)
    summary: dict[str, Any] = {
        "data": name,
        "train": len(faces.train),
        "held_out": len(faces.held_out),
        "rule": "held out: index % 10 == 9",
        "normalizer": "inter_ocular" if faces.known else "box",
        "seed": seed,
        "machine": {
            "processor": processor(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipe": asdict(recipe),
        "reader": reader,
        "mean_shape": _errors(mean, truth, faces.known),
        "trainings": {way: result.row for way, result in results.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    rows = report.spread_indices(len(truth), recipe.shown)
    report.save_png(out / "predictions.png", _predictions(images[rows], truth[rows], rows, results, faces.known))
    report.save_png(out / "heatmaps.png", _heatmaps(images[0], truth[0], results))
    report.save_png(out / "errors.png", _error_panels(results, summary))
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "results.md", _markdown(summary))
    return summary


def _markdown(summary: dict[str, Any]) -> str:
    recipe, machine, reader = (summary[key] for key in ("recipe", "machine", "reader"))
    length = f"{recipe['steps']} steps" if recipe["minutes"] is None else f"{recipe['minutes']:g} minutes"
    where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    lines = [
        f"# {recipe['landmarks']} landmarks: coordinates against heatmaps",
        "",
        f"{summary['train']} faces to train, {summary['held_out']} held out ({summary['rule'][10:]}), "
        f"{recipe['size']} x {recipe['size']} pixels, {recipe['batch']} faces a step, {length} each, seed "
        f"{summary['seed']}; {where}, {machine['threads']} threads, PyTorch {machine['torch']}. Cells: mean squared "
        f"distance in pixels squared, NME ({summary['normalizer']}). Reader: {_speed(reader)}; the column is its share "
        "of a step.",
        "",
        f"| training | steps | seconds a step | peak memory, MB | reader | coordinates | {' | '.join(DECODINGS)} |",
        f"|---|{'---|' * (5 + len(DECODINGS))}",
    ]
    for way, row in summary["trainings"].items():
        peak = "" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        share = "" if row["reader_share"] is None else f"{100 * row['reader_share']:.1f} %"
        cells = [str(row["steps"]), f"{row['seconds_a_step']:.3f}", peak, share]
        cells += [_cell(row["decodings"].get(decoding)) for decoding in ("coordinates", *DECODINGS)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines.append(f"| mean shape | | | | | {_cell(summary['mean_shape'])} |{' |' * len(DECODINGS)}")
    pictures = [f"![{picture}]({picture}.png)" for picture in ("predictions", "heatmaps", "errors")]
    return "\n".join([*lines, "", *pictures]) + "\n"


def _speed(reader: dict[str, float] | None) -> str:
    if reader is None:
        return "not measured, pyarrow is missing"
    return f"{reader['images_a_second']:.0f} images a second in one thread"


def _cell(errors: dict[str, float] | None) -> str:
    return "" if errors is None else f"{errors['mse']:.2f}, {100 * errors['nme']:.2f} %"


def _predictions(images: Tensor, truth: Tensor, rows: Tensor, results: dict[str, Result], known: bool) -> np.ndarray:
    """A row a training at its best decoding, a column a face: predictions in colour over the truth in white."""
    colours = _colours(truth.shape[1], known)
    figure = Figure(figsize=(1.5 * len(images) + 1.7, 1.52 * len(results)), dpi=100)
    figure.patch.set_facecolor("#181818")
    grid = figure.subplots(len(results), len(images), squeeze=False)
    figure.subplots_adjust(1.7 / figure.get_figwidth(), 0.002, 0.998, 0.998, 0.02, 0.02)
    for line, (way, result) in zip(grid, results.items(), strict=True):
        best = result.best()
        label = "\n".join([*dict.fromkeys([*way.split(", "), best]), f"NME {100 * result.nme():.2f} %"])
        line[0].text(-0.04, 0.5, label, transform=line[0].transAxes, color="white", fontsize=9, ha="right", va="center")
        for axes, image, true, pred in zip(line, images, truth, result.points[best][rows], strict=True):
            _face(axes, image)
            _dots(axes, true, "white", 1.6)
            _dots(axes, pred, colours, 2.2)
    return _rgb(figure)


def _heatmaps(image: Tensor, truth: Tensor, results: dict[str, Result]) -> np.ndarray:
    """A column a training: the highest of all maps over the face; one landmark's map, and the target that it had."""
    shown = {way: result for way, result in results.items() if result.maps is not None}
    landmark = 36 if len(truth) > 36 else 0
    figure = Figure(figsize=(2.1 * len(shown) + 0.35, 6.7), dpi=100, layout="constrained")
    grid = figure.subplots(3, len(shown), squeeze=False)
    for column, (way, result) in zip(grid.T, shown.items(), strict=True):
        assert result.maps is not None
        size = image.shape[1], image.shape[2]
        target = ff.render_gaussian(truth[None, landmark : landmark + 1], result.row["sigma"], size)
        _face(column[0], image)
        highest = result.maps.amax(0).clamp(0, 1).numpy()
        column[0].imshow(highest, cmap="inferno", vmin=0, vmax=1, alpha=0.35 + 0.6 * highest)
        column[0].set_title(way, fontsize=9)
        decoded = result.points[result.best()][0, landmark]
        for axes, shades in zip(column[1:], (result.maps[landmark], target[0, 0]), strict=True):
            axes.imshow(shades.numpy(), cmap="inferno", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.plot(*truth[landmark].tolist(), "+", color="#35c2ff", ms=9, label="truth")
        column[1].plot(*decoded.tolist(), "o", mfc="none", mec="#3df29b", ms=6, label=result.best())
        column[1].legend(fontsize=7, loc="lower right", framealpha=0.7)
    for axes, label in zip(
        grid[:, 0], ("highest of all maps", f"map of landmark {landmark}", "its target"), strict=True
    ):
        axes.set_ylabel(label, fontsize=9)
    return _rgb(figure)


def _error_panels(results: dict[str, Result], summary: dict[str, Any]) -> np.ndarray:
    """NME by training and decoding; the course of the losses."""
    figure = Figure(figsize=(13, 5.2), dpi=100, layout="constrained")
    errors, courses = figure.subplots(1, 2, width_ratios=(1.25, 1))
    series = dict(zip(("coordinates", *DECODINGS), ("#222222", *draw.SERIES), strict=True))
    for (decoding, colour), mark in zip(series.items(), "sovD^<>", strict=True):
        found = [
            (100 * result.row["decodings"][decoding]["nme"], i)
            for i, result in enumerate(results.values())
            if decoding in result.points
        ]
        # Marks of a training are set apart, so that equal errors do not hide each other.
        rise = 0.0 if decoding == "coordinates" else 0.11 * (list(DECODINGS).index(decoding) - 2.5)
        errors.plot([x for x, _ in found], [y + rise for _, y in found], mark, color=colour, ms=5.5, label=decoding)
    errors.axvline(100 * summary["mean_shape"]["nme"], color="#999999", ls="--", lw=0.9, label="mean shape")
    errors.set(xscale="log", xlabel=f"held-out NME ({summary['normalizer']}), %")
    errors.set_yticks(range(len(results)), list(results))
    errors.invert_yaxis()
    for colour, (way, result) in zip((*draw.SERIES, "#222222", "#999999"), results.items(), strict=False):
        width = max(1, len(result.losses) // 25)
        smooth = np.convolve(result.losses, np.ones(width) / width, mode="valid")
        courses.plot(np.linspace(0, 100, len(smooth)), smooth / smooth[0], color=colour, lw=1.3, label=way)
    courses.set(xlabel="of the training, %", ylabel="loss, over its start", yscale="log")
    for axes, axis, columns in ((errors, errors.xaxis, 4), (courses, courses.yaxis, 3)):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=columns, columnspacing=1
        )
    return _rgb(figure)


def _colours(landmarks: int, known: bool) -> list[str]:
    """Of each landmark, by the part of the face where that is known."""
    if not known:
        return [draw.PALETTE["eyes"]] * landmarks
    part = {index: colour for name, colour in draw.PALETTE.items() for index in data.REGIONS_68[name]}
    inner = zip(dense.SEGMENTS_68, dense.allotment(landmarks), strict=True)
    return [part[i] for i in range(68)] + [part[first] for (first, _), count in inner for _ in range(count)]


def _face(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="bicubic")
    axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))


def _dots(axes: Axes, points: Tensor, colours: Any, size: float) -> None:
    """Discs of `size` pixels; markers would be rounded to whole pixels."""
    across = np.full(len(points), size)
    discs = EllipseCollection(
        across, across, np.zeros(len(points)), units="dots", offsets=points.numpy(), transOffset=axes.transData
    )
    discs.set(facecolor=colours, edgecolor="none")
    axes.add_collection(discs)


def _rgb(figure: Figure) -> np.ndarray:
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(prog="fastforest.recipes.dense", description="Dense landmarks: coordinates against heatmaps.")
    parser.add_argument("--data", default="synthetic", metavar="synthetic|DIR|FILE.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="971 landmarks on 128 x 128 pixels, 32 faces a step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole(1), help="of each of 8 trainings (default: 600; full: 4000)")
    length.add_argument("--minutes", type=real(0), help="of each training, instead of steps")
    parser.add_argument("--size", type=whole(8), help="side of images and maps, pixels (default: 48; full: 128)")
    parser.add_argument("--landmarks", type=whole(1), help="at least 68 (default: 136; full: 971; a table has its own)")
    parser.add_argument("--batch", type=whole(2), help="faces a step (default: 8; full: 32)")
    parser.add_argument("--faces", type=whole(20), help="synthetic: how many (default: 1000; full: 4000)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of faces, weights, order (default: 0)")
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)

    def report_results() -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: this PyTorch finds no CUDA device")
        summary = run(
            options.data,
            options.out,
            options.seed,
            _chosen(options),
            landmarks=options.landmarks,
            device=options.device,
        )
        print(_markdown(summary))
        print(f"written to {options.out}")

    return guarded(report_results, options)


def _chosen(options: argparse.Namespace) -> DenseRecipe:
    names = ("minutes", "steps", "size", "batch", "faces")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(FULL if options.full else DenseRecipe(), **given)


if __name__ == "__main__":
    sys.exit(main())
