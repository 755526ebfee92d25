"""Landmarks of faces, the forest against the dense heatmap: python -m fastforest.recipes.faces --data DIR --out DIR.

Trains `LandmarkForest`, then `DenseHeatmap`, with the same backbone, augmentation and time, on nine tenths of a set;
evaluates both on the held-out tenth (index % 10 == 9); writes

    results.json results.md curves.png ced.png predictions_forest.png predictions_dense.png
    forest/ dense/              the runs: checkpoint.pt, metrics.jsonl, a picture a round
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import data, draw, metrics, training
from ..cli.common import BadInput, Parser, build_model, check_writable, guarded, real, whole
from ..training import report
from ..training.checkpoint import write_text

__all__ = ["FacesRecipe", "main", "processor", "run"]


@dataclass(frozen=True)
class FacesRecipe:
    """All that is chosen by hand. What is not named here is the default of the models and of `TrainConfig`.

    size: side of the images, pixels. models: by name, keywords of the models' configuration; what both must share, the
    backbone's, stands in `backbone`. training: keywords of `TrainConfig` for both; `training_of` for one of them.
    augment: keywords of `data.Augment` for both.
    """

    size: int = 96
    backbone: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {"forest": {}, "dense": {}})
    training: dict[str, Any] = field(default_factory=lambda: {"amp": True, "steps": 228, "warmup": 100})
    augment: dict[str, Any] = field(default_factory=lambda: {"rotation": 20.0, "scale": 0.1, "shift": 0.04})
    training_of: dict[str, dict[str, Any]] = field(default_factory=lambda: {"forest": {}, "dense": {}})


class Result(NamedTuple):
    """One trained model on the held-out faces. points: [N, P, 2], pixels. errors: NME [N], fractions."""

    history: training.History
    metrics: metrics.Metrics
    points: Tensor
    errors: Tensor
    weights: int


def run(name: str, out: Path, minutes: float, seed: int = 0, recipe: FacesRecipe | None = None) -> dict[str, Any]:
    """The whole recipe; returns what results.json holds.

    Args:
        name: "synthetic" or a folder, as `data.open_dataset`.
        out: folder for the results, made if missing.
        minutes: of training for each model, evaluations included.
        seed: of weights, order and augmentation.

    Raises:
        DataError: the set cannot be used. BadInput: out holds a run already. TrainingError: as `training.fit`.
    """
    recipe = recipe or FacesRecipe()
    check_writable(out)
    taken = next((out / model for model in recipe.models if (out / model / "checkpoint.pt").exists()), None)
    if taken is not None:
        raise BadInput(f"{taken}: holds a run already, choose another --out")
    faces = training.training_sets(data.open_dataset(name, size=recipe.size), recipe.size, name)
    results = {model: _train(model, faces, out / model, minutes, seed, recipe) for model in recipe.models}
    return _write(out, name, faces, results, minutes, seed, recipe)


def _train(
    name: str, faces: tuple[data.Cached, data.Cached], out: Path, minutes: float, seed: int, recipe: FacesRecipe
) -> Result:
    train, held_out = faces
    shape = training.mean_shape(train)
    config = training.TrainConfig(minutes=minutes, seed=seed, **(recipe.training | recipe.training_of.get(name, {})))
    given = {"landmarks": len(shape), "mean_shape": shape.tolist(), "image_size": recipe.size}
    torch.manual_seed(seed)
    model = build_model(name, given | recipe.backbone | recipe.models[name])
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {weights:,} weights, {len(train)} faces, {len(held_out)} held out, {minutes:g} minutes", flush=True)
    flip = data.FLIP_68 if len(shape) == len(data.FLIP_68) else None
    augment = data.Augment(recipe.size, flip=flip, **recipe.augment)
    history = training.fit(
        model,
        train,
        held_out,
        config,
        out,
        augment=augment,
        on_round=lambda record: print(report.round_line(record), flush=True),
    )
    pred, truth = training.predict(model, held_out)
    kind = training.default_normalizer(len(shape))
    found = metrics.evaluate(pred, truth, kind, config.threshold)
    print(f"{name}: {found}", flush=True)
    return Result(history, found, pred, metrics.nme(pred, truth, kind), weights)


def _write(
    out: Path,
    name: str,
    faces: tuple[data.Cached, data.Cached],
    results: dict[str, Result],
    minutes: float,
    seed: int,
    recipe: FacesRecipe,
) -> dict[str, Any]:
    train, held_out = faces
    first = next(iter(results.values())).metrics
    kind, threshold = first.normalizer, first.threshold
    truth = held_out.batch(range(len(held_out)))[1]
    floor = metrics.evaluate(training.mean_shape(train).expand_as(truth), truth, kind, threshold)
    summary: dict[str, Any] = {
        "data": name,
        "train": len(train),
        "held_out": len(held_out),
        "rule": "held out: index % 10 == 9",
        "minutes": minutes,
        "seed": seed,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipe": asdict(recipe),
        "mean_shape": floor.as_dict(),
        "models": {
            model: result.metrics.as_dict()
            | {"weights": result.weights, "rounds": len(result.history.rounds)}
            | {key: result.history.last[key] for key in ("step", "seconds")}
            for model, result in results.items()
        },
    }
    title = f"{len(held_out)} held-out faces"
    curves = draw.curves_figure({model: result.history.rounds for model, result in results.items()}, kind)
    report.save_png(out / "curves.png", curves)
    errors = {model: result.errors for model, result in results.items()}
    report.save_png(out / "ced.png", draw.ced_figure(errors, kind, threshold, title))
    rows = report.spread_indices(len(held_out))
    images, truths = held_out.batch(rows)
    for model, result in results.items():
        caption = f"{model}: {result.metrics}"
        picture = report.sheet(images, result.points[rows], truths, result.errors[rows], caption)
        report.save_png(out / f"predictions_{model}.png", picture)
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "results.md", _markdown(summary))
    return summary


def _markdown(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    keys = [key for key in summary["mean_shape"] if "[" in key]
    lines = [
        "# Faces: the forest against the dense heatmap",
        "",
        f"{summary['train']} faces to train, {summary['held_out']} held out (index % 10 == 9), "
        f"{summary['minutes']:g} minutes each, seed {summary['seed']}; {machine['processor']}, "
        f"{machine['threads']} threads, PyTorch {machine['torch']}.",
        "",
        f"| model | {' | '.join(keys)} | weights | rounds | steps | minutes |",
        f"|---|{'---|' * (len(keys) + 4)}",
    ]
    for model, row in summary["models"].items():
        cells = [f"{100 * row[key]:.2f} %" for key in keys]
        cells += [f"{row['weights']:,}", str(row["rounds"]), str(row["step"]), f"{row['seconds'] / 60:.1f}"]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    floor = [f"{100 * summary['mean_shape'][key]:.2f} %" for key in keys]
    lines.append(f"| mean shape | {' | '.join(floor)} | | | | |")
    pictures = ["curves", "ced", *(f"predictions_{model}" for model in summary["models"])]
    lines += ["", *(f"![{picture}]({picture}.png)" for picture in pictures)]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(prog="fastforest.recipes.faces", description="The forest against the dense heatmap on faces.")
    parser.add_argument("--data", required=True, metavar="synthetic|DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=real(0), default=20.0, help="for each model (default: 20)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    options = parser.parse_args(arguments)

    def report_results() -> None:
        summary = run(options.data, options.out, options.minutes, options.seed)
        print(_markdown(summary))
        print(f"written to {options.out}")

    return guarded(report_results, options)


if __name__ == "__main__":
    sys.exit(main())
