"""Scores of faces, five heads on one backbone: python -m fastforest.recipes.score [--data synthetic|DIR] --out DIR.

Trains the same small network with each head: direct regression, without and with noise on its labels; classes of half a
point, one-hot; a label distribution, Gaussian about the score; `LabelDistributionForest`; `GaussianForest`. Every fifth
face is held out. A second group of annotators, whose scale is another, is then fitted with the models frozen: y = k x + b
on one half of the held-out faces, measured on the other. Writes results.json, results.md and score.png.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from .. import data, measures
from ..cli.common import BadInput, Parser, check_writable, guarded, real, whole
from ..models.backbone import Backbone
from ..nn import GaussianForest, LabelDistributionForest
from ..training import report
from ..training.checkpoint import write_text

__all__ = ["HEADS", "ScoreRecipe", "cosine_from_minimum", "grid_quantiles", "main", "run"]

LOW, HIGH = 1.0, 5.0
LEVELS = (0.05, 0.25, 0.75, 0.95)
"""Ends of the 90 % and the 50 % interval."""

INK = "#222222"


@dataclass(frozen=True)
class ScoreRecipe:
    """All that is chosen by hand.

    size: side of the images, pixels. width, code: of the backbone. half_period: epochs in which the learning rate rises
    from `rate` / 100 to `rate`, or falls again; cycles: how often it does both; one more epoch stays at the minimum.
    batch, weight_decay: of AdamW. sigma: deviation of the softened labels, points of the score, on `classes` even steps
    from 1 to 5. trees, depth, units: of the forests. update_every, iterations: of their leaves. floor: least variance of
    a Gaussian leaf, relative to the scores'. label_noise: variance, of the row of regression that has it.
    """

    size: int = 64
    width: int = 12
    code: int = 32
    half_period: int = 4
    cycles: int = 2
    rate: float = 3e-3
    batch: int = 32
    weight_decay: float = 0.05
    sigma: float = 0.15
    classes: int = 33
    trees: int = 5
    depth: int = 5
    units: int = 64
    update_every: int = 25
    iterations: int = 5
    floor: float = 1e-2
    label_noise: float = 0.1


class Regression(nn.Module):
    """One number, squared error."""

    def __init__(self, features: int, recipe: ScoreRecipe) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def start(self, features: Tensor, scores: Tensor) -> None:
        with torch.no_grad():
            self.linear.bias.fill_(float(scores.mean()))

    def loss(self, features: Tensor, scores: Tensor) -> Tensor:
        return functional.mse_loss(self.linear(features)[:, 0], scores)

    def finish(self, features: Tensor, scores: Tensor) -> None:
        """Nothing is fitted in closed form."""

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [N] and, where the head has a spread, their quantiles [N, 4] at `LEVELS`."""
        return self.linear(features)[:, 0], None


class OneHot(Regression):
    """Classes of half a point, cross-entropy, decoded as their expectation."""

    def __init__(self, features: int, recipe: ScoreRecipe) -> None:
        super().__init__(features, recipe)
        edges = torch.arange(LOW, HIGH + 0.25, 0.5)
        self.register_buffer("centres", (edges[1:] + edges[:-1]) / 2)
        self.linear = nn.Linear(features, len(self.centres))

    centres: Tensor

    def start(self, features: Tensor, scores: Tensor) -> None:
        """The bias starts at 0: all classes as likely."""

    def loss(self, features: Tensor, scores: Tensor) -> Tensor:
        classes = (2 * (scores - LOW)).long().clamp(0, len(self.centres) - 1)
        return functional.cross_entropy(self.linear(features), classes)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        prob = self.linear(features).softmax(-1)
        return prob @ self.centres, grid_quantiles(prob, self.centres, LEVELS)


class SoftLabels(OneHot):
    """Fine classes, labels softened by a Gaussian, Kullback-Leibler divergence."""

    def __init__(self, features: int, recipe: ScoreRecipe) -> None:
        super().__init__(features, recipe)
        self.sigma = recipe.sigma
        self.centres = torch.linspace(LOW, HIGH, recipe.classes)
        self.linear = nn.Linear(features, recipe.classes)

    def loss(self, features: Tensor, scores: Tensor) -> Tensor:
        return functional.kl_div(self.linear(features).log_softmax(-1), self.soften(scores), reduction="batchmean")

    def soften(self, scores: Tensor) -> Tensor:
        """[N, C]: a Gaussian about each score, on the classes."""
        return (-0.5 * ((self.centres - scores[:, None]) / self.sigma) ** 2).softmax(-1)


