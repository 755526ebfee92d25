"""Heads side by side, and the questions of forest regression answered by training:

    python -m fastforest.recipes.ablation heads --data DIR --minutes 60 --out DIR
    python -m fastforest.recipes.ablation questions --data DIR --minutes 90 --out DIR

"heads" trains every head on one backbone, with one augmentation and equal time, and decodes the dense heatmaps in two
ways. "questions" changes one thing at a time, with several seeds a row. All on nine tenths of a set (index % 10 != 9); the
rest is held out. The minutes are of all trainings together. A command that was interrupted goes on where it was, a training
at its last round. Written to --out, after every seed anew:

    results.json results.md table.png    rows with the spread over seeds
    ced.png curves.png                   of the heads
    runs/                                a folder a training: checkpoint.pt, metrics.jsonl, pictures a round
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import data, draw, metrics, training
from ..cli.common import BadInput, Parser, build_model, check_writable, device, guarded, real, whole
from ..training import report
from ..training.checkpoint import write_text
from ._machine import machine

__all__ = ["HEADS", "QUESTIONS", "Recipe", "Row", "main", "run"]


@dataclass(frozen=True)
class Row:
    """One line of a table: what is trained, and how its output is decoded.

    label: in the table. model: name for `models.build`. options: of its constructor. training: of `TrainConfig`. decode: of
    the dense heatmaps, or None. Rows that differ in decode alone share their training.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    decode: str | None = None

    def key(self) -> str:
        """Of the training: equal for rows that share it; fit for a folder's name."""
        parts = [f"{name}={value}" for name, value in (*self.options.items(), *self.training.items())]
        return re.sub(r"[^\w=.-]+", "-", "_".join([self.model, *parts])).strip("-")


TWO_STAGES = Row("two pools, coarse and fine (LandmarkForest)", "forest")
HEATMAP_FOREST = Row("HeatmapForest, residual to the mean face", "heatmap_forest")
POOL = Row("LeafPool", "pool", {"residual": False})
RESIDUAL = Row("LeafPool, residual to the mean face", "pool", {"residual": True})
DENSE = Row("dense heatmap + soft-argmax", "dense", decode="soft_argmax")

HEADS: dict[str, tuple[Row, ...]] = {
    "heads": (
        Row("coordinate regression", "coordinates"),
        DENSE,
        Row("dense heatmap + quarter shift", "dense", decode="quarter"),
        HEATMAP_FOREST,
        POOL,
        RESIDUAL,
        TWO_STAGES,
    )
}
"""One table of one question: which head."""


def _pool(label: str, training: Mapping[str, Any] | None = None, **options: Any) -> Row:
    return Row(label, "pool", {"residual": True, **options}, training or {})


