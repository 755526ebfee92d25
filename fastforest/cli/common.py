"""What the commands and the recipes share: complaints in one line, numbers in range, the data and the device asked for."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import data, models, training

__all__ = [
    "BadInput",
    "Parser",
    "add_data",
    "add_machine",
    "build_model",
    "check_writable",
    "device",
    "guarded",
    "real",
    "whole",
]


GROUPED_FACES = 2048


class BadInput(ValueError):
    """One sentence for the user."""


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


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


def _complain(sentence: str) -> int:
    print(f"fastforest: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def build_model(name: str, config: dict[str, Any], faces: Any) -> Any:
    """A number of groups becomes groups of landmarks by the first faces of the training set."""
    groups, points = config.get("groups"), None
    if isinstance(groups, int) and groups > 1:
        points = faces.batch(range(min(GROUPED_FACES, len(faces))))[1]
    try:
        return models.build(name, config, points)
    except ValueError as error:
        raise BadInput(f"model '{name}': {error}") from None


def device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch finds no CUDA device")
    return torch.device(name)


def check_writable(folder: Path) -> None:
    """Without making anything: the nearest folder that exists must let us write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise BadInput(f"{folder}: cannot be made, {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"{folder}: cannot be written, no permission for {existing}")


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


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="synthetic|PATH", help="drawn faces, or a set as `data.open_dataset` takes it"
    )
    parser.add_argument("--subset", help="of 300-W, COFW or WFLW, e.g. train, full, test (default: train)")
    parser.add_argument("--faces", type=whole(10), default=1000, help="synthetic: how many (default: 1000)")
    parser.add_argument("--face-seed", type=whole(0), default=0, help="synthetic: which series (default: 0)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=whole(1), help="of the processor (default: PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