class DistributionForest(SoftLabels):
    """`LabelDistributionForest` on the same softened labels."""

    def __init__(self, features: int, recipe: ScoreRecipe) -> None:
        super().__init__(features, recipe)
        del self.linear
        self.forest = LabelDistributionForest(features, recipe.classes, **_forest(recipe))

    def start(self, features: Tensor, scores: Tensor) -> None:
        self.forest.calibrate(features)
        self.forest.initialize(self.soften(scores))

    def loss(self, features: Tensor, scores: Tensor) -> Tensor:
        return self.forest.loss(features, self.soften(scores))

    def finish(self, features: Tensor, scores: Tensor) -> None:
        _fit_leaves(self.forest, features, self.soften(scores))

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        prob = self.forest(features)
        return prob @ self.centres, grid_quantiles(prob, self.centres, LEVELS)


class GaussianLeaves(Regression):
    """`GaussianForest`, its likelihood."""

    def __init__(self, features: int, recipe: ScoreRecipe) -> None:
        super().__init__(features, recipe)
        del self.linear
        self.forest = GaussianForest(features, 1, floor=recipe.floor, **_forest(recipe))

    def start(self, features: Tensor, scores: Tensor) -> None:
        self.forest.calibrate(features)
        self.forest.initialize(scores[:, None])

    def loss(self, features: Tensor, scores: Tensor) -> Tensor:
        return self.forest.loss(features, scores[:, None])

    def finish(self, features: Tensor, scores: Tensor) -> None:
        _fit_leaves(self.forest, features, scores[:, None])

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        mixture = self.forest.distribution(features)
        return mixture.mean[:, 0], mixture.quantile(torch.tensor(LEVELS))


HEADS: dict[str, Callable[[int, ScoreRecipe], Regression]] = {
    "regression": Regression,
    "regression, label noise": Regression,
    "one-hot classes": OneHot,
    "label distribution": SoftLabels,
    "label-distribution forest": DistributionForest,
    "Gaussian forest": GaussianLeaves,
}


class Result(NamedTuple):
    """On the held-out faces: scores [N], their quantiles [N, 4] or None, and what the table says."""

    pred: Tensor
    quantiles: Tensor | None
    row: dict[str, float | None]


def cosine_from_minimum(step: int, half_period: int, cycles: int, low: float, high: float) -> float:
    """Learning rate of a step: low + (high - low)(1 - cos(pi step / half_period)) / 2, then `low` after the cycles.

    A cosine schedule turned by half a period: it starts at its minimum, so it needs no other warm-up, and at the end of
    every cycle of 2 half_period steps training can stop.

    >>> [round(cosine_from_minimum(step, 2, 1, 0.0, 1.0), 3) for step in range(6)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if step >= 2 * half_period * cycles:
        return low
    return low + (high - low) * (1 - math.cos(math.pi * step / half_period)) / 2


def grid_quantiles(prob: Tensor, centres: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles [N, Q] of distributions [N, C] over even classes, each spread evenly over its class's width.

    >>> grid_quantiles(torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 2.0]), [0.25, 0.5])
    tensor([[1.0000, 1.5000]])
    """
    width = float(centres[1] - centres[0])
    above = prob.cumsum(-1)
    wanted = torch.tensor(levels, dtype=prob.dtype).expand(len(prob), -1).contiguous()
    cell = torch.searchsorted(above, wanted).clamp(max=prob.shape[1] - 1)
    mass = prob.gather(1, cell)
    inside = (wanted - above.gather(1, cell) + mass) / torch.where(mass > 0, mass, 1.0)
    return centres[cell] + width * (inside.clamp(0, 1) - 0.5)


def run(
    name: str,
    out: Path,
    faces: int = 1500,
    seed: int = 0,
    label_noise: float | None = None,
    recipe: ScoreRecipe | None = None,
) -> dict[str, Any]:
    """The whole recipe; returns what results.json holds.

    Args:
        name: "synthetic", or a folder as `data.read_scored_faces`.
        out: folder for the results, made if missing.
        faces: how many are drawn.
        seed: of faces, weights and order.
        label_noise: variance, of every head's labels; None: only of the row that is named so.

    Raises:
        DataError: the folder cannot be used. BadInput: out cannot be written, or too few faces have scores.
    """
    recipe = recipe or ScoreRecipe()
    check_writable(out)
    start = time.monotonic()
    scored = (
        data.synthetic_scored_faces(faces, recipe.size, seed)
        if name == "synthetic"
        else data.read_scored_faces(name, recipe.size)
    )
    known = scored.first.isfinite()
    scored = data.ScoredFaces(*(column[known] for column in scored))
    if len(scored.first) < 20:
        raise BadInput(f"{name}: has {len(scored.first)} faces with scores, needs at least 20")
    held = torch.arange(len(scored.first)) % 5 == 4
    train, test = (data.ScoredFaces(*(column[rows] for column in scored)) for rows in (~held, held))
    print(
        f"{len(train.first)} faces to train, {len(test.first)} held out, {time.monotonic() - start:.0f} s", flush=True
    )
    results = {}
    for head in HEADS:
        noise = label_noise if label_noise is not None else recipe.label_noise if "noise" in head else 0.0
        results[head] = _train(head, train, test, noise, seed, recipe)
    summary = {
        "data": name,
        "train": len(train.first),
        "held_out": len(test.first),
        "seed": seed,
        "label_noise": label_noise,
        "seconds": round(time.monotonic() - start, 1),
        "recipe": asdict(recipe),
        "heads": {head: result.row for head, result in results.items()},
        "mean score": _row(train.first.mean().expand_as(test.first), None, test),
        "true score": None if bool(test.truth.isnan().any()) else _row(test.truth, None, test),
    }
    out.mkdir(parents=True, exist_ok=True)
    report.save_png(out / "score.png", _picture(results, test))
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "results.md", _markdown(summary))
    return summary


