"""fastforest train: a model, its checkpoint and pictures a round. On many ranks under torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import config, data, metrics, models, training
from ..training import checkpoint, ranks, report
from ..training.settings import FREE
from .common import BadInput, add_machine, build_model, check_writable, device, real, whole
from .sets import open_sets

__all__ = ["add_arguments", "train"]

FLAGS = {
    "data": "data.path",
    "faces": "data.faces",
    "face_seed": "data.face_seed",
    "size": "data.size",
    "subset": "data.subset",
    "model": "model.name",
    "steps": "train.steps",
    "batch": "train.batch",
    "rate": "train.rate",
    "steepness": "train.steepness",
    "ema": "train.ema",
    "amp": "train.amp",
    "seed": "train.seed",
}
"""Options that stand for keys of the configuration. `--rounds` and `--minutes` do too, each instead of the other."""

ANY_DATA = ("path", "faces", "face_seed", "subset")
"""Keys that a resumed run may have otherwise: folders move, and `fit` sees how many faces there are."""


def train(options: argparse.Namespace) -> None:
    if options.resume and options.out is None:
        raise BadInput("--resume needs --out, the folder of the run to continue")
    if options.resume and options.overwrite:
        raise BadInput("--resume and --overwrite exclude each other")
    saved = checkpoint.load(options.out / "checkpoint.pt") if options.resume else None
    try:
        chosen = _chosen(options, saved)
    except config.ConfigError as error:
        raise BadInput(str(error)) from None
    if options.print_config:
        print(chosen.toml(), end="")
        return
    with ranks.joined(device(options.device)) as here:
        _train(options, chosen, saved, here)


def _train(
    options: argparse.Namespace, chosen: config.Config, saved: checkpoint.Checkpoint | None, here: torch.device
) -> None:
    path, size = chosen.data.path, chosen.data.size
    assert size is not None  # of a resolved configuration
    name = "synthetic" if path == "synthetic" else Path(path).resolve().name
    out = options.out or _unused(Path("runs") / f"{name}-{chosen.model.name}")
    existing = out / "checkpoint.pt"
    if existing.exists() and not (options.resume or options.overwrite):
        raise BadInput(f"{existing}: exists already, continue it with --resume or replace it with --overwrite")
    check_writable(out)
    train_faces, held_out = open_sets(chosen)
    landmarks = held_out.batch([0])[1].shape[1]
    if saved and saved.landmarks != landmarks:
        raise BadInput(f"{path}: has {landmarks} points, but {existing} was trained with {saved.landmarks}")
    torch.manual_seed(chosen.train.seed)
    if saved:
        model: Any = saved.build(existing)
    else:
        shape = training.mean_shape(train_faces)
        given = {"landmarks": landmarks, "mean_shape": shape.tolist(), "image_size": size}
        model = build_model(chosen.model.name, chosen.model.options | given, train_faces)
    model.to(here)
    speaks = ranks.rank() == 0
    if speaks:
        print(_opening(model, chosen, len(train_faces), len(held_out)), flush=True)
    if options.overwrite and speaks:
        _clear(out)
    layout = data.layout_of(landmarks)
    history = training.fit(
        model,
        train_faces,
        held_out,
        chosen.train,
        out,
        resume=options.resume,
        augment=data.Augment(size, flip=layout.flip if layout else None, **chosen.augment),
        on_round=lambda r: print(report.round_line(r), flush=True),
        settings=chosen.as_dict(),
    )
    if speaks:
        pred, truth = training.predict(model, held_out)
        normalizer = chosen.train.normalizer or training.default_normalizer(landmarks)
        print(metrics.evaluate(pred, truth, normalizer, chosen.train.threshold))
        print(f"checkpoint {history.checkpoint}\npicture    {history.picture}")


def _chosen(options: argparse.Namespace, saved: checkpoint.Checkpoint | None) -> config.Config:
    """From the checkpoint of a resumed run, the file, the words and the options, in this order."""
    layers = [] if options.config is None else [config.read_toml(options.config)]
    layers += [config.parse_set(text) for text in options.set]
    for flag, key in FLAGS.items():
        value = getattr(options, flag)
        if value is not None:
            section, _, name = key.partition(".")
            layers.append({section: {name: value}})
    if options.rounds or options.minutes:
        layers.append({"train": {"rounds": options.rounds, "minutes": options.minutes}})
    settings = {} if saved is None else _settings(saved)
    if not options.print_config and "path" not in config.merged(settings, *layers).get("data", {}):
        raise BadInput("--data is needed: synthetic, or a folder (or data.path in --config)")
    if saved is None:
        return config.resolve(*layers)
    before = config.resolve(settings)
    now = config.resolve(before.as_dict(), *layers)
    _check_unchanged(options.out / "checkpoint.pt", before, now)
    return now


def _settings(saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """What the checkpoint was made with; of a run that no command line configured, what can be told of it."""
    if saved.settings:
        return saved.settings
    options = {key: value for key, value in saved.config.items() if key not in config.GIVEN_BY_DATA}
    known = training.TrainConfig.from_dict(saved.train)
    return {
        "data": {"size": saved.size},
        "model": {"name": saved.model} | options,
        "train": {key: getattr(known, key) for key in saved.train if hasattr(known, key)},
    }


def _check_unchanged(path: Path, before: config.Config, now: config.Config) -> None:
    then, given = before.as_dict(), now.as_dict()
    for section, keys in given.items():
        for key in keys:
            was, got = then[section].get(key), given[section][key]
            if was != got and key not in (*FREE, *ANY_DATA):
                raise BadInput(f"{path}: was written with {section}.{key} = {was!r}, got {got!r}")


def _opening(model: Any, chosen: config.Config, faces: int, held_out: int) -> str:
    limits = [
        f"{chosen.train.rounds} rounds" if chosen.train.rounds else "",
        f"{chosen.train.minutes:g} minutes" if chosen.train.minutes else "",
    ]
    weights = sum(parameter.numel() for parameter in model.parameters())
    size, together = chosen.data.size, f", {ranks.count()} ranks" if ranks.count() > 1 else ""
    return (
        f"{model.name}: {weights:,} weights, {faces} faces of {size} x {size} pixels, "
        f"{held_out} held out, at most {' or '.join(filter(None, limits))}{together}"
    )


def _clear(out: Path) -> None:
    """Removes the files of an earlier run, and nothing else."""
    names = ("checkpoint.pt", "best.pt", "metrics.jsonl", "steps.jsonl")
    pictures = (path for kind in ("round", "inside") for path in (out / "rounds").glob(f"{kind}_*.png"))
    events = (out / "tensorboard").glob("events.out.tfevents.*")
    for path in (*(out / name for name in names), *pictures, *events):
        path.unlink(missing_ok=True)


def _unused(folder: Path) -> Path:
    """folder, or folder-2, folder-3, ...: the first that holds no checkpoint."""
    names = (folder if i == 1 else folder.with_name(f"{folder.name}-{i}") for i in range(1, 10_000))
    return next(path for path in names if not (path / "checkpoint.pt").exists())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML with sections data, model, augment, train; or the name of one that comes along: stacked",
    )
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one key over the file's; repeatable")
    add("--print-config", action="store_true", help="print the resolved configuration as TOML, and train nothing")
    add("--data", metavar="synthetic|PATH", help="drawn faces, or a set as `data.open_dataset` takes it")
    add("--faces", type=whole(10), help="synthetic: how many (default: 1000)")
    add("--face-seed", type=whole(0), help="synthetic: which series (default: 0)")
    add("--subset", help="of 300-W, COFW or WFLW, e.g. train, full, test (default: train)")
    add("--out", type=Path, help="folder of the run (default: a new one, runs/DATA-MODEL)")
    add("--model", choices=tuple(models.MODELS), help="(default: forest)")
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
    add("--amp", action="store_const", const="bf16", help="bfloat16 autocast")
    add("--seed", type=whole(0), help="of weights, order and augmentation (default: 0)")
    add_machine(parser)
    parser.set_defaults(run=train)
