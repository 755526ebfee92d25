"""Checkpoints and the one way files are written here: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .older import from_version_1

__all__ = ["Checkpoint", "CheckpointError", "load", "save", "write_atomically", "write_text"]

FORMAT = "fastforest checkpoint"
VERSION = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one sentence that names the file and the reason."""


@dataclass
class Checkpoint:
    """Everything that a run needs to go on, and that a user needs to predict. Tensors and plain values only.

    model: name for `models.build`. config: its `model.config()`. weights, ema: state dicts (`ema` only parameters, or
    None). steepness: of the split nodes, or None. landmarks: P. size: side of the model's images, pixels. mean_shape:
    float32 [P, 2], pixels of such an image. optimizer, scaler: their state dicts. step, round, seconds: position of the
    run. batch: faces a step, fewer than configured once memory ran out. rng: torch generator states by name. train: the
    TrainConfig as a dict. settings: the resolved configuration of the command line, sections of plain values, or {}.
    faces: size of the training set. history: one dict a round.
    """

    model: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    steepness: float | None
    landmarks: int
    size: int
    mean_shape: Tensor
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: int
    round: int
    seconds: float
    batch: int
    rng: dict[str, Tensor]
    train: dict[str, Any]
    settings: dict[str, Any]
    faces: int
    history: list[dict[str, Any]]

    @property
    def padding(self) -> float:
        """Of the crops that the model was trained on, as `data.RecordFaces` takes it."""
        return float(self.settings.get("data", {}).get("padding", 0.25))

    @property
    def crop(self) -> str:
        """What they were around, as `data.RecordFaces` takes it."""
        return str(self.settings.get("data", {}).get("crop", "landmarks"))

    def best_weights(self) -> dict[str, Tensor]:
        """The weights to predict with: the averaged ones where there are any."""
        return self.weights | (self.ema or {})

    def build(self, path: Path) -> torch.nn.Module:
        """The model with the weights to predict with, in evaluation mode. `path` is for the error's sentence.

        Raises:
            CheckpointError: unknown model, or weights that do not fit its configuration.
        """
        from .. import models

        try:
            model = models.build(self.model, self.config)
            restore_weights(model, self.best_weights(), self.steepness)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit the model '{self.model}': {_brief(error)}") from error
        return model.eval()


def restore_weights(model: Any, weights: dict[str, Tensor], steepness: float | None) -> None:
    model.load_state_dict(weights)
    if steepness is not None:
        model.steepness = steepness


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint atomically; `torch.load(path, weights_only=True)` reads it.

    Raises:
        OSError: the folder cannot be written.
    """
    content = {"format": FORMAT, "version": VERSION}
    content |= {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}

    def write(temporary: Path) -> None:
        # torch.save to a path turns some failures into RuntimeError; a file object keeps OSError.
        with open(temporary, "wb") as file:
            torch.save(content, file)

    write_atomically(path, write)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: file missing, truncated, not a checkpoint of this library, or of a later version.
    """
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a checkpoint") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: not a checkpoint of fastforest (holds more than tensors and numbers)") from None
    except Exception:
        # torch.load raises RuntimeError, EOFError, KeyError, ... on files that are cut or were never its own
        raise CheckpointError(f"{path}: {_unreadable(Path(path))}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of fastforest")
    if content.get("version") == 1:
        content = from_version_1(content)
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {content.get('version')}, this library reads 1 and {VERSION}"
        )
    missing = [field.name for field in fields(Checkpoint) if field.name not in content]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint lacks '{missing[0]}'")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` beside `path`, synchronised to the disk, then renamed: readers see the old file or the new.

    The temporary keeps the suffix, from which image writers take the format. It is removed when anything fails.

    Raises:
        OSError: the folder cannot be written; whatever `write` raises.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a text file, UTF-8."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last; systems that cannot open a folder do without."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unreadable(path: Path) -> str:
    """A checkpoint is a zip file: its first bytes tell a cut one from a stranger."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "empty file, not a checkpoint"
    return "truncated or damaged checkpoint" if start == b"PK\x03\x04" else "not a checkpoint of fastforest"


def _brief(error: BaseException) -> str:
    """The first complaint of a long one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaint = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else (lines or [""])[0]
    return (complaint or type(error).__name__).rstrip(".")