def _train(
    name: str, train: data.ScoredFaces, test: data.ScoredFaces, noise: float, seed: int, recipe: ScoreRecipe
) -> Result:
    torch.manual_seed(seed)
    start = time.monotonic()
    backbone = Backbone(recipe.size, width=recipe.width, blocks=(1, 1, 1, 0), code=recipe.code)
    head = HEADS[name](backbone.features, recipe)
    descent = torch.optim.AdamW(
        [*backbone.parameters(), *head.parameters()], recipe.rate, weight_decay=recipe.weight_decay
    )
    batch = min(recipe.batch, len(train.first))
    each = len(train.first) // batch
    total = (2 * recipe.half_period * recipe.cycles + 1) * each
    with torch.no_grad():
        # In training mode: the running averages of the normalisation know nothing yet.
        head.start(backbone(_floats(train.images[: 4 * batch]))[1], train.first)
    bar = report.Bar(name, total)
    step = 0
    while step < total:
        for rows in torch.randperm(len(train.first)).split(batch)[:each]:
            rate = cosine_from_minimum(step, recipe.half_period * each, recipe.cycles, recipe.rate / 100, recipe.rate)
            descent.param_groups[0]["lr"] = rate
            scores = train.first[rows] + noise**0.5 * torch.randn(len(rows))
            descent.zero_grad()
            head.loss(backbone(_augmented(train.images[rows]))[1], scores).backward()
            descent.step()
            step += 1
            bar.show(step)
    bar.close()
    backbone.eval()
    head.eval()
    with torch.no_grad():
        head.finish(_features(backbone, train.images), train.first)
        pred, quantiles = head.predict(_features(backbone, test.images))
    row = _row(pred, quantiles, test) | {"seconds": round(time.monotonic() - start, 1)}
    print(f"{name}: MAE {row['mae']:.3f} in {row['seconds']:.0f} s", flush=True)
    return Result(pred, quantiles, row)


def _row(pred: Tensor, quantiles: Tensor | None, test: data.ScoredFaces) -> dict[str, float | None]:
    """The measures of one head; None where there is nothing to measure."""
    row: dict[str, float | None] = {
        name: value if math.isfinite(value) else None
        for name, value in measures.score_measures(pred, test.first).items()
    }
    if quantiles is not None:
        row["cover_50"] = measures.coverage(quantiles[:, 1], quantiles[:, 2], test.first)
        row["cover_90"] = measures.coverage(quantiles[:, 0], quantiles[:, 3], test.first)
        row["width_90"] = float((quantiles[:, 3] - quantiles[:, 0]).mean())
    seen = test.second.isfinite().nonzero()[:, 0]
    fit, rest = seen[::2], seen[1::2]
    if len(rest) > 1 and bool(pred[fit].amax() > pred[fit].amin()):
        k, b = measures.calibrate_linear(pred[fit], test.second[fit])
        row |= {"k": k, "b": b}
        row["second_before"] = measures.score_measures(pred[rest], test.second[rest])["mae"]
        row["second_after"] = measures.score_measures(k * pred[rest] + b, test.second[rest])["mae"]
    return row


def _forest(recipe: ScoreRecipe) -> dict[str, Any]:
    names = ("trees", "depth", "units", "update_every", "iterations")
    return {name: getattr(recipe, name) for name in names} | {"replay": recipe.batch * recipe.update_every}


def _fit_leaves(forest: Any, features: Tensor, labels: Tensor) -> None:
    """To what will be predicted with: the final network in evaluation mode."""
    for _ in range(20):
        forest.accumulate(features, labels)
        forest.update()


def _features(backbone: Backbone, images: Tensor) -> Tensor:
    return torch.cat([backbone(_floats(part))[1] for part in images.split(128)])


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255