QUESTIONS: dict[str, tuple[Row, ...]] = {
    "Is the number of leaves the bottleneck?": tuple(_pool(f"{n} leaves", leaves=n) for n in (16, 64, 256, 1024)),
    "Does a shared pool need fewer leaves than grouped forests?": (
        *(_pool(f"one pool of {n}", leaves=n) for n in (64, 256)),
        *(
            Row(f"{words}, 5 trees of {2**depth}", "heatmap_forest", {"groups": groups, "depth": depth})
            for depth in (4, 6)
            for words, groups in (("one group", 1), ("five groups", 5))
        ),
    ),
    "Which loss, with which leaf update?": (
        _pool("KL, bounding", leaves=256),
        _pool("L2, least squares", leaves=256, objective="l2"),
        _pool("two-sided KL, bounding", leaves=256, objective="two_sided"),
    ),
    "Does annealing the trees' steepness help?": (
        _pool("trees, steepness 1", leaves=256, selection="forest"),
        _pool("trees, 1 to 3", {"steepness": (1.0, 3.0)}, leaves=256, selection="forest"),
        _pool("trees, 1 to 10", {"steepness": (1.0, 10.0)}, leaves=256, selection="forest"),
        _pool("for reference: softmax, no trees", leaves=256),
    ),
    "Does it help to predict the residual to the mean face?": (
        _pool("offsets from the mean face", leaves=256),
        # Pixels of the same size: the image's side against 0.6 of it on 32.
        Row("places in the image", "pool", {"residual": False, "leaves": 256, "canvas": 53}),
    ),
    "How should heatmaps be decoded?": tuple(
        Row(label, "dense", decode=decode)
        for label, decode in (
            ("highest pixel", "argmax"),
            ("quarter shift", "quarter"),
            ("DARK", "dark"),
            ("soft-argmax in a window", "soft_argmax"),
        )
    ),
    "Do pretrained dense heatmaps help the trees?": (
        Row("from scratch", "heatmap_forest"),
        Row("a third of the time on heatmaps", "heatmap_forest", {"pretrain": True}, {"pretrain": 1 / 3}),
    ),
    "How wide should the targets be?": (
        _pool("sigma 0.75", leaves=256, sigma=0.75),
        _pool("sigma 1.5", leaves=256),
        _pool("sigma 3", leaves=256, sigma=3.0),
    ),
}
"""The questions that the library grew from. Rows of one question differ in what it asks, but for those for reference and
those that set a pool, which trains its mixture, against forests, whose trees are trained each by itself."""


@dataclass(frozen=True)
class Recipe:
    """All that is chosen by hand; what is not named is the default of the models, of `TrainConfig` and `Augment`.

    size: of the images, pixels. training: of every row, before its own. augment: of every row. backbone: options of every
    model, before its own.
    """

    size: int = 96
    training: Mapping[str, Any] = field(default_factory=lambda: {"amp": True, "steps": 228, "warmup": 100})
    augment: Mapping[str, Any] = field(default_factory=lambda: {"rotation": 20.0, "scale": 0.1, "shift": 0.04})
    backbone: Mapping[str, Any] = field(default_factory=dict)


class Trained(NamedTuple):
    """One training, on the held-out faces. points: by decode, [N, P, 2] pixels."""

    history: training.History
    points: dict[str | None, Tensor]
    weights: int


