"""The command line: python -m fastforest train | evaluate | predict | info."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import data, draw, metrics, models, training
from .training import checkpoint, report
from .training.photos import Prediction, locate

DEFAULT_MINUTES = {True: 1.5, False: 20.0}
DEFAULT_SIZE = {True: 64, False: 96}
"""By whether the faces are drawn: the demonstration takes about two minutes with the drawing."""


class BadInput(ValueError):
    """One sentence for the user."""


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 after bad input (one line on standard error), 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: options.run(options), options)


def guarded(run: Callable[[], None], options: argparse.Namespace) -> int:
    """Runs it on `options.threads` threads and turns what a user can mend into a line and an exit code, as `main`."""
    try:
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        run()
    except (BadInput, data.DataError, training.CheckpointError, training.TrainingError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename or getattr(options, 'out', None)}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("fastforest: interrupted", file=sys.stderr)
        return 130
    return 0


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
    model.to(_device(options.device))
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


def evaluate(options: argparse.Namespace) -> None:
    saved = checkpoint.load(options.checkpoint)
    model = saved.build(options.checkpoint).to(_device(options.device))
    dataset = open_faces(options, saved.size)
    if not options.all and len(dataset) < 10:
        raise BadInput(f"{options.data}: has only {len(dataset)} faces, of which none is held out: add --all")
    faces = training.read(data.Cached(dataset if options.all else data.split(dataset)[1], saved.size), options.data)
    landmarks = faces.batch([0])[1].shape[1]
    if landmarks != saved.landmarks:
        raise BadInput(f"{options.data}: has {landmarks} points, but {options.checkpoint} predicts {saved.landmarks}")
    pred, truth = training.predict(model, faces)
    normalizer = options.normalizer or training.default_normalizer(landmarks)
    try:
        print(metrics.evaluate(pred, truth, normalizer, options.threshold))
    except ValueError as error:
        raise BadInput(f"{options.data}: {error}") from None


def predict(options: argparse.Namespace) -> None:
    """All predictions first, then all files: bad input leaves nothing behind."""
    saved = checkpoint.load(options.checkpoint)
    model = saved.build(options.checkpoint).to(_device(options.device))
    check_writable(options.out)
    _check_stems(options.image)
    found = [_located(model, saved.size, path, options.box) for path in options.image]
    options.out.mkdir(parents=True, exist_ok=True)
    for path, prediction in zip(options.image, found, strict=True):
        covariance = prediction.covariance if options.ellipses else None
        picture = draw.annotate(data.read_image(path), prediction.points, covariance=covariance)
        target = options.out / f"{path.stem}_landmarks.png"
        report.save_png(target, picture)
        _write_pts(target.with_suffix(".pts"), prediction)
        print(f"{path}: {target}")


def info(options: argparse.Namespace) -> None:
    build = importlib.import_module("fastforest._C").build_info()
    print(f"fastforest {build['version']}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(f"built by   {build['compiler']}")
    print(
        f"processor  kernels for {', '.join(build['isas'])}; chosen: {build['isa']}; {torch.get_num_threads()} threads"
    )
    if build["cuda"]:
        print(f"CUDA       kernels built with {build['cuda']} for {', '.join(build['cuda_architectures'])}")
    else:
        print("CUDA       no kernels: nvcc was not found when this was built")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices    cpu{''.join(f', cuda:{i} {name}' for i, name in enumerate(devices))}")


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


def open_faces(options: argparse.Namespace, size: int) -> Any:
    return data.open_dataset(options.data, size=max(16, size), count=options.faces, seed=options.face_seed)


def _located(model: Any, size: int, path: Path, box: Sequence[float] | None) -> Prediction:
    image = data.read_image(path)
    try:
        prediction = locate(model, size, image, None if box is None else (box[0], box[1], box[2], box[3]))
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if prediction is None:
        raise BadInput(f"{path}: no face found, give its place with --box X Y W H")
    return prediction


def _write_pts(path: Path, prediction: Prediction) -> None:
    checkpoint.write_atomically(path, lambda temporary: data.write_pts(temporary, prediction.points))


def build_model(name: str, config: dict[str, Any]) -> Any:
    try:
        return models.build(name, config)
    except ValueError as error:
        raise BadInput(f"model '{name}': {error}") from None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch finds no CUDA device")
    return torch.device(name)


def _check_stems(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise BadInput(f"{path}: would write the same files as {seen[path.stem]}, predict them one by one")
        seen[path.stem] = path


def check_writable(folder: Path) -> None:
    """Without making anything: the nearest folder that exists must let us write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise BadInput(f"{folder}: cannot be made, {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"{folder}: cannot be written, no permission for {existing}")


def _clear(out: Path) -> None:
    """Removes the files of an earlier run, and nothing else."""
    for path in (out / "checkpoint.pt", out / "metrics.jsonl", *(out / "rounds").glob("round_*.png")):
        path.unlink(missing_ok=True)


def _unused(folder: Path) -> Path:
    """folder, or folder-2, folder-3, ...: the first that holds no checkpoint."""
    names = (folder if i == 1 else folder.with_name(f"{folder.name}-{i}") for i in range(1, 10_000))
    return next(path for path in names if not (path / "checkpoint.pt").exists())


def _complain(sentence: str) -> int:
    print(f"fastforest: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return parse


def real(low: float, high: float = math.inf) -> Callable[[str], float]:
    """A number strictly between low and high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            bounds = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"must be a finite number {bounds}, got {text!r}")
        return value

    return parse


def _parser() -> Parser:
    parser = Parser(prog="fastforest", description="Landmarks of faces by differentiable regression forests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate|predict|info")
    _add_train(commands.add_parser("train", help="train a model, a checkpoint and a picture every round"))
    _add_evaluate(commands.add_parser("evaluate", help="NME, failure rate and AUC of a checkpoint on a set"))
    _add_predict(commands.add_parser("predict", help="find a face, write its landmarks and a picture of them"))
    shown = commands.add_parser("info", help="versions, instruction sets, devices")
    shown.set_defaults(run=info)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
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
    _add_machine(parser)
    parser.set_defaults(run=train)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True)
    add("--all", action="store_true", help="all faces, not only every tenth, which training holds out")
    add("--normalizer", choices=metrics.KINDS, help="(default: inter_ocular where the landmarks have it, else box)")
    add("--threshold", type=real(0), default=0.08, help="of failure rate and AUC, a fraction (default: 0.08)")
    _add_machine(parser)
    parser.set_defaults(run=evaluate)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, nargs="+", metavar="IMAGE")
    add("--checkpoint", type=Path, required=True)
    box = "around the landmarks, brows to chin, pixels (default: the largest face found)"
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help=box)
    add("--out", type=Path, default=Path("."), help="folder for STEM_landmarks.png and .pts (default: here)")
    add("--ellipses", action="store_true", help="draw two standard deviations of each landmark, if the model has them")
    _add_machine(parser)
    parser.set_defaults(run=predict)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="synthetic|DIR", help="drawn faces, a crop package or .pts files"
    )
    parser.add_argument("--faces", type=whole(10), default=1000, help="synthetic: how many (default: 1000)")
    parser.add_argument("--face-seed", type=whole(0), default=0, help="synthetic: which series (default: 0)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


if __name__ == "__main__":
    sys.exit(main())
