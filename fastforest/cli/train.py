"""fastforest train: a model, its checkpoint and a picture a round."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import metrics, training
from ..training import checkpoint, report
from .common import BadInput, add_data, add_machine, build_model, check_writable, device, open_faces, real, whole

__all__ = ["add_arguments", "train"]

DEFAULT_MINUTES = {True: 1.5, False: 20.0}
DEFAULT_SIZE = {True: 64, False: 96}
"""By whether the faces are drawn: the demonstration takes about two minutes with the drawing."""


def train(options: argparse.Namespace) -> None:
    synthetic = options.data == "synthetic"
    if options.resume and options.out is None:
        raise BadInput("--resume needs --out, the folder of the run to continue")
    name = "synthetic" if synthetic else Path(options.data).resolve().name
    out = options.out or _unused(Path("runs") / f"{name}-{options.model}")
    existing = out / "checkpoint.pt"
    if existing.exists() and not (options.resume or options.overwrite):
        raise BadInput(f"{existing}: exists already, continue it with --resume or replace it with --overwrite")
    if options.resume and options.overwrite:
        raise BadInput("--resume and --overwrite exclude each other")
    saved = checkpoint.load(existing) if options.resume else None
    check_writable(out)
    size = saved.size if saved else options.size or DEFAULT_SIZE[synthetic]
    train_faces, held_out = training.training_sets(open_faces(options, size), size, options.data)
    landmarks = held_out.batch([0])[1].shape[1]
    if saved and saved.landmarks != landmarks:
        raise BadInput(f"{options.data}: has {landmarks} points, but {existing} was trained with {saved.landmarks}")
    config = _train_config(options, saved, synthetic)
    torch.manual_seed(config.seed)
    if saved:
        model: Any = saved.build(existing)
    else:
        shape = training.mean_shape(train_faces)
        model = build_model(options.model, {"landmarks": landmarks, "mean_shape": shape.tolist(), "image_size": size})
    model.to(device(options.device))
    limits = [
        f"{config.rounds} rounds" if config.rounds else "",
        f"{config.minutes:g} minutes" if config.minutes else "",
    ]
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{model.name}: {weights:,} weights, {len(train_faces)} faces of {size} x {size} pixels, "
        f"{len(held_out)} held out, at most {' or '.join(filter(None, limits))}",
        flush=True,
    )
    if options.overwrite:
        _clear(out)
    history = training.fit(
        model,
        train_faces,
        held_out,
        config,
        out,
        resume=options.resume,
        on_round=lambda r: print(report.round_line(r), flush=True),
    )
    pred, truth = training.predict(model, held_out)
    normalizer = config.normalizer or training.default_normalizer(landmarks)
    print(metrics.evaluate(pred, truth, normalizer, config.threshold))
    print(f"checkpoint {history.checkpoint}\npicture    {history.picture}")


def _train_config(
    options: argparse.Namespace, saved: checkpoint.Checkpoint | None, synthetic: bool
) -> training.TrainConfig:
    """From the options; of a resumed run everything but the limits is the checkpoint's."""
    limits = {"rounds": options.rounds, "minutes": options.minutes}
    if not any(limits.values()):
        limits["minutes"] = DEFAULT_MINUTES[synthetic]
    if saved:
        given = limits if options.rounds or options.minutes else {}
        return replace(training.TrainConfig.from_dict(saved.train), **given)
    names = ("steps", "batch", "rate", "ema", "seed", "steepness", "amp")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "steepness" in chosen:
        chosen["steepness"] = tuple(chosen["steepness"])
    return training.TrainConfig(**limits, **chosen)


def _clear(out: Path) -> None:
    """Removes the files of an earlier run, and nothing else."""
    for path in (out / "checkpoint.pt", out / "metrics.jsonl", *(out / "rounds").glob("round_*.png")):
        path.unlink(missing_ok=True)


def _unused(folder: Path) -> Path:
    """folder, or folder-2, folder-3, ...: the first that holds no checkpoint."""
    names = (folder if i == 1 else folder.with_name(f"{folder.name}-{i}") for i in range(1, 10_000))
    return next(path for path in names if not (path / "checkpoint.pt").exists())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the run (default: a new one, runs/DATA-MODEL)")
    add("--model", choices=("forest", "dense"), default="forest", help="(default: forest)")
    add("--minutes", type=real(0), help="when to stop (default: 1.5 for synthetic, else 20)")
    add("--rounds", type=whole(1), help="when to stop; repeats bit for bit, as minutes cannot")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings and a later end")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--size", type=whole(16), help="side of the model's images, pixels (default: 64 for synthetic, else 96)")
    add("--steps", type=whole(1), help="network steps a round (default: one pass, at least 40)")
    add("--batch", type=whole(2), help="faces a step")
    add("--rate", type=real(0), help="learning rate")
    add("--steepness", type=real(0), nargs=2, metavar=("START", "END"), help="anneal the split nodes' steepness")
    add("--ema", type=real(0, 1), help="decay of the weights' average, e.g. 0.999")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--seed", type=whole(0), default=0, help="of weights, order and augmentation (default: 0)")
    add_machine(parser)
    parser.set_defaults(run=train)