def run(
    table: Mapping[str, Sequence[Row]],
    name: str,
    out: Path,
    minutes: float,
    *,
    seeds: int = 1,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Trains what is not trained yet, and returns what results.json holds.

    Args:
        table: by question, its rows.
        name: "synthetic" or a data set, as `data.open_dataset`.
        out: folder for the results, made if missing; a run of the same rows and recipe in it is continued.
        minutes: of all trainings together, evaluations included, each of them getting the same.
        seeds: 0, 1, ..., of weights, order and augmentation.

    Raises:
        DataError: the set cannot be used. BadInput: out holds a run with other settings. TrainingError: as `training.fit`.
    """
    recipe = recipe or Recipe()
    check_writable(out)
    faces = training.training_sets(data.open_dataset(name, size=recipe.size), recipe.size, name)
    jobs = {row.key(): row for rows in table.values() for row in rows}
    count = len(jobs) * seeds
    each = minutes / count
    _same_settings(out, {"data": name, "minutes": each, **asdict(recipe)})
    done: dict[tuple[str, int], Trained] = {}
    summary: dict[str, Any] = {}
    # Seed by seed, each with its results, so that an interrupted run has a table with every row.
    for seed in range(seeds):
        for key, row in jobs.items():
            decodes = {row.decode for rows in table.values() for row in rows if row.key() == key}
            print(f"{len(done) + 1} of {count}: {key}, seed {seed}, {each:.1f} minutes", flush=True)
            folder = out / "runs" / f"{key}-{seed}"
            done[key, seed] = _trained(row, decodes, faces, folder, each, seed, recipe, device)
        summary = _write(table, done, faces, out, name, each, seed + 1, recipe)
    return summary


def _trained(
    row: Row,
    decodes: Iterable[str | None],
    faces: tuple[data.Cached, data.Cached],
    out: Path,
    minutes: float,
    seed: int,
    recipe: Recipe,
    device: torch.device | str,
) -> Trained:
    train, held_out = faces
    shape = training.mean_shape(train)
    settings = training.TrainConfig(minutes=minutes, seed=seed, **(dict(recipe.training) | dict(row.training)))
    given = {"landmarks": len(shape), "mean_shape": shape.tolist(), "image_size": recipe.size}
    marker = out / "finished"
    if marker.exists():
        saved = training.load(out / "checkpoint.pt")
        model: Any = saved.build(out / "checkpoint.pt").to(device)
        history = training.History(saved.history)
    else:
        torch.manual_seed(seed)
        model = build_model(row.model, given | dict(recipe.backbone) | dict(row.options), train).to(device)
        layout = data.layout_of(len(shape))
        history = training.fit(
            model,
            train,
            held_out,
            settings,
            out,
            resume=(out / "checkpoint.pt").exists(),
            augment=data.Augment(recipe.size, flip=layout.flip if layout else None, **recipe.augment),
            on_round=lambda record: print(report.round_line(record), flush=True),
        )
        write_text(marker, "")
    points: dict[str | None, Tensor] = {}
    for decode in decodes:
        if decode is not None:
            model.decode = decode
        points[decode] = training.predict(model, held_out)[0]
    return Trained(history, points, sum(parameter.numel() for parameter in model.parameters()))


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes them in `out`; refuses another run's. What an older file does not hold is not compared."""
    path, text = out / "settings.json", json.dumps(settings)
    if path.exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        for name, value in json.loads(text).items():
            if then.get(name, value) != value:
                raise BadInput(f"{path}: was begun with {name} = {then[name]}, got {value}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


def _write(
    table: Mapping[str, Sequence[Row]],
    done: Mapping[tuple[str, int], Trained],
    faces: tuple[data.Cached, data.Cached],
    out: Path,
    name: str,
    minutes: float,
    seeds: int,
    recipe: Recipe,
) -> dict[str, Any]:
    train, held_out = faces
    truth = held_out.batch(range(len(held_out)))[1]
    kind = training.default_normalizer(truth.shape[1])
    floor = metrics.evaluate(training.mean_shape(train).expand_as(truth), truth, kind)
    summary: dict[str, Any] = {
        "data": name,
        "train": len(train),
        "held_out": len(held_out),
        "rule": "held out: index % 10 == 9",
        "normalizer": kind,
        "minutes": minutes,
        "seeds": seeds,
        "size": recipe.size,
        "machine": machine(),
        "mean_shape": floor.as_dict(),
        "questions": {
            question: [_line(row, done, truth, kind, seeds) for row in rows] for question, rows in table.items()
        },
    }
    report.save_png(out / "table.png", _figure(summary))
    if len(table) == 1:
        rows = next(iter(table.values()))
        first = {row.label: done[row.key(), 0] for row in rows}
        errors = {row.label: metrics.nme(first[row.label].points[row.decode], truth, kind) for row in rows}
        report.save_png(out / "ced.png", draw.ced_figure(errors, kind, title=f"{len(truth)} held-out faces"))
        histories = {label: one.history.rounds for label, one in first.items()}
        report.save_png(out / "curves.png", draw.curves_figure(histories, kind))
    write_text(out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "results.md", markdown(summary))
    return summary


def _line(row: Row, done: Mapping[tuple[str, int], Trained], truth: Tensor, kind: str, seeds: int) -> dict[str, Any]:
    """A row's figures: of every seed, fractions."""
    runs = [done[row.key(), seed] for seed in range(seeds)]
    found = [metrics.evaluate(one.points[row.decode], truth, kind) for one in runs]
    return {
        "label": row.label,
        "model": row.model,
        "options": dict(row.options),
        "training": {key: list(v) if isinstance(v, tuple) else v for key, v in row.training.items()},
        "decode": row.decode,
        "weights": runs[0].weights,
        "nme": [one.nme for one in found],
        "failure_rate": [one.failure_rate for one in found],
        "auc": [one.auc for one in found],
        "steps": [one.history.last["step"] for one in runs],
        "dead_leaves": [one.history.last["dead_leaves"] for one in runs],
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables of `run`'s result."""
    where, seeds = summary["machine"], summary["seeds"]
    spread = f"mean +- standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        f"{summary['train']} faces to train, {summary['held_out']} held out ({summary['rule']}), {summary['size']} x "
        f"{summary['size']} pixels, {summary['minutes']:.1f} minutes a training, {spread}; NME by "
        f"{summary['normalizer']}; {where.get('device', where['processor'])}, {where['threads']} threads, PyTorch "
        f"{where['torch']}.",
    ]
    for question, rows in summary["questions"].items():
        lines += [
            "",
            f"**{question}**" if len(summary["questions"]) > 1 else "",
            "| | NME | FR at 8 % | AUC at 8 % | weights | steps |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [_percent(row[key]) for key in ("nme", "failure_rate", "auc")]
            steps = round(float(np.mean(row["steps"])))
            lines.append(f"| {row['label']} | {' | '.join(cells)} | {row['weights']:,} | {steps:,} |")
        floor = list(summary["mean_shape"].values())[:3]
        lines.append(f"| the mean shape | {' | '.join(_percent([value]) for value in floor)} | | |")
    return "\n".join(lines) + "\n"


def _percent(values: Sequence[float]) -> str:
    """
    >>> _percent([0.05, 0.06]), _percent([0.05])
    ('5.50 +- 0.71 %', '5.00 %')
    """
    percent = 100 * np.asarray(values, dtype=np.float64)
    if len(percent) == 1:
        return f"{percent[0]:.2f} %"
    return f"{percent.mean():.2f} +- {percent.std(ddof=1):.2f} %"


def _figure(summary: Mapping[str, Any]) -> np.ndarray:
    rows = {
        question: {row["label"]: [100 * value for value in row["nme"]] for row in lines}
        for question, lines in summary["questions"].items()
    }
    return draw.rows_figure(rows, f"held-out NME[{summary['normalizer']}], %")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as `python -m fastforest`."""
    parser = Parser(
        prog="fastforest.recipes.ablation", description="Heads side by side; questions answered by training."
    )
    parser.add_argument("table", choices=("heads", "questions"))
    parser.add_argument("--data", required=True, metavar="synthetic|DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=real(0), default=60.0, help="of all trainings together (default: 60)")
    parser.add_argument("--seeds", type=whole(1), help="of each row (default: 1 for heads, 2 for questions)")
    parser.add_argument("--only", metavar="WORDS", help="questions, or heads, whose name holds these words")
    parser.add_argument("--size", type=whole(32), default=Recipe.size, help="side of the images, pixels (default: 96)")
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)

    def report_results() -> None:
        table, seeds = (HEADS, 1) if options.table == "heads" else (QUESTIONS, 2)
        summary = run(
            _chosen(table, options.only),
            options.data,
            options.out,
            options.minutes,
            seeds=options.seeds or seeds,
            recipe=Recipe(size=options.size),
            device=device(options.device),
        )
        print(markdown(summary))
        print(f"written to {options.out}")

    return guarded(report_results, options)


def _chosen(table: Mapping[str, Sequence[Row]], words: str | None) -> dict[str, tuple[Row, ...]]:
    """The questions that hold the words, or else the rows that do."""
    if words is None:
        return {question: tuple(rows) for question, rows in table.items()}
    wanted = words.lower()
    chosen = {question: tuple(rows) for question, rows in table.items() if wanted in question.lower()}
    if not chosen:
        held = {q: tuple(row for row in rows if wanted in row.label.lower()) for q, rows in table.items()}
        chosen = {question: rows for question, rows in held.items() if rows}
    if not chosen:
        raise BadInput(f"--only {words!r}: no question or row holds these words")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