def _augmented(images: Tensor) -> Tensor:
    """Each mirrored or not, which keeps a score; all of them shifted by up to 3 pixels, brighter or darker."""
    mirrored = torch.where((torch.rand(len(images)) < 0.5)[:, None, None, None], images.flip(-1), images)
    size = images.shape[-1]
    x, y = torch.randint(0, 7, (2,)).tolist()
    padded = functional.pad(_floats(mirrored), (3, 3, 3, 3), mode="replicate")
    gain = 1 + 0.2 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    return (padded[..., y : y + size, x : x + size] * gain).clamp(0, 1)


def _markdown(summary: dict[str, Any]) -> str:
    lines = [
        "# Scores of faces",
        "",
        f"{summary['train']} faces to train, {summary['held_out']} held out (index % 5 == 4), seed {summary['seed']}, "
        f"{summary['seconds']:.0f} seconds. Scores from 1 to 5.",
        "",
        "| head | MAE | RMSE | Pearson | in 50 % | in 90 % | width of 90 % | second group: MAE | y = k x + b |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {**summary["heads"], "mean score": summary["mean score"], "true score": summary["true score"]}
    for head, row in rows.items():
        if row is None:
            continue
        cells = [_cell(row, key, "{:.3f}") for key in ("mae", "rmse", "pearson")]
        cells += [_cell(row, key, "{:.1%}") for key in ("cover_50", "cover_90")] + [_cell(row, "width_90", "{:.2f}")]
        calibrated = row.get("k") is not None
        cells.append(f"{row['second_before']:.3f}, calibrated {row['second_after']:.3f}" if calibrated else "")
        cells.append(f"{row['k']:.3f} x {row['b']:+.3f}" if calibrated else "")
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![score](score.png)"]) + "\n"


def _cell(row: dict[str, float | None], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else form.format(value)


def _picture(results: dict[str, Result], test: data.ScoredFaces) -> np.ndarray:
    """A panel a head, predictions against the first group's scores with 90 % intervals; and the second group's line."""
    figure = Figure(figsize=(13, 7.4), dpi=100, layout="constrained")
    grid = figure.subplots(2, 4)
    panels = grid.ravel()
    shown = torch.arange(len(test.first))[: min(len(test.first), 100)]
    for axes, (head, result) in zip(panels, results.items(), strict=False):
        _scatter(axes, head, result, test.first, shown)
    _calibration(panels[len(results)], results["Gaussian forest"], test)
    for axes in panels[len(results) + 1 :]:
        axes.axis("off")
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def _scatter(axes: Axes, head: str, result: Result, truth: Tensor, shown: Tensor) -> None:
    x, y = truth[shown].numpy(), result.pred[shown].numpy()
    if result.quantiles is not None:
        low, high = result.quantiles[shown, 0].numpy(), result.quantiles[shown, 3].numpy()
        axes.vlines(x, low, high, color="#56b4e9", alpha=0.45, linewidth=1.2, label="90 % interval")
    axes.plot(x, y, "o", color="#0072b2", markersize=2.8, label="prediction")
    note = f"MAE {result.row['mae']:.3f}"
    if "cover_90" in result.row:
        note += f", inside {result.row['cover_90']:.0%}"
    _square(axes, f"{head}\n{note}", "score of the first group", "predicted")


def _calibration(axes: Axes, result: Result, test: data.ScoredFaces) -> None:
    if result.row.get("k") is None:
        axes.axis("off")
        return
    k, b = float(result.row["k"] or 0), float(result.row["b"] or 0)
    axes.plot(result.pred.numpy(), test.second.numpy(), "o", color="#009e73", markersize=2.8, label="face")
    ends = np.array([LOW, HIGH])
    axes.plot(ends, k * ends + b, color="#d55e00", label=f"y = {k:.2f} x {b:+.2f}")
    _square(axes, "second group, model frozen\n(Gaussian forest)", "predicted", "score of the second group")


def _square(axes: Axes, title: str, x: str, y: str) -> None:
    axes.plot([LOW, HIGH], [LOW, HIGH], color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(LOW, HIGH), ylim=(LOW, HIGH), xlabel=x, ylabel=y, aspect="equal")
    axes.set_title(title, fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="upper left", handlelength=1.2, borderpad=0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(prog="fastforest.recipes.score", description="Scores of faces: five heads on one backbone.")
    parser.add_argument("--data", default="synthetic", metavar="synthetic|DIR", help="a folder holds scores.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faces", type=whole(20), default=1500, help="synthetic: how many (default: 1500)")
    parser.add_argument("--label-noise", type=real(0), metavar="VARIANCE", help="of all heads' labels (0.1 is usual)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of faces, weights and order (default: 0)")
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    options = parser.parse_args(arguments)

    def report_results() -> None:
        print(_markdown(run(options.data, options.out, options.faces, options.seed, options.label_noise)))
        print(f"written to {options.out}")

    return guarded(report_results, options)


if __name__ == "__main__":
    sys.exit(main())
